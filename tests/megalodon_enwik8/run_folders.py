"""Run folders as training writes them, for the report, and ways to read what it says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megalodon_enwik8.config import ExperimentConfig
from megalodon_enwik8.data import ENWIK8_DATA_BYTES, SAMPLE_SHA256, SAMPLE_SIZE, split_point
from megalodon_enwik8.errors import run_main
from megalodon_enwik8.report import main

CORPORA = {"sample": (SAMPLE_SIZE, SAMPLE_SHA256), "enwik8": (ENWIK8_DATA_BYTES, "e" * 64)}
PARAMETERS = {"megalodon": 11_277_696, "llama": 12_489_600}
LOSS = {"megalodon": 1.40, "llama": 1.45}  # at the end, of seed 8
BYTES = 16 * 512  # in a step


def falling(end: float, steps: int) -> Callable[[int], float]:
    """A loss that falls from 5.6 to `end` along a curve."""
    return lambda step: end + (5.6 - end) * (1 - step / steps) ** 8


def make_run(
    folder: Path,
    model: str,
    seed: int,
    *,
    loss: Callable[[int], float] | None = None,
    step_seconds: float = 2.0,
    corpus: str = "sample",
    cut_at: int | None = None,
    environment: dict[str, Any] | None = None,
    end: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """A run folder as training writes it, but for the steps that tell the report nothing."""
    values = {"val_batches": 100, "batch_size": 4, "grad_accum_every": 4, "weight_decay": 2e-4}
    if model == "llama":
        values["ffn_dim_multiplier"] = 2.67
    values |= config
    used = ExperimentConfig(
        model=model, seed=seed, run_dir=str(folder), data_path="sample", **values
    )
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(used.to_yaml())
    size, sha256 = CORPORA.get(corpus, (1000, corpus * 8))
    sizes = {"train_bytes": split_point(size), "val_bytes": size - split_point(size)}
    session = {"device": "cpu (2 of 2 cores)", "threads": 2, "torch": "2.13.0", "commit": "c" * 40}
    facts = {
        "corpus": {"name": corpus, "sha256": sha256, **sizes},
        "parameters": PARAMETERS[model],
        "sessions": [{**session, **(environment or {})}],
    }
    (folder / "environment.json").write_text(json.dumps(facts))
    steps, per_step = used.num_batches, used.tokens_per_step
    loss = loss or falling(LOSS[model] + (seed - 8) * 0.01, steps)
    rows = []
    for step in range(0, steps if cut_at is None else cut_at, 50):
        row: dict[str, Any] = {"step": step, "train_loss": loss(step), "skipped_steps": 0}
        if step % 100 == 0:
            row["val_loss"] = loss(step)
        row["seconds"] = (step + 1) * step_seconds
        row["tokens_per_second"] = per_step / step_seconds
        row["peak_memory_bytes"] = (step + 1) * 2**20
        rows.append(row)
    if cut_at is None:
        whole = {
            "full_val_loss": loss(steps) + 0.1,
            "sample": f"A prompt, and {model}:\n~~~~ \x1b[2J",
        }
        last = {"step": steps, "val_loss": loss(steps), **whole, "seconds": steps * step_seconds}
        rows.append({**last, "peak_memory_bytes": 1200 * 2**20, **(end or {})})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make_pair(folder: Path, seeds: tuple[int, ...] = (7, 8, 9), **options: Any) -> list[Path]:
    """Runs of both models with the settings of the protocol."""
    return [
        make_run(folder / f"{model}-{seed}", model, seed, **options)
        for model in ("megalodon", "llama")
        for seed in seeds
    ]


def line(start: float, end: float, steps: int = 1200) -> Callable[[int], float]:
    """A loss that falls in a straight line, on which interpolation is exact."""
    return lambda step: start + (end - start) * step / steps


def report(folder: Path, *arguments: object) -> str:
    """RESULTS.md of what lies in a folder."""
    out = folder / "RESULTS.md"
    assert main([*map(str, arguments or [folder / "runs"]), "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


def refused(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that the program says on its way out with code 2."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        run_main(lambda: main([str(argument) for argument in arguments]))
    assert caught.value.code == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def section(text: str, title: str) -> str:
    """What stands below a title, up to the next of its rank."""
    return re.split(r"\n## ", text.split(f"\n## {title}\n")[1])[0]


def row(text: str, *start: str) -> list[str]:
    """The cells after the first ones of a table's only row that begins with `start`."""
    opening = f"| {' | '.join(start)} | "
    found = [each for each in text.splitlines() if each.startswith(opening)]
    assert len(found) == 1, (opening, found)
    return found[0].removeprefix(opening).removesuffix(" |").split(" | ")


def write_evaluation(
    run: Path, name: str, reading: dict[str, int], loss: float, **other: Any
) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    trained_at = {"carry_state": False} | {
        key: config[key] for key in ("seed", "seq_len", "carry_state") if key in config
    }
    trained_at |= {key: other.pop(key) for key in list(other) if key in trained_at}
    facts = {"step": 1200, "model": "megalodon", "corpus_sha256": SAMPLE_SHA256, "split": "val"}
    facts |= {"trained_at": trained_at, "reading": reading, "loss": loss}
    (run / name).write_text(json.dumps({**facts, **other}))


BEST = {"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 50}


def make_tuned(folder: Path, seeds: tuple[int, ...] = (7, 8)) -> None:
    """A grid of three settings, the protocol's among them, and the best ones at full length."""
    for model in ("megalodon", "llama"):
        worse = {"megalodon": 0.3, "llama": 0.2}[model]
        for name, config, end in (("a", {"learning_rate": 2e-3}, 1.6), ("b", BEST, 1.5)):
            run = folder / f"grid-{model}-{name}"
            make_run(run, model, 7, num_batches=400, loss=line(3, end + worse, 400), **config)
        for seed in seeds:
            make_run(
                folder / f"best-{model}-{seed}", model, seed, loss=line(3, 1.0 + worse), **BEST
            )
    for seed in seeds:
        run = folder / f"carried-{seed}"
        carried = {"carry_state": True, "carry_steps": 8, **BEST}
        make_run(run, "megalodon", seed, loss=line(3, 1.25), end={"full_val_loss": None}, **carried)
        write_evaluation(run, "stream.json", {"streams": 1, "segment": 8192}, 1.1)
        write_evaluation(run, "windows.json", {"context": 512, "stride": 512}, 1.2)
