"""Where padding and document borders lie in a batch: index maps that the operations share.

A row of tokens may hold padding anywhere and several documents one after the other. The first
document of a row continues from the cached state; every other starts afresh. Plain rows need
none of this, and the operations take ``segments=None`` for them.

Three things are derived, once per forward pass:

- the *rank* of a token among the valid ones, and its index inside its document;
- slots in *blocks* for CEMA: every document begins at a block border, so that the carry from
  block to block is cut exactly there;
- slots in *chunks* for attention: the valid tokens of a row close together, behind the tokens of
  the current chunk that the cache holds.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Index maps of one batch of B rows of L positions. See :func:`build_segments`."""

    mask: Tensor  # (B, L) bool, False at padding
    document: Tensor  # (B, L) int64; document 0 continues from the cached state
    start: Tensor  # (B, L) int64, position of the first token of the own document
    index: Tensor  # (B, L) int64, index inside the document, without what the cache saw
    last: Tensor  # (B,) int64, position of the last valid token (0 if there is none)
    any_valid: Tensor  # (B,) bool

    block: int
    num_blocks: int
    block_slot: Tensor  # (B, L) slot in the blocks; num_blocks * block for padding
    block_document: Tensor  # (B, num_blocks)
    block_used: Tensor  # (B,) slots used in the blocks

    num_chunks: int
    chunk_slot: Tensor  # (B, L) slot in the chunks; (num_chunks + 1) * chunk for padding
    chunk_position: Tensor  # (B, L) position inside the chunk, for RoPE
    chunk_start: Tensor  # (B, num_chunks * chunk) slot at which the chunk of each slot starts
    chunk_last: Tensor  # (B,) slot at which the row's last chunk starts
    has_borders: bool

    @property
    def continues(self) -> Tensor:
        """(B, L) bool, True where the entry state belongs to the token's document."""
        return self.document == 0

    def count(self, before: Tensor) -> Tensor:
        """Tokens of the own document up to and including each token: (B,) -> (B, L)."""
        return self.index + 1 + before.unsqueeze(1) * self.continues

    def final(self, x: Tensor, before: Tensor) -> Tensor:
        """x (B, L, K) at each row's last token; `before` (B, K) in rows without one."""
        last = x.take_along_dim(self.last.view(-1, 1, 1), 1).squeeze(1)
        return torch.where(self.any_valid.unsqueeze(1), last, before)

    def final_count(self, before: Tensor) -> Tensor:
        """Tokens of the row's last document after this batch: (B,) -> (B,)."""
        return self.final(self.count(before).unsqueeze(-1), before.unsqueeze(-1)).squeeze(-1)

    def cumsum(self, x: Tensor) -> Tensor:
        """Cumulative sum of x (B, L, K) over tokens, begun anew with each document."""
        x = x.masked_fill(~self.mask.unsqueeze(-1), 0.0)
        total = x.cumsum(1)
        before = (total - x).take_along_dim(self.start.unsqueeze(-1), 1)
        return total - before.masked_fill(self.continues.unsqueeze(-1), 0.0)


def build_segments(
    mask: Tensor, border: Tensor, lengths: Tensor, *, block: int, chunk: int
) -> Segments:
    """Derive the index maps.

    Args:
        mask: (B, L) bool, False at padding.
        border: (B, L) bool, True at the first token of a document that does not continue from
            the cached state.
        lengths: (B,) int64, tokens that each row's document already has in the cache.
        block: block size of CEMA. chunk: chunk size of attention.
    """
    batch, length = mask.shape
    device = mask.device
    border = border & mask
    positions = torch.arange(length, device=device).expand(batch, length)
    rank = mask.long().cumsum(1) - 1
    document = border.long().cumsum(1)
    start = torch.where(border, positions, 0).cummax(1).values
    first_rank = torch.where(border, rank, 0).cummax(1).values
    index = (rank - first_rank).clamp(min=0)
    any_valid = mask.any(1)
    last = torch.where(mask, positions, 0).amax(1)

    # Slots skipped at a border, so that the new document begins at a multiple of `block`.
    previous_first = torch.nn.functional.pad(first_rank[:, :-1], (1, 0))
    skipped = torch.where(border, -(rank - previous_first) % block, 0).cumsum(1)
    block_slot = rank + skipped
    block_used = torch.where(mask, block_slot + 1, 0).amax(1)
    num_blocks = max(1, -(-int(block_used.max()) // block))
    trash = num_blocks * block
    block_slot = torch.where(mask, block_slot, trash)
    block_document = torch.zeros(batch, num_blocks + 1, dtype=torch.int64, device=device)
    block_document = block_document.scatter_reduce(1, block_slot // block, document, "amax")
    block_document = block_document[:, :num_blocks].cummax(1).values

    offset = (lengths % chunk).unsqueeze(1)
    in_document = index + offset * (document == 0)
    chunk_position = in_document % chunk
    chunk_slot = offset + rank
    used = torch.where(mask, chunk_slot + 1, offset).amax(1)
    num_chunks = max(1, -(-int(used.max()) // chunk))
    chunk_slot = torch.where(mask, chunk_slot, (num_chunks + 1) * chunk)
    # A slot that holds no token is a chunk of its own: it sees itself and nothing sees it.
    slots = torch.arange((num_chunks + 1) * chunk + 1, device=device).expand(batch, -1)
    chunk_start = torch.where(slots < offset, 0, slots)
    chunk_start = chunk_start.scatter(1, chunk_slot, chunk_slot - chunk_position)
    chunk_last = chunk_start.take_along_dim(
        chunk_slot.take_along_dim(last.unsqueeze(1), 1), 1
    ).squeeze(1)

    return Segments(
        mask=mask,
        document=document,
        start=start,
        index=index,
        last=last,
        any_valid=any_valid,
        block=block,
        num_blocks=num_blocks,
        block_slot=block_slot,
        block_document=block_document,
        block_used=block_used,
        num_chunks=num_chunks,
        chunk_slot=chunk_slot,
        chunk_position=chunk_position,
        chunk_start=chunk_start[:, : num_chunks * chunk],
        chunk_last=torch.where(any_valid, chunk_last, 0),
        has_borders=bool(border.any()),
    )


def scatter_slots(x: Tensor, slot: Tensor, size: int, first: Tensor | None = None) -> Tensor:
    """Lay x (B, L, ...) out by slot (B, L) in a buffer (B, size, ...) of zeros, behind the slots
    that `first` brings, if any; one slot more, the last, takes what is padding and is cut off."""
    buffer = x.new_zeros(x.shape[0], size + 1, *x.shape[2:])
    if first is not None:
        buffer = torch.cat([first.to(x.dtype), buffer[:, first.shape[1] :]], dim=1)
    return buffer.scatter(1, _expand(slot, x), x)[:, :size]


def gather_slots(x: Tensor, slot: Tensor) -> Tensor:
    """The inverse of :func:`scatter_slots`: (B, size, ...) -> (B, L, ...), zero at padding."""
    padded = torch.cat([x, x.new_zeros(x.shape[0], 1, *x.shape[2:])], dim=1)
    slot = slot.clamp(max=x.shape[1])
    return padded.gather(1, _expand(slot, x))


def _expand(slot: Tensor, x: Tensor) -> Tensor:
    return slot.reshape(*slot.shape, *(1,) * (x.dim() - 2)).expand(*slot.shape, *x.shape[2:])
