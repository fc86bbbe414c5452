"""CEMA: the complex exponential moving average, in real arithmetic.

Ma et al. 2024 (arXiv 2404.08801), section 3.1. Per channel d and order n = 1..N::

    h_t = q h_{t-1} + p x_t                             h complex
    y_t = Re(sum_n g_n h_{t,n}) + omega x_t             g = gamma / sqrt(N)

    p = sigmoid(alpha),  q = rho exp(i phi),  rho = 1 - sigmoid(alpha) sigmoid(delta)
    phi = n sigmoid(theta) 2 pi / N

States are real tensors (B, D, N, 2) that hold real and imaginary part.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import without_autocast
from .segments import Segments, gather_slots, scatter_slots

BLOCK = 64
"""Longest block of the block-parallel form; a power of two, so that angles reduce exactly."""


class CEMACoefficients(NamedTuple):
    """p, log_rho, turns, g_re, g_im: (D, N); omega: (D,). turns is phi / (2 pi)."""

    p: Tensor
    log_rho: Tensor
    turns: Tensor
    g_re: Tensor
    g_im: Tensor
    omega: Tensor


@without_autocast
def cema_coefficients(
    alpha: Tensor, delta: Tensor, theta: Tensor, gamma: Tensor, omega: Tensor
) -> CEMACoefficients:
    """Coefficients from the parameters: alpha, delta (D, N), theta, omega (D,), gamma (D, N, 2).

    Computed in float32, or in float64 where the parameters are.
    """
    dtype = torch.promote_types(alpha.dtype, torch.float32)
    p = alpha.to(dtype).sigmoid()
    log_rho = torch.log1p(-p * delta.to(dtype).sigmoid())
    order = alpha.shape[1]
    n = torch.arange(1, order + 1, dtype=dtype, device=alpha.device)
    turns = theta.to(dtype).sigmoid().unsqueeze(-1) * (n / order)
    g = gamma.to(dtype) / math.sqrt(order)
    return CEMACoefficients(p, log_rho, turns, g[..., 0], g[..., 1], omega.to(dtype))


def _powers(c: CEMACoefficients, exponent: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of q^t, (D, N, K), for exponents t of shape (K,) or (..., 1).

    The magnitude is exp(t log rho); the angle is reduced to one turn before it is scaled.
    """
    exponent = exponent.to(c.log_rho.dtype)
    magnitude = (c.log_rho.unsqueeze(-1) * exponent).exp()
    turns = c.turns.unsqueeze(-1) * exponent
    angle = (turns - turns.detach().floor()) * (2 * math.pi)
    return magnitude * angle.cos(), magnitude * angle.sin()


def cema_reference(
    x: Tensor, c: CEMACoefficients, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence, one step after the other. Arguments as :func:`cema`."""
    q = torch.polar(c.log_rho.exp(), c.turns * (2 * math.pi))
    g = torch.complex(c.g_re, c.g_im)
    u = x.to(c.p.dtype)
    if state is None:
        state = u.new_zeros(x.shape[0], *c.p.shape, 2)
    h = torch.view_as_complex(state.contiguous())
    outputs = []
    for t in range(x.shape[1]):
        h = q * h + c.p * u[:, t].unsqueeze(-1)
        outputs.append((g * h).sum(-1).real + c.omega * u[:, t])
    return torch.stack(outputs, dim=1).to(x.dtype), torch.view_as_real(h)


@without_autocast
def cema(
    x: Tensor,
    c: CEMACoefficients,
    state: Tensor | None = None,
    segments: Segments | None = None,
    *,
    return_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """CEMA of a whole piece of text at once, in blocks of T steps, as real matrix products.

    1. inside a block, y is a Toeplitz matrix of the kernel times x;
    2. each block is summed up in the state that it would leave from zero;
    3. a scan over the blocks gives the state on entry to each;
    4. which adds to the block's outputs.

    Work O(L (T + N)), memory O(L), per channel.

    Args:
        x: (B, L, D), L >= 1.
        c: coefficients, see :func:`cema_coefficients`; all arithmetic is in their dtype.
        state: (B, D, N, 2), the state on entry; ``None`` for zero.
        segments: where padding and document borders lie; ``None`` for plain text.
        return_state: whether the final state is wanted.

    Returns:
        y (B, L, D) in the dtype of x; the state (B, D, N, 2) after the last step, or ``None``.
    """
    if x.shape[1] == 1 and segments is None:
        return _step(x, c, state)
    if segments is None:
        block = min(BLOCK, x.shape[1])
        size = -(-x.shape[1] // block) * block
        u = F.pad(x, (0, 0, 0, size - x.shape[1])) if size > x.shape[1] else x
    else:
        block, size = segments.block, segments.num_blocks * segments.block
        u = scatter_slots(x, segments.block_slot, size)
    batch, num_blocks, dim = x.shape[0], size // block, x.shape[2]
    u = u.to(c.p.dtype).view(batch, num_blocks, block, dim).permute(3, 2, 0, 1)
    u = u.reshape(dim, block, batch * num_blocks)  # (D, T, B * blocks)

    steps = torch.arange(block, device=x.device)
    re, im = _powers(c, steps)  # (D, N, T)
    kernel = torch.einsum("dn,dnt->dt", c.p * c.g_re, re) - torch.einsum(
        "dn,dnt->dt", c.p * c.g_im, im
    )
    kernel = torch.cat([kernel[:, :1] + c.omega.unsqueeze(-1), kernel[:, 1:]], dim=1)
    toeplitz = _lower_toeplitz(kernel)  # (D, T, T)
    summary = torch.cat([re, im], dim=1).flip(-1) * torch.cat([c.p, c.p], dim=1).unsqueeze(-1)

    if num_blocks == 1 and state is None and segments is None:
        y = torch.bmm(toeplitz, u)
        entry = None
    else:
        entry = _entry_states(torch.bmm(summary, u), c, block, state, batch, segments)
        next_re, next_im = _powers(c, steps + 1)
        g_re, g_im = c.g_re.unsqueeze(-1), c.g_im.unsqueeze(-1)
        readout = torch.cat(
            [g_re * next_re - g_im * next_im, -g_re * next_im - g_im * next_re], dim=1
        )
        y = torch.baddbmm(torch.bmm(toeplitz, u), readout.transpose(1, 2), entry.flatten(2))

    y = y.view(dim, block, batch, num_blocks).permute(2, 3, 1, 0).reshape(batch, size, dim)
    y = y.to(x.dtype)
    y = y[:, : x.shape[1]] if segments is None else gather_slots(y, segments.block_slot)
    if not return_state:
        return y, None
    u = u.view(dim, block, batch, num_blocks)
    return y, _final_state(u, summary, entry, c, x.shape[1], segments)


def _step(x: Tensor, c: CEMACoefficients, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """One step of the recurrence, for decoding."""
    u = x[:, 0].to(c.p.dtype)
    pu = c.p * u.unsqueeze(-1)  # (B, D, N)
    re, im = pu, torch.zeros_like(pu)
    if state is not None:
        q_re, q_im = (part.squeeze(-1) for part in _powers(c, x.new_ones(1)))
        h_re, h_im = state.unbind(-1)
        re, im = re + q_re * h_re - q_im * h_im, q_re * h_im + q_im * h_re
    y = (c.g_re * re - c.g_im * im).sum(-1) + c.omega * u
    return y.unsqueeze(1).to(x.dtype), torch.stack([re, im], dim=-1)


def _lower_toeplitz(kernel: Tensor) -> Tensor:
    """(D, T) -> (D, T, T) with [t, s] = kernel[t - s] for s <= t and 0 above.

    A row of length 2T repeated T times and read with row length 2T - 1 shifts by one per row;
    its backward is a plain sum, where that of indexing would be a scattered one.
    """
    dim, size = kernel.shape
    row = F.pad(kernel, (0, size))
    rows = row.unsqueeze(1).expand(dim, size, 2 * size).reshape(dim, 2 * size * size)
    rows = rows[:, : size * (2 * size - 1)].view(dim, size, 2 * size - 1)
    return rows[:, :, :size].transpose(1, 2)


def _entry_states(
    summary: Tensor,
    c: CEMACoefficients,
    block: int,
    state: Tensor | None,
    batch: int,
    segments: Segments | None,
) -> Tensor:
    """States on entry to each block, (D, 2N, B, blocks), from the blocks' sums (D, 2N, B * blocks).

    An inclusive scan of h_{b+1} = q^T h_b + s_b by doubling: after round k, every entry has
    taken in the 2^k blocks before it.
    """
    dim, order = c.p.shape
    summary = summary.view(dim, 2, order, batch, -1)
    if state is None:
        first = summary.new_zeros(dim, 2, order, batch, 1)
    else:
        first = state.to(summary.dtype).permute(1, 3, 2, 0).unsqueeze(-1)
    scan = torch.cat([first, summary[..., :-1]], dim=-1)
    re, im = scan.unbind(1)  # (D, N, B, blocks): [b] is the state at the end of block b - 1
    owner = None
    if segments is not None:
        owner = F.pad(segments.block_document[:, :-1], (1, 0))
    shift = 1
    while shift < re.shape[-1]:
        exponent = torch.tensor([block * shift], device=re.device)
        q_re, q_im = (part.unsqueeze(-1) for part in _powers(c, exponent))
        past_re, past_im = re[..., :-shift], im[..., :-shift]
        if owner is not None:
            same = (owner[:, shift:] == owner[:, :-shift]).to(re.dtype)
            past_re, past_im = past_re * same, past_im * same
        re, im = (
            re + F.pad(q_re * past_re - q_im * past_im, (shift, 0)),
            im + F.pad(q_re * past_im + q_im * past_re, (shift, 0)),
        )
        shift *= 2
    if segments is not None and owner is not None:
        same = (owner == segments.block_document).to(re.dtype)
        re, im = re * same, im * same
    return torch.cat([re, im], dim=1)


def _final_state(
    u: Tensor,
    summary: Tensor,
    entry: Tensor | None,
    c: CEMACoefficients,
    length: int,
    segments: Segments | None,
) -> Tensor:
    """The state (B, D, N, 2) after the last step; u is (D, T, B, blocks)."""
    dim, block, batch, num_blocks = u.shape
    order = c.p.shape[1]
    if segments is None:
        used = length - (num_blocks - 1) * block
        # The last `used` columns hold the powers used - 1 .. 0.
        tail = torch.bmm(summary[..., block - used :], u[:, :used, :, -1])
        last = None if entry is None else entry[..., -1]
        exponent = torch.tensor([used], device=u.device)
    else:
        assert entry is not None
        index = (segments.block_used - 1).clamp(min=0) // block
        exponent = segments.block_used - index * block  # (B,), 0 for a row without tokens
        slots = torch.arange(block, device=u.device) - block + exponent.unsqueeze(1)
        slots = torch.where(slots >= 0, slots + index.unsqueeze(1) * block, num_blocks * block)
        rows = u.permute(2, 3, 1, 0).reshape(batch, num_blocks * block, dim)
        aligned = gather_slots(rows, slots)  # (B, T, D), the tail moved to the block's end
        tail = torch.bmm(summary, aligned.permute(2, 1, 0))
        last = entry.take_along_dim(index.view(1, 1, -1, 1), -1).squeeze(-1)
    tail_re, tail_im = tail.split(order, dim=1)  # (D, N, B)
    if last is not None:
        q_re, q_im = _powers(c, exponent)  # (D, N, B or 1)
        h_re, h_im = last.split(order, dim=1)
        tail_re = tail_re + q_re * h_re - q_im * h_im
        tail_im = tail_im + q_re * h_im + q_im * h_re
    return torch.stack([tail_re, tail_im], dim=-1).permute(2, 0, 1, 3).contiguous()
