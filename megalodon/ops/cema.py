"""CEMA: the complex exponential moving average.

Ma et al. 2024 (arXiv 2404.08801), section 3.1. Per channel d and order n = 1..N::

    h_t = q h_{t-1} + p x_t                             h complex
    y_t = Re(sum_n g_n h_{t,n}) + omega x_t             g = gamma / sqrt(N)

    p = sigmoid(alpha),  q = rho exp(i phi),  rho = 1 - sigmoid(alpha) sigmoid(delta)
    phi = n sigmoid(theta) 2 pi / N

States are real tensors (B, D, N, 2) that hold real and imaginary part, so that they may be traced,
cast and saved like any other; neither autograd nor a compiler ever meets a complex one.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .cema_blocks import CEMACoefficients, cema_blocks, q_powers
from .precision import wide_dtype, without_autocast
from .scan import complex_power
from .segments import Segments, gather_slots, scatter_slots

BLOCK = 32
"""Longest block of the block-parallel form; a power of two, so that angles reduce exactly."""


@without_autocast
def cema_coefficients(
    alpha: Tensor, delta: Tensor, theta: Tensor, gamma: Tensor, omega: Tensor
) -> CEMACoefficients:
    """Coefficients from the parameters: alpha, delta (D, N), theta, omega (D,), gamma (D, N, 2).

    Computed in float32, or in float64 where the parameters are.
    """
    dtype = wide_dtype(alpha)
    p = alpha.to(dtype).sigmoid()
    log_rho = torch.log1p(-p * delta.to(dtype).sigmoid())
    order = alpha.shape[1]
    n = torch.arange(1, order + 1, dtype=dtype, device=alpha.device)
    turns = theta.to(dtype).sigmoid().unsqueeze(-1) * (n / order)
    g = gamma.to(dtype) / math.sqrt(order)
    return CEMACoefficients(p, log_rho, turns, g[..., 0], g[..., 1], omega.to(dtype))


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

    Work O(L (T + N)), memory O(L), per channel. The products are taken in the dtype of x, the
    scan and the state in that of the coefficients.

    Args:
        x: (B, L, D), L >= 1.
        c: coefficients, see :func:`cema_coefficients`.
        state: (B, D, N, 2), the state on entry; ``None`` for zero.
        segments: where padding and document borders lie; ``None`` for plain text.
        return_state: whether the final state is wanted.

    Returns:
        y (B, L, D) in the dtype of x; the state (B, D, N, 2) after the last step, or ``None``.
    """
    if x.shape[1] == 1 and segments is None:
        return _traceable_step(x, c, state)
    keep = None
    if segments is None:
        block = min(BLOCK, x.shape[1])
    else:
        block = segments.block
        x = scatter_slots(x, segments.block_slot, segments.num_blocks * block)
        owner = F.pad(segments.block_document[:, :-1], (1, 0))
        keep = (owner == segments.block_document).to(c.p.dtype)
    y, entries = cema_blocks(x, c, state, keep, block)
    if segments is not None:
        y = gather_slots(y, segments.block_slot)
    if not return_state:
        return y, None
    return y, _final_state(x, entries, c, block, segments)


def _traceable_step(x: Tensor, c: CEMACoefficients, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """One step of the recurrence, which autograd and a compiler can follow."""
    u = x[:, 0].to(c.p.dtype)
    re = c.p * u.unsqueeze(-1)  # (B, D, N)
    im = torch.zeros_like(re)
    if state is not None:
        q_re, q_im = complex_power(c.log_rho, c.turns)
        h_re, h_im = state.unbind(-1)
        re = torch.addcmul(torch.addcmul(re, q_re, h_re), q_im, h_im, value=-1)
        im = torch.addcmul(q_re * h_im, q_im, h_re)
    read = (c.g_re * re - c.g_im * im).sum(-1)
    y = torch.addcmul(read, c.omega, u)
    return y.unsqueeze(1).to(x.dtype), torch.stack([re, im], dim=-1)


def _final_state(
    x: Tensor, entries: Tensor, c: CEMACoefficients, block: int, segments: Segments | None
) -> Tensor:
    """The state (B, D, N, 2) after the last step of x (B, L, D)."""
    batch, length, _ = x.shape
    if segments is None:
        used = (length - 1) % block + 1
        tail, before = x[:, -used:], (length - 1) // block  # blocks before the last
        last = entries[:, before]  # (B, D, N, 2)
        count: int | Tensor = used
    else:
        index = (segments.block_used - 1).clamp(min=0) // block
        count = segments.block_used - index * block  # (B,), 0 for a row without tokens
        slots = torch.arange(block, device=x.device) - block + count.unsqueeze(1)
        slots = torch.where(slots >= 0, slots + index.unsqueeze(1) * block, length)
        tail = gather_slots(x, slots)  # moved to its block's end
        last = entries[torch.arange(batch, device=x.device), index]
    # The powers of a block's matrices come cheaper, but neither differentiable nor traceable.
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        steps = torch.arange(tail.shape[1] - 1, -1, -1, device=x.device).view(-1, 1, 1)
        powers = torch.stack(complex_power(c.log_rho, c.turns, steps), dim=-1)  # (T, D, N, 2)
        exponent = torch.as_tensor(count, device=x.device)[..., None, None]
        q_re, q_im = complex_power(c.log_rho, c.turns, exponent)
    else:
        all_powers = torch.view_as_real(q_powers(c, tail.shape[1]))
        powers = all_powers[:-1].flip(0)
        q_re, q_im = all_powers[count].unbind(-1)
    # Multiplied and summed: as a batched product it would be D tiny ones.
    added = (tail.to(c.p.dtype)[..., None, None] * powers).sum(1) * c.p.unsqueeze(-1)
    re, im = last.unbind(-1)
    return added + torch.stack([q_re * re - q_im * im, q_re * im + q_im * re], dim=-1)


@without_autocast
def cema_summary(x: Tensor, c: CEMACoefficients) -> Tensor:
    """The state (B, D, N, 2) that x (B, L, D) leaves from zero: in blocks, as in :func:`cema`."""
    block = min(BLOCK, x.shape[1])
    x = F.pad(x, (0, 0, -x.shape[1] % block, 0))  # zeros in front leave nothing
    blocks = x.unflatten(1, (-1, block)).to(c.p.dtype)  # (B, M, T, D)
    steps = torch.arange(block - 1, -1, -1, device=x.device).view(-1, 1, 1)
    powers = torch.stack(complex_power(c.log_rho, c.turns, steps), dim=-1)  # (T, D, N, 2)
    sums = torch.einsum("bmtd,tdnc->mbdnc", blocks, powers * c.p.unsqueeze(-1))
    return fold_states(sums, c, block, len(sums))


def fold_states(parts: Tensor, c: CEMACoefficients, length: int, count: int) -> Tensor:
    """The state (B, D, N, 2) after the first `count` of M parts of `length` steps, which leave the
    states `parts` (M, B, D, N, 2) from zero: the sum of q^((count - 1 - m) length) parts_m. The
    other parts get a gradient as well, of zero."""
    ages = count - 1 - torch.arange(len(parts), device=parts.device)
    counts = (ages >= 0).view(-1, 1, 1).to(parts.dtype)
    exponents = ages.clamp(min=0).view(-1, 1, 1)
    w_re, w_im = complex_power(c.log_rho, c.turns, exponents, scale=length)  # (M, D, N)
    w_re, w_im = (counts * w_re).unsqueeze(1), (counts * w_im).unsqueeze(1)
    re, im = parts.unbind(-1)
    return torch.stack([w_re * re - w_im * im, w_re * im + w_im * re], dim=-1).sum(0)


class CEMAStepCoefficients(NamedTuple):
    """What the steps of a decoding have in common. p, q: complex (D, N); read: (D, 2N), real and
    imaginary parts alternating; omega: (D,)."""

    p: Tensor
    q: Tensor
    read: Tensor
    omega: Tensor


def cema_step_coefficients(c: CEMACoefficients) -> CEMAStepCoefficients:
    """The coefficients as :func:`cema_step` takes them."""
    q = torch.complex(*complex_power(c.log_rho, c.turns))
    read = torch.stack([c.g_re, -c.g_im], dim=-1).flatten(-2)
    return CEMAStepCoefficients(c.p.to(q.dtype), q, read, c.omega.clone())


@without_autocast
def cema_step(x: Tensor, c: CEMAStepCoefficients, state: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the recurrence with few operations, for decoding: x (B, 1, D); else as
    :func:`cema`."""
    u = x[:, 0].to(c.omega.dtype)
    before = torch.view_as_complex(state.to(u.dtype).contiguous())
    after = torch.view_as_real(torch.addcmul(c.p * u.unsqueeze(-1), c.q, before))
    y = torch.addcmul(torch.linalg.vecdot(c.read, after.flatten(-2)), c.omega, u)
    return y.unsqueeze(1).to(x.dtype), after
