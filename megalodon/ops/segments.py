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

import torch
import torch.nn.functional as F
from torch import Tensor


class Segments:
    """Index maps of one batch of B rows of L positions.

    Args:
        mask: (B, L) bool, False at padding.
        border: (B, L) bool, True at the first token of a document that does not continue from
            the cached state.
        lengths: (B,) int64, tokens that each row's document already has in the cache.
        block: block size of CEMA. chunk: chunk size of attention.
    """

    def __init__(
        self, mask: Tensor, border: Tensor, lengths: Tensor, *, block: int, chunk: int
    ) -> None:
        batch, length = mask.shape
        device = mask.device
        self.has_borders = bool(border.any())
        self.mask, self.any_valid = mask, mask.any(1)  # (B, L), (B,) bool
        positions = torch.arange(length, device=device).expand(batch, length)
        self.last = torch.where(mask, positions, 0).amax(1)  # (B,) the last valid token, or 0
        # (B, L) int64: the document, of which 0 continues from the cached state; the position of
        # its first token; and the index inside of it, without what the cache saw.
        self.document = border.long().cumsum(1)
        self.start = torch.where(border, positions, 0).cummax(1).values
        rank = mask.long().cumsum(1) - 1
        first_rank = torch.where(border, rank, 0).cummax(1).values
        self.index = (rank - first_rank).clamp(min=0)

        # Slots skipped at a border, so that the new document begins at a multiple of `block`.
        previous_first = F.pad(first_rank[:, :-1], (1, 0))
        skipped = torch.where(border, -(rank - previous_first) % block, 0).cumsum(1)
        slot = rank + skipped
        self.block = block
        self.block_used = torch.where(mask, slot + 1, 0).amax(1)  # (B,) slots
        self.num_blocks = max(1, -(-int(self.block_used.max()) // block))
        self.block_slot = torch.where(mask, slot, self.num_blocks * block)  # (B, L)
        document = torch.zeros(batch, self.num_blocks + 1, dtype=torch.int64, device=device)
        document = document.scatter_reduce(1, self.block_slot // block, self.document, "amax")
        self.block_document = document[:, :-1].cummax(1).values  # (B, num_blocks)

        offset = (lengths % chunk).unsqueeze(1)
        self.chunk_position = (self.index + offset * self.continues) % chunk  # (B, L), for RoPE
        slot = offset + rank
        used = torch.where(mask, slot + 1, offset).amax(1)
        self.num_chunks = max(1, -(-int(used.max()) // chunk))
        self.chunk_slot = torch.where(mask, slot, (self.num_chunks + 1) * chunk)  # (B, L)
        # A slot that holds no token is a chunk of its own: it sees itself and nothing sees it.
        slots = torch.arange((self.num_chunks + 1) * chunk + 1, device=device).expand(batch, -1)
        start = torch.where(slots < offset, 0, slots)
        start = start.scatter(1, self.chunk_slot, self.chunk_slot - self.chunk_position)
        # Of each slot (B, num_chunks * chunk), and of each row (B,), where its (last) chunk starts.
        self.chunk_start = start[:, : self.num_chunks * chunk]
        last = self.chunk_slot.take_along_dim(self.last.unsqueeze(1), 1)
        last = start.take_along_dim(last, 1).squeeze(1)
        self.chunk_last = torch.where(self.any_valid, last, 0)

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
        total = sums_over_time(x)
        before = (total - x).take_along_dim(self.start.unsqueeze(-1), 1)
        return total - before.masked_fill(self.continues.unsqueeze(-1), 0.0)


def sums_over_time(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Cumulative sums of x (B, L, K) along L: transposed, for along the last axis a CPU takes half
    the time, and a GPU a fifth."""
    return x.transpose(1, 2).cumsum(2, dtype=dtype).transpose(1, 2)


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
