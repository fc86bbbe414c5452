"""How a batch lies: what the masks, positions and cache of a call mean for the operations."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .cache import MegalodonCache
from .ops.cema import BLOCK
from .ops.segments import Segments, build_segments


@dataclass(frozen=True)
class Layout:
    """What every block of one forward pass shares.

    rotary: (L, 2, d/2) or (B, L, 2, d/2), cos and sin at each token's place in its chunk.
    offset: tokens of the current chunk that the cache holds; (B,) where one token is decoded.
    segments: padding and document borders, ``None`` for plain text.
    return_state: whether the states after the last token are wanted.
    fused: whether attention runs by PyTorch's fused operation.
    truncated: whether they are cut off from the graph that makes them.
    """

    rotary: Tensor
    offset: int | Tensor
    segments: Segments | None
    return_state: bool
    fused: bool
    truncated: bool

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "Layout":
        """The same on another device. accelerate calls it for each block, so that the blocks of
        one model may lie on several."""
        if self.rotary.device == torch.device(device):
            return self
        return _to_device(self, device, non_blocking)


def _to_device(part: Any, device: torch.device | str | int, non_blocking: bool) -> Any:
    if isinstance(part, Tensor):
        return part.to(device, non_blocking=non_blocking)
    if isinstance(part, (Layout, Segments)):
        moved = {
            field.name: _to_device(getattr(part, field.name), device, non_blocking)
            for field in fields(part)
        }
        return replace(part, **moved)
    return part


def read_layout(
    x: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    segment_ids: Tensor | None,
    cache: MegalodonCache | None,
    rotary: Tensor,
    chunk_size: int,
    *,
    return_state: bool,
    fused: bool,
) -> Layout:
    """The layout of x (B, L, D). Raises ValueError for shapes that do not fit."""
    batch, length = x.shape[:2]
    mask = read_mask(attention_mask, batch, length, 0 if cache is None else cache.positions)
    lengths = None
    if cache is not None and cache.lengths is not None:
        lengths = cache.lengths.to(x.device)  # the last norm may lie on another device
    border = document_borders(position_ids, segment_ids, mask, lengths, batch, length)
    uniform = 0 if cache is None else cache.uniform_length
    truncated = cache is not None and cache.truncated

    def layout(rotary: Tensor, offset: int | Tensor, segments: Segments | None = None) -> Layout:
        return Layout(rotary, offset, segments, return_state, fused, truncated)

    if mask is None and border is None:
        if length == 1 and lengths is not None and uniform is None and return_state:
            offset = lengths % chunk_size
            return layout(rotary[offset].unsqueeze(1), offset)
        if uniform is not None:
            start = uniform % chunk_size
            if length == 1:
                return layout(rotary[start : start + 1], start)
            places = torch.arange(start, start + length, device=x.device) % chunk_size
            return layout(rotary[places], start)

    if mask is None:
        mask = torch.ones(batch, length, dtype=torch.bool, device=x.device)
    if border is None:
        border = torch.zeros_like(mask)
    if lengths is None:
        lengths = torch.zeros(batch, dtype=torch.int64, device=x.device)
    segments = build_segments(mask, border, lengths, block=BLOCK, chunk=chunk_size)
    return layout(rotary[segments.chunk_position], 0, segments)


def read_mask(attention_mask: Tensor | None, batch: int, length: int, past: int) -> Tensor | None:
    """(B, L) bool, or ``None`` where nothing is masked."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or attention_mask.shape not in (
        (batch, length),
        (batch, past + length),
    ):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; it must be "
            f"({batch}, {length})" + (f" or ({batch}, {past + length})" if past else "")
        )
    mask = attention_mask[:, -length:].bool()
    return None if mask.all() else mask


def document_borders(
    position_ids: Tensor | None,
    segment_ids: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    batch: int,
    length: int,
) -> Tensor | None:
    """Where documents begin that do not go on from the cache: (B, L) bool, or ``None`` for nowhere.

    mask: (B, L) bool or ``None``. lengths: (B,), tokens in the cache, or ``None``.
    """
    border = None
    if position_ids is not None:
        position_ids = _as_rows("position_ids", position_ids, batch, length)
        decoding = length == 1 and mask is None and segment_ids is None
        if decoding and lengths is not None and torch.equal(position_ids[:, 0], lengths):
            return None  # where every operation counts
        before = _previous_valid(position_ids, mask)
        first = before < 0
        border = (position_ids != before + 1) & ~first
        if lengths is not None:
            seen = lengths.unsqueeze(1)
            restart = first & (position_ids == 0) & (seen > 0)
            wrong = first & (position_ids != seen) & ~restart
            if mask is not None:
                wrong = wrong & mask
            if wrong.any():
                raise ValueError(
                    "position_ids do not continue the cache: a row's first position must be the "
                    "number of its tokens in the cache, or 0 for a new document"
                )
            border = border | restart
    if segment_ids is not None:
        segment_ids = _as_rows("segment_ids", segment_ids, batch, length)
        if bool((segment_ids < 0).any()):
            raise ValueError("segment_ids must not be negative; mark padding in attention_mask")
        if position_ids is None and lengths is not None and bool((lengths > 0).any()):
            raise ValueError(
                "segment_ids do not tell whether a row's first document goes on from the cache: "
                "pass position_ids, which go on from its tokens there or begin with 0"
            )
        before = _previous_valid(segment_ids, mask)
        change = (segment_ids != before) & (before >= 0)
        border = change if border is None else border | change
    if border is None:
        return None
    if mask is not None:
        border = border & mask
    return border if border.any() else None


def document_positions(
    segment_ids: Tensor,
    attention_mask: Tensor | None,
    cache: MegalodonCache | None,
    batch: int,
    length: int,
) -> Tensor:
    """Positions (B, L) that say what segment_ids say: 0 where a document begins, and at padding.
    Raises ValueError for a cache that holds text."""
    mask = read_mask(attention_mask, batch, length, 0 if cache is None else cache.positions)
    lengths = None if cache is None else cache.lengths
    border = document_borders(None, segment_ids, mask, lengths, batch, length)
    if mask is None:
        mask = torch.ones(batch, length, dtype=torch.bool, device=segment_ids.device)
    count = mask.long().cumsum(1) - 1
    if border is not None:
        count = count - torch.where(border, count, 0).cummax(1).values
    return count.masked_fill(~mask, 0)


def _as_rows(name: str, ids: Tensor, batch: int, length: int) -> Tensor:
    if ids.dim() == 1:
        ids = ids.unsqueeze(0)
    if ids.dim() != 2 or ids.shape[1] != length or ids.shape[0] not in (1, batch):
        raise ValueError(f"{name} has shape {tuple(ids.shape)}; it must be ({batch}, {length})")
    return ids.expand(batch, length)


def _previous_valid(ids: Tensor, mask: Tensor | None) -> Tensor:
    """The id at the last unmasked place before each one; -1 where there is none."""
    padded = torch.nn.functional.pad(ids, (1, 0), value=-1)  # place t is at t + 1
    places = torch.arange(1, ids.shape[1] + 1, device=ids.device).expand_as(ids)
    if mask is not None:
        places = torch.where(mask, places, 0)
    latest = torch.nn.functional.pad(places.cummax(1).values[:, :-1], (1, 0))
    return padded.gather(1, latest)


def mask_labels(
    labels: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    segment_ids: Tensor | None,
    ignore_index: int = -100,
) -> Tensor:
    """Labels (B, L) without those that no token of the same document predicts: padding, the first
    token after padding, and the first token of a document."""
    batch, length = labels.shape
    mask = read_mask(attention_mask, batch, length, 0)
    border = document_borders(position_ids, segment_ids, mask, None, batch, length)
    if border is not None:
        labels = labels.masked_fill(border, ignore_index)
    if mask is not None:
        predicted = mask & torch.nn.functional.pad(mask[:, :-1], (1, 0), value=True)
        labels = labels.masked_fill(~predicted, ignore_index)
    return labels
