"""The loss of a model on fixed text; of a whole split from the command line:

python -m megalodon_enwik8.evaluation runs/X/final.pt [--context N [--stride S] | --stream]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from megalodon_enwik8.checkpoint import Checkpoint, load_checkpoint
from megalodon_enwik8.command_line import Parser, whole_number
from megalodon_enwik8.config import ExperimentConfig
from megalodon_enwik8.description import device_name
from megalodon_enwik8.drawing import check_can_draw, save_picture
from megalodon_enwik8.errors import UserError, run_main
from megalodon_enwik8.files import atomic_write
from megalodon_enwik8.models import keeps_a_state, restore_model, summed_loss
from megalodon_enwik8.scoring import TOKENS_PER_BATCH, Score, score_streams, score_windows
from megalodon_enwik8.stored_text import StoredCorpus, StoredText, Text, open_corpus
from megalodon_enwik8.utils import (
    autocast,
    bits_per_byte,
    choose_device,
    peak_memory_bytes,
    ran_out_of_memory,
)


@torch.no_grad()
def evaluate(model: PreTrainedModel, windows: torch.Tensor, *, use_autocast: bool) -> float:
    """Mean loss in nats per byte over `windows` (count, L + 1) int64; the first byte is given.

    Dropout is off, the model's mode is restored, and compiled layers run eagerly: their few
    extra seconds here are less than compiling for one more shape.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    length = windows.size(1) - 1
    with torch.compiler.set_stance("force_eager"):
        for rows in windows.split(max(1, TOKENS_PER_BATCH // length)):
            with autocast(device, use_autocast):
                total += summed_loss(model, rows.to(device)).cpu().double()
    model.train(was_training)
    return total.item() / (windows.size(0) * length)


def full_validation(
    model: PreTrainedModel, text: Text, *, seq_len: int, use_autocast: bool
) -> float:
    """Mean loss in nats per byte over all of `text` but its first byte, each byte counted once.

    Consecutive windows of `seq_len` predictions; the last may be shorter.
    text: T >= 2 bytes.
    """
    score = score_windows(
        model, text, context=seq_len, stride=seq_len, use_autocast=use_autocast, progress=False
    )
    return score.loss


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m megalodon_enwik8.evaluation",
        description="Bits per byte (BPC) of a whole split, every byte counted once.",
    )
    parser.add_argument("checkpoint", help="final.pt, best.pt or a checkpoint_*.pt of a run folder")
    parser.add_argument("--split", choices=["val", "train"], default="val", help="(%(default)s)")
    parser.add_argument(
        "--context",
        type=whole_number(1),
        metavar="N",
        help="read windows of N bytes that start afresh (the seq_len of the training)",
    )
    parser.add_argument(
        "--stride",
        type=whole_number(1),
        metavar="S",
        help="a window every S bytes: each byte sees at least N - S bytes (N)",
    )
    parser.add_argument(
        "--stream",
        action="store_true",
        help="carry the state from the first byte to the last; Megalodon only",
    )
    parser.add_argument(
        "--streams", type=whole_number(1), metavar="K", help="so many streams side by side (1)"
    )
    parser.add_argument(
        "--segment",
        type=whole_number(1),
        metavar="M",
        help=f"bytes of a stream to read at a time (together about {TOKENS_PER_BATCH})",
    )
    parser.add_argument("--data-path", metavar="FILE", help="another text than the training's")
    parser.add_argument(
        "--data-bytes",
        type=whole_number(1),
        metavar="N",
        help="use the first N bytes of --data-path (as in training, all of another text)",
    )
    parser.add_argument(
        "--out", metavar="FILE", help="where the figures go as JSON (beside the checkpoint)"
    )
    parser.add_argument("--picture", metavar="FILE", help="draw BPC by distance: .png, .svg, .pdf")
    parser.add_argument(
        "--beside",
        nargs="+",
        default=[],
        metavar="JSON",
        help="earlier figures to draw in the same picture",
    )
    options = parser.parse_args(argv)
    if options.stream and (options.context or options.stride):
        parser.error("--stream has no --context and no --stride: its context is the whole text")
    if not options.stream and (options.streams or options.segment):
        parser.error("--streams and --segment are for --stream: add it")
    if options.beside and not options.picture:
        parser.error("--beside is for --picture: name the picture")
    if options.data_bytes and not options.data_path:
        parser.error("--data-bytes is for --data-path: name the text")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.picture:
        check_can_draw(options.picture)
    beside = [_read_result(path) for path in options.beside]
    device = choose_device()
    path = Path(options.checkpoint)
    checkpoint = load_checkpoint(path)
    config = checkpoint.experiment(path)
    model = restore_model(checkpoint, path)
    if options.stream and not keeps_a_state(model):
        raise UserError(
            f"--stream: {path} holds a {config.model}, whose memory of the text grows with every "
            "byte, where a stream needs a state of fixed size; use --context N, and --stride S to "
            "let each byte see at least N - S bytes"
        )
    model.to(device)  # type: ignore[arg-type]
    data_path, data_bytes = config.data_path, config.data_bytes
    if options.data_path is not None:
        data_path, data_bytes = options.data_path, options.data_bytes
    with open_corpus(data_path, data_bytes) as corpus:
        if corpus.sha256 != checkpoint.corpus_sha256 and options.data_path is None:
            print(f"{data_path} is not the text that {path} was trained on", file=sys.stderr)
        text: StoredText = getattr(corpus, options.split)
        reading = _how_to_read(options, config, len(text), corpus.name)
        began = time.perf_counter()
        score_text: Any = score_streams if options.stream else score_windows
        try:
            score: Score = score_text(
                model, text, **reading, use_autocast=config.use_autocast, progress=True
            )
        except (MemoryError, RuntimeError) as error:
            if not ran_out_of_memory(error):
                raise
            given = ", ".join(f"--{name} {value}" for name, value in reading.items())
            raise UserError(f"out of memory with {given}: use smaller numbers") from None
        seconds = time.perf_counter() - began
        result = _result(path, checkpoint, config, corpus, options.split, reading, score)
    result |= {
        "seconds": seconds,
        "bytes_per_second": result["predicted"] / seconds,
        "peak_memory_bytes": peak_memory_bytes(device),
        "device": device_name(device),
        "torch": torch.__version__,
    }
    print(_report(result))
    out = Path(options.out) if options.out else path.with_name(_default_name(path, result))
    with atomic_write(out) as file:
        file.write((json.dumps(result, indent=2) + "\n").encode())
    print(f"written: {out}")
    if options.picture:
        _draw([result, *beside], options.picture)
        print(f"drawn: {options.picture}")
    return 0


def _how_to_read(
    options: argparse.Namespace, config: ExperimentConfig, size: int, corpus: str
) -> dict[str, int]:
    """The arguments of the scoring function. Raises UserError where the text is too short."""
    if options.stream:
        name, needed = "--streams", options.streams or 1
        segment = options.segment
        if segment is None:  # whole chunks
            chunk = config.chunk_size
            segment = max(chunk, TOKENS_PER_BATCH // needed // chunk * chunk)
        reading = {"streams": needed, "segment": segment}
    else:
        name, needed = "--context", options.context or config.seq_len
        reading = {"context": needed, "stride": options.stride or needed}
        if reading["stride"] > needed:
            raise UserError(
                f"--stride {reading['stride']}: must be at most --context {needed}, or bytes would "
                "be left out"
            )
    if size < needed + 1:
        raise UserError(
            f"{name} {needed}: the {options.split} split of {corpus} has {size} bytes and needs "
            f"{needed + 1}: use a smaller number, the other split or more data"
        )
    return reading


def _result(
    path: Path,
    checkpoint: Checkpoint,
    config: ExperimentConfig,
    corpus: StoredCorpus,
    split: str,
    reading: dict[str, int],
    score: Score,
) -> dict[str, Any]:
    """What the JSON file tells, but for time and machine."""
    return {
        "checkpoint": str(path),
        "step": checkpoint.step,
        "model": config.model,
        "trained_at": {
            "seed": config.seed,
            "seq_len": config.seq_len,
            "carry_state": config.carry_state,
        },
        "use_autocast": config.use_autocast,
        "corpus": corpus.name,
        "corpus_sha256": corpus.sha256,
        "trained_on_this_corpus": corpus.sha256 == checkpoint.corpus_sha256,
        "split": split,
        "reading": reading,
        "predicted": int(score.predicted.sum()),
        "loss": score.loss,
        "bpc": bits_per_byte(score.loss),
        "state_bytes": score.state_bytes,
        "by_distance": [
            {
                "from": start,
                "to": end,
                "predicted": predicted,
                "bpc": bits_per_byte(loss),
                "bpc_so_far": bits_per_byte(so_far),
            }
            for start, end, predicted, loss, so_far in score.by_distance()
        ],
    }


def _label(result: dict[str, Any]) -> str:
    reading = result["reading"]
    if "streams" in reading:
        return f"{reading['streams']} stream{'s' if reading['streams'] > 1 else ''}"
    stride = f", stride {reading['stride']}" if reading["stride"] < reading["context"] else ""
    return f"windows of {reading['context']}{stride}"


def _default_name(path: Path, result: dict[str, Any]) -> str:
    label = "-".join(f"{name}{value}" for name, value in result["reading"].items())
    return f"{path.stem}-{result['corpus']}-{result['split']}-{label}.json"


def _report(result: dict[str, Any]) -> str:
    lines = [
        f"{result['checkpoint']}: {result['model']} after {result['step']} steps",
        f"{result['split']} split of {result['corpus']}, {_label(result)}: "
        f"{result['predicted']:,} bytes predicted",
        f"loss {result['loss']:.4f} nats per byte, {result['bpc']:.4f} BPC",
        f"{result['seconds']:.1f} s, {result['bytes_per_second']:,.0f} bytes per second",
    ]
    if result["peak_memory_bytes"]:
        lines[-1] += f", peak memory {result['peak_memory_bytes'] / 2**20:,.0f} MiB"
    if result["state_bytes"]:
        lines.append(f"state of a stream: {result['state_bytes']:,} bytes, at any position")
    lines.append(f"{'bytes seen before':>25} {'predicted':>13} {'BPC':>8} {'so far':>8}")
    for row in result["by_distance"]:
        seen = f"{row['from']:,} to {row['to']:,}"
        lines.append(
            f"{seen:>25} {row['predicted']:>13,} {row['bpc']:8.4f} {row['bpc_so_far']:8.4f}"
        )
    return "\n".join(lines)


def _read_result(path: str) -> dict[str, Any]:
    """A result that an earlier call wrote."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
        _label(result)
        for row in result["by_distance"]:
            float(row["to"]), float(row["bpc"])
        str(result["model"])
    except OSError as error:
        raise UserError(f"--beside {path}: cannot be read: {error.strerror}") from None
    except (ValueError, LookupError, TypeError):
        raise UserError(f"--beside {path}: holds no figures of this program") from None
    return result


def _draw(results: list[dict[str, Any]], path: str) -> None:
    """BPC against distance: one line for each result."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for result in results:
        rows = result["by_distance"]
        axes.plot(
            [row["to"] for row in rows],
            [row["bpc"] for row in rows],
            marker="o",
            label=f"{result['model']}, {_label(result)}: {result['bpc']:.3f} BPC",
        )
    axes.set_xscale("log", base=2)
    axes.set_xlabel("bytes seen before, up to")
    axes.set_ylabel("BPC")
    axes.set_title(f"{results[0]['split']} split of {results[0]['corpus']}")
    axes.grid(alpha=0.3)
    axes.legend()
    save_picture(figure, path)


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
