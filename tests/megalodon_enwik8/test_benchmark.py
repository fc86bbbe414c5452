"""The benchmark measures what it says, each task in a process of its own, and loses nothing."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megalodon_enwik8.benchmark import __main__ as benchmark
from megalodon_enwik8.benchmark import task as measuring
from megalodon_enwik8.benchmark.task import Task
from megalodon_enwik8.config import MODELS, precision_name
from megalodon_enwik8.distributed import World
from megalodon_enwik8.safety import UserError

TINY = Task("train", "megalodon", 64, 128, 1, layers=1, chunk_size=32, new_tokens=3)
RESULTS = Path(__file__).parents[2] / "results" / "benchmarks"


def fake(task: Task, limit: float, cache: str) -> dict[str, Any]:
    """What a fresh process would answer; a Llama's memory never suffices."""
    if task.model == "llama":
        return {"failed": "out of memory"}
    if task.kind == "turns":
        steps = {"step_seconds": 2.0, "step_seconds_least": 1.0, "tokens_per_second": 9.0}
        steps |= {"matrix_products_seconds": 1.0, "step_over_matrix_products": 2.0}
        return {"time": 0.5, "megalodon": steps, "llama": steps}
    if task.kind == "count":
        return {"forward": {"aten.mm.default": 2}, "peak_memory_bytes": 100, "torch": "2"}
    second = Path(cache).exists()
    Path(cache).mkdir(exist_ok=True)
    memory = {"peak_memory_bytes": 100, "device": "cpu", "torch": "2"}
    return {"first_step_seconds": 5 - second, "compile_seconds": None, **memory}


@pytest.fixture
def run_faked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """run_faked(*arguments, answer=fake): the JSON that a command leaves, in tmp_path; measuring,
    tables and pictures are faked."""
    report = "megalodon_enwik8.report"
    tables = SimpleNamespace(
        steps_table=str, context_table=str, parallel_table=str, count_table=str
    )
    pictures = SimpleNamespace(
        check_can_draw=lambda path: None,
        draw_contexts=lambda measured: "picture",
        save_picture=lambda figure, path: path.write_text(figure),
    )
    monkeypatch.setitem(sys.modules, f"{report}.tables", tables)
    monkeypatch.setitem(sys.modules, f"{report}.pictures", pictures)

    def run(command: str, *arguments: object, answer: Any = fake) -> Any:
        monkeypatch.setattr(benchmark, "measure_apart", answer)
        with contextlib.suppress(KeyboardInterrupt):
            benchmark.main([command, *map(str, arguments), "--out", str(tmp_path)])
        return json.loads((tmp_path / f"{command}.json").read_text())

    return run


def test_a_task_is_measured_in_a_fresh_process(tmp_path: Path) -> None:
    ballast = torch.ones(1_500_000_000, dtype=torch.uint8)
    figures = measuring.measure_apart(TINY, 300, str(tmp_path))
    assert "failed" not in figures
    assert (figures["rows"], figures["steps"]) == (2, 2)
    assert figures["tokens_per_second"] == 128 / figures["step_seconds"]
    assert 1e7 < figures["peak_memory_bytes"] < ballast.nbytes


@pytest.mark.parametrize("model", ["megalodon", "llama"])
def test_reading_and_writing_are_measured(model: str) -> None:
    figures = measuring.measure(replace(TINY, kind="decode", model=model))
    assert figures["prefill_tokens_per_second"] == 64 / figures["prefill_seconds"]
    assert figures["decode_tokens_per_second"] == 1 / figures["decode_seconds"]
    if model == "llama":  # keys and values of 67 bytes, six heads of 64
        assert figures["state_bytes"] == 67 * 2 * 384 * 4
    else:
        longer = measuring.measure(replace(TINY, kind="decode", context=100))
        assert longer["state_bytes"] == figures["state_bytes"]


def test_steps_of_both_models_are_measured_with_their_products() -> None:
    figures = measuring.measure(replace(TINY, kind="turns", model="both", micro_batch=1))
    for name in MODELS:  # one repetition: the ratio is that of its two times
        over = figures[name]["step_seconds"] / figures[name]["matrix_products_seconds"]
        assert figures[name]["step_over_matrix_products"] == over


def test_several_processes_are_measured_beside_one(tmp_path: Path) -> None:
    task = replace(TINY, kind="scale", use_autocast=False, chunk_parallel=2)
    figures = measuring.measure_apart(task, 300, str(tmp_path))
    assert figures["processes"] == 2
    assert figures["alone"]["efficiency"] == 1
    for way in ("data", "time"):  # one repetition: the ratio is that of its two times
        times = [figures[name]["step_seconds"] for name in ("alone", way)]
        assert figures[way]["efficiency"] == times[0] / times[1] / 2


@pytest.mark.parametrize(
    ("along_data", "along_time", "shape"), [((1, 2), (0, 1), (1, 65)), ((0, 1), (1, 2), (2, 33))]
)
def test_a_process_trains_on_its_share_of_a_step(
    along_data: tuple[int, int],
    along_time: tuple[int, int],
    shape: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = replace(TINY, micro_batch=2).config("megalodon")
    world = World(torch.device("cpu"))
    world.along_data, world.along_time = along_data, along_time
    batches: list[torch.Tensor] = []
    monkeypatch.setattr(measuring, "train_step", lambda *given: batches.append(given[2]))
    measuring._stepper(measuring.build_model(config), config, world)()
    assert batches[0].shape == shape


def test_functions_take_turns_and_ratios_are_of_neighbours() -> None:
    calls: list[str] = []
    functions = [lambda name=name: calls.append(name) for name in "ab"]
    times = measuring.by_turns(functions, 3, torch.device("cpu"))
    assert calls == ["a", "b"] * 4
    assert [len(seconds) for seconds in times] == [3, 3]  # the first round is not counted
    assert measuring.ratio([1, 20, 3], [2, 10, 6]) == 0.5  # not 24 / 18


@pytest.mark.parametrize("use_autocast", [True, False])
def test_bound_is_three_times_the_forward_products(
    use_autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in multiplications: 3 x sequences x length x weights."""
    counted = []

    def linear(x: torch.Tensor, weight: torch.Tensor) -> None:
        assert x.dtype == weight.dtype == (torch.bfloat16 if use_autocast else torch.float32)
        counted.append(x.shape[0] * weight.numel())

    task = Task("turns", "both", 8, 16 * 8, 1, micro_batch=4, use_autocast=use_autocast)
    config = task.config("llama")
    products = measuring._matrix_products(measuring.build_model(config), config)
    monkeypatch.setattr(measuring.F, "linear", linear)
    products()
    # 12,489,600 parameters but the 13 norms; the tied embedding is the output matrix.
    assert sum(counted) == 3 * 16 * 8 * (12_489_600 - 13 * 384)


@pytest.mark.parametrize(
    ("task", "limit", "reason"),
    [
        (TINY, 0.01, "took more than 0.01 s"),  # torch alone takes longer to load
        (replace(TINY, layers=0), 300, "num_layers"),
        (replace(TINY, kind="scale", chunk_parallel=3), 300, "chunk_parallel=3: seq_len=64"),
        (replace(TINY, context=10**6, tokens=10**15), 300, "out of memory"),
    ],
)
def test_a_task_that_fails_says_why(task: Task, limit: float, reason: str, tmp_path: Path) -> None:
    figures = measuring.measure_apart(task, limit, str(tmp_path))
    assert list(figures) == ["failed"]
    assert reason in figures["failed"]


def test_training_steps_have_the_keys_of_the_committed_results(run_faked: Any) -> None:
    measured = run_faked("train", "--micro-batches", 16)
    committed = json.loads((RESULTS / "train.json").read_text())
    assert [key for key in measured if key != "processor"] == list(committed)
    assert list(measured["ratios"][0]) == list(committed["ratios"][0])
    eager, failed, compiled, _ = measured["rows"]
    assert set(eager) == set(committed["rows"][0])
    assert set(compiled) == {*eager, "second_start_seconds"}
    assert (compiled["first_step_seconds"], compiled["second_start_seconds"]) == (5, 4)
    assert (failed["model"], failed["failed"]) == ("llama", "out of memory")
    assert measured["ratios"][0]["memory"] is None


def test_a_step_has_the_same_bytes_at_every_length(run_faked: Any) -> None:
    tasks: list[Task] = []
    answer = lambda task, *more: [tasks.append(task), fake(task, *more)][1]  # noqa: E731
    measured = run_faked("train", "--seq-len", 2048, "--chunk-size", 1024, answer=answer)
    assert [row["micro_batch"] for row in measured["rows"]] == [1, 1, 1, 1, 4, 4, 4, 4]
    assert (measured["sequences"], measured["seq_len"], measured["chunk_size"]) == (4, 2048, 1024)
    for config in (task.config("megalodon") for task in tasks):
        assert (config.tokens_per_step, config.seq_len, config.chunk_size) == (8192, 2048, 1024)


def test_processes_share_the_step_of_the_protocol_or_one_sequence(run_faked: Any) -> None:
    rows = run_faked("scale", "--micro-batch", 8)["rows"]
    assert [(row["context"], row["micro_batch"]) for row in rows] == [(512, 8), (16_384, 1)]
    configs = [
        Task(**{name: row[name] for name in asdict(TINY)}).config("megalodon") for row in rows
    ]
    assert [config.sequences_per_step for config in configs] == [16, 1]


def test_operations_are_counted_of_one_sequence_without_what_differs_each_time(
    run_faked: Any,
) -> None:
    measured = run_faked("count", "--seq-len", 64, "--float32")
    assert (measured["seq_len"], measured["dtype"]) == (64, "float32")
    counted, failed = measured["rows"]
    assert counted == {"model": "megalodon", "forward": {"aten.mm.default": 2}, "torch": "2"}
    assert failed == {"model": "llama", "failed": "out of memory"}


def test_each_context_is_a_row_a_failed_one_too(run_faked: Any, tmp_path: Path) -> None:
    measured = run_faked("context", "--contexts", 128, 64, "--positions", 1000)
    assert [(row["kind"], row["model"], row["context"]) for row in measured["rows"]] == [
        (kind, model, context)
        for kind in ("train", "decode")
        for context in (64, 128)
        for model in ("megalodon", "llama")
    ] + [("decode", "megalodon", 1000)]
    for row in measured["rows"]:
        assert ("failed" in row) == (row["model"] == "llama")
    committed = json.loads((RESULTS / "context.json").read_text())["rows"]
    assert set(committed[7]) <= set(measured["rows"][1])  # both failed
    assert (tmp_path / "context.md").read_text() == str(measured)
    assert (tmp_path / "context.png").read_text() == "picture"


@pytest.mark.parametrize("command", ["train", "context", "scale", "count"])
@pytest.mark.parametrize(
    ("arguments", "dtype"), [([], "bfloat16 autocast"), (["--float32"], "float32")]
)
def test_the_switch_sets_and_names_the_precision(
    command: str, arguments: list[str], dtype: str, run_faked: Any
) -> None:
    tasks: list[Task] = []
    answer = lambda task, *more: [tasks.append(task), fake(task, *more)][1]  # noqa: E731
    measured = run_faked(command, *arguments, answer=answer)
    assert {precision_name(task.use_autocast) for task in tasks} == {dtype}
    assert measured.get("dtype", dtype) == dtype


@pytest.mark.parametrize("command", ["train", "context"])
def test_what_is_measured_survives_an_interruption(command: str, run_faked: Any) -> None:
    asked = []

    def interrupted(task: Task, limit: float, cache: str) -> dict[str, Any]:
        asked.append(task)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return fake(task, limit, cache)

    rows = run_faked(command, answer=interrupted)["rows"]
    assert [row["model"] for row in rows] == ["megalodon", "llama"]
    assert rows[0]["peak_memory_bytes"] == 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --micro-batches 3", "--micro-batches 3: does not divide 16 sequences a step"),
        ("train --micro-batches 4 --seq-len 8192", "--micro-batches 4: does not divide 1 sequence"),
        ("train --seq-len 1000", "--seq-len 1000: does not divide 8,192 bytes a step"),
        ("context --contexts 0", "argument --contexts: '0' is not a whole number >= 1"),
        ("scale --contexts 512 800", "chunk_parallel=2: seq_len=800 must be that many parts of wh"),
        ("scale --micro-batch 3", "--micro-batch 3: does not divide 16 sequences a step"),
        ("count --seq-len 0", "argument --seq-len: '0' is not a whole number >= 1"),
        ("context --measure speed", "invalid choice: 'speed'"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_measured(
    arguments: str, message: str, run_faked: Any
) -> None:
    with pytest.raises(UserError, match=message):
        run_faked(*arguments.split(), answer=lambda *_: pytest.fail("measured"))


@pytest.mark.slow
def test_the_second_start_finds_what_the_first_compiled(run_faked: Any) -> None:
    """Of the Llama, whose layers the compiler's cache keeps whole."""
    arguments = ["--steps", 1, "--modes", "compiled", "--micro-batches", 16, "--seq-len", 16]
    measured = run_faked("train", *arguments, answer=benchmark.measure_apart)
    llama = measured["rows"][1]
    assert llama["second_start_seconds"] < llama["first_step_seconds"]
    assert measured["ratios"][0]["memory"] > 0
