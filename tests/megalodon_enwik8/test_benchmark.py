"""The benchmark measures what it says, each task in a process of its own, and loses nothing."""

import contextlib
import json
import re
import sys
from dataclasses import replace

import pytest
import torch

from megalodon_enwik8.benchmark import __main__ as benchmark
from megalodon_enwik8.benchmark import task as measuring
from megalodon_enwik8.benchmark.task import BOTH, RATIO, Task
from megalodon_enwik8.config import MODELS
from megalodon_enwik8.distributed import World
from megalodon_enwik8.safety import UserError

SETTINGS = {
    "step_bytes": 128, "seq_len": 64, "batch_size": 2, "chunk_size": 32, "compile": False,
    "use_autocast": True, "num_layers": 1, "depth": 1,
}  # fmt: skip
TINY = Task("train", "megalodon", SETTINGS)


def tiny(kind, model="megalodon", **settings):
    return replace(TINY, kind=kind, model=model, settings=SETTINGS | settings)


def fake(task, limit, cache):
    """What a fresh process would answer; a Llama's memory never suffices."""
    if task.model == "llama":
        return {"failed": "out of memory"}
    if task.model == BOTH:
        return {name: {"step, s": 2.0} for name in MODELS} | {RATIO: {"step, s": 0.5}}
    return {task.model: {f"{task.kind}, s": 3}}


@pytest.fixture
def run_faked(monkeypatch, tmp_path):
    """run_faked(command, *settings, answer=fake): the JSON that it leaves; measuring is faked."""

    def run(command, *settings, answer=fake):
        monkeypatch.setattr(benchmark, "measure_apart", answer)
        out = tmp_path / "new" / "out.json"
        with contextlib.suppress(KeyboardInterrupt):
            benchmark.main([command, *settings, "--out", str(out)])
            return json.loads(out.read_text())
        return json.loads(out.with_suffix(".part.json").read_text())

    return run


def test_a_task_is_measured_in_a_fresh_process(tmp_path):
    ballast = torch.ones(1_500_000_000, dtype=torch.uint8)
    figures = measuring.measure_apart(TINY, 300, str(tmp_path))
    assert list(figures) == ["megalodon"]
    assert figures["megalodon"]["bytes/s"] > 0
    assert 10 < figures["megalodon"]["peak memory, MB"] < ballast.nbytes / 1e6


def test_the_first_step_is_measured_twice_over():
    assert list(measuring.measure(tiny("first"))["megalodon"]) == [
        "first step, s",
        "peak memory, MB",
    ]
    assert list(measuring.measure(tiny("second"))["megalodon"]) == ["the second time, s"]


@pytest.mark.parametrize("model", MODELS)
def test_reading_and_writing_are_measured(model, monkeypatch):
    monkeypatch.setattr(measuring, "NEW_BYTES", 3)
    state = measuring.measure(tiny("decode", model))[model]["state, MB"]
    if model == "llama":  # keys and values of 67 bytes, six heads of 64
        assert state == 67 * 2 * 384 * 4 / 1e6
    else:
        longer = measuring.measure(tiny("decode", model, seq_len=100))
        assert longer[model]["state, MB"] == state


def test_steps_of_both_models_are_measured_with_their_products():
    figures = measuring.measure(tiny("steps", BOTH, batch_size=1))
    # One round: the ratio is that of its two times.
    ours, theirs = (figures[name]["step, s"] for name in MODELS)
    assert figures[RATIO] == {"step, s": ours / theirs}
    assert figures["llama"]["bytes/s"] == 128 / theirs
    assert figures["llama"]["step / its matrix products"] > 0


def test_several_processes_are_measured_beside_one(tmp_path):
    task = tiny("scale", use_autocast=False, chunk_parallel=2)
    figures = measuring.measure_apart(task, 300, str(tmp_path))
    assert list(figures) == list(measuring.WAYS)
    alone = figures["one process"]
    assert alone["efficiency"] == 1
    for way in measuring.WAYS[1:]:  # one round: the ratio is that of its two times
        assert figures[way]["efficiency"] == alone["step, s"] / figures[way]["step, s"] / 2


@pytest.mark.parametrize(
    ("along_data", "along_time", "shape"), [((1, 2), (0, 1), (1, 65)), ((0, 1), (1, 2), (2, 33))]
)
def test_a_process_trains_on_its_share_of_a_step(along_data, along_time, shape, monkeypatch):
    config = TINY.config("megalodon")
    world = World(torch.device("cpu"))
    world.along_data, world.along_time = along_data, along_time
    batches = []
    monkeypatch.setattr(measuring, "train_step", lambda *given: batches.append(given[2]))
    measuring._stepper(measuring.build_model(config), config, world)()
    assert batches[0].shape == shape


def test_functions_take_turns_and_ratios_are_of_neighbours():
    calls = []
    functions = [lambda name=name: calls.append(name) for name in "ab"]
    times = measuring.by_turns(functions, 3, torch.device("cpu"))
    assert calls == ["a", "b"] * 4
    assert [len(seconds) for seconds in times] == [3, 3]  # the first round is not counted
    assert measuring.ratio([1, 20, 3], [2, 10, 6]) == 0.5  # not 24 / 18


@pytest.mark.parametrize("use_autocast", [True, False])
def test_bound_is_three_times_the_forward_products(use_autocast, monkeypatch):
    """Counted in multiplications: 3 x sequences x length x weights."""
    counted = []

    def linear(x, weight):
        assert x.dtype == weight.dtype == (torch.bfloat16 if use_autocast else torch.float32)
        counted.append(x.shape[0] * weight.numel())

    given = {"depth": 6, "use_autocast": use_autocast}
    config = tiny("steps", seq_len=8, batch_size=4, **given).config("llama")
    products = measuring._matrix_products(measuring.build_model(config), config)
    monkeypatch.setattr(measuring.F, "linear", linear)
    products()
    # 12,489,600 parameters but the 13 norms; the tied embedding is the output matrix.
    assert sum(counted) == 3 * 16 * 8 * (12_489_600 - 13 * 384)


@pytest.mark.parametrize(
    ("program", "limit", "reason"),
    [
        ("exec sleep 60", 0.5, "took more than 0.5 s"),
        ("echo error: num_layers=0 >&2; echo torchrun says more >&2; exit 1", 60, "num_layers=0"),
        ("kill -9 $$", 60, "killed by signal 9, as the system does when memory runs out"),
        ("exit 3", 60, "exit code 3"),
    ],
)
def test_a_task_that_fails_says_why(program, limit, reason, tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\n{program}\n")
    script.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(script))
    assert measuring.measure_apart(TINY, limit, str(tmp_path)) == {"failed": reason}


def test_memory_that_runs_out_is_said():
    with pytest.raises(UserError, match=r"^out of memory$"):
        measuring.measure(tiny("train", seq_len=10**6, step_bytes=10**15, batch_size=10**9))


def test_a_row_holds_what_both_models_have_and_their_ratio(run_faked):
    (row,) = run_faked("train", "batch_size=16", "compile=true")["rows"]
    assert (row["kind"], row["batch_size"], row["compile"]) == ("steps", 16, True)
    # By turns where it was so measured.
    assert row["megalodon"] == {"step, s": 2.0, "first, s": 3, "second, s": 3}
    assert row["megalodon / llama"] == {"step, s": 0.5}
    failed = ["first, llama", "second, llama"]
    assert row["failed"] == dict.fromkeys(failed, "out of memory")


def test_ratios_are_of_all_that_both_have(run_faked):
    times = {"megalodon": 2, "llama": 4}

    def answer(task, *_):
        return {task.model: {"a": times[task.model], "by_name": {}}}

    (row,) = run_faked("count", answer=answer)["rows"]
    assert row["megalodon / llama"] == {"a": 0.5}


def test_a_second_start_has_the_folder_of_the_first_and_no_other(run_faked):
    folders = {}

    def answer(task, limit, cache):
        folders.setdefault(cache, []).append(task.kind)
        return fake(task, limit, cache)

    run_faked("train", "batch_size=[4,16]", "compile=true", answer=answer)
    assert sorted(folders.values()) == [["first", "second"]] * 4 + [["steps"]] * 2


def test_settings_are_tried_in_turn_and_reach_the_models_that_have_them(run_faked):
    tasks = []

    def answer(task, *more):
        return [tasks.append(task), fake(task, *more)][1]

    given = ["seq_len=[64,2048]", "chunk_size=1024", "compile=false", "use_autocast=false"]
    rows = run_faked("train", *given, answer=answer)["rows"]
    assert [(row["seq_len"], row["batch_size"]) for row in rows] == [
        (length, size) for length in (64, 2048) for size in (1, 4, 16)
    ]
    for config in (task.config("megalodon") for task in tasks):
        assert (config.tokens_per_step, config.chunk_size) == (8192, 1024)
        assert not config.use_autocast


def test_processes_share_the_step_of_the_protocol_or_one_sequence():
    tasks = [task for _, found in benchmark.plan("scale", {}, 1) for task in found]
    configs = [task.config("megalodon") for task in tasks]
    assert [config.sequences_per_step for config in configs] == [16, 1]
    assert {config.chunk_parallel for config in configs} == {2}


def test_beyond_the_longest_context_a_megalodon_writes_alone(run_faked):
    measured = run_faked("context", "seq_len=[64,200000]")
    assert [
        (row["kind"], row["seq_len"], len(row.get("failed", {}))) for row in measured["rows"]
    ] == [
        (kind, length, failed)
        for kind in ("train", "decode")
        for length, failed in ((64, 1), (200_000, 0))
    ]


@pytest.mark.parametrize(
    ("command", "kept"), [("train", ["step, s", "first, s"]), ("context", ["train, s"])]
)
def test_what_is_measured_survives_an_interruption(command, kept, run_faked, tmp_path):
    before, asked = run_faked(command), []
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.json"]

    def interrupted(task, limit, cache):
        asked.append(task)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return fake(task, limit, cache)

    (row, *_) = run_faked(command, answer=interrupted)["rows"]
    assert list(row["megalodon"]) == kept
    assert json.loads((tmp_path / "new" / "out.json").read_text()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train batch_size=3", "batch_size=3: does not divide 16 sequences a step"),
        ("train seq_len=0", "command line: seq_len=0"),
        ("train seq_len=[]", "command line: seq_len=[]: "),
        ("train use_autocast=auto", "command line: use_autocast=auto: say true or false"),
        ("train chunk_sise=1", "command line: chunk_sise: unknown key; did you mean chunk_size"),
        ("train model=llama", "command line: model: the benchmark sets it or does without; leave"),
        ("train --rounds 3 shard=true", "command line: shard: the benchmark sets it or does with"),
        ("train batch_size", "command line: 'batch_size': expected key=value"),
        ("train step_bytes=x", "command line: step_bytes=x: "),
        ("train step_bytes=true", "command line: step_bytes=True: must be a whole number >= 1"),
        ("train step_bytes=0", "command line: step_bytes=0: must be a whole number >= 1"),
        ("task", "task: is what a benchmark asks of its own processes"),
        ("scale seq_len=[512,800]", "chunk_parallel=2: seq_len=800 must be that many parts of wh"),
        ("speed", "invalid choice: 'speed'"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_measured(arguments, message, run_faked):
    with pytest.raises(UserError, match=re.escape(message)):
        run_faked(*arguments.split(), answer=lambda *_: pytest.fail("measured"))


def test_what_is_no_file_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "measure_apart", lambda *_: pytest.fail("measured"))
    with pytest.raises(UserError, match="is no regular file: name another"):
        benchmark.main(["count", "--out", str(tmp_path)])


@pytest.mark.slow
def test_the_second_start_finds_what_the_first_compiled(run_faked):
    """Of the Llama, whose layers the compiler's cache keeps whole."""
    given = ["compile=true", "batch_size=16", "seq_len=16", "step_bytes=256"]
    (row,) = run_faked("train", *given, "--rounds", "1", answer=measuring.measure_apart)["rows"]
    assert row["llama"]["the second time, s"] < row["llama"]["first step, s"]
    assert row["megalodon / llama"]["peak memory, MB"] > 0
