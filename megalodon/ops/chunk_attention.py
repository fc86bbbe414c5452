"""Causal attention inside consecutive chunks of C tokens, and rotary position embedding.

Ma et al. 2024 (arXiv 2404.08801), section 3.3. A token sees the tokens of its own chunk up to
itself and nothing else; a last, shorter chunk is allowed. The scores are q k^T as they are: the
1/sqrt(d) is part of q and k already.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from .precision import without_autocast
from .segments import Segments, gather_slots, scatter_slots

SCORES_LIMIT = 512
"""On a CPU, the chunk size up to which whole score matrices beat the fused kernel."""

FLASH_LIMIT = 256
"""The largest head that PyTorch's flash attention takes."""


class AttentionState(NamedTuple):
    """Keys (B, C, H, Z/H) and values (B, C, H, E/H) of the current chunk, filled from slot 0.

    How many slots are filled is the number of tokens seen modulo C, which the caller keeps.
    """

    keys: Tensor
    values: Tensor


def rotary_table(
    chunk_size: int, head_dim: int, base: float, device: torch.device | str | None = None
) -> Tensor:
    """cos, -sin and sin of the angles at each position of a chunk: (C, 3, head_dim / 2), float32.

    Su et al. 2021 (arXiv 2104.09864): position m turns pair i by m base^(-2i/d). The angles are
    taken in float64, since a position of a few thousand costs a float32 angle four digits.
    """
    has_it = device is not None and torch.device(device).type in ("cuda", "meta")
    wide: Any = {"dtype": torch.float64, "device": device if has_it else "cpu"}
    exponent = torch.arange(0, head_dim, 2, **wide) / head_dim
    angle = torch.outer(torch.arange(chunk_size, **wide), base**-exponent)
    table = torch.stack([angle.cos(), -angle.sin(), angle.sin()], dim=1)
    return table.to(device, torch.float32)


def apply_rotary_reference(x: Tensor, rotary: Tensor) -> Tensor:
    """The definition, pair by pair. Arguments as :func:`apply_rotary`."""
    cos, _, sin = rotary.to(x.dtype).unsqueeze(-3).unbind(-2)  # (..., L, 1, d/2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def apply_rotary(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + d/2}) of x (B, L, ..., H, d) by rotary (L, ..., 3, d/2), which
    may begin with B."""
    if is_compiling():  # whose loops over the definition are twice as fast
        return apply_rotary_reference(x, rotary)
    cos, sin = rotary.to(x.dtype).unsqueeze(-3).split([1, 2], dim=-2)  # of each half of a head
    halves = x.unflatten(-1, (2, -1))
    return torch.addcmul(halves * cos, halves.flip(-2), sin).flatten(-2)


def chunk_attention_reference(q: Tensor, k: Tensor, v: Tensor, chunk_size: int) -> Tensor:
    """The definition, one token after the other. Arguments as :func:`chunk_attention`."""
    outputs = []
    for t in range(q.shape[1]):
        start = t - t % chunk_size
        scores = torch.einsum("bhd,bshd->bhs", q[:, t], k[:, start : t + 1])
        outputs.append(torch.einsum("bhs,bshd->bhd", scores.softmax(-1), v[:, start : t + 1]))
    return torch.stack(outputs, dim=1)


@without_autocast
def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    *,
    state: AttentionState | None = None,
    offset: int | Tensor = 0,
    segments: Segments | None = None,
    dropout: float = 0.0,
    fused: bool = True,
    return_state: bool = False,
) -> tuple[Tensor, AttentionState | None]:
    """Chunk attention of a whole piece of text, begun anywhere in a chunk.

    Args:
        q, k: (B, L, H, Z/H), already rotated; v: (B, L, H, E/H). L >= 1.
        chunk_size: C.
        state: keys and values of the current chunk so far; needed where offset is not 0.
        offset: tokens of the current chunk that the state holds: an int in [0, C) for all rows,
            or (B,) for a single token whose rows differ.
        segments: where padding and document borders lie, and the rows' offsets; ``None`` for
            plain text.
        dropout: probability with which entries of the attention map are dropped.
        fused: whether scaled_dot_product_attention may be used.
        return_state: whether the state after the last token is wanted. Without autograd the
            given state's own tensors are then written to when L = 1.

    Returns:
        (B, L, H, E/H) in the dtype of v, and the state or ``None``.
    """
    if segments is not None:
        return _segmented(q, k, v, chunk_size, state, segments, dropout, fused, return_state)
    length = q.shape[1]
    in_place = length == 1 and state is not None and return_state and not torch.is_grad_enabled()
    if isinstance(offset, Tensor) or in_place:
        assert state is not None
        return _decode(q, k, v, state, offset, dropout)

    head = min(length, chunk_size - offset) if offset else 0
    pieces = []
    if head:
        assert state is not None
        keys = torch.cat([state.keys[:, :offset].to(k.dtype), k[:, :head]], dim=1)
        values = torch.cat([state.values[:, :offset].to(v.dtype), v[:, :head]], dim=1)
        pieces.append(_attend(q[:, :head], keys, values, dropout, fused))
    whole = (length - head) // chunk_size * chunk_size
    if whole:
        body = slice(head, head + whole)
        chunks = [x[:, body].unflatten(1, (-1, chunk_size)).flatten(0, 1) for x in (q, k, v)]
        y = _attend(chunks[0], chunks[1], chunks[2], dropout, fused)
        pieces.append(y.unflatten(0, (q.shape[0], -1)).flatten(1, 2))
    if head + whole < length:
        rest = slice(head + whole, length)
        pieces.append(_attend(q[:, rest], k[:, rest], v[:, rest], dropout, fused))
    y = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
    if not return_state:
        return y, None
    return y, _next_state(k, v, chunk_size, state, offset)


def whole_scores(x: Tensor, keys: int, fused: bool) -> bool:
    """Whether attention on the device of x to so many keys makes their scores, and keeps them for
    the backward. Arguments as :func:`chunk_attention`."""
    return not fused or (x.device.type == "cpu" and keys <= SCORES_LIMIT)


def of_one_size(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (..., d), or v (..., e), with heads filled up to one size, which PyTorch's flash
    attention wants, where it takes that size at all: zeros change no score."""
    own, size = q.shape[-1], v.shape[-1]
    if max(own, size) <= FLASH_LIMIT:
        if own < size:
            q, k = F.pad(q, (0, size - own)), F.pad(k, (0, size - own))
        elif size < own:
            v = F.pad(v, (0, own - size))
    return q, k, v


def _attend(
    q: Tensor, k: Tensor, v: Tensor, dropout: float, fused: bool, mask: Tensor | None = None
) -> Tensor:
    """Causal attention of (B, Q, H, d) to (B, K, H, d), the queries being the last Q of the keys.

    mask: (B, 1, Q, K) bool, True where a query may look; ``None`` for causal.
    """
    queries, keys = q.shape[1], k.shape[1]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, Q or K, d)
    if not whole_scores(q, keys, fused):
        causal = mask is None and queries == keys
        if mask is None and not causal:
            mask = _causal(queries, keys, q.device)
        size = v.shape[-1]
        q, k, v = of_one_size(q, k, v)
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal, scale=1.0)
        return y[..., :size].transpose(1, 2)
    if queries == 1 and mask is None:
        scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2))
    else:
        bias = q.new_full((queries, keys), -torch.inf)
        bias = bias.triu(keys - queries + 1) if mask is None else bias.masked_fill(mask, 0)
        heads = bias.expand(q.shape[0], q.shape[1], queries, keys).reshape(-1, queries, keys)
        scores = torch.baddbmm(heads, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2))
    weights = scores.softmax(-1, dtype=scores.dtype)  # which autocast would widen
    if dropout:
        weights = F.dropout(weights, dropout)
    return torch.bmm(weights, v.flatten(0, 1)).view(*q.shape[:3], -1).transpose(1, 2)


def _causal(queries: int, keys: int, device: torch.device) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: AttentionState,
    offset: int | Tensor,
    dropout: float,
) -> tuple[Tensor, AttentionState]:
    """One token for each row, at one place in the chunk for all, or at its own in its own."""
    keys, values = state
    if torch.is_grad_enabled():
        keys, values = keys.clone(), values.clone()
    if isinstance(offset, int):
        keys.narrow(1, offset, 1).copy_(k)
        values.narrow(1, offset, 1).copy_(v)
        seen_keys, seen_values, mask = keys[:, : offset + 1], values[:, : offset + 1], None
    else:
        slot = offset.view(-1, 1, 1, 1)
        keys.scatter_(1, slot.expand_as(k), k.to(keys.dtype))
        values.scatter_(1, slot.expand_as(v), v.to(values.dtype))
        seen = torch.arange(keys.shape[1], device=q.device) <= offset.unsqueeze(1)
        seen_keys, seen_values, mask = keys, values, seen[:, None, None]  # (B, 1, 1, C)
    y = _attend(q, seen_keys.to(q.dtype), seen_values.to(v.dtype), dropout, False, mask)
    return y, AttentionState(keys, values)


def _next_state(
    k: Tensor, v: Tensor, chunk_size: int, state: AttentionState | None, offset: int
) -> AttentionState:
    """The current chunk's keys and values after this piece, in buffers of a whole chunk."""
    total = offset + k.shape[1]
    kept = total % chunk_size  # tokens of the chunk in progress
    new = min(kept, k.shape[1])  # of which this piece brought

    def update(x: Tensor, old: Tensor | None) -> Tensor:
        tail = x[:, x.shape[1] - new :]
        if old is not None and kept > new:
            tail = torch.cat([old[:, : kept - new].to(x.dtype), tail], dim=1)
        return F.pad(tail, (0, 0, 0, 0, 0, chunk_size - kept))

    keys, values = state or (None, None)
    return AttentionState(update(k, keys), update(v, values))


def _segmented(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    state: AttentionState | None,
    segments: Segments,
    dropout: float,
    fused: bool,
    return_state: bool,
) -> tuple[Tensor, AttentionState | None]:
    """Rows with padding, documents or offsets of their own, by way of slots."""
    chunks, size = segments.num_chunks, segments.num_chunks * chunk_size

    def to_slots(x: Tensor, cached: Tensor | None = None) -> Tensor:
        return scatter_slots(x, segments.chunk_slot, size + chunk_size, cached)

    def in_chunks(x: Tensor) -> Tensor:
        return x[:, :size].unflatten(1, (chunks, chunk_size)).flatten(0, 1)

    cached_keys, cached_values = state or (None, None)
    keys, values = to_slots(k, cached_keys), to_slots(v, cached_values)
    queries = in_chunks(to_slots(q))
    if segments.has_borders:
        # A chunk of a document may lie across a border of the slots, but reaches no further
        # back than one.
        def with_previous(x: Tensor) -> Tensor:
            now = x[:, :size].unflatten(1, (chunks, chunk_size))
            before = F.pad(now[:, :-1], (0,) * 2 * (now.dim() - 2) + (1, 0))
            return torch.cat([before, now], dim=2).flatten(0, 1)

        window = with_previous(segments.chunk_start + 1)  # 0 where there is no chunk before
        same = window[:, chunk_size:].unsqueeze(-1) == window.unsqueeze(-2)
        mask = (same & _causal(chunk_size, 2 * chunk_size, q.device)).unsqueeze(1)
        y = _attend(queries, with_previous(keys), with_previous(values), dropout, fused, mask)
    else:
        y = _attend(queries, in_chunks(keys), in_chunks(values), dropout, fused)
    y = gather_slots(y.unflatten(0, (-1, chunks)).flatten(1, 2), segments.chunk_slot)
    if not return_state:
        return y, None
    slots = segments.chunk_last.unsqueeze(1) + torch.arange(chunk_size, device=q.device)
    return y, AttentionState(gather_slots(keys, slots), gather_slots(values, slots))
