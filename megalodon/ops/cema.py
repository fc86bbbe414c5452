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
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..time_parallel import TimeGroup
from .cema_blocks import (
    CEMACoefficients,
    block_matrices,
    by_channel,
    by_time,
    cema_blocks,
    cema_blocks_of_part,
    toeplitz,
)
from .precision import wide_dtype, without_autocast
from .scan import complex_power, q_powers
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
    # Within a rounding of 1, so that rho is not 0 where both sigmoids are 1: log 0 times 0.
    most = 1 - torch.finfo(dtype).eps / 2
    log_rho = torch.log1p(p * delta.to(dtype).sigmoid() * -most)
    order = alpha.shape[1]
    turns = torch.linspace(1 / order, 1, order, dtype=dtype, device=alpha.device)
    turns = theta.to(dtype).sigmoid().unsqueeze(-1) * turns
    g = gamma.to(dtype) / math.sqrt(order)
    return CEMACoefficients(p, torch.stack([log_rho, turns], dim=-1), g, omega.to(dtype))


def cema_reference(
    x: Tensor, c: CEMACoefficients, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence, one step after the other. Arguments as :func:`cema`."""
    q = torch.polar(c.log_q[..., 0].exp(), c.log_q[..., 1] * (2 * math.pi))
    g = torch.view_as_complex(c.g)
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
    time: TimeGroup | None = None,
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
        time: the processes that share the text; then there is no state, neither before nor after,
            and there are no segments. ``None``: x is all of it.

    Returns:
        y (B, L, D) in the dtype of x; the state (B, D, N, 2) after the last step, or ``None``.
    """
    length = x.shape[1]
    if time is not None:
        return cema_blocks_of_part(x, c, math.gcd(BLOCK, length), time), None
    if segments is not None:
        return _cema_segments(x, c, state, segments, return_state=return_state)
    if length == 1:
        return _traceable_step(x, c, state)
    rest = length % BLOCK if length > BLOCK else 0
    if return_state and rest:  # the state after the last step is one that a block leaves
        y, state = cema(x[:, :-rest], c, state)
        y_rest, state = cema(x[:, -rest:], c, state)
        return torch.cat([y, y_rest], dim=1), state
    y, states = cema_blocks(x, c, state, None, min(BLOCK, length))
    return y, states[:, :, -1].transpose(0, 1) if return_state else None


def _cema_segments(
    x: Tensor, c: CEMACoefficients, state: Tensor | None, segments: Segments, *, return_state: bool
) -> tuple[Tensor, Tensor | None]:
    """:func:`cema` of rows with padding and document borders."""
    block, document = segments.block, segments.block_document
    x = scatter_slots(x, segments.block_slot, segments.num_blocks * block)
    first = x.new_zeros(len(x), *c.log_q.shape, dtype=c.p.dtype) if state is None else state
    owner = F.pad(document[:, :-1], (1, 0))  # of what comes to a block
    first = first * (document[:, 0] == 0).view(-1, 1, 1, 1)
    y, states = cema_blocks(x, c, first, document, block)
    y = gather_slots(y, segments.block_slot)
    if not return_state:
        return y, None
    rows = torch.arange(len(x), device=x.device)
    last = (segments.block_used - 1).clamp(min=0) // block
    count = segments.block_used - last * block  # (B,), 0 for a row without tokens
    slots = torch.arange(block, device=x.device) - block + count.unsqueeze(1)
    slots = torch.where(slots >= 0, slots + last.unsqueeze(1) * block, x.shape[1])
    tail = gather_slots(x, slots)  # moved to its block's end
    entries = torch.cat([first.unsqueeze(1), states.permute(1, 2, 0, 3, 4)], dim=1)
    keep = (owner == document)[rows, last].to(c.p.dtype).view(-1, 1, 1)
    q_re, q_im = complex_power(c.log_q, count.view(-1, 1, 1))
    re, im = (keep * part for part in entries[rows, last].unbind(-1))
    kept = torch.stack([q_re * re - q_im * im, q_re * im + q_im * re], dim=-1)
    _, added = cema_blocks(tail.to(c.p.dtype), c, None, None, block)  # from a state of zero
    return y, kept + added[:, :, 0].transpose(0, 1)


def _traceable_step(x: Tensor, c: CEMACoefficients, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """One step of the recurrence, which autograd and a compiler can follow."""
    u = x[:, 0].to(c.p.dtype)
    re = c.p * u.unsqueeze(-1)  # (B, D, N)
    im = torch.zeros_like(re)
    if state is not None:
        q_re, q_im = complex_power(c.log_q)
        h_re, h_im = state.unbind(-1)
        re = torch.addcmul(torch.addcmul(re, q_re, h_re), q_im, h_im, value=-1)
        im = torch.addcmul(q_re * h_im, q_im, h_re)
    read = (c.g[..., 0] * re - c.g[..., 1] * im).sum(-1)
    y = torch.addcmul(read, c.omega, u)
    return y.unsqueeze(1).to(x.dtype), torch.stack([re, im], dim=-1)


KeptSteps = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes x (B, L, D) and a state, and gives the outputs and the state after: as :func:`cema`, with
few operations, for decoding. What all its calls multiply with is computed once."""


def cema_steps(c: CEMACoefficients) -> KeptSteps:
    """For single steps."""
    q = torch.complex(*complex_power(c.log_q))
    read = torch.view_as_real(torch.view_as_complex(c.g).conj_physical()).flatten(-2)
    p, omega = c.p.to(q.dtype), c.omega.clone()

    @without_autocast
    def step(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        u = x[:, 0].to(omega.dtype)
        before = torch.view_as_complex(state.to(u.dtype).contiguous())
        after = torch.view_as_real(torch.addcmul(p * u.unsqueeze(-1), q, before))
        y = torch.addcmul(torch.linalg.vecdot(read, after.flatten(-2)), omega, u)
        return y.unsqueeze(1).to(x.dtype), after

    return step


def cema_pieces(c: CEMACoefficients) -> KeptSteps:
    """For pieces of at most `BLOCK` steps."""
    powers = q_powers(c.log_q, BLOCK, 0, BLOCK)
    kernel, sides = block_matrices(c, powers, c.p.dtype)
    matrix = toeplitz(kernel)

    @without_autocast
    def piece(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, _ = x.shape
        state = state.to(matrix.dtype)
        entry = state.flatten(2).transpose(0, 1)  # (D, B, 2N)
        u = by_channel(x.to(state.dtype), length)  # (D, B, L)
        summary, readout = sides[0, -length:].transpose(0, 1), sides[1, :length].permute(1, 2, 0)
        y = torch.bmm(u, matrix[:, :length, :length]).baddbmm_(entry, readout)
        added = torch.bmm(u, summary).transpose(0, 1).unflatten(-1, (-1, 2))
        before = torch.view_as_complex(state.contiguous())
        after = torch.addcmul(torch.view_as_complex(added), powers[length], before)
        return by_time(y, batch, length).to(x.dtype), torch.view_as_real(after)

    return piece
