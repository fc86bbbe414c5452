"""Speed and memory of both models against the length of their context.

Each figure is taken by a process of its own (:mod:`megalodon_enwik8.context_probe`), so that peak
memory is that of the one thing measured; the two models take turns at each context.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megalodon_enwik8.command_line import Parser, whole_number
from megalodon_enwik8.drawing import check_can_draw, save_picture
from megalodon_enwik8.errors import UserError
from megalodon_enwik8.files import atomic_write, make_folder

MODELS = ("megalodon", "llama")
CONTEXTS = [512 * 2**i for i in range(9)]  # 512 ... 131,072
KINDS = ("train", "decode", "parts")


def add_parser(subparsers: argparse._SubParsersAction[Parser]) -> None:
    """Add the command `context` to the benchmark's."""
    parser = subparsers.add_parser(
        "context", help="training, reading and writing against the length of the context"
    )
    count = whole_number(1)
    parser.add_argument(
        "--measure",
        nargs="+",
        choices=KINDS,
        default=list(KINDS),
        help="training; prompts and decoding; what a Megalodon's forward pass consists of (all)",
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--contexts",
        type=count,
        nargs="+",
        default=CONTEXTS,
        metavar="N",
        help="lengths in bytes (512 to 131072, each twice the one before)",
    )
    parser.add_argument(
        "--positions",
        type=count,
        nargs="+",
        default=[1000, 1_000_000],
        metavar="N",
        help="further positions at which the Megalodon alone writes (%(default)s)",
    )
    parser.add_argument(
        "--parts-at", type=count, default=8192, metavar="N", help="length for parts (%(default)s)"
    )
    parser.add_argument(
        "--tokens",
        type=count,
        default=32_768,
        metavar="N",
        help="bytes in a training step, in rows of the context (%(default)s, at least one row)",
    )
    parser.add_argument(
        "--layers", type=count, default=2, help="of the models that train (%(default)s)"
    )
    parser.add_argument(
        "--decode-layers", type=count, default=6, help="of the models that write (%(default)s)"
    )
    parser.add_argument("--chunk-size", type=count, default=256, help="(%(default)s)")
    parser.add_argument(
        "--repetitions",
        type=count,
        default=3,
        metavar="N",
        help="after a first one; the fastest of all counts (%(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=count,
        default=60,
        metavar="S",
        help="begin no further repetition after so long (%(default)s)",
    )
    parser.add_argument(
        "--new-tokens", type=count, default=100, metavar="N", help="to write (%(default)s)"
    )
    parser.add_argument(
        "--limit",
        type=count,
        default=900,
        metavar="S",
        help="give up a measurement after so long (%(default)s)",
    )
    parser.add_argument("--float32", action="store_true", help="train without bfloat16 autocast")
    parser.add_argument(
        "--compile", action="store_true", help="train and write with compiled layers"
    )
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument(
        "--out", default="runs/benchmark", metavar="DIR", help="for context.json, .md and .png"
    )
    parser.add_argument("--no-picture", action="store_true")


def run(options: argparse.Namespace) -> int:
    """Measure as asked; print the tables; write context.json, context.md and context.png.

    context.json is brought up to date after each measurement, so that none is lost.
    """
    folder = Path(options.out)
    if not options.no_picture:
        try:
            check_can_draw(folder / "context.png")
        except UserError as error:
            raise UserError(f"{error}, or add --no-picture") from None
    make_folder(folder, "--out")
    rows: list[dict[str, Any]] = []
    with tqdm(_tasks(options), unit="measurement", disable=None) as bar:
        for task in bar:
            bar.set_postfix_str(f"{task['model']}, {task['kind']} at {task['context']:,}")
            rows.append(_ask(task, options.limit))
            _write(folder / "context.json", json.dumps({"rows": rows}, indent=2) + "\n")
    tables = make_tables(rows)
    print(tables)
    _write(folder / "context.md", tables)
    written = ["context.json", "context.md"]
    if not options.no_picture and draw(rows, folder / "context.png"):
        written.append("context.png")
    print(f"written: {', '.join(str(folder / name) for name in written)}")
    return 0


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())


def _tasks(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The measurements to take, as context_probe.Task has them."""

    def task(kind: str, model: str, context: int) -> dict[str, Any]:
        return {
            "kind": kind,
            "model": model,
            "context": context,
            "layers": options.layers if kind == "train" else options.decode_layers,
            "chunk_size": options.chunk_size,
            "tokens": options.tokens,
            "repetitions": options.repetitions,
            "seconds": options.seconds,
            "new_tokens": options.new_tokens,
            "use_autocast": not options.float32,
            "compile": options.compile,
            "gradient_checkpointing": options.gradient_checkpointing,
        }

    contexts = sorted(set(options.contexts))
    tasks = [
        task(kind, model, context)
        for kind in ("train", "decode")
        if kind in options.measure
        for context in contexts
        for model in options.models
    ]
    if "megalodon" in options.models:
        if "decode" in options.measure:
            positions = sorted(set(options.positions) - set(contexts))
            tasks += [task("decode", "megalodon", position) for position in positions]
        if "parts" in options.measure:
            tasks.append(task("parts", "megalodon", options.parts_at))
    return tasks


def _ask(task: dict[str, Any], limit: float) -> dict[str, Any]:
    """The figures of a fresh process, or the task with the reason why there are none."""
    command = [sys.executable, "-m", "megalodon_enwik8.context_probe", json.dumps(task)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {**task, "failed": f"took more than {limit:g} s"}
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        return {**task, "failed": reason}
    figures: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return figures


Cell = Callable[[dict[str, Any]], str]


def make_tables(rows: list[dict[str, Any]]) -> str:
    """The rows of context.json as Markdown."""
    parts = []
    where = next((row for row in rows if "device" in row), None)
    if where is not None:
        parts.append(f"{where['device']}, PyTorch {where['torch']}.")
    training = [row for row in rows if row["kind"] == "train"]
    if training:
        first = training[0]
        precision = "bfloat16 autocast" if first["use_autocast"] else "float32"
        extras = [name for name in ("compile", "gradient_checkpointing") if first[name]]
        parts.append(
            f"**Training**, {first['layers']} layers, {first['tokens']:,} bytes a step, or one row "
            f"where that is longer, chunks of {first['chunk_size']}, "
            f"{', '.join([precision, *extras]).replace('_', ' ')}:"
        )
        columns: dict[str, Cell] = {
            "bytes/s": lambda row: f"{row['tokens_per_second']:,.0f}",
            "peak MB": lambda row: f"{row['peak_memory_bytes'] / 1e6:,.0f}",
        }
        parts.append(_table(training, columns))
    decoding = [row for row in rows if row["kind"] == "decode"]
    if decoding:
        parts.append(
            f"**Reading a prompt and writing on**, {decoding[0]['layers']} layers, one row, "
            "float32; the prompt is read at once, the longest by a Megalodon in pieces, which is "
            "what takes the memory:"
        )
        columns = {
            "prompt bytes/s": lambda row: f"{row['prefill_tokens_per_second']:,.0f}",
            "new bytes/s": lambda row: f"{row['decode_tokens_per_second']:,.1f}",
            "state bytes": lambda row: f"{row['state_bytes']:,}",
            "peak MB": lambda row: f"{row['peak_memory_bytes'] / 1e6:,.0f}",
        }
        parts.append(_table(decoding, columns))
    for row in rows:
        if row["kind"] == "parts" and "failed" not in row:
            parts.append(_parts_table(row))
    failed = [
        f"- {row['model']}, {row['kind']} at {row['context']:,}: {row['failed']}"
        for row in rows
        if "failed" in row
    ]
    if failed:
        parts.append("\n".join(["Given up:", "", *failed]))
    if any(row["kind"] in ("train", "decode") for row in rows):
        parts.append("A dash stands where nothing was measured.")
    return "\n\n".join(parts) + "\n"


def _table(rows: list[dict[str, Any]], columns: dict[str, Cell]) -> str:
    """One line for each context, every column for each model side by side."""
    models = [model for model in MODELS if any(row["model"] == model for row in rows)]
    names = [f"{model.title()} {column}" for column in columns for model in models]
    lines = ["| context | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    found = {(row["context"], row["model"]): row for row in rows if "failed" not in row}
    for context in sorted({row["context"] for row in rows}):
        cells = [
            show(found[context, model]) if (context, model) in found else "–"
            for show in columns.values()
            for model in models
        ]
        lines.append(f"| {context:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _parts_table(row: dict[str, Any]) -> str:
    plain, products = row["forward_seconds"], row["matrix_products_seconds"]
    with_state, average = row["forward_with_state_seconds"], row["cema_seconds"]
    literal, narrow = row["cema_reference_seconds"], row["cema_bfloat16_seconds"]
    lines = [
        f"**A Megalodon's forward pass** over {row['context']:,} bytes, {row['layers']} layers, "
        "one row, float32:",
        "",
        "| | s | |",
        "|---|---|---|",
        f"| products with weight matrices alone | {products:.3f} | |",
        f"| forward pass | {plain:.3f} | {plain / products:.2f} x the products |",
        f"| with the state after it | {with_state:.3f} | {with_state / plain:.2f} x the plain |",
        f"| one layer's CEMA with its last state | {average:.4f} | |",
        f"| the same of a bfloat16 input | {narrow:.4f} | |",
        f"| its recurrence, step by step | {literal:.3f} | {literal / average:.0f} x CEMA, "
        f"{literal / narrow:.0f} x in bfloat16 |",
    ]
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> bool:
    """Speed and memory against context, one panel for each figure. False: there is none."""
    from matplotlib.figure import Figure

    panels = [
        ("train", "tokens_per_second", "training, bytes per second", 1.0),
        ("train", "peak_memory_bytes", "training, peak memory in MB", 1e-6),
        ("decode", "prefill_tokens_per_second", "reading a prompt, bytes per second", 1.0),
        ("decode", "decode_tokens_per_second", "writing, bytes per second", 1.0),
        ("decode", "state_bytes", "state, MB", 1e-6),
    ]
    panels = [panel for panel in panels if any(row["kind"] == panel[0] for row in rows)]
    if not panels:
        return False
    figure = Figure(figsize=(4 * len(panels), 3.5))
    for axes, (kind, key, title, unit) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        for model in MODELS:
            points = sorted(
                (row["context"], row[key] * unit)
                for row in rows
                if (row["kind"], row["model"]) == (kind, model) and row.get(key) is not None
            )
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=model.title())
        axes.set(xscale="log", yscale="log", xlabel="context, bytes", title=title)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    save_picture(figure, path)
    return True
