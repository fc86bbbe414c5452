"""Speed, memory and operations of both models, side by side, and several processes beside one:

python -m megalodon_enwik8.benchmark train [KEY=VALUE ...]

KEY is any of a config, or step_bytes, the bytes in a step; [A,B] tries several values in turn.

  train     training steps: time, memory, compilation
  context   training, reading a prompt and writing on, against the length of the context
  scale     a step of one process, and of two, with a thread each
  count     operations and kernels of a block, on the CPU

Machines are noisy, and what a process did before stays in its memory: every task is measured in a
fresh process, the models take turns, and what counts are ratios of what ran next to each other.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megalodon_enwik8 import device as machine
from megalodon_enwik8.benchmark.task import (
    BOTH,
    PROCESSES,
    RATIO,
    Task,
    layers,
    measure,
    measure_apart,
)
from megalodon_enwik8.config import FREE_KEYS, MODELS, read_overrides
from megalodon_enwik8.distributed import join
from megalodon_enwik8.safety import Parser, UserError, atomic_write, run_main, whole_number

Grid = dict[str, Any]
"""Settings; a list is of values to try in turn."""

SHARED: Grid = {  # the comparison's
    "step_bytes": 16 * 512, "seq_len": 512, "chunk_size": 256, "batch_size": 16,
    "use_autocast": True, "compile": False,
}  # fmt: skip
OF_A_STEP = {"batch_size", "compile", "gradient_checkpointing"}  # of the keys that change no weight
CONTEXTS = [512 * 2**i for i in range(9)]  # 512 ... 131,072; beyond, a Llama takes for ever
COMMANDS: dict[str, dict[str, Grid]] = {  # by the kind of a row
    "train": {"steps": {"batch_size": [1, 4, 16], "compile": [False, True]}},
    "context": {
        "train": {"seq_len": CONTEXTS, "step_bytes": 32_768, "batch_size": 64, **layers(2)},
        "decode": {
            "seq_len": [*CONTEXTS, 1_000_000],
            "batch_size": 1,
            "use_autocast": False,
            **layers(6),
        },
    },
    "scale": {"scale": {"seq_len": [512, 16_384], "chunk_parallel": PROCESSES}},
    "count": {"count": {"step_bytes": 512}},
}


def plan(command: str, given: Grid, rounds: int) -> Iterator[tuple[dict[str, Any], list[Task]]]:
    """A row for each combination of settings, and the tasks that fill it."""
    for kind, own in COMMANDS[command].items():
        grid = SHARED | own | given
        values = [each if each and isinstance(each, list) else [each] for each in grid.values()]
        for chosen in itertools.product(*values):
            settings = dict(zip(grid, chosen, strict=True))
            ours = Task(kind, MODELS[0], settings, rounds)
            alone = kind == "scale" or ours.config(MODELS[0]).seq_len > CONTEXTS[-1]
            models = MODELS[:1] if alone else MODELS
            pairs = [(kind, model) for model in models]
            if kind == "steps":
                starts = ["first", "second"] if settings["compile"] else ["first"]
                pairs = [(kind, BOTH), *((start, model) for start in starts for model in models)]
            yield {"kind": kind, **settings}, [Task(*pair, settings, rounds) for pair in pairs]


def run(command: str, given: Grid, rounds: int, limit: float, out: Path) -> dict[str, Any]:
    """Fill row after row, and write all anew each time, so that nothing is lost: to a file beside
    `out`, which takes its place at the end."""
    if fixed := given.keys() & ({"model", "num_batches"} | FREE_KEYS - OF_A_STEP):
        raise UserError(
            f"command line: {min(fixed)}: the benchmark sets it or does without; leave it out"
        )
    rows = list(plan(command, given, rounds))
    for task in (task for _, tasks in rows for task in tasks):
        for model in MODELS if task.model == BOTH else (task.model,):
            task.config(model)  # its error now
    measured: dict[str, Any] = {
        "device": machine.device_name(machine.choose_device()),
        "processor": machine.processor_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rows": [],
    }
    if out.exists() and not out.is_file():
        raise UserError(f"{out}: is no regular file: name another")
    out.parent.mkdir(parents=True, exist_ok=True)
    underway = out.with_suffix(".part.json")
    with tempfile.TemporaryDirectory() as caches, tqdm(rows, disable=None) as bar:
        for number, (row, tasks) in enumerate(bar):
            measured["rows"].append(row)
            for task in tasks:
                bar.set_postfix_str(f"{task.kind}, {task.model}")
                # What compiles a second time finds what the first left, and nothing else.
                found = measure_apart(task, limit, f"{caches}/{number}{task.model}")
                if "failed" in found:
                    found = {"failed": {f"{task.kind}, {task.model}": found["failed"]}}
                for name, figures in found.items():
                    row.setdefault(name, {}).update(figures)
                ours, theirs = (row.get(model, {}) for model in MODELS)
                for title in (title for title in ours if title in theirs and title != "by_name"):
                    row.setdefault(RATIO, {}).setdefault(title, ours[title] / theirs[title])
                with atomic_write(underway) as file:
                    file.write((json.dumps(measured, indent=2) + "\n").encode())
    with atomic_write(out) as file:
        file.write(underway.read_bytes())
    underway.unlink()
    return measured


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__, "python -m megalodon_enwik8.benchmark")
    parser.add_argument("command", choices=[*COMMANDS, "task"], metavar="COMMAND")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    count = whole_number(1)
    parser.add_argument("--rounds", type=count, default=5, help="timed calls (%(default)s)")
    text = "give up a measurement after so many seconds (%(default)s)"
    parser.add_argument("--limit", type=count, default=900, help=text)
    parser.add_argument("--out", metavar="FILE", help="(runs/benchmark/COMMAND.json)")
    options = parser.parse_intermixed_args(argv)
    if options.command == "task":  # what a fresh process is asked for
        if len(options.settings) != 1 or not options.settings[0].startswith("{"):
            parser.error("task: is what a benchmark asks of its own processes")
        with join(machine.choose_device()):
            print(json.dumps(measure(Task(**json.loads(options.settings[0])))))
        return 0
    # Imported late: a task does without.
    from megalodon_enwik8.report.tables import measured_tables

    out = Path(options.out or f"runs/benchmark/{options.command}.json")
    given = read_overrides(options.settings)
    measured = run(options.command, given, options.rounds, options.limit, out)
    print(f"{measured_tables(measured)}\n\nwritten: {out}")
    return 0


if __name__ == "__main__":
    run_main(main)
