"""Short chains of elementwise operations whose backward keeps nothing but their inputs.

PyTorch's own autograd would keep every link of the chain; over all blocks that is a large part
of a training step's memory.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling

from .precision import wide_dtype


def swiglu_reference(gate: Tensor, value: Tensor) -> Tensor:
    """silu(gate) * value (Shazeer 2020, arXiv 2002.05202)."""
    return F.silu(gate) * value


def swiglu(gate: Tensor, value: Tensor) -> Tensor:
    """silu(gate) * value, tensors of one shape and dtype."""
    if is_compiling():
        return swiglu_reference(gate, value)
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
        return _swiglu(gate, value)

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
    if is_compiling():
        return rms_norm_reference(x, weight, eps, dtype)
    if not torch.is_grad_enabled():
        return _rms_norm(x, weight, eps, dtype)[0]
    result: Tensor = _RMSNorm.apply(x, weight, eps, dtype)
    return result


def _rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The result, and 1 / rms (..., 1)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide_dtype(x))
    rstd = torch.rsub(norm.square_(), eps, alpha=-1 / x.shape[-1]).rsqrt_()  # eps + norm / D
    normed = x * rstd
    if weight is not None:
        normed.addcmul_(normed, weight.to(normed.dtype))
    return normed.to(dtype), rstd


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype
    ) -> Tensor:
        normed, rstd = _rms_norm(x, weight, eps, dtype)
        ctx.save_for_backward(x, weight, rstd)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, weight, rstd = ctx.saved_tensors
        normed = x * rstd
        if weight is None:
            grad_weight, along = None, (grad * normed).mean(-1)
        else:
            scale, product = (weight + 1).to(rstd.dtype), grad * normed
            grad_weight = product.flatten(0, -2).sum(0).to(weight.dtype)
            along, grad = (product * scale).mean(-1), grad * scale
        grad_x = torch.addcmul(grad, normed, along.unsqueeze(-1), value=-1).mul_(rstd)
        return grad_x.to(x.dtype), grad_weight, None, None
