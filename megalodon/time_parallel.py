"""One sequence over several processes along time: each holds a part, and all run side by side.

To what comes behind it a part of a text is its statistics (TimestepNorm) and the state that it
leaves from zero (CEMA): of fixed size, however long the part is. In the middle of an operation
every process tells what its part amounts to, by one all-gather, and goes on from what those before
it amount to together. The operation's backward does the same with the gradients of those behind.
Attention needs nothing, where parts are whole chunks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class TimeGroup:
    """The processes that share each sequence; the rank in the group is the place of the part."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def check(self, x: Tensor, chunk_size: int) -> None:
        """Raise ValueError, in every process, unless all parts have the same shape, (B, L, D), of
        whole chunks."""
        shapes = self.gather(torch.tensor(x.shape, device=x.device)).tolist()
        if any(shape != shapes[0] for shape in shapes):
            raise ValueError(
                f"the parts of a sequence have shapes {', '.join(map(str, map(tuple, shapes)))}; "
                "along time all must be of one length"
            )
        if x.shape[1] % chunk_size:
            raise ValueError(
                f"a part of a sequence has {x.shape[1]} tokens; in {self.size} processes along "
                f"time it must be a multiple of chunk_size={chunk_size}"
            )

    def gather(self, x: Tensor) -> Tensor:
        """x of each process, in the order of the parts: (...) -> (size, ...). Not differentiable:
        an operation's backward gathers in its own right."""
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.stack(parts)
