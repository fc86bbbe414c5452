"""The context benchmark measures what it says, in processes of their own, and loses nothing."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megalodon_enwik8 import benchmark_context
from megalodon_enwik8.benchmark_context import add_parser, draw, make_tables, run
from megalodon_enwik8.command_line import Parser
from megalodon_enwik8.context_probe import Task, measure
from megalodon_enwik8.errors import UserError


def parse(*arguments: object) -> Any:
    parser = Parser(prog="benchmark")
    add_parser(parser.add_subparsers(dest="command"))
    return parser.parse_args(["context", *map(str, arguments)])


SMALL = {
    "context": 64,
    "layers": 1,
    "chunk_size": 32,
    "tokens": 128,
    "repetitions": 1,
    "seconds": 60,
    "new_tokens": 3,
    "use_autocast": False,
    "compile": False,
    "gradient_checkpointing": False,
}


@pytest.mark.parametrize("model", ["megalodon", "llama"])
@pytest.mark.parametrize("kind", ["train", "decode"])
def test_each_kind_of_figure_is_taken_of_each_model(kind: str, model: str) -> None:
    figures = measure(Task(kind=kind, model=model, **SMALL))
    assert (figures["kind"], figures["model"], figures["context"]) == (kind, model, 64)
    assert figures["peak_memory_bytes"] > 1e6
    if kind == "train":
        assert (figures["rows"], figures["steps"]) == (2, 2)
        assert figures["tokens_per_second"] == 128 / figures["step_seconds"]
    else:
        assert figures["prefill_tokens_per_second"] == 64 / figures["prefill_seconds"]
        assert figures["decode_tokens_per_second"] == 1 / figures["decode_seconds"]
        # Keys and values of 67 bytes, six heads of 64; or the state, whatever the length.
        state = {"llama": 67 * 2 * 384 * 4, "megalodon": None}[model]
        assert state is None or figures["state_bytes"] == state


def test_the_state_of_a_megalodon_is_as_large_at_any_context() -> None:
    sizes = {
        measure(Task(kind="decode", model="megalodon", **{**SMALL, "context": n}))["state_bytes"]
        for n in (1, 64, 100)
    }
    assert len(sizes) == 1


PARTS = ["forward", "forward_with_state", "matrix_products"]
PARTS += ["cema", "cema_bfloat16", "cema_reference"]


def test_the_parts_of_a_forward_pass_are_timed() -> None:
    figures = measure(Task(kind="parts", model="megalodon", **SMALL))
    assert all(figures[f"{name}_seconds"] > 0 for name in PARTS)


def fake(task: dict[str, Any], limit: float) -> dict[str, Any]:
    if task["model"] == "llama" and task["context"] == 128:
        return {**task, "failed": f"took more than {limit} s"}
    figures = {"tokens_per_second": 1000.0, "peak_memory_bytes": 2e6, "state_bytes": 3000}
    figures |= {"prefill_tokens_per_second": 4000.0, "decode_tokens_per_second": 50.0}
    for name in PARTS:
        figures[f"{name}_seconds"] = 1.5
    return {**task, **figures, "device": "cpu", "torch": torch.__version__}


def test_tables_figures_and_picture_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark_context, "_ask", fake)
    options = parse("--contexts", 128, 64, "--positions", 1000, "--out", tmp_path / "a" / "b")
    assert run(options) == 0
    folder = tmp_path / "a" / "b"
    rows = json.loads((folder / "context.json").read_text())["rows"]
    assert [(row["kind"], row["model"], row["context"]) for row in rows] == [
        ("train", "megalodon", 64),
        ("train", "llama", 64),
        ("train", "megalodon", 128),
        ("train", "llama", 128),
        ("decode", "megalodon", 64),
        ("decode", "llama", 64),
        ("decode", "megalodon", 128),
        ("decode", "llama", 128),
        ("decode", "megalodon", 1000),
        ("parts", "megalodon", 8192),
    ]
    tables = (folder / "context.md").read_text()
    assert tables in capsys.readouterr().out
    assert "| 64 | 1,000 | 1,000 | 2 | 2 |" in tables
    assert "| 128 | 1,000 | – | 2 | – |" in tables
    assert "| 1,000 | 4,000 | – | 50.0 | – | 3,000 | – |" in tables
    assert "- llama, train at 128: took more than 900 s" in tables
    assert make_tables(rows) == tables
    assert (folder / "context.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_measured_so_far_survives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(task: dict[str, Any], limit: float) -> dict[str, Any]:
        if task["kind"] == "decode":
            raise KeyboardInterrupt
        return fake(task, limit)

    monkeypatch.setattr(benchmark_context, "_ask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(parse("--contexts", 64, "--out", tmp_path))
    assert len(json.loads((tmp_path / "context.json").read_text())["rows"]) == 2


def test_a_measurement_that_fails_or_takes_too_long_is_told() -> None:
    task = {"kind": "train", "model": "megalodon", **SMALL}
    assert benchmark_context._ask(task, 0.01)["failed"] == "took more than 0.01 s"  # torch loads
    failed = benchmark_context._ask({**task, "layers": 0}, 60)["failed"]
    assert failed == "error: the benchmark: num_layers=0: must be >= 1"


def test_nothing_to_draw_draws_nothing(tmp_path: Path) -> None:
    assert not draw([{"kind": "parts"}], tmp_path / "x.png")
    assert make_tables([]) == "\n"


def test_what_cannot_be_done_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--out .*file: cannot be made: File exists"):
        run(parse("--out", tmp_path / "file"))
    with pytest.raises(UserError, match="argument --contexts: '0' is not a whole number >= 1"):
        parse("--contexts", 0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs matplotlib: pip install .*, or add --no-picture"):
        run(parse("--out", tmp_path))
