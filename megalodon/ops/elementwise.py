"""Short chains of elementwise operations whose backward keeps nothing but their inputs.

PyTorch's own autograd would keep every link of the chain; over all blocks that is a large part
of a training step's memory.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .precision import wide_dtype


def fresh(result: Tensor) -> Tensor:
    """What an autograd function's forward returns. Compiled by PyTorch 2.11, the function would
    give gradients of zero where an operation has handed the result through, as an in-place one
    does, and `.to` what has the dtype already. The compiler fuses the copy with what it copies."""
    return result.clone() if torch.compiler.is_compiling() else result


def swiglu_reference(gate: Tensor, value: Tensor) -> Tensor:
    """silu(gate) * value (Shazeer 2020, arXiv 2002.05202)."""
    return F.silu(gate) * value


def swiglu(gate: Tensor, value: Tensor) -> Tensor:
    """silu(gate) * value, tensors of one shape and dtype."""
    if not torch.is_grad_enabled():
        return _swiglu(gate, value)
    result: Tensor = _SwiGLU.apply(gate, value)
    return result


def _swiglu(gate: Tensor, value: Tensor) -> Tensor:
    return F.silu(gate).mul_(value)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gate, value)
        return fresh(_swiglu(gate, value))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, value = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * value, gate), F.silu(gate).mul_(grad)


def rms_norm_reference(x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight + 1) over the last axis. Arguments as rms_norm."""
    wide = x.to(wide_dtype(x))
    normed = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (normed if weight is None else normed * (weight + 1)).to(dtype)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """Root-mean-square norm (Zhang and Sennrich 2019, arXiv 1910.07467).

    Computed in float32, or float64 where x is.

    Args:
        x: (..., D). weight: (D,), the scale minus one, or ``None`` for no scale.
        eps: added to the mean square.
        dtype: of the result.
    """
    if not torch.is_grad_enabled():
        return _rms_norm(x, weight, eps, dtype)[0]
    result: Tensor = _RMSNorm.apply(x, weight, eps, dtype)
    return result


def _rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The result, and 1 / rms (..., 1)."""
    wide = x.to(wide_dtype(x))
    mean_square = torch.linalg.vecdot(wide, wide).mul_(1 / x.shape[-1])
    rstd = mean_square.add_(eps).rsqrt_().unsqueeze(-1)
    normed = wide * rstd
    if weight is not None:
        normed.addcmul_(normed, weight.to(wide.dtype))
    return normed.to(dtype), rstd


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype
    ) -> Tensor:
        normed, rstd = _rms_norm(x, weight, eps, dtype)
        ctx.save_for_backward(x, weight, rstd)
        return fresh(normed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, weight, rstd = ctx.saved_tensors
        wide, grad = x.to(rstd.dtype), grad.to(rstd.dtype)
        normed = wide * rstd
        grad_weight = None
        if weight is not None:
            grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
            grad = grad * (weight + 1).to(grad.dtype)
        along = torch.linalg.vecdot(grad, normed).unsqueeze(-1) / x.shape[-1]
        grad_x = torch.addcmul(grad, normed, along, value=-1).mul_(rstd)
        return grad_x.to(x.dtype), grad_weight, None, None
