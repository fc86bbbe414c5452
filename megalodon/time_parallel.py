"""One sequence over several processes along time: each holds a part, and all run side by side.

To what comes behind it a part of a text is its statistics (TimestepNorm) and the state that it
leaves from zero (CEMA): of fixed size, however long the part is. Every process sums its part up,
one all-gather tells the summaries, each folds those of the parts before its own into the state on
entry, and the ordinary operation goes on from there. Attention needs nothing, where parts are whole
chunks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .ops.cema import cema_summary, fold_states
from .ops.cema_blocks import CEMACoefficients
from .ops.timestep_norm import TimestepNormState, merge_parts, part_statistics


class TimeGroup:
    """The processes that share each sequence; the rank in the group is the place of the part."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def check(self, x: Tensor, chunk_size: int) -> None:
        """Raise ValueError, in every process, unless all parts have the same shape, (B, L, D), of
        whole chunks."""
        shape = torch.tensor(x.shape, device=x.device)
        shapes = [torch.empty_like(shape) for _ in range(self.size)]
        dist.all_gather(shapes, shape, group=self.group)
        found = [tuple(each.tolist()) for each in shapes]
        if len(set(found)) > 1:
            raise ValueError(
                f"the parts of a sequence have shapes {', '.join(map(str, found))}; along time "
                "all must be of one length"
            )
        if x.shape[1] % chunk_size:
            raise ValueError(
                f"a part of a sequence has {x.shape[1]} tokens; in {self.size} processes along "
                f"time it must be a multiple of chunk_size={chunk_size}"
            )

    @torch.compiler.disable
    def norm_entry(self, x: Tensor, num_groups: int) -> TimestepNormState:
        """The statistics of all parts before this one, for x (B, L, D)."""
        return merge_parts(self._gather(part_statistics(x, num_groups)), self.rank, x.shape[1])

    @torch.compiler.disable
    def cema_entry(self, x: Tensor, c: CEMACoefficients) -> Tensor:
        """The state (B, D, N, 2) that all parts before this one leave, for x (B, L, D)."""
        return fold_states(self._gather(cema_summary(x, c)), c, x.shape[1], self.rank)

    def _gather(self, x: Tensor) -> Tensor:
        gathered: Tensor = _AllGather.apply(x, self.group)
        return gathered


class _AllGather(torch.autograd.Function):
    """(...) of each process -> (K, ...) in all; what reaches its gradient in any comes back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        mine = torch.empty_like(grad[0])
        dist.reduce_scatter(mine, list(grad.contiguous().unbind()), group=ctx.group)
        return mine, None
