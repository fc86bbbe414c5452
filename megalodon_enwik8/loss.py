"""Cross-entropy without a float32 copy of all logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

ELEMENTS_AT_A_TIME = 2**20


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log softmax(logits)[target] of each row, in nats: float32 (R,), or float64 where logits are.

    Forward and backward go through the rows in pieces and compute each in float32; between
    them only the logits as they are, and one number a row, are kept.

    logits: (R, V), float. targets: (R,) int64.
    """
    losses: torch.Tensor = _CrossEntropy.apply(logits, targets)
    return losses


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        rows = max(1, ELEMENTS_AT_A_TIME // logits.shape[1])
        normalizer = torch.cat([piece.to(dtype).logsumexp(1) for piece in logits.split(rows)])
        ctx.save_for_backward(logits, targets, normalizer)
        return normalizer - logits.gather(1, targets.unsqueeze(1)).squeeze(1).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, targets, normalizer = ctx.saved_tensors
        rows = max(1, ELEMENTS_AT_A_TIME // logits.shape[1])
        grad_logits = torch.empty_like(logits)
        for into, piece, target, log_sum, weight in zip(
            *(t.split(rows) for t in (grad_logits, logits, targets, normalizer, grad)), strict=True
        ):
            probabilities = (piece.to(log_sum.dtype) - log_sum.unsqueeze(1)).exp_()
            probabilities -= F.one_hot(target, logits.shape[1])
            into.copy_(probabilities.mul_(weight.unsqueeze(1)))
        return grad_logits, None
