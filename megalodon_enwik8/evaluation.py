"""The loss of a model on fixed text; of a whole split from the command line:

python -m megalodon_enwik8.evaluation runs/X/final.pt [--context N [--stride S] | --stream]

or, shared out between N processes: torchrun --nproc_per_node=N -m megalodon_enwik8.evaluation ...

The first byte of a text is given; each other byte is predicted once. A text is read in windows
that start afresh, or as streams whose state goes on from piece to piece.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tqdm import tqdm
from transformers import PreTrainedModel

from megalodon import MegalodonCache
from megalodon_enwik8.checkpoint import load_checkpoint
from megalodon_enwik8.config import ExperimentConfig, bits_per_byte
from megalodon_enwik8.data import Bytes, load_corpus, windows_at
from megalodon_enwik8.device import autocast, choose_device, device_name, peak_memory_bytes
from megalodon_enwik8.distributed import World, join
from megalodon_enwik8.models import byte_losses, new_state, restore_model
from megalodon_enwik8.safety import Parser, UserError, atomic_write, run_main, whole_number

# A text is read so many tokens at a time: enough to fill the cores, small in memory, and
# independent of the training batch so that every run evaluates in the same way.
TOKENS_PER_BATCH = 8192

RANGE_ENDS = (32, 128, 512, *(1024 * 4**i for i in range(25)))
"""Distances, in bytes, are put together in ranges that end here."""


@contextmanager
def reading(model: PreTrainedModel) -> Iterator[None]:
    """While the block runs the model only reads: no dropout, no gradients, and compiled layers run
    eagerly, since each length would be compiled anew. Its mode is restored."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train(was_training)


def _losses(
    model: PreTrainedModel,
    batch: torch.Tensor,
    use_autocast: bool | str,
    state: MegalodonCache | None = None,
) -> torch.Tensor:
    """The loss of each byte but the first of batch (B, L + 1) int64: float32 (B, L)."""
    device = next(model.parameters()).device
    with autocast(device, use_autocast):
        return byte_losses(model, batch.to(device), state)


class Score:
    """Losses in nats, summed by distance: how many bytes the model saw before the one predicted.

    predicted: (ranges,) int64, bytes of each range of distances. total: (ranges,) float64, the
    sum of their losses. state_bytes: the size of one stream's state, 0 where none was carried.
    """

    def __init__(self) -> None:
        self.predicted = np.zeros(len(RANGE_ENDS), dtype=np.int64)
        self.total = np.zeros(len(RANGE_ENDS))
        self.state_bytes = 0

    def add(self, losses: torch.Tensor, seen: int) -> None:
        """losses: (B, L), of bytes before which the model saw `seen`, `seen` + 1, ... bytes."""
        where = np.searchsorted(RANGE_ENDS, seen + np.arange(losses.shape[1]))
        columns = losses.cpu().double().sum(0).numpy()
        self.predicted += losses.shape[0] * np.bincount(where, minlength=len(RANGE_ENDS))
        self.total += np.bincount(where, weights=columns, minlength=len(RANGE_ENDS))

    def gather(self, world: World) -> None:
        """Add up what all processes scored."""
        for sums in (self.predicted, self.total):
            world.sum(torch.from_numpy(sums))

    @property
    def loss(self) -> float:
        """The mean, in nats per byte."""
        return float(self.total.sum() / self.predicted.sum())

    def by_distance(self) -> list[dict[str, Any]]:
        """Of each range that holds bytes: its least and greatest distance, how many bytes, their
        BPC, and that of all bytes up to here."""
        starts = (1, *(end + 1 for end in RANGE_ENDS))
        predicted, total = self.predicted.cumsum(), self.total.cumsum()
        return [
            {
                "from": starts[i],
                "to": RANGE_ENDS[i],
                "predicted": int(self.predicted[i]),
                "bpc": bits_per_byte(float(self.total[i] / self.predicted[i])),
                "bpc_so_far": bits_per_byte(float(total[i] / predicted[i])),
            }
            for i in np.flatnonzero(self.predicted)
        ]


def score_windows(
    model: PreTrainedModel,
    text: Bytes,
    *,
    context: int,
    stride: int,
    starts: Sequence[int] | None = None,
    use_autocast: bool | str,
    progress: bool = False,
    check: Callable[[], None] = lambda: None,
    world: World | None = None,
) -> Score:
    """Score `text` in windows of `context` bytes that start afresh, one every `stride` bytes, or
    where `starts` says.

    Of each window but the first only the last `stride` bytes count, so that each of them sees at
    least context - stride bytes; stride = context gives windows side by side. The last window may
    be shorter, and one that is longer than the text is the text. `check` is called before each
    batch, and may raise. In a world of several each reads its share.
    text: at least 2 bytes. 1 <= stride <= context.
    """
    world = world or World(torch.device("cpu"))
    score, predicted, seen = Score(), len(text) - 1, context - stride
    if starts is None:
        starts = range(0, max(predicted - context, 0) + stride, stride)
    size = max(1, TOKENS_PER_BATCH // context)
    whole = [start for start in starts if start + context <= predicted]
    batches = [whole[i : i + size] for i in range(0, len(whole), size)]
    batches += [[start] for start in starts[len(whole) :]]
    with reading(model):
        bar = tqdm(world.share(batches), unit="batch", disable=None if progress else True)
        for batch, counts in bar:
            check()
            length = min(context, predicted - batch[0])
            losses = _losses(model, windows_at(text, batch, length), use_autocast)
            if counts:
                score.add(losses[:, seen:], seen + 1)
                if batch[0] == 0:  # the first window counts whole
                    score.add(losses[:1, :seen], 1)
    score.gather(world)
    return score


def score_streams(
    model: PreTrainedModel,
    text: Bytes,
    *,
    streams: int,
    piece: int,
    use_autocast: bool | str,
    progress: bool = False,
    world: World | None = None,
) -> Score:
    """Score `text` as `streams` texts side by side, each read from its first byte to its last,
    `piece` bytes at a time, with its state carried along.

    The streams follow each other in the text and differ by one byte at most. In a world of several
    each reads its share of them.
    text: at least `streams` + 1 bytes. Raises UserError for a model without a state.
    """
    world = world or World(torch.device("cpu"))
    score, state = Score(), new_state(model)
    length, longer = divmod(len(text) - 1, streams)  # so many streams have one byte more
    mine = range(streams)[world.rank :: world.size]
    firsts = [stream * length + min(stream, longer) for stream in mine]
    with reading(model):
        starts = [*range(0, length, piece), length]
        for start in tqdm(starts, unit="piece", disable=None if progress else True):
            end = min(start + piece, length) if start < length else length + 1
            if start == length:
                firsts = firsts[: len([stream for stream in mine if stream < longer])]
                state.batch_select_indices(torch.arange(len(firsts)))
            if firsts:
                pieces = windows_at(text, [first + start for first in firsts], end - start)
                score.add(_losses(model, pieces, use_autocast, state), start + 1)
                score.state_bytes = state.nbytes // len(firsts)
    score.gather(world)
    return score


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m megalodon_enwik8.evaluation",
        description="Bits per byte (BPC) of a whole split, every byte counted once.",
    )
    count = whole_number(1)
    parser.add_argument("checkpoint", help="final.pt, best.pt or a checkpoint_*.pt of a run folder")
    parser.add_argument("--split", choices=["val", "train"], default="val", help="(%(default)s)")
    parser.add_argument(
        "--context", type=count, metavar="N", help="windows of N bytes (the seq_len of training)"
    )
    parser.add_argument(
        "--stride",
        type=count,
        metavar="S",
        help="a window every S bytes: each byte sees at least N - S bytes (N)",
    )
    parser.add_argument(
        "--stream",
        action="store_true",
        help="carry the state from the first byte to the last; Megalodon only",
    )
    parser.add_argument("--streams", type=count, metavar="K", help="streams side by side (1)")
    parser.add_argument("--piece", type=count, metavar="M", help="bytes of a stream at a time")
    parser.add_argument("--data-path", metavar="FILE", help="another text than the training's")
    parser.add_argument(
        "--data-bytes", type=count, metavar="N", help="the first N bytes of --data-path (all)"
    )
    parser.add_argument("--out", metavar="FILE", help="for the figures (beside the checkpoint)")
    options = parser.parse_args(argv)
    if options.stream and (options.context or options.stride):
        parser.error("--stream has no --context and no --stride: its context is the whole text")
    if not options.stream and (options.streams or options.piece):
        parser.error("--streams and --piece are for --stream: add it")
    if options.data_bytes and not options.data_path:
        parser.error("--data-bytes is for --data-path: name the text")
    if options.out and Path(options.out).suffix != ".json":
        parser.error(f"--out {options.out}: the figures are JSON: name a file that ends in .json")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    device = choose_device()
    with join(device) as world:
        return _evaluate(options, device, world)


def _evaluate(options: argparse.Namespace, device: torch.device, world: World) -> int:
    path = Path(options.checkpoint)
    checkpoint = load_checkpoint(path)
    config = checkpoint.config
    model = restore_model(checkpoint, device)
    corpus = load_corpus(
        options.data_path or config.data_path,
        options.data_bytes if options.data_path else config.data_bytes,
    )
    text: Bytes = getattr(corpus, options.split)
    how = _how_to_read(options, config, len(text))
    label = "-".join(f"{name}{value}" for name, value in how.items())
    corpus_name = corpus.name + (f"-{corpus.sha256[:8]}" if options.data_path else "")
    name = f"{path.stem}-{corpus_name}-{options.split}-{label}.json"
    out = Path(options.out) if options.out else path.with_name(name)
    out.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    score_text: Callable[..., Score] = score_streams if options.stream else score_windows
    shared = {"use_autocast": config.use_autocast, "progress": world.is_main, "world": world}
    score = score_text(model, text, **how, **shared)
    seconds = time.perf_counter() - began
    result = {
        "checkpoint": str(path),
        "step": checkpoint.step,
        "model": config.model,
        "trained_at": {"seed": config.seed, "seq_len": config.seq_len},
        "use_autocast": config.use_autocast,
        "corpus": corpus.name,
        "corpus_sha256": corpus.sha256,
        "trained_on_this_corpus": corpus.sha256 == checkpoint.corpus_sha256,
        "split": options.split,
        "reading": how,
        "predicted": int(score.predicted.sum()),
        "loss": score.loss,
        "bpc": bits_per_byte(score.loss),
        "state_bytes": score.state_bytes,
        "processes": world.size,
        "by_distance": score.by_distance(),
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(device),
        "device": device_name(device),
        "torch": str(torch.__version__),
    }
    print(yaml.safe_dump(result, sort_keys=False, default_flow_style=None, width=200))
    if world.is_main:
        with atomic_write(out) as file:
            file.write((json.dumps(result, indent=2) + "\n").encode())
    print(f"written: {out}")
    return 0


def _how_to_read(
    options: argparse.Namespace, config: ExperimentConfig, size: int
) -> dict[str, int]:
    """The arguments of the scoring function. Raises UserError where they cannot be."""
    if options.stream:
        streams = options.streams or 1
        piece = options.piece or max(config.chunk_size, TOKENS_PER_BATCH // streams)
        how = {"streams": streams, "piece": piece}
    else:
        context = options.context or config.seq_len
        how = {"context": context, "stride": options.stride or context}
        if how["stride"] > context:
            raise UserError(
                f"--stride {how['stride']}: must be at most --context {context}, or bytes would "
                "be left out"
            )
    if size <= how.get("streams", 1):
        raise UserError(f"the {options.split} split has {size} bytes: too few to be read like this")
    return how


if __name__ == "__main__":
    run_main(main)
