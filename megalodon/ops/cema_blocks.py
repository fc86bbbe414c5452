"""The block-parallel form of CEMA: one differentiable operation made of real matrix products.

A block of T steps has three parts per channel: the kernel, which takes an input to the outputs
from there on; the summary, which takes the block's inputs to what they leave in the state; and
the readout, which takes the state on entry to the outputs. A scan joins the blocks.

To a compiler it is one opaque operation with a backward of its own: nobody need trace the scan or
its complex numbers, which come and go as real pairs.

Inputs lie by channel, (D, B blocks, T), and so do states, (D, B, blocks, 2N), so that every
product is a plain batched one.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..time_parallel import TimeGroup
from .precision import autocast_off
from .scan import block_scan, complex_power, q_powers, scan_jumps

VERSION = 4
"""To be raised when results or saved tensors change: a compiler's cache on disk knows an operation
by its name alone."""


TWO_COPIES_ON = "cpu"
"""The device on which a transposition takes half as long in two copies, of which each moves what
lies close together: in one, the steps of a channel are written to the same places of a cache."""


class CEMACoefficients(NamedTuple):
    """p: (D, N); log_q: (D, N, 2), log rho and phi / (2 pi); g: (D, N, 2); omega: (D,)."""

    p: Tensor
    log_q: Tensor
    g: Tensor
    omega: Tensor


def block_matrices(
    c: CEMACoefficients, powers: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What a block of T steps is made of, from q^0 .. q^T, complex (T + 1, D, N): the kernel
    (T, D), and the summary and the readout, (2, T, D, 2N), where real and imaginary parts of a
    state alternate."""
    reads = torch.view_as_complex(c.g) * powers
    # The kernel is what the readout makes of an input of one.
    kernel = (c.p * reads[:-1].real).sum(-1)
    kernel[0].add_(c.omega)
    sides = powers.new_empty(2, *reads[1:].shape)
    torch.mul(c.p, powers[:-1].flip(0), out=sides[0])
    torch.conj_physical(reads[1:], out=sides[1])  # Re(read h) = <conj(read), h> as pairs
    return kernel.to(dtype), _pairs(sides).to(dtype)


def block_matrices_backward(
    c: CEMACoefficients, powers: Tensor, grad: Sequence[Tensor], jump: Tensor, grad_jump: Tensor
) -> Tensor:
    """Gradients (3, D, N, 2) of p (in the real part), log q and g from those of kernel, summary and
    readout, (D, T) and (D, T, 2N), and of q^T, by which a state goes on: jump is conj(q^T), (D, N).

    The gradient of a complex number is that of its real part plus i times that of its imaginary
    part. Sums of products with q^t, where those with its conjugate are meant, are conjugate.
    """
    grad_kernel, grad_summary, grad_readout = grad
    p, g, powers = c.p, torch.view_as_complex(c.g), powers.transpose(0, 1)
    left = _complex(grad_summary.flip(1)).conj_physical_()  # (D, T, N), of q^0 and on
    parts = powers.new_empty(3, *left.shape)
    torch.mul(powers[:, :-1], grad_kernel.unsqueeze(-1), out=parts[0])
    torch.mul(powers[:, 1:], _complex(grad_readout), out=parts[1])
    torch.mul(powers[:, :-1], left, out=parts[2])
    kernel, read, leave = parts.sum(2)
    steps = torch.arange(grad_kernel.shape[1], dtype=p.dtype, device=p.device)
    moments = torch.bmm(steps.expand(3 * len(p), 1, -1), _pairs(parts).flatten(0, 1))
    kernel_t, read_t, leave_t = torch.view_as_complex(moments.view(3, *c.g.shape))

    grads = torch.empty_like(parts[:, :, 0])
    torch.addcmul(leave, g, kernel, out=grads[0])
    torch.addcmul(p * leave_t, g, torch.addcmul(read + read_t, p, kernel_t), out=grads[1])
    torch.addcmul(read, p, kernel, out=grads[2])
    grads.conj_physical_()
    grads[1].addcmul_(jump, grad_jump, value=len(steps)).imag.mul_(2 * math.pi)
    return torch.view_as_real(grads)


def _pairs(z: Tensor) -> Tensor:
    """Complex (..., N) -> real (..., 2N)."""
    return torch.view_as_real(z).flatten(-2)


def _complex(pairs: Tensor) -> Tensor:
    """Real (..., 2N) -> complex (..., N)."""
    return torch.view_as_complex(pairs.contiguous().unflatten(-1, (-1, 2)))


def cema_blocks(
    x: Tensor, c: CEMACoefficients, state: Tensor | None, document: Tensor | None, block: int
) -> tuple[Tensor, Tensor]:
    """Outputs, and the states that the blocks leave.

    Args:
        x: (B, L, D); products are taken in its dtype, the scan in that of the coefficients.
        c: coefficients.
        state: (B, D, N, 2), the state on entry; ``None`` for zero.
        document: (B, blocks), non-decreasing; a block of another one than the block before starts
            from zero. ``None`` where all are of one.
        block: T.

    Returns:
        y (B, L, D), and states (D, B, blocks, N, 2).
    """
    y, states, *_ = _cema_blocks(x, list(c), state, document, block)
    return y, states


def _forward(
    x: Tensor,
    coefficients: Sequence[Tensor],
    state: Tensor | None,
    document: Tensor | None,
    block: int,
    time: TimeGroup | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """y, states, and for the backward the states on entry to each block, the powers of q and the
    matrices."""
    c = CEMACoefficients(*(t.contiguous() for t in coefficients))
    batch, length, _ = x.shape
    blocks = -(-length // block)
    powers = q_powers(c.log_q, block, scan_jumps(blocks), block)
    far, near = powers[: -block - 1], powers[-block - 1 :]
    kernel, sides = block_matrices(c, near, x.dtype)
    summary, readout = sides.transpose(1, 2)  # (D, T, 2N)
    u = by_channel(x, block)
    s = _states(torch.bmm(u, summary), batch, c.p.dtype)
    first = None
    if time is not None:
        first = _beyond(s, c, block, far, length, time)
    elif state is not None:
        first = torch.view_as_complex(state.contiguous()).transpose(0, 1).unsqueeze(2)
    if first is not None:
        s[:, :, :1].addcmul_(far[0, :, None, None], first)  # (D, B, 1, N)
    block_scan(s, c.log_q, block, far, document)
    before = s[:, :, :-1]
    if document is not None:
        before = before * _goes_on(document)
    before = F.pad(before, (0, 0, 1, 0)) if first is None else torch.cat([first, before], dim=2)
    entries = _pairs(before).to(x.dtype).flatten(1, 2)
    y = torch.bmm(u, toeplitz(kernel)).baddbmm_(entries, readout.transpose(1, 2))
    saved = [entries, torch.view_as_real(powers), kernel, sides]
    return by_time(y, batch, length), torch.view_as_real(s), saved


_cema_blocks = torch.library.custom_op(
    f"megalodon::cema_blocks_v{VERSION}",
    _forward,
    mutates_args=(),
    schema="(Tensor x, Tensor[] coefficients, Tensor? state, Tensor? document, SymInt block)"
    " -> (Tensor, Tensor, Tensor[])",
)


@_cema_blocks.register_fake
def _(
    x: Tensor, coefficients: Sequence[Tensor], *others: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    (batch, length, dim), p, block = x.shape, coefficients[0], others[-1]
    order, blocks = p.shape[1], -(-length // block)
    saved = [
        x.new_empty(dim, batch * blocks, 2 * order),
        p.new_empty(block + 1 + scan_jumps(blocks), dim, order, 2),
        x.new_empty(block, dim),
        x.new_empty(2, block, dim, 2 * order),
    ]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, p.new_empty(dim, batch, blocks, order, 2), saved


def _adjoint(
    grad_y: Tensor,
    grad_states: Tensor | None,
    x: Tensor,
    saved: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    document: Tensor | None,
    block: int,
    time: TimeGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, of p, log q and g as :func:`block_matrices_backward` gives them, of the
    kernel (D, T), and of the states on entry, (D, B, blocks, N, 2).

    The adjoint is the same operation backwards in time, with transposed matrices and the
    conjugate of q. Products of what went in with what comes back are the gradients of the
    matrices and of the scan's q.
    """
    c = CEMACoefficients(*(t.contiguous() for t in coefficients))
    entries, powers, kernel, sides = saved
    summary, readout = sides.transpose(1, 2)  # (D, T, 2N)
    powers = torch.view_as_complex(powers)
    (batch, length, _), (dim, order), dtype = x.shape, c.p.shape, c.p.dtype
    far, near = powers[: -block - 1].flip(0).conj_physical_(), powers[-block - 1 :]
    jump = far[-1]
    u, back = by_channel(x, block), by_channel(grad_y, block)
    s = _states(torch.bmm(back, readout), batch, dtype)
    if grad_states is not None:
        of_states = torch.view_as_complex(grad_states.contiguous())
        s.addcmul_(jump[:, None, None], of_states)
    last = None
    if time is not None:
        last = _beyond(s, c, block, far, length, time, reverse=True)
        s[:, :, -1:].addcmul_(jump[:, None, None], last)  # (D, B, 1, N)
    block_scan(s, c.log_q, block, far, document, reverse=True)
    after = s[:, :, 1:]
    if document is not None:
        after = after * _goes_on(document)
    after = F.pad(after, (0, 0, 0, 1)) if last is None else torch.cat([after, last], dim=2)
    if grad_states is not None:
        after += of_states
    left = _pairs(after).to(x.dtype).flatten(1, 2)
    grad_x = torch.bmm(back, toeplitz(kernel).transpose(1, 2))
    grad_x = by_time(grad_x.baddbmm_(left, summary.transpose(1, 2)), batch, length)

    u = u.transpose(1, 2)
    grad = (
        _toeplitz_adjoint(torch.bmm(u, back), dtype),
        torch.bmm(u, left).to(dtype),
        torch.bmm(back.transpose(1, 2), entries).to(dtype),
    )
    of_jump = torch.bmm(entries.transpose(1, 2), left).to(dtype).view(dim, order, 2, order, 2)
    # (2, D, N): real and imaginary part of the entry, times the gradient
    re, im = _complex(of_jump.diagonal(dim1=1, dim2=3).permute(1, 0, 3, 2).flatten(2))
    grads = block_matrices_backward(c, near, grad, jump, torch.sub(re, im, alpha=1j))
    return grad_x, grads, grad[0], torch.view_as_real(s)


_cema_blocks_backward = torch.library.custom_op(
    f"megalodon::cema_blocks_backward_v{VERSION}",
    _adjoint,
    mutates_args=(),
    schema="(Tensor grad_y, Tensor? grad_states, Tensor x, Tensor[] saved, Tensor[] coefficients,"
    " Tensor? document, SymInt block) -> (Tensor, Tensor, Tensor, Tensor)",
)


@_cema_blocks_backward.register_fake
def _(
    grad_y: Tensor, grad_states: Tensor | None, x: Tensor, saved: Any, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    coefficients, _, block = others
    (batch, length, dim), p = x.shape, coefficients[0]
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        p.new_empty(3, *p.shape, 2),
        p.new_empty(dim, block),
        p.new_empty(dim, batch, -(-length // block), p.shape[1], 2),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    x, coefficients, state, document, block = inputs
    ctx.set_materialize_grads(False)
    ctx.block, ctx.has_state, ctx.adjoint = block, state is not None, _cema_blocks_backward
    ctx.save_for_backward(x, document, *coefficients, *output[2])


def _backward(
    ctx: Any, grad_y: Tensor | None, grad_states: Tensor | None, _: Any
) -> tuple[Any, ...]:
    x, document, *rest = ctx.saved_tensors
    if grad_y is None:  # only the state takes part in the loss
        grad_y = torch.zeros_like(x)
    with autocast_off(grad_y.device.type):  # a caller's may reach as far as here
        grad_x, grads, grad_kernel, grad_entries = ctx.adjoint(
            grad_y, grad_states, x, rest[4:], rest[:4], document, ctx.block
        )
    grad_c = [grads[0, ..., 0], grads[1], grads[2], grad_kernel[:, 0]]
    grad_state = grad_entries[:, :, 0].transpose(0, 1) if ctx.has_state else None
    return grad_x, grad_c, grad_state, None, None


_cema_blocks.register_autograd(_backward, setup_context=_setup_context)


@torch.compiler.disable  # which cannot follow what processes tell each other
def cema_blocks_of_part(x: Tensor, c: CEMACoefficients, block: int, time: TimeGroup) -> Tensor:
    """Outputs of one of the parts of a sequence, as of :func:`cema_blocks`; T divides L."""
    y: Tensor = _CEMABlocksOfPart.apply(x, *c, block, time)
    return y


class _CEMABlocksOfPart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        *c, block, time = rest
        output = _forward(x, c, None, None, block, time)
        _setup_context(ctx, (x, c, None, None, block), output)
        ctx.adjoint = partial(_adjoint, time=time)
        return output[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_c, *_ = _backward(ctx, grad_y, None, None)
        return grad_x, *grad_c, None, None


def _beyond(
    s: Tensor,
    c: CEMACoefficients,
    block: int,
    powers: Tensor,
    length: int,
    time: TimeGroup,
    *,
    reverse: bool = False,
) -> Tensor:
    """The state that the parts before this one leave, complex (D, B, 1, N), where this one's blocks
    add s to it; or, for the scan from the end, what those behind it leave."""
    alone = s.clone()
    block_scan(alone, c.log_q, block, powers, reverse=reverse)
    mine = torch.view_as_real(alone[:, :, :1] if reverse else alone[:, :, -1:])
    others = torch.view_as_complex(time.gather(mine))
    others = others[time.rank + 1 :] if reverse else others[: time.rank]
    ages = torch.arange(len(others), device=s.device).view(-1, 1, 1)
    q_re, q_im = complex_power(c.log_q, ages if reverse else ages.flip(0), scale=length)
    decay = torch.complex(q_re, -q_im if reverse else q_im)  # (parts, D, N)
    return (decay[:, :, None, None] * others).sum(0)


def by_channel(x: Tensor, block: int) -> Tensor:
    """x (B, L, D) by channel, the last block filled up with zeros: (D, B blocks, T)."""
    missing = -x.shape[1] % block
    x = F.pad(x, (0, 0, 0, missing)) if missing else x
    blocks = x.flatten(0, 1).unflatten(0, (-1, block))
    if x.device.type == TWO_COPIES_ON:
        blocks = blocks.transpose(1, 2).contiguous().transpose(1, 2)
    return blocks.permute(2, 0, 1).contiguous()


def by_time(u: Tensor, batch: int, length: int) -> Tensor:
    """The inverse of :func:`by_channel`."""
    blocks = u.transpose(0, 1)
    if u.device.type == TWO_COPIES_ON:
        blocks = blocks.contiguous()
    x = blocks.transpose(1, 2).contiguous().view(batch, -1, u.shape[0])
    return x if x.shape[1] == length else x[:, :length].contiguous()


def _states(sums: Tensor, batch: int, dtype: torch.dtype) -> Tensor:
    """Real (D, B blocks, 2N) -> complex (D, B, blocks, N)."""
    return _complex(sums.to(dtype).unflatten(1, (batch, -1)))


def _goes_on(document: Tensor) -> Tensor:
    """Whether the states between neighbouring blocks are handed on: (B, blocks - 1, 1)."""
    return (document[:, 1:] == document[:, :-1]).unsqueeze(-1)


def toeplitz(kernel: Tensor) -> Tensor:
    """(T, D) -> (D, T, T) with [s, t] = kernel[t - s] for t >= s and 0 below: windows of a row that
    begins with zeros, the last window first."""
    size = len(kernel)
    return F.pad(kernel.t(), (size - 1, 0)).unfold(1, size, 1).flip(1)


def _toeplitz_adjoint(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The adjoint of an upper Toeplitz matrix: (D, T, T) -> (D, T), summed in `dtype`."""
    dim, size, _ = grad.shape
    shifted = F.pad(grad, (0, size))  # read with a row length of one more, they shift back
    diagonals = shifted.as_strided((dim, size, size), (2 * size * size, 2 * size + 1, 1))
    return diagonals.sum(1, dtype=dtype)
