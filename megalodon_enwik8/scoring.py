"""What a model loses on a whole text, every byte counted once, by how much of it the model saw.

The first byte is given; each other byte is predicted once. A text is read in windows that start
afresh, or as streams whose state goes on from segment to segment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from megalodon_enwik8.models import byte_losses, new_state
from megalodon_enwik8.stored_text import Text
from megalodon_enwik8.utils import autocast

if TYPE_CHECKING:
    from megalodon import MegalodonCache

# A text is read so many tokens at a time: enough to fill the cores, small in memory, and
# independent of the training batch so that every run evaluates in the same way.
TOKENS_PER_BATCH = 8192

RANGE_ENDS = (32, 128, 512, *(1024 * 4**i for i in range(25)))
"""Distances, in bytes, are put together in ranges that end here."""


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
        rows, length = losses.shape
        if not rows:
            return
        where = np.searchsorted(RANGE_ENDS, seen + np.arange(length))
        columns = losses.cpu().double().sum(0).numpy()
        self.predicted += rows * np.bincount(where, minlength=len(RANGE_ENDS))
        self.total += np.bincount(where, weights=columns, minlength=len(RANGE_ENDS))

    @property
    def loss(self) -> float:
        """The mean, in nats per byte."""
        return float(self.total.sum() / self.predicted.sum())

    def by_distance(self) -> list[tuple[int, int, int, float, float]]:
        """Of each range that holds bytes: its least and greatest distance, how many bytes, their
        mean loss, and the mean loss of all bytes up to here."""
        starts = (1, *(end + 1 for end in RANGE_ENDS))
        predicted, total = self.predicted.cumsum(), self.total.cumsum()
        return [
            (
                starts[i],
                RANGE_ENDS[i],
                int(self.predicted[i]),
                float(self.total[i] / self.predicted[i]),
                float(total[i] / predicted[i]),
            )
            for i in np.flatnonzero(self.predicted)
        ]


def score_windows(
    model: PreTrainedModel,
    text: Text,
    *,
    context: int,
    stride: int,
    use_autocast: bool,
    progress: bool = False,
) -> Score:
    """Score `text` in windows of `context` bytes that start afresh, one every `stride` bytes.

    Of each window but the first only the last `stride` bytes count, so that each of them sees at
    least context - stride bytes; stride = context gives windows side by side. The last window may
    be shorter, and one that is longer than the text is the text.
    text: at least 2 bytes. 1 <= stride <= context.
    """
    score, predicted = Score(), len(text) - 1
    length = min(context, predicted)
    ends = range(length, predicted + 1, stride)
    at_once = max(1, TOKENS_PER_BATCH // length)
    with _Reader(model, predicted, use_autocast, progress) as read:
        for first in range(0, len(ends), at_once):
            batch = ends[first : first + at_once]
            losses = read([text[end - length : end + 1] for end in batch])
            if first == 0:  # the first window counts whole
                score.add(losses[:1], 1)
                losses = losses[1:]
                read.count(length)
            score.add(losses[:, length - stride :], length - stride + 1)
            read.count(losses.shape[0] * stride)
        rest = predicted - ends[-1]
        if rest:
            losses = read([text[ends[-1] + stride - length :]])
            score.add(losses[:, -rest:], losses.shape[1] - rest + 1)
            read.count(rest)
    return score


def score_streams(
    model: PreTrainedModel,
    text: Text,
    *,
    streams: int,
    segment: int,
    use_autocast: bool,
    progress: bool = False,
) -> Score:
    """Score `text` as `streams` texts side by side, each read from its first byte to its last with
    its state carried from one segment of `segment` bytes to the next.

    The streams follow each other in the text and differ by one byte at most.
    text: at least `streams` + 1 bytes. Raises UserError for a model without a state.
    """
    score, predicted = Score(), len(text) - 1
    length, longer = divmod(predicted, streams)  # so many streams have one byte more
    firsts = [row * length + min(row, longer) for row in range(streams)]
    state = new_state(model)
    with _Reader(model, predicted, use_autocast, progress) as read:
        for start in range(0, length, segment):
            stop = min(start + segment, length)
            losses = read([text[first + start : first + stop + 1] for first in firsts], state)
            score.add(losses, start + 1)
            read.count(losses.numel())
            score.state_bytes = state.nbytes // streams
        if longer:
            state.batch_select_indices(torch.arange(longer))
            rows = [text[first + length : first + length + 2] for first in firsts[:longer]]
            score.add(read(rows, state), length + 1)
            read.count(longer)
    return score


class _Reader:
    """A model that only reads, while the `with` block runs: no dropout, no gradients, and compiled
    layers run eagerly, since each length would be compiled anew. Its mode is restored."""

    def __init__(
        self, model: PreTrainedModel, predicted: int, use_autocast: bool, progress: bool
    ) -> None:
        self._model, self._use_autocast = model, use_autocast
        self._device = next(model.parameters()).device
        self._bar = tqdm(
            total=predicted,
            unit="byte",
            unit_scale=True,
            disable=None if progress else True,
        )

    def __enter__(self) -> _Reader:
        self._was_training = self._model.training
        self._model.eval()
        self._stance = torch.compiler.set_stance("force_eager")
        self._stance.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._stance.__exit__(*error)
        self._model.train(self._was_training)
        self._bar.close()

    @torch.no_grad()
    def __call__(self, rows: list[np.ndarray], state: MegalodonCache | None = None) -> torch.Tensor:
        """The loss of each byte but the first of rows (B, L + 1) uint8: float32 (B, L)."""
        batch = torch.from_numpy(np.stack(rows).astype(np.int64)).to(self._device)
        with autocast(self._device, self._use_autocast):
            return byte_losses(self._model, batch, state)

    def count(self, predicted: int) -> None:
        self._bar.update(predicted)
