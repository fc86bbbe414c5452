"""Speed, memory and operations of both models, side by side, and several processes beside one:
python -m megalodon_enwik8.benchmark train|context|scale|count

Machines are noisy, and what a process did before stays in its memory: every task is measured in a
fresh process, the models take turns, and what counts are ratios of what ran next to each other.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from megalodon_enwik8 import device as machine
from megalodon_enwik8.benchmark.task import (
    PROCESSES,
    Figures,
    Task,
    measure,
    measure_apart,
)
from megalodon_enwik8.config import MODELS, precision_name
from megalodon_enwik8.distributed import join
from megalodon_enwik8.safety import Parser, UserError, atomic_write, run_main, whole_number

STEP_BYTES = 16 * 512  # in a step of `train`, as the protocol has it
CONTEXTS = [512 * 2**i for i in range(9)]  # 512 ... 131,072
COMPILE: dict[str, bool | Literal["graphs"]] = {
    "eager": False,
    "compiled": True,
    "graphs": "graphs",
}

Record = Callable[[Figures, Task, Figures], None]


def run(
    options: argparse.Namespace, tasks: Sequence[Task], measured: Figures, record: Record
) -> None:
    """Measure task after task, and bring the file up to date each time, so that none is lost.

    A task that comes a second time finds the compiled code of its first; else there is none.
    """
    path = Path(options.out) / f"{options.command}.json"
    with tempfile.TemporaryDirectory() as caches, tqdm(tasks, disable=None) as bar:
        for task in bar:
            bar.set_postfix_str(f"{task.model}, {task.kind}, {task.context:,} bytes")
            record(measured, task, measure_apart(task, options.limit, f"{caches}/{hash(task)}"))
            with atomic_write(path) as file:
                file.write((json.dumps(measured, indent=2) + "\n").encode())


def run_train(options: argparse.Namespace) -> str:
    """Training steps, into train.json; returns its tables."""
    from megalodon_enwik8.report.tables import steps_table

    sequences = STEP_BYTES // options.seq_len
    if STEP_BYTES % options.seq_len:
        raise UserError(f"--seq-len {options.seq_len}: does not divide {STEP_BYTES:,} bytes a step")
    sizes = [size for size in options.micro_batches if size <= sequences]
    for size in sizes or options.micro_batches:
        check_divides("--micro-batches", size, sequences)
    measured: Figures = {
        "device": machine.device_name(machine.choose_device()),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "processor": machine.processor_name(),
        "sequences": sequences,
        "seq_len": options.seq_len,
        "chunk_size": options.chunk_size,
        "dtype": precision_name(options.use_autocast),
        "timed_steps": options.steps,
        "rows": [],
        "ratios": [],
    }
    tasks = []
    for size in sizes:
        for mode in options.modes:
            turns = Task(
                kind="turns",
                model="both",
                context=options.seq_len,
                micro_batch=size,
                chunk_size=options.chunk_size,
                tokens=STEP_BYTES,
                repetitions=options.steps,
                use_autocast=options.use_autocast,
                compile=COMPILE[mode],
            )
            turns.config("megalodon")  # its error now
            starts = [replace(turns, kind="train", model=name, repetitions=1) for name in MODELS]
            tasks += [turns, *starts, *(starts if turns.compile else [])]
    run(options, tasks, measured, record_step)
    return steps_table(measured)


def check_divides(option: str, size: int, sequences: int) -> None:
    if sequences % size:
        raise UserError(f"{option} {size}: does not divide {sequences} sequences a step")


def record_step(measured: Figures, task: Task, figures: Figures) -> None:
    """Two rows and a ratio for steps by turns, to which each model's own starts are added."""
    mode = next(mode for mode, how in COMPILE.items() if how == task.compile)
    key = {"mode": mode, "micro_batch": task.micro_batch}
    if task.kind == "turns":
        for name in MODELS:
            measured["rows"].append({"model": name, **key, **figures.get(name, figures)})
        measured["ratios"].append({**key, "time": figures.get("time"), "memory": None})
        return
    rows = {row["model"]: row for row in measured["rows"][-len(MODELS) :]}
    row = rows[task.model]
    if "failed" in figures:
        row["failed"] = figures["failed"]
    elif "first_step_seconds" in row:
        row["second_start_seconds"] = figures["first_step_seconds"]
    else:
        names = ("first_step_seconds", "compile_seconds", "peak_memory_bytes")
        row |= {name: figures[name] for name in names}
    ours, theirs = (rows[name].get("peak_memory_bytes") for name in MODELS)
    measured["ratios"][-1]["memory"] = ours / theirs if ours and theirs else None


def run_context(options: argparse.Namespace) -> str:
    """Training, reading and writing at each context, into context.json; returns its tables."""
    from megalodon_enwik8.report.tables import context_table

    picture = Path(options.out) / "context.png"
    if options.picture:
        from megalodon_enwik8.report.pictures import check_can_draw, draw_contexts, save_picture

        check_can_draw(picture)
    measured: Figures = {"rows": []}
    run(options, context_tasks(options), measured, record_row)
    if options.picture:
        save_picture(draw_contexts(measured), picture)
    return context_table(measured)


def record_row(measured: Figures, task: Task, figures: Figures) -> None:
    measured["rows"].append({**asdict(task), **figures})


def run_scale(options: argparse.Namespace) -> str:
    """A step of one process and of several, at each context, into scale.json; returns its table."""
    from megalodon_enwik8.report.tables import parallel_table

    tasks = []
    for context in sorted(set(options.contexts)):
        sequences = max(1, STEP_BYTES // context)
        micro_batch = min(options.micro_batch, sequences)
        check_divides("--micro-batch", micro_batch, sequences)
        task = Task(
            kind="scale",
            model="megalodon",
            context=context,
            tokens=STEP_BYTES,
            repetitions=options.rounds,
            micro_batch=micro_batch,
            layers=options.layers,
            chunk_size=options.chunk_size,
            use_autocast=options.use_autocast,
            compile=options.compile,
            chunk_parallel=PROCESSES,
        )
        task.config("megalodon")  # its error now
        tasks.append(task)
    measured: Figures = {"processor": machine.processor_name(), "rows": []}
    run(options, tasks, measured, record_row)
    return parallel_table(measured)


def run_count(options: argparse.Namespace) -> str:
    """Operations of a block and of a step of one sequence, into count.json; returns the table."""
    from megalodon_enwik8.report.tables import count_table

    tasks = [
        Task(
            kind="count",
            model=name,
            context=options.seq_len,
            tokens=options.seq_len,
            repetitions=1,
            chunk_size=options.chunk_size,
            use_autocast=options.use_autocast,
        )
        for name in MODELS
    ]

    def record(measured: Figures, task: Task, figures: Figures) -> None:
        idle = ("peak_memory_bytes", "device")  # say nothing here, and differ each time
        counted = {key: value for key, value in figures.items() if key not in idle}
        measured["rows"].append({"model": task.model, **counted})

    measured: Figures = {
        "seq_len": options.seq_len,
        "chunk_size": options.chunk_size,
        "dtype": precision_name(options.use_autocast),
        "rows": [],
    }
    run(options, tasks, measured, record)
    return count_table(measured)


def context_tasks(options: argparse.Namespace) -> list[Task]:
    """By kind and context, the models by turns; last the Megalodon alone at far positions."""
    given = vars(options)
    shared = {field.name: given[field.name] for field in fields(Task) if field.name in given}
    contexts = sorted(set(options.contexts))
    places = [(model, context) for context in contexts for model in MODELS]
    far = [("megalodon", position) for position in sorted(set(options.positions) - set(contexts))]
    of_kind = {
        "train": (options.train_layers, places),
        "decode": (options.decode_layers, places + far),
    }
    return [
        Task(kind, model, context, layers=layers, **shared)
        for kind, (layers, where) in of_kind.items()
        for model, context in where
        if kind in options.measure and model in options.models
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m megalodon_enwik8.benchmark", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="training steps: time, memory, compilation")
    context = commands.add_parser("context", help="training, reading, writing against the context")
    scale = commands.add_parser("scale", help="a step of one process, and of two, a thread each")
    counting = commands.add_parser("count", help="operations and kernels, on the CPU, of a block")
    commands.add_parser("task").add_argument("task")  # what a fresh process is asked for

    def count(
        command: argparse.ArgumentParser, name: str, default: Any, text: str, **more: Any
    ) -> None:
        more |= {"nargs": "+"} if isinstance(default, list) else {}
        more |= {"type": whole_number(1), "default": default, "help": f"{text} (%(default)s)"}
        command.add_argument(name, metavar="N", **more)

    def some_of(command: argparse.ArgumentParser, name: str, *names: str, but: str = "") -> None:
        default = [each for each in names if each != but]
        text = f"(all but {but})" if but else "(all)"
        command.add_argument(name, nargs="+", choices=names, default=default, help=text)

    def switch(
        command: argparse.ArgumentParser, name: str, text: str, off: str | None = None
    ) -> None:
        action = "store_false" if off else "store_true"
        command.add_argument(name, action=action, dest=off, help=text)

    count(train, "--micro-batches", [1, 4, 16], "sequences at a time, as far as a step has them")
    count(train, "--steps", 7, "timed steps of each")
    count(train, "--seq-len", 512, f"bytes in a sequence, of the {STEP_BYTES:,} of a step")
    count(counting, "--seq-len", 512, "bytes in the one sequence of a step")
    for command in (train, counting):
        count(command, "--chunk-size", 256, "of the Megalodon's attention")
    some_of(train, "--modes", *COMPILE, but="graphs")
    some_of(context, "--measure", "train", "decode")
    some_of(context, "--models", *MODELS)
    count(context, "--contexts", CONTEXTS, "lengths in bytes")
    count(context, "--positions", [1000, 1_000_000], "where the Megalodon alone writes as well")
    count(context, "--tokens", 32_768, "bytes in a training step, in one row at least")
    count(context, "--layers", 2, "of the models that train", dest="train_layers")
    count(context, "--decode-layers", 6, "of the models that write")
    count(context, "--chunk-size", 256, "of the Megalodon's attention")
    count(context, "--repetitions", 3, "after a first one; the fastest of all counts")
    count(context, "--seconds", 60, "begin no further repetition after so long")
    count(context, "--new-tokens", 100, "to write")
    count(
        scale, "--contexts", [512, 16_384], f"bytes in a sequence; {STEP_BYTES:,} in a step, or one"
    )
    count(scale, "--micro-batch", 16, "sequences at a time, as far as a process has them")
    count(scale, "--rounds", 5, "timed steps of each")
    count(scale, "--layers", 6, "of the model")
    count(scale, "--chunk-size", 256, "of its attention")
    switch(scale, "--compile", "with compiled layers")
    switch(context, "--compile", "train and write with compiled layers")
    switch(context, "--gradient-checkpointing", "recompute activations in the backward pass")
    switch(context, "--no-picture", "write no context.png, which needs matplotlib", off="picture")
    for command in (train, context, scale, counting):
        switch(command, "--float32", "train without bfloat16 autocast", off="use_autocast")
        count(command, "--limit", 900, "give up a measurement after so many seconds")
        command.add_argument("--out", default="runs/benchmark", metavar="DIR", help="(%(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.command == "task":
        with join(machine.choose_device()):
            print(json.dumps(measure(Task(**json.loads(options.task)))))
        return 0
    machine.choose_device()  # its error now, not from every process
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    commands = {"train": run_train, "context": run_context, "scale": run_scale, "count": run_count}
    tables = commands[options.command](options)
    with atomic_write(folder / f"{options.command}.md") as file:
        file.write(tables.encode())
    print(f"{tables}\nwritten: {options.command}.* in {folder}")
    return 0


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
