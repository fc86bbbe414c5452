"""What cannot be compared is refused, in one line that names it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megalodon_enwik8.report import BEGIN, END

from .run_folders import (
    BEST,
    line,
    make_pair,
    make_run,
    make_tuned,
    refused,
    write_evaluation,
)


def change_config(run: Path, **changes: Any) -> None:
    path = run / "config.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))


def change_facts(run: Path, **changes: Any) -> None:
    path = run / "environment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_end(run: Path, **changes: Any) -> None:
    path = run / "metrics.jsonl"
    *lines, last = path.read_text().splitlines()
    path.write_text("\n".join([*lines, json.dumps({**json.loads(last), **changes}), ""]))


def append(run: Path, text: str) -> None:
    with open(run / "metrics.jsonl", "a") as file:
        file.write(text)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "llama-8: no such run folder"),
    "no config": (lambda run: (run / "config.yaml").unlink(), "llama-8: has no config.yaml"),
    "no environment": (
        lambda run: (run / "environment.json").unlink(),
        "llama-8: has no environment.json",
    ),
    "no metrics": (lambda run: (run / "metrics.jsonl").unlink(), "llama-8: has no metrics.jsonl"),
    "empty metrics": (
        lambda run: (run / "metrics.jsonl").write_text(""),
        "metrics.jsonl: is empty: the run has made no step yet",
    ),
    "bad line": (lambda run: append(run, "{'step': 1\n"), "metrics.jsonl: line 26 is damaged"),
    "bad number": (
        lambda run: append(run, '{"step": 1201, "seconds": "long"}\n'),
        r"metrics.jsonl: line 26: seconds: Input should be a valid number",
    ),
    "not later": (
        lambda run: change_end(run, seconds=2000.0),
        "line 25: is not later than the validation before it",
    ),
    "no final loss": (
        lambda run: change_end(run, val_loss=None),
        "the last line, of the end of the run, has no val_loss",
    ),
    "yaml": (lambda run: (run / "config.yaml").write_text("a: ["), "config.yaml: not valid YAML"),
    "list": (lambda run: (run / "config.yaml").write_text("- a"), "must hold `key: value` lines"),
    "seed": (lambda run: change_config(run, seed="x"), "config.yaml: seed: Input should be"),
    "json": (
        lambda run: (run / "environment.json").write_text("{"),
        "environment.json: not valid JSON",
    ),
    "facts": (lambda run: change_facts(run, sessions=[]), "environment.json: sessions: "),
    "key": (
        lambda run: change_config(run, weight_decay=0.1, dim=512),
        "llama-8: belongs in no table: differs from the protocol in dim=512, weight_decay=0.1;",
    ),
    "unknown key": (
        lambda run: change_config(run, wight=1),
        "differs from the protocol in wight=1",
    ),
    "other model's key": (
        lambda run: change_config(run, cema_ndim=16),
        "llama-8: belongs in no table: differs from the protocol in cema_ndim=16",
    ),
    "parameters": (
        lambda run: change_facts(run, parameters=5),
        "llama-7 and .*llama-8 cannot stand in one table: parameters: 12489600 in the first, 5 in",
    ),
    "windows": (
        lambda run: change_config(run, val_batches=10),
        "megalodon-7 and .*llama-8 cannot stand in one table: windows to validate on: 100 in the "
        "first, 10 in the second",
    ),
    "twice": (
        lambda run: change_config(run, seed=7),
        "llama-7 and .*llama-8 are of the same settings and seed 7: leave one out",
    ),
    "stream of another text": (
        lambda run: write_evaluation(run, "stream.json", {"streams": 1}, 1.0, corpus_sha256="f"),
        r"llama-8.stream.json: model is megalodon, but llama of the run",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_that_is_not_whole_or_fits_nowhere_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], damage: str
) -> None:
    runs = make_pair(tmp_path / "runs", (7, 8))
    spoil, message = DAMAGES[damage]
    spoil(runs[-1])
    assert re.search(message, refused(capfd, *runs, "--out", tmp_path / "RESULTS.md"))
    assert not (tmp_path / "RESULTS.md").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corpus": "other"}, r"text: sample \(34c1c63050c8...\) in the first, other \(otherother"),
        ({"corpus": "enwik8", "num_batches": 600}, "text: sample .* in the first, enwik8"),
        ({"num_batches": 600}, "steps: 1200 in the first, 600 in the second"),
        ({"seq_len": 256}, "bytes in a sequence: 512 in the first, 256 in the second"),
        ({"batch_size": 2}, "bytes in a step: 8192 in the first, 4096 in the second"),
        ({"num_batches": 250, "cut_at": 150}, "still going or cut off, after 101 of 250 steps"),
    ],
)
def test_mixed_and_unfinished_runs_are_refused_by_name(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], options: dict[str, Any], message: str
) -> None:
    runs = make_pair(tmp_path / "runs", (7,))
    odd = make_run(tmp_path / "odd", "llama", 8, **options)
    line = refused(capfd, *runs, odd, "--out", tmp_path / "RESULTS.md")
    assert re.search(message, line)
    assert str(odd) in line


def test_a_seed_that_one_model_lacks_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runs = make_pair(tmp_path / "runs")
    said = refused(capfd, *runs[:-1], "--out", tmp_path / "R.md")
    assert "llama has no run with seed 9, which megalodon has" in said
    said = refused(capfd, *runs[3:], "--out", tmp_path / "R.md")
    assert "megalodon has no run with seed 7, which llama has" in said


def test_the_tuned_table_refuses_an_unfair_fight(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_pair(tmp_path / "runs", (7, 8), loss=line(3, 1.5))
    make_tuned(tmp_path / "runs")

    def said_without(*names: str) -> str:
        kept = [run for run in sorted((tmp_path / "runs").iterdir()) if run.name not in names]
        return refused(capfd, *kept, "--out", tmp_path / "R.md")

    said = said_without("grid-llama-a")
    assert "the grid has 3 settings of megalodon and 2 of llama" in said
    assert "add llama at learning rate 0.002, constant" in said
    other = make_run(tmp_path / "runs" / "another", "llama", 7, num_batches=400, learning_rate=1e-4)
    said = said_without("grid-llama-a", "grid-llama-b")  # what the shorter side has is not named
    assert "add llama at learning rate 0.001, cosine, warm-up of 50 steps" in said
    shutil.rmtree(other)
    said = said_without("best-llama-7", "best-llama-8")
    assert "Llama has no run of 1200 steps at learning rate 0.001, cosine, warm-up of 50" in said
    assert "Llama has no run with seed 8" in said_without("best-llama-8")
    write_evaluation(tmp_path / "runs" / "best-megalodon-7", "stream.json", {"streams": 64}, 1.1)
    assert "stream.json is of 64 streams in the first, of 1 in the second" in said_without()
    (tmp_path / "runs" / "best-megalodon-7" / "stream.json").unlink()
    said = said_without("grid-llama-b", "grid-megalodon-b")
    assert "Megalodon has no run of 1200 steps at learning rate 0.002, constant, the best" in said
    odd = make_run(tmp_path / "runs" / "odd", "llama", 9, learning_rate=3e-3)
    assert "settings of Llama that were run to the end have no seed in common" in said_without()
    shutil.rmtree(odd)
    make_run(odd, "llama", 7, learning_rate=3e-3, loss=line(3, 1))  # the best at the end
    assert "Llama has no run with seed 8" in said_without()
    shutil.rmtree(odd)
    make_run(odd, "megalodon", 9, carry_state=True, carry_steps=2, **BEST)
    assert "settings of Megalodon with carried state that were run to the end" in said_without()
    grid = [f"grid-{model}-{name}" for model in ("megalodon", "llama") for name in "ab"]
    said = said_without(*grid)
    assert "are Megalodon with carried state with different settings, and there is no grid" in said
    shutil.rmtree(odd)
    make_run(odd, "llama", 9, learning_rate=3e-3, num_batches=1500)
    assert "steps: 1200 in the first, 1500 in the second" in said_without()
    shutil.rmtree(odd)
    make_run(odd, "llama", 9, learning_rate=3e-3, num_batches=300)
    assert re.search("steps: [34]00 in the first, [34]00 in the second", said_without())


def test_an_ablation_without_its_counterpart_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runs = make_pair(tmp_path / "runs", (7,))
    out = ("--out", tmp_path / "R.md")
    change: dict[str, Any] = {"ablation": "no_cema"}
    seed = make_run(tmp_path / "seed", "megalodon", 8, num_batches=400, **change)
    assert "megalodon has no run with seed 8 to compare" in refused(capfd, *runs, seed, *out)
    step = make_run(tmp_path / "step", "megalodon", 7, num_batches=450, **change)
    assert "has no validation after 450 steps" in refused(capfd, *runs, step, *out)
    both = make_run(tmp_path / "both", "megalodon", 7, learning_rate=1e-3, **change)
    assert "in ablation=no_cema, learning_rate=0.001" in refused(capfd, *runs, both, *out)
    assert "no run has the settings of the protocol" in refused(capfd, step, *out)


@pytest.mark.parametrize(
    ("name", "reading", "other", "message"),
    [
        ("stream.json", {"context": 512, "stride": 512}, {}, "is not of a stream"),
        ("windows.json", {"context": 512, "stride": 64}, {}, "is not of windows of 512 side by"),
        ("windows.json", {"streams": 1}, {"step": 600}, "step is 600, but 1200 of the run"),
        ("stream.json", {"streams": 1}, {"split": "train"}, "split is train, but val of the run"),
        ("stream.json", {"streams": 1}, {"seed": 8}, "seed is 8, but 7 of the run"),
        ("stream.json", {"streams": 1}, {"carry_state": True}, "carry_state is True, but False"),
    ],
)
def test_an_evaluation_of_something_else_is_refused(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    name: str,
    reading: dict[str, int],
    other: dict[str, Any],
    message: str,
) -> None:
    runs = make_pair(tmp_path / "runs", (7,), end={"full_val_loss": None})
    write_evaluation(runs[0], name, reading, 1.0, **other)
    said = refused(capfd, *runs, "--out", tmp_path / "R.md")
    assert f"megalodon-7{os.sep}{name}: {message}" in said


def test_files_that_are_not_what_they_should_be_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runs = make_pair(tmp_path / "runs", (7,))
    odd = tmp_path / "odd"
    assert f"{odd}: cannot be read: No such file" in refused(capfd, *runs, "--readme", odd)
    for text in ("no markers", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}{BEGIN}{END}"):
        odd.write_text(text)
        assert f"{odd}: needs one line {BEGIN}" in refused(capfd, *runs, "--readme", odd)
    for text in ("{", "[]", "{}", '{"rows": [1]}', '{"rows": []}', '{"rows": [{"kind": "train"}]}'):
        odd.write_text(text)
        assert "is no context.json" in refused(capfd, *runs, "--context", odd)
        if text != '{"rows": []}':
            assert "is no train.json" in refused(capfd, *runs, "--speed", odd)


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = refused(capfd, tmp_path, "--out", tmp_path / "R.md")
    assert 'comparison.svg: drawing needs matplotlib: pip install -e ".[report]"' in said
