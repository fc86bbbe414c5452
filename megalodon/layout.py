"""How a batch lies: what the masks, positions and cache of a call mean for the operations."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import Kept, MegalodonCache
from .ops.cema import BLOCK
from .ops.segments import Segments
from .ops.timestep_norm import StepCounts, step_counts
from .time_parallel import TimeGroup


@dataclass(frozen=True)
class Layout:
    """What every block of one forward pass shares.

    rotary: (L, 3, d/2) or (B, L, 3, d/2), cos, -sin and sin at each token's place in its chunk.
    offset: tokens of the current chunk that the cache holds; (B,) where one token is decoded.
    segments: padding and document borders, ``None`` for plain text.
    return_state: whether the states after the last token are wanted.
    fused: whether attention runs by PyTorch's fused operation.
    kept: the cache's, where few further tokens are read; else ``None``.
    time: the processes that share the sequence; ``None`` for this one alone.
    counts: for TimestepNorm; ``None`` for a single step.
    """

    rotary: Tensor
    offset: int | Tensor
    segments: Segments | None
    return_state: bool
    fused: bool
    kept: Kept | None
    time: TimeGroup | None
    counts: StepCounts | None

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "Layout":
        """The same on another device. accelerate calls it for each block, so that the blocks of
        one model may lie on several."""
        if self.rotary.device == torch.device(device):
            return self

        def moved(part: Any) -> Any:
            if isinstance(part, Tensor):
                return part.to(device, non_blocking=non_blocking)
            if isinstance(part, StepCounts):
                return StepCounts(*map(moved, part))
            if isinstance(part, (Layout, Segments)):
                part = copy.copy(part)
                vars(part).update({name: moved(each) for name, each in vars(part).items()})
            return part

        return moved(self)


def packed_positions(
    x: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, packing: dict[str, Any]
) -> Tensor | None:
    """The positions (B, L) that say where documents begin in x (B, L, ...), of a call with what
    transformers' own models take beside positions.

    packing: flash-attention's `cu_seq_lens_q` and `cu_seq_lens_k` (documents + 1,), where the
    documents of a single row begin, and its end; `max_length_q` and `max_length_k`, no less than
    the longest of them; `seq_idx` (B, L), each token's document. Without them the positions are
    `position_ids`. `is_causal=True` and `output_router_logits=False` say what holds in any case.

    Raises:
        TypeError: for another keyword. ValueError: for values that say something else than each
            other, than `position_ids`, or than a Megalodon does.
    """
    if not packing:
        return position_ids
    rest = dict(packing)
    for key, only in (("is_causal", True), ("output_router_logits", False)):
        if rest.pop(key, None) not in (None, only):
            raise ValueError(f"{key}={not only}: a Megalodon is causal and has no router")
    ends, key_ends = rest.pop("cu_seq_lens_q", None), rest.pop("cu_seq_lens_k", None)
    longest = [n for key in "qk" if (n := rest.pop(f"max_length_{key}", None)) is not None]
    seq_idx = rest.pop("seq_idx", None)
    if rest:
        raise TypeError(f"forward() got an unexpected keyword argument {next(iter(rest))!r}")
    batch, length = x.shape[:2]
    places = torch.arange(length, device=x.device).expand(batch, length)
    found = []
    if ends is not None or key_ends is not None or longest:
        same = ends is not None and key_ends is not None and torch.equal(ends, key_ends)
        rises = same and ends[0] == 0 and ends[-1] == length and (ends.diff() >= 0).all()
        if batch != 1 or not rises:
            raise ValueError(
                f"cu_seq_lens_q={ends} and cu_seq_lens_k={key_ends} for {batch} rows of {length} "
                "tokens: both must be given, be equal and rise from 0 to the length of a single row"
            )
        ends = ends.to(places)
        found.append(places - ends[torch.searchsorted(ends, places, right=True) - 1])
        if min(longest, default=length) < ends.diff().max():
            raise ValueError(
                f"max_length_q and max_length_k must be {int(ends.diff().max())}, the longest "
                f"document of cu_seq_lens_q, or more; one is {int(min(longest))}"
            )
    if seq_idx is not None:
        if seq_idx.shape != places.shape:
            raise ValueError(
                f"seq_idx has shape {tuple(seq_idx.shape)}; it must be {tuple(places.shape)}"
            )
        begins = F.pad(seq_idx.to(places).diff() != 0, (1, 0), value=True)
        found.append(places - torch.where(begins, places, 0).cummax(1).values)
    if not found:
        return position_ids
    if position_ids is not None:
        found.append(position_ids.to(places))
    if not all(p.shape[-1] == length and (p == found[0]).all() for p in found):
        raise ValueError(
            "cu_seq_lens_q, seq_idx and position_ids differ in where documents begin: give one of "
            "them, or let positions count from 0 in each document"
        )
    if attention_mask is not None and not attention_mask.all():
        raise ValueError("attention_mask has padding, which cu_seq_lens_q and seq_idx cannot name")
    return found[0]


def read_layout(
    x: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: MegalodonCache | None,
    rotary: Tensor,
    chunk_size: int,
    *,
    return_state: bool,
    fused: bool,
    time: TimeGroup | None,
) -> Layout:
    """The layout of x (B, L, D). Raises ValueError for shapes that do not fit."""
    batch, length = x.shape[:2]
    if time is not None:
        time.check(x, chunk_size)
    past = 0 if cache is None else cache.positions
    lengths = None
    if cache is not None and cache.lengths is not None:
        lengths = cache.lengths.to(x.device)  # the last norm may lie on another device
    mask = None
    if attention_mask is not None:
        if attention_mask.shape not in ((batch, length), (batch, past + length)):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; it must be "
                f"({batch}, {length})" + (f" or ({batch}, {past + length})" if past else "")
            )
        mask = attention_mask[:, -length:].bool()
        mask = None if mask.all() else mask
    border = document_borders(position_ids, mask, lengths, batch, length)
    if lengths is not None and attention_mask is not None and attention_mask.shape[1] > length:
        hidden = attention_mask[:, :-length].bool().sum(1).to(x.device) < lengths
        if (hidden if border is None else hidden & ~border.any(1)).any():
            raise ValueError(
                "attention_mask hides tokens that the cache has read, which no state forgets: "
                "begin with a new cache"
            )
    plain = mask is None and border is None
    offset: int | Tensor = 0
    segments = None
    if plain and (cache is None or cache.is_uniform):
        offset = past % chunk_size
        if length == 1:
            rotary = rotary[offset : offset + 1]
        else:
            rotary = rotary[torch.arange(offset, offset + length, device=x.device) % chunk_size]
    elif plain and length == 1 and lengths is not None and return_state:
        offset = lengths % chunk_size
        rotary = rotary[offset].unsqueeze(1)
    elif time is not None:
        raise ValueError(
            "padding and document borders (attention_mask, position_ids) are not served where "
            "processes share a sequence along time"
        )
    else:
        if mask is None:
            mask = torch.ones(batch, length, dtype=torch.bool, device=x.device)
        if border is None:
            border = torch.zeros_like(mask)
        if lengths is None:
            lengths = torch.zeros(batch, dtype=torch.int64, device=x.device)
        segments = Segments(mask, border, lengths, block=BLOCK, chunk=chunk_size)
        rotary = rotary[segments.chunk_position]
    kept = None
    if cache is not None:
        many = length > BLOCK or cache.lengths is None or segments is not None
        if many or torch.is_grad_enabled():
            cache.kept = {}
        else:
            kept = cache.kept
    counts = None
    if length > 1 or segments is not None:
        seen = 0 if time is None else time.rank * length
        counts = step_counts(x, seen if lengths is None else lengths, segments)
    return Layout(rotary, offset, segments, return_state, fused, kept, time, counts)


def document_borders(
    position_ids: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    batch: int,
    length: int,
) -> Tensor | None:
    """Where documents begin that do not go on from the cache: (B, L) bool, or ``None`` for nowhere.

    mask: (B, L) bool or ``None``. lengths: (B,), tokens in the cache, or ``None``.
    """
    if position_ids is None:
        return None
    ids = torch.atleast_2d(position_ids)
    if ids.shape not in ((1, length), (batch, length)):
        raise ValueError(
            f"position_ids has shape {tuple(position_ids.shape)}; it must be ({batch}, {length})"
        )
    ids = ids.expand(batch, length)
    padded = F.pad(ids, (1, 0), value=-1)  # place t is at t + 1
    places = torch.arange(1, length + 1, device=ids.device).expand_as(ids)
    if mask is not None:
        places = torch.where(mask, places, 0)
    latest = F.pad(places.cummax(1).values[:, :-1], (1, 0))
    before = padded.gather(1, latest)  # at the last unmasked place before; -1 where there is none
    first = before < 0
    border = ids != torch.where(first, ids if lengths is None else lengths.unsqueeze(1), before + 1)
    if mask is not None:
        border = border & mask
    if lengths is not None and (border & first & (ids != 0)).any():
        raise ValueError(
            "position_ids do not continue the cache: a row's first position must be the "
            "number of its tokens in the cache, or 0 for a new document"
        )
    return border if border.any() else None


def mask_labels(
    labels: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """Labels (B, L) without those that no token of the same document predicts: padding, the first
    token after padding, and the first token of a document. The mask is (B, L)."""
    batch, length = labels.shape
    mask = None if attention_mask is None else attention_mask.bool()
    border = document_borders(position_ids, mask, None, batch, length)
    if border is not None:
        labels = labels.masked_fill(border, ignore_index)
    if mask is not None:
        predicted = mask & F.pad(mask[:, :-1], (1, 0), value=True)
        labels = labels.masked_fill(~predicted, ignore_index)
    return labels
