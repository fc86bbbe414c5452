"""The block-parallel form of CEMA: one differentiable operation made of real matrix products.

A block of T steps has three parts per channel: the kernel, which takes an input to the outputs
from there on; the summary, which takes the block's inputs to what they leave in the state; and
the readout, which takes the state on entry to the outputs. A scan joins the blocks.

To a compiler it is one opaque operation with a backward of its own: its layouts are chosen so
that every product is a plain batched one, and nobody need trace the scan. Time and channels change
places within a block, whose T x D numbers a cache holds; blocks then move as whole rows.
"""

import math
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .scan import block_scan, complex_power, group_blocks


class CEMACoefficients(NamedTuple):
    """p, log_rho, turns, g_re, g_im: (D, N); omega: (D,). turns is phi / (2 pi)."""

    p: Tensor
    log_rho: Tensor
    turns: Tensor
    g_re: Tensor
    g_im: Tensor
    omega: Tensor


class BlockMatrices(NamedTuple):
    """kernel (D, T), summary (D, T, 2N), readout (D, 2N, T); real parts before imaginary ones."""

    kernel: Tensor
    summary: Tensor
    readout: Tensor


def block_matrices(c: CEMACoefficients, block: int) -> BlockMatrices:
    """What a block of T steps is made of."""
    re, im = _powers(c, block)
    read_re, read_im = _readouts(c, re, im)
    # The kernel is what the readout makes of an input of one.
    kernel = (c.p.unsqueeze(-1) * read_re[..., :block]).sum(1)
    kernel = kernel + F.pad(c.omega.unsqueeze(-1), (0, block - 1))
    readout = torch.cat([read_re, read_im], dim=1)[..., 1:]
    return BlockMatrices(kernel, _summary(c, re, im, block), readout)


def block_summary(c: CEMACoefficients, block: int) -> Tensor:
    """The summary of :func:`block_matrices` alone."""
    return _summary(c, *_powers(c, block - 1), block)


def _summary(c: CEMACoefficients, re: Tensor, im: Tensor, block: int) -> Tensor:
    powers = torch.cat([re[..., :block], im[..., :block]], dim=1)
    return (powers * c.p.repeat(1, 2).unsqueeze(-1)).flip(-1).transpose(1, 2)


def block_matrices_backward(
    c: CEMACoefficients, block: int, grad: BlockMatrices
) -> CEMACoefficients:
    """Gradients of the coefficients from those of :func:`block_matrices`."""
    re, im = _powers(c, block)
    read_re, _ = _readouts(c, re, im)
    p, g_re, g_im = c.p.unsqueeze(-1), c.g_re.unsqueeze(-1), c.g_im.unsqueeze(-1)
    grad_kernel = F.pad(grad.kernel, (0, 1)).unsqueeze(1)
    grad_read_re, grad_read_im = F.pad(grad.readout, (1, 0)).chunk(2, dim=1)
    grad_read_re = grad_read_re + p * grad_kernel
    grad_left = F.pad(grad.summary.transpose(1, 2).flip(-1), (0, 1))
    grad_left_re, grad_left_im = grad_left.chunk(2, dim=1)
    grad_p = (read_re * grad_kernel + re * grad_left_re + im * grad_left_im).sum(-1)
    grad_re = g_re * grad_read_re - g_im * grad_read_im + p * grad_left_re
    grad_im = -g_im * grad_read_re - g_re * grad_read_im + p * grad_left_im
    steps = torch.arange(block + 1, dtype=re.dtype, device=re.device)
    return CEMACoefficients(
        grad_p,
        ((grad_re * re + grad_im * im) * steps).sum(-1),
        ((grad_im * re - grad_re * im) * steps).sum(-1) * (2 * math.pi),
        (grad_read_re * re - grad_read_im * im).sum(-1),
        -(grad_read_re * im + grad_read_im * re).sum(-1),
        grad.kernel[:, 0].clone(),
    )


def _powers(c: CEMACoefficients, block: int) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of q^0 .. q^T, each (D, N, T + 1)."""
    steps = torch.arange(block + 1, device=c.p.device)
    return complex_power(c.log_rho.unsqueeze(-1), c.turns.unsqueeze(-1), steps)


def _readouts(c: CEMACoefficients, re: Tensor, im: Tensor) -> tuple[Tensor, Tensor]:
    """What powers of q add to the output, per real and per imaginary part of a state."""
    g_re, g_im = c.g_re.unsqueeze(-1), c.g_im.unsqueeze(-1)
    return g_re * re - g_im * im, -g_re * im - g_im * re


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
        y (B, L, D), and entries (2, size, groups, B, D, N) in the order of :func:`block_scan`.
    """
    y, entries, _ = _cema_blocks(x, *c, state, keep, block)
    return y, entries


# A compiler's cache on disk knows an operation by its name alone: what it kept of an earlier
# version of this file, whose tensors had other shapes, must not be found under the name of this.
_VERSION = f"{zlib.crc32(Path(__file__).read_bytes()):08x}"


@torch.library.custom_op(f"megalodon::cema_blocks_{_VERSION}", mutates_args=())
def _cema_blocks(
    x: Tensor,
    p: Tensor,
    log_rho: Tensor,
    turns: Tensor,
    g_re: Tensor,
    g_im: Tensor,
    omega: Tensor,
    state: Tensor | None,
    keep: Tensor | None,
    block: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, entries, and for the backward the inputs with their entry states,
    (D, B, blocks, T + 2N)."""
    c = CEMACoefficients(p, log_rho, turns, g_re, g_im, omega)
    kernel, summary, readout = (t.to(x.dtype) for t in block_matrices(c, block))
    columns = _to_columns(x, block, p.shape[1])
    s = _sum_up(columns, summary, p.dtype)
    first = None if state is None else state.permute(3, 0, 1, 2)
    through = _grouped_keep(keep, s)
    entries = block_scan(s, first, log_rho, turns, block, through)
    if through is not None:
        entries *= through[..., None, None]
    _write_states(columns, entries)
    weight = torch.cat([_upper_toeplitz(kernel), readout], dim=1)
    return _from_columns(columns, weight, x.shape[1]), entries, columns


@_cema_blocks.register_fake
def _(
    x: Tensor,
    p: Tensor,
    log_rho: Tensor,
    turns: Tensor,
    g_re: Tensor,
    g_im: Tensor,
    omega: Tensor,
    state: Tensor | None,
    keep: Tensor | None,
    block: int,
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, length, dim), order = x.shape, p.shape[1]
    size, groups = group_blocks((length + block - 1) // block)
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        p.new_empty(2, size, groups, batch, dim, order),
        x.new_empty(dim, batch, groups * size, block + 2 * order),
    )


@torch.library.custom_op(f"megalodon::cema_blocks_backward_{_VERSION}", mutates_args=())
def _cema_blocks_backward(
    grad_y: Tensor,
    grad_entries: Tensor | None,
    columns: Tensor,
    p: Tensor,
    log_rho: Tensor,
    turns: Tensor,
    g_re: Tensor,
    g_im: Tensor,
    omega: Tensor,
    keep: Tensor | None,
    block: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, of the coefficients, and of the state on entry.

    The adjoint is the same operation backwards in time, with transposed matrices and the
    conjugate of q; and one product of its columns with those of the forward holds the gradients
    of the matrices and of the scan's q.
    """
    c = CEMACoefficients(p, log_rho, turns, g_re, g_im, omega)
    kernel, summary, readout = (t.to(grad_y.dtype) for t in block_matrices(c, block))
    order = p.shape[1]
    grad_columns = _to_columns(grad_y, block, order)
    grad_reads = _sum_up(grad_columns, readout.transpose(1, 2), p.dtype)
    if grad_entries is not None:
        grad_reads += grad_entries
    through = _grouped_keep(keep, grad_reads)
    if through is not None:
        grad_reads *= through[..., None, None]
    grad_s = block_scan(grad_reads, None, log_rho, -turns, block, through, reverse=True)
    _write_states(grad_columns, grad_s)
    adjoint = torch.cat([_upper_toeplitz(kernel).transpose(1, 2), summary.transpose(1, 2)], dim=1)
    grad_x = _from_columns(grad_columns, adjoint, grad_y.shape[1])

    inner = torch.bmm(columns.flatten(1, 2).transpose(1, 2), grad_columns.flatten(1, 2))
    inner = inner.to(p.dtype)
    grad_matrices = BlockMatrices(
        _diagonal_sums(inner[:, :block, :block]), inner[:, :block, block:], inner[:, block:, :block]
    )
    grad_c = block_matrices_backward(c, block, grad_matrices)
    q_re, q_im = complex_power(log_rho, turns, scale=block)
    (re_re, re_im), (im_re, im_im) = (
        [part.diagonal(dim1=1, dim2=2) for part in rows.split(order, dim=2)]
        for rows in inner[:, block:, block:].split(order, dim=1)
    )
    grad_q_re, grad_q_im = re_re + im_im, re_im - im_re
    grad_log_rho = grad_c.log_rho + block * (grad_q_re * q_re + grad_q_im * q_im)
    grad_turns = grad_c.turns + 2 * math.pi * block * (grad_q_im * q_re - grad_q_re * q_im)

    (re, im), (reads_re, reads_im) = grad_s[:, 0, 0], grad_reads[:, 0, 0]  # (B, D, N)
    if through is not None:
        factor = through[0, 0, :, None, None]
        re, im = re * factor, im * factor
    grad_state = torch.stack(
        [reads_re + q_re * re + q_im * im, reads_im + q_re * im - q_im * re], dim=-1
    )
    grad_c = grad_c._replace(log_rho=grad_log_rho, turns=grad_turns)
    return (grad_x, *grad_c, grad_state)


@_cema_blocks_backward.register_fake
def _(
    grad_y: Tensor,
    grad_entries: Tensor | None,
    columns: Tensor,
    p: Tensor,
    log_rho: Tensor,
    turns: Tensor,
    g_re: Tensor,
    g_im: Tensor,
    omega: Tensor,
    keep: Tensor | None,
    block: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_x, *grad_c = (
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (grad_y, p, log_rho, turns, g_re, g_im, omega)
    )
    state = p.new_empty(grad_y.shape[0], *p.shape, 2)
    return grad_x, grad_c[0], grad_c[1], grad_c[2], grad_c[3], grad_c[4], grad_c[5], state


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, *coefficients, state, keep, block = inputs
    ctx.set_materialize_grads(False)
    ctx.shape, ctx.block, ctx.has_state = x.shape, block, state is not None
    ctx.save_for_backward(output[2], *coefficients, keep)


def _backward(
    ctx: Any, grad_y: Tensor | None, grad_entries: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    columns, *coefficients, keep = ctx.saved_tensors
    if grad_y is None:  # only the state takes part in the loss
        grad_y = columns.new_zeros(ctx.shape)
    *grads, grad_state = _cema_blocks_backward(
        grad_y, grad_entries, columns, *coefficients, keep, ctx.block
    )
    return (*grads, grad_state if ctx.has_state else None, None, None)


_cema_blocks.register_autograd(_backward, setup_context=_setup_context)


def _upper_toeplitz(kernel: Tensor) -> Tensor:
    """(D, T) -> (D, T, T) with [s, t] = kernel[t - s] for t >= s and 0 below.

    A row of length 2T repeated T times and read with row length 2T - 1 shifts by one per row.
    """
    dim, size = kernel.shape
    row = F.pad(kernel, (0, size))
    rows = row.unsqueeze(1).expand(dim, size, 2 * size).reshape(dim, 2 * size * size)
    return rows[:, : size * (2 * size - 1)].view(dim, size, 2 * size - 1)[:, :, :size]


def _diagonal_sums(grad: Tensor) -> Tensor:
    """The adjoint of :func:`_upper_toeplitz`: (D, T, T) -> (D, T)."""
    dim, size, _ = grad.shape
    rows = F.pad(F.pad(grad, (0, size - 1)).flatten(1), (0, size))
    return rows.view(dim, size, 2 * size)[..., :size].sum(1)


def _to_columns(x: Tensor, block: int, order: int) -> Tensor:
    """x (B, L, D), filled up with zeros, by channels and blocks: (D, B, blocks, T + 2N), where the
    last 2N are left for states."""
    batch, length, dim = x.shape
    size, groups = group_blocks(-(-length // block))
    blocks = groups * size
    if blocks * block > length:
        x = F.pad(x, (0, 0, 0, blocks * block - length))
    rows = x.view(batch, blocks, block, dim).transpose(2, 3).contiguous()
    columns = x.new_empty(dim, batch, blocks, block + 2 * order)
    columns[..., :block] = rows.permute(2, 0, 1, 3)
    return columns


def _by_rounds(columns: Tensor) -> Tensor:
    """(D, B, blocks, K) -> (size, groups, B, D, K), a view."""
    size, groups = group_blocks(columns.shape[2])
    return columns.unflatten(2, (groups, size)).permute(3, 2, 1, 0, 4)


def _sum_up(columns: Tensor, matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Every block's inputs times matrix (D, T, 2N): (2, size, groups, B, D, N)."""
    inputs = columns.flatten(1, 2)[..., : matrix.shape[1]]
    sums = torch.bmm(inputs, matrix).to(dtype).view(*columns.shape[:3], 2, -1)
    return torch.stack([_by_rounds(part) for part in sums.unbind(3)])


def _write_states(columns: Tensor, states: Tensor) -> None:
    """Put states (2, size, groups, B, D, N) in their place beside the inputs."""
    order = states.shape[-1]
    states = states.to(columns.dtype)  # apart: a copy that both casts and permutes is slow
    rounds = _by_rounds(columns)
    rounds[..., -2 * order : -order] = states[0]
    rounds[..., -order:] = states[1]


def _from_columns(columns: Tensor, weight: Tensor, length: int) -> Tensor:
    """Every block's inputs and states times weight (D, T + 2N, T), in order: (B, L, D)."""
    dim, batch = columns.shape[:2]
    # A plain transposition: PyTorch has a faster way for it than for a general permutation.
    y = torch.bmm(columns.flatten(1, 2), weight).view(dim, -1).t().contiguous()
    y = y.view(batch, -1, dim)
    return y if y.shape[1] == length else y[:, :length].contiguous()


def _grouped_keep(keep: Tensor | None, s: Tensor) -> Tensor | None:
    """(B, blocks) -> (size, groups, B)."""
    if keep is None:
        return None
    size, groups = s.shape[1:3]
    keep = F.pad(keep, (0, size * groups - keep.shape[1]))
    return keep.view(-1, groups, size).permute(2, 1, 0)
