"""The layers of a block: parameters around the operations of :mod:`megalodon.ops`."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init

from .configuration_megalodon import MegalodonConfig
from .layout import Layout
from .ops.cema import cema, cema_coefficients, cema_pieces, cema_steps
from .ops.cema_blocks import CEMACoefficients
from .ops.chunk_attention import apply_rotary
from .ops.elementwise import rms_norm, swiglu
from .ops.precision import compute_dtype, wide_dtype
from .ops.timestep_norm import TimestepNormState, timestep_norm


class Float32Module(nn.Module):
    """A module whose parameters stay float32 when the model is cast to a shorter type."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Float32Module":
        def keep_precision(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            shortened = result.dtype.itemsize < 4 <= tensor.dtype.itemsize
            return tensor.to(result.device) if shortened else result

        return super()._apply(keep_precision, recurse)


def _zeros(*shape: int) -> nn.Parameter:
    """Zeros in float32, or in float64 where that is the default."""
    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
    return nn.Parameter(torch.zeros(shape, dtype=dtype))


class MegalodonTimestepNorm(Float32Module):
    """See :func:`megalodon.ops.timestep_norm.timestep_norm`; its dtype is that of RMSNorm."""

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__()
        self.num_groups, self.eps = config.norm_num_groups, config.norm_eps
        self.weight, self.bias = _zeros(config.model_dim), _zeros(config.model_dim)

    def forward(
        self, x: Tensor, state: TimestepNormState | None, layout: Layout
    ) -> tuple[Tensor, TimestepNormState | None]:
        return timestep_norm(
            x,
            self.weight,
            self.bias,
            self.num_groups,
            self.eps,
            state,
            layout.segments,
            compute_dtype(x),
            counts=layout.counts,
            return_state=layout.return_state,
            time=layout.time,
        )


class MegalodonRMSNorm(Float32Module):
    """x / rms(x) * (weight + 1), in the dtype that the next linear layer computes in."""

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.weight = _zeros(config.model_dim)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, compute_dtype(x))


class MegalodonLayerNorm(Float32Module):
    """Layer normalisation whose weight is stored minus one; its dtype is that of RMSNorm."""

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.weight, self.bias = _zeros(config.model_dim), _zeros(config.model_dim)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(wide_dtype(x))
        y = F.layer_norm(wide, self.weight.shape, self.weight + 1, self.bias, self.eps)
        return y.to(compute_dtype(x))


class MegalodonCEMA(Float32Module):
    """See :func:`megalodon.ops.cema.cema`; gamma holds real and imaginary part in its last axis."""

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__()
        dim, order = config.model_dim, config.cema_ndim
        self.alpha, self.delta = _zeros(dim, order), _zeros(dim, order)
        self.theta, self.omega = _zeros(dim), _zeros(dim)
        self.gamma = _zeros(dim, order, 2)

    def forward(
        self, x: Tensor, state: Tensor | None, layout: Layout
    ) -> tuple[Tensor, Tensor | None]:
        if torch.compiler.is_compiling() or layout.kept is None:
            return cema(
                x,
                self._coefficients(),
                state,
                layout.segments,
                return_state=layout.return_state,
                time=layout.time,
            )
        assert state is not None
        one = x.shape[1] == 1
        if (self, one) not in layout.kept:
            layout.kept[self, one] = (cema_steps if one else cema_pieces)(self._coefficients())
        return layout.kept[self, one](x, state)

    def _coefficients(self) -> CEMACoefficients:
        return cema_coefficients(self.alpha, self.delta, self.theta, self.gamma, self.omega)

    def reset_parameters(self) -> None:
        """Initialise as the paper's code does; safe on already loaded parameters."""
        dim = self.alpha.shape[0]
        init.normal_(self.alpha, std=0.2)
        init.normal_(self.delta, std=0.2)
        k = torch.arange(1, dim + 1, dtype=torch.float64, device=self.theta.device)
        frequency = torch.exp(-k * (math.log(dim) / dim))
        order = torch.randperm(dim, device=self.theta.device)
        init.copy_(self.theta, torch.logit(frequency[order], eps=1e-6).to(self.theta.dtype))
        gamma = torch.zeros_like(self.gamma)
        gamma[..., 0].normal_()
        init.copy_(self.gamma, gamma)
        init.trunc_normal_(self.omega, std=0.25, a=-1.0, b=1.0)


class MegalodonQueryKey(Float32Module):
    """Queries and keys from one shared representation: per-head RMS norm, two affine maps, RoPE."""

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__()
        self.num_heads, self.eps = config.num_heads, config.norm_eps
        self.gamma, self.beta = _zeros(2, config.z_dim), _zeros(2, config.z_dim)

    def forward(self, z: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        """z (B, L, Z) -> q, k (B, L, H, Z/H) in the dtype of z."""
        heads = z.view(*z.shape[:2], 1, self.num_heads, -1)  # (B, L, 1, H, Z/H)
        wide = wide_dtype(z)
        normed = rms_norm(heads, None, self.eps, wide)
        scale = (self.gamma + 1).view(2, self.num_heads, -1)
        beta = self.beta.view_as(scale)
        both = torch.addcmul(beta, normed, scale, value=heads.shape[-1] ** -0.5)
        q, k = apply_rotary(both, rotary.unsqueeze(-3)).to(z.dtype).unbind(2)
        return q, k


def drop(x: Tensor, p: float) -> Tensor:
    """Dropout, asked for where p is not 0 alone: that takes longer than a small operation."""
    return F.dropout(x, p) if p else x


def again_in_backward(function: Callable[..., Any], *inputs: Tensor) -> Any:
    """function(*inputs), of which compiled code keeps the inputs and computes the rest again in
    the backward, as the compiler would not do by itself. Not for what draws a mask anew."""
    if not is_dynamo_compiling():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def swiglu_linear(gate: Tensor, value: Tensor, linear: nn.Module, dropout: float) -> Tensor:
    """linear(swiglu(gate, value)), with dropout between the two."""

    def product(gate: Tensor, value: Tensor) -> Tensor:
        y: Tensor = linear(drop(swiglu(gate, value), dropout))
        return y

    return product(gate, value) if dropout else again_in_backward(product, gate, value)


class MegalodonFFN(nn.Module):
    """W_2 (silu(W_1 u) * W_3 u), or W_2 silu(W_1 u); scaled by alpha if `rescale_nffn`."""

    def __init__(self, config: MegalodonConfig, layer_idx: int) -> None:
        super().__init__()
        dim, hidden, bias = config.model_dim, config.ffn_hidden_dim, config.output_ffn_bias
        self.layer_idx = layer_idx
        self.w1 = nn.Linear(dim, hidden, bias=bias)
        self.w2 = nn.Linear(hidden, dim, bias=bias)
        self.w3 = nn.Linear(dim, hidden, bias=bias) if config.swiglu else None
        self.alpha = nn.Parameter(torch.empty(dim)) if config.rescale_nffn else None

    def forward(self, x: Tensor, dropout: float = 0.0) -> Tensor:
        if self.w3 is None:
            y = self.w2(drop(F.silu(self.w1(x)), dropout))
        else:
            y = swiglu_linear(self.w1(x), self.w3(x), self.w2, dropout)
        return y if self.alpha is None else y * self.alpha
