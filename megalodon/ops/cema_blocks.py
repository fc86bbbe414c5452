"""The block-parallel form of CEMA: one differentiable operation made of real matrix products.

A block of T steps has three parts per channel: the kernel, which takes an input to the outputs
from there on; the summary, which takes the block's inputs to what they leave in the state; and
the readout, which takes the state on entry to the outputs. A scan joins the blocks.

To a compiler it is one opaque operation with a backward of its own: nobody need trace the scan or
its complex numbers, which come and go as real pairs.

A channel has K = T + 2N numbers in a block: T inputs, and beside them the 2N of a state. They lie
by channel, (D, B, blocks, K), so that every product is a plain batched one. Time and channels
change places within a block, whose T x D numbers a cache holds; then blocks move as whole rows.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .scan import block_scan, complex_power, group_blocks

VERSION = 3
"""To be raised when results or saved tensors change: a compiler's cache on disk knows an operation
by its name alone."""


class CEMACoefficients(NamedTuple):
    """p, log_rho, turns, g_re, g_im: (D, N); omega: (D,). turns is phi / (2 pi)."""

    p: Tensor
    log_rho: Tensor
    turns: Tensor
    g_re: Tensor
    g_im: Tensor
    omega: Tensor


class BlockMatrices(NamedTuple):
    """kernel (T, D); summary, readout (T, D, 2N), where a state's real and imaginary parts
    alternate."""

    kernel: Tensor
    summary: Tensor
    readout: Tensor


def block_matrices(c: CEMACoefficients, block: int) -> BlockMatrices:
    """What a block of T steps is made of."""
    powers = q_powers(c, block)
    reads = torch.complex(c.g_re, c.g_im) * powers
    # The kernel is what the readout makes of an input of one.
    kernel = (c.p * reads[:-1].real).sum(-1)
    kernel[0] += c.omega
    summary = _pairs(c.p * powers[:-1].flip(0))
    readout = _pairs(reads[1:].conj_physical())  # Re(read h) = <conj(read), h> as pairs
    return BlockMatrices(kernel, summary, readout)


def block_matrices_backward(
    c: CEMACoefficients, block: int, grad: BlockMatrices
) -> CEMACoefficients:
    """Gradients of the coefficients from those of :func:`block_matrices`.

    The gradient of a complex number is that of its real part plus i times that of its imaginary
    part.
    """
    powers = q_powers(c, block)
    g = torch.complex(c.g_re, c.g_im)
    grad_kernel = F.pad(grad.kernel, (0, 0, 0, 1)).unsqueeze(-1)  # (T + 1, D, 1)
    grad_left = F.pad(_complex(grad.summary).flip(0), (0, 0, 0, 0, 0, 1))
    grad_reads = F.pad(_complex(grad.readout).conj(), (0, 0, 0, 0, 1, 0))
    grad_reads = grad_reads + c.p * grad_kernel
    grad_p = ((g * powers).real * grad_kernel + (powers.conj() * grad_left).real).sum(0)
    grad_g = (powers.conj() * grad_reads).sum(0)
    grad_powers = g.conj() * grad_reads + c.p * grad_left
    steps = torch.arange(block + 1, dtype=c.p.dtype, device=c.p.device).view(-1, 1, 1)
    grad_log = (powers.conj() * grad_powers * steps).sum(0)  # of log q
    return CEMACoefficients(
        grad_p,
        grad_log.real.clone(),
        grad_log.imag * (2 * math.pi),
        grad_g.real.clone(),
        grad_g.imag.clone(),
        grad.kernel[0].clone(),
    )


def q_powers(c: CEMACoefficients, block: int) -> Tensor:
    """q^0 .. q^T, complex (T + 1, D, N), by doubling. Not differentiable.

    A chain of five products for 32 rounds no worse than an exponential of each; across blocks,
    where a chain would be long, powers have their exact angles (:func:`complex_power`).
    """
    q = torch.polar(c.log_rho.exp(), c.turns * (2 * math.pi))
    powers = q.new_empty(block + 1, *q.shape)
    powers[0], powers[1] = 1, q
    known = 1
    while known < block:
        more = min(known, block - known)
        torch.mul(powers[1 : more + 1], powers[known], out=powers[known + 1 : known + more + 1])
        known += more
    return powers


def _pairs(z: Tensor) -> Tensor:
    """Complex (..., N) -> real (..., 2N)."""
    return torch.view_as_real(z).flatten(-2)


def _complex(pairs: Tensor) -> Tensor:
    """Real (..., 2N) -> complex (..., N)."""
    return torch.view_as_complex(pairs.unflatten(-1, (-1, 2)).contiguous())


def cema_blocks(
    x: Tensor, c: CEMACoefficients, state: Tensor | None, keep: Tensor | None, block: int
) -> tuple[Tensor, Tensor]:
    """Outputs, and states on entry to each block.

    Args:
        x: (B, L, D); products are taken in its dtype, the scan in that of the coefficients.
        c: coefficients.
        state: (B, D, N, 2), the state on entry; ``None`` for zero.
        keep: (B, blocks), 0 where a block starts from zero; ``None`` for 1.
        block: T.

    Returns:
        y (B, L, D), and entries (B, blocks, D, N, 2).
    """
    y, entries, _ = _cema_blocks(x, list(c), state, keep, block)
    return y, entries


@torch.library.custom_op(f"megalodon::cema_blocks_v{VERSION}", mutates_args=())
def _cema_blocks(
    x: Tensor,
    coefficients: Sequence[Tensor],
    state: Tensor | None,
    keep: Tensor | None,
    block: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, entries, and for the backward the inputs with their entry states."""
    c = CEMACoefficients(*coefficients)
    kernel, summary, readout = (t.to(x.dtype) for t in block_matrices(c, block))
    joined = _lay_out(x, block, c.p.shape[1])
    s = _in_rounds(_complex(_sum_up(joined, summary).to(c.p.dtype)))
    first = None if state is None else torch.view_as_complex(state.to(c.p.dtype).contiguous())
    through = _grouped_keep(keep, s)
    entries = block_scan(s, first, c.log_rho, c.turns, block, through)
    if through is not None:
        entries *= through[..., None, None]
    entries = _in_order(entries)
    _join(joined, _pairs(entries))
    del s  # whose memory the outputs can have
    y = _read_out(joined, kernel, readout, x.shape[1])
    return y, torch.view_as_real(entries), joined


@_cema_blocks.register_fake
def _(
    x: Tensor,
    coefficients: Sequence[Tensor],
    state: Tensor | None,
    keep: Tensor | None,
    block: int,
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, length, dim), p = x.shape, coefficients[0]
    order = p.shape[1]
    size, groups = group_blocks((length + block - 1) // block)
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        p.new_empty(batch, groups * size, dim, order, 2),
        x.new_empty(dim, batch, groups * size, block + 2 * order),
    )


@torch.library.custom_op(f"megalodon::cema_blocks_backward_v{VERSION}", mutates_args=())
def _cema_blocks_backward(
    grad_y: Tensor,
    grad_entries: Tensor | None,
    joined: Tensor,
    coefficients: Sequence[Tensor],
    keep: Tensor | None,
    block: int,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Gradients of x, of the coefficients, and of the state on entry.

    The adjoint is the same operation backwards in time, with transposed matrices and the
    conjugate of q; and one product of what it joins with what the forward joined holds the
    gradients of the matrices and of the scan's q.
    """
    c = CEMACoefficients(*coefficients)
    kernel, summary, readout = (t.to(grad_y.dtype) for t in block_matrices(c, block))
    order, dtype = c.p.shape[1], c.p.dtype
    grad_joined = _lay_out(grad_y, block, order)
    grad_reads = _complex(_sum_up(grad_joined, readout).to(dtype))
    if grad_entries is not None:
        grad_reads += torch.view_as_complex(grad_entries.contiguous())
    grad_reads = _in_rounds(grad_reads)
    through = _grouped_keep(keep, grad_reads)
    if through is not None:
        grad_reads *= through[..., None, None]
    grad_s = block_scan(grad_reads, None, c.log_rho, -c.turns, block, through, reverse=True)
    _join(grad_joined, _pairs(_in_order(grad_s)))
    grad_x = _read_out(grad_joined, kernel, summary, grad_y.shape[1], adjoint=True)

    # Products of all pairs of a channel's numbers, summed over blocks: (D, K, K).
    inner = torch.bmm(joined.flatten(1, 2).transpose(1, 2), grad_joined.flatten(1, 2)).to(dtype)
    grad_matrices = BlockMatrices(
        _toeplitz_adjoint(inner[:, :block, :block]),
        inner[:, :block, block:].transpose(0, 1),
        inner[:, block:, :block].permute(2, 0, 1),
    )
    grad_c = block_matrices_backward(c, block, grad_matrices)
    q = torch.complex(*complex_power(c.log_rho, c.turns, scale=block))
    of_q = inner[:, block:, block:].unflatten(2, (order, 2)).unflatten(1, (order, 2))
    of_q = of_q.diagonal(dim1=1, dim2=3)  # (D, 2, 2, N): part of the entry, part of the gradient
    grad_q = torch.complex(of_q[:, 0, 0] + of_q[:, 1, 1], of_q[:, 0, 1] - of_q[:, 1, 0])
    grad_log = block * q.conj() * grad_q
    grad_c = grad_c._replace(
        log_rho=grad_c.log_rho + grad_log.real,
        turns=grad_c.turns + 2 * math.pi * grad_log.imag,
    )

    after = grad_s[0, 0]  # (B, D, N)
    if through is not None:
        after = after * through[0, 0, :, None, None]
    grad_state = torch.view_as_real(grad_reads[0, 0] + q.conj() * after)
    return grad_x, list(grad_c), grad_state


@_cema_blocks_backward.register_fake
def _(
    grad_y: Tensor,
    grad_entries: Tensor | None,
    joined: Tensor,
    coefficients: Sequence[Tensor],
    keep: Tensor | None,
    block: int,
) -> tuple[Tensor, list[Tensor], Tensor]:
    grad_x, *grad_c = (
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (grad_y, *coefficients)
    )
    state = grad_c[0].new_empty(grad_y.shape[0], *grad_c[0].shape, 2)
    return grad_x, grad_c, state


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, coefficients, state, keep, block = inputs
    ctx.set_materialize_grads(False)
    ctx.shape, ctx.block, ctx.has_state = x.shape, block, state is not None
    ctx.save_for_backward(output[2], *coefficients, keep)


def _backward(
    ctx: Any, grad_y: Tensor | None, grad_entries: Tensor | None, _: Tensor | None
) -> tuple[Tensor | list[Tensor] | None, ...]:
    joined, *coefficients, keep = ctx.saved_tensors
    if grad_y is None:  # only the state takes part in the loss
        grad_y = joined.new_zeros(ctx.shape)
    with torch.autocast(grad_y.device.type, enabled=False):  # a caller's may reach as far as here
        grad_x, grad_c, grad_state = _cema_blocks_backward(
            grad_y, grad_entries, joined, coefficients, keep, ctx.block
        )
    return grad_x, grad_c, grad_state if ctx.has_state else None, None, None


_cema_blocks.register_autograd(_backward, setup_context=_setup_context)


def _lay_out(x: Tensor, block: int, order: int) -> Tensor:
    """x (B, L, D) by channel, the last blocks filled up with zeros: (D, B, blocks, K), with room
    for the numbers of the states."""
    size, groups = group_blocks(-(-x.shape[1] // block))
    missing = size * groups * block - x.shape[1]
    x = F.pad(x, (0, 0, 0, missing)) if missing else x.contiguous()
    rows = x.unflatten(1, (-1, block)).transpose(2, 3).contiguous()  # (B, blocks, D, T)
    columns = x.new_empty(x.shape[2], *rows.shape[:2], block + 2 * order)
    columns[..., :block] = rows.permute(2, 0, 1, 3)
    return columns


def _sum_up(joined: Tensor, matrices: Tensor) -> Tensor:
    """Every block's inputs times matrices (T, D, 2N): (B, blocks, D, 2N)."""
    inputs = joined.flatten(1, 2)[..., : matrices.shape[0]]
    sums = torch.bmm(inputs, matrices.transpose(0, 1))
    return sums.view(*joined.shape[:3], -1).permute(1, 2, 0, 3).contiguous()


def _join(joined: Tensor, states: Tensor) -> None:
    """Write states (B, blocks, D, 2N) beside the inputs."""
    # Cast apart: a copy that both casts and permutes is slow.
    joined[..., -states.shape[-1] :] = states.to(joined.dtype).permute(2, 0, 1, 3)


def _read_out(
    joined: Tensor, kernel: Tensor, matrices: Tensor, length: int, *, adjoint: bool = False
) -> Tensor:
    """Inputs times the Toeplitz matrix of kernel (T, D), or times its transpose, plus states times
    matrices (T, D, 2N): (B, length, D)."""
    toeplitz = _toeplitz(kernel, lower=adjoint)
    weight = torch.cat([toeplitz, matrices.permute(1, 2, 0)], dim=1)
    y = torch.bmm(joined.flatten(1, 2), weight)  # (D, B blocks, T)
    y = y.transpose(0, 1).contiguous().transpose(1, 2).contiguous()
    y = y.view(joined.shape[1], -1, joined.shape[0])
    return y if y.shape[1] == length else y[:, :length].contiguous()


def _toeplitz(kernel: Tensor, *, lower: bool) -> Tensor:
    """(T, D) -> (D, T, T) with [s, t] = kernel[t - s] for t >= s and 0 below; or its transpose.

    A row of length 2T repeated T times and read with row length 2T - 1 shifts by one per row.
    """
    (size, dim), kernel = kernel.shape, kernel.t()
    zeros = kernel.new_zeros(dim, size)
    parts = [kernel[:, :1], zeros, kernel[:, 1:].flip(1)] if lower else [kernel, zeros]
    rows = torch.cat(parts, dim=1).unsqueeze(1).expand(dim, size, 2 * size).flatten(1)
    return rows[:, : size * (2 * size - 1)].view(dim, size, 2 * size - 1)[:, :, :size]


def _toeplitz_adjoint(grad: Tensor) -> Tensor:
    """The adjoint of an upper Toeplitz matrix: (D, T, T) -> (T, D)."""
    dim, size, _ = grad.shape
    rows = F.pad(F.pad(grad, (0, size - 1)).flatten(1), (0, size))
    return rows.view(dim, size, 2 * size)[..., :size].sum(1).t()


def _in_rounds(states: Tensor) -> Tensor:
    """(B, blocks, D, N) -> (size, groups, B, D, N), as :func:`block_scan` takes them; a view."""
    size, groups = group_blocks(states.shape[1])
    return states.unflatten(1, (groups, size)).permute(2, 1, 0, 3, 4)


def _in_order(states: Tensor) -> Tensor:
    """The inverse of :func:`_in_rounds`."""
    return states.permute(2, 1, 0, 3, 4).flatten(1, 2).contiguous()


def _grouped_keep(keep: Tensor | None, s: Tensor) -> Tensor | None:
    """(B, blocks) -> (size, groups, B)."""
    if keep is None:
        return None
    size, groups = s.shape[:2]
    keep = F.pad(keep, (0, size * groups - keep.shape[1]))
    return keep.view(-1, groups, size).permute(2, 1, 0)
