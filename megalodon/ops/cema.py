"""CEMA: the complex exponential moving average, in real arithmetic.

Ma et al. 2024 (arXiv 2404.08801), section 3.1. Per channel d and order n = 1..N::

    h_t = q h_{t-1} + p x_t                             h complex
    y_t = Re(sum_n g_n h_{t,n}) + omega x_t             g = gamma / sqrt(N)

    p = sigmoid(alpha),  q = rho exp(i phi),  rho = 1 - sigmoid(alpha) sigmoid(delta)
    phi = n sigmoid(theta) 2 pi / N

States are real tensors (B, D, N, 2) that hold real and imaginary part.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import without_autocast
from .scan import block_scan, complex_power
from .segments import Segments, gather_slots, scatter_slots

BLOCK = 32
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
    u = x.to(c.p.dtype)
    keep = None
    if segments is None:
        block = min(BLOCK, x.shape[1])
    else:
        block = segments.block
        u = scatter_slots(u, segments.block_slot, segments.num_blocks * block)
        owner = F.pad(segments.block_document[:, :-1], (1, 0))
        keep = (owner == segments.block_document).to(u.dtype)
    summary, weight = _block_matrices(c, block)
    y, entries, _ = _cema_blocks(u, weight, summary, c.log_rho, c.turns, state, keep)
    y = y.to(x.dtype) if segments is None else gather_slots(y, segments.block_slot).to(x.dtype)
    if not return_state:
        return y, None
    return y, _final_state(u, summary, entries, c, segments)


def _step(x: Tensor, c: CEMACoefficients, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """One step of the recurrence, for decoding."""
    u = x[:, 0].to(c.p.dtype)
    pu = c.p * u.unsqueeze(-1)  # (B, D, N)
    re, im = pu, torch.zeros_like(pu)
    if state is not None:
        q_re, q_im = complex_power(c.log_rho, c.turns, x.new_ones(()))
        h_re, h_im = state.unbind(-1)
        re, im = re + q_re * h_re - q_im * h_im, q_re * h_im + q_im * h_re
    y = (c.g_re * re - c.g_im * im).sum(-1) + c.omega * u
    return y.unsqueeze(1).to(x.dtype), torch.stack([re, im], dim=-1)


def _block_matrices(c: CEMACoefficients, block: int) -> tuple[Tensor, Tensor]:
    """The two matrices of a block of T steps.

    Returns:
        summary (D, T, 2N): from the block's inputs to what they leave in the state.
        weight (D, T + 2N, T): from the inputs and the state on entry to the outputs.
    """
    steps = torch.arange(block + 1, device=c.p.device)
    re, im = complex_power(c.log_rho.unsqueeze(-1), c.turns.unsqueeze(-1), steps)  # (D, N, T + 1)
    powers = torch.cat([re, im], dim=1)
    summary = powers[..., :block].flip(-1) * torch.cat([c.p, c.p], dim=1).unsqueeze(-1)
    g_re, g_im = c.g_re.unsqueeze(-1), c.g_im.unsqueeze(-1)
    readout = torch.cat([g_re * re - g_im * im, -g_re * im - g_im * re], dim=1)  # of q^t
    # The kernel is what the readout makes of an input of one.
    kernel = torch.einsum("dn,dnt->dt", c.p, readout[:, : c.p.shape[1], :block])
    kernel = kernel + F.pad(c.omega.unsqueeze(-1), (0, block - 1))
    return summary.transpose(1, 2), torch.cat([_upper_toeplitz(kernel), readout[..., 1:]], dim=1)


def _upper_toeplitz(kernel: Tensor) -> Tensor:
    """(D, T) -> (D, T, T) with [s, t] = kernel[t - s] for t >= s and 0 below.

    A row of length 2T repeated T times and read with row length 2T - 1 shifts by one per row;
    its backward is a plain sum, where that of indexing would be a scattered one.
    """
    dim, size = kernel.shape
    row = F.pad(kernel, (0, size))
    rows = row.unsqueeze(1).expand(dim, size, 2 * size).reshape(dim, 2 * size * size)
    return rows[:, : size * (2 * size - 1)].view(dim, size, 2 * size - 1)[:, :, :size]


@torch.library.custom_op("megalodon::cema_blocks", mutates_args=())
def _cema_blocks(
    x: Tensor,
    weight: Tensor,
    summary: Tensor,
    log_rho: Tensor,
    turns: Tensor,
    state: Tensor | None,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, and states on entry to each block, from the matrices of a block.

    One opaque operation with a backward of its own: its layouts are chosen so that every
    product is a plain batched one, and a compiler need not trace the scan.

    Args:
        x: (B, L, D). weight (D, T + 2N, T), summary (D, T, 2N): see :func:`_block_matrices`.
        log_rho, turns: (D, N), one step's decay and phase.
        state: (B, D, N, 2). keep: (B, blocks), 0 where a block starts from zero.

    Returns:
        y (B, L, D); entries (2, blocks, B, D, N); and for the backward the inputs with their
        entry states, (D, B, blocks, T + 2N).
    """
    batch, length, dim = x.shape
    block, order = weight.shape[2], log_rho.shape[1]
    blocks = -(-length // block)
    columns = x.new_empty(dim, batch, blocks, block + 2 * order)
    columns[..., :block] = _to_columns(x, block)
    flat = columns.view(dim, batch * blocks, -1)
    if blocks == 1 and state is None:
        entries = x.new_zeros(2, 1, batch, dim, order)
    else:
        s = torch.bmm(flat[..., :block], summary).view(dim, batch, blocks, 2, order)
        first = None if state is None else state.permute(3, 0, 1, 2)
        entries = block_scan(
            s.permute(3, 2, 1, 0, 4).contiguous(), first, log_rho, turns, block, _keep_axes(keep)
        )
    columns[..., block:].unflatten(-1, (2, order)).copy_(entries.permute(3, 2, 1, 0, 4))
    y = torch.bmm(flat, weight)
    return _from_columns(y.view(dim, batch, blocks, block), length), entries, columns


@_cema_blocks.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    summary: Tensor,
    log_rho: Tensor,
    turns: Tensor,
    state: Tensor | None,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, length, dim), (_, width, block) = x.shape, weight.shape
    blocks = (length + block - 1) // block
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(2, blocks, batch, *log_rho.shape),
        x.new_empty(dim, batch, blocks, width),
    )


@torch.library.custom_op("megalodon::cema_blocks_backward", mutates_args=())
def _cema_blocks_backward(
    grad_y: Tensor,
    grad_entries: Tensor | None,
    columns: Tensor,
    weight: Tensor,
    summary: Tensor,
    log_rho: Tensor,
    turns: Tensor,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, summary, log_rho, turns, and of the state on entry (B, D, N, 2)."""
    batch, length, dim = grad_y.shape
    block, order = weight.shape[2], log_rho.shape[1]
    blocks = columns.shape[2]
    flat = columns.view(dim, batch * blocks, -1)
    grad_out = _to_columns(grad_y, block).contiguous().view(dim, batch * blocks, block)
    grad_flat = torch.bmm(grad_out, weight.transpose(1, 2))
    grad_weight = torch.bmm(flat.transpose(1, 2), grad_out)
    grad_reads = grad_flat[..., block:].view(dim, batch, blocks, 2, order).permute(3, 2, 1, 0, 4)
    grad_reads = grad_reads.contiguous() if grad_entries is None else grad_reads + grad_entries
    # The adjoint of the scan is the scan backwards in time with the conjugate of q.
    axes = _keep_axes(keep)
    if axes is not None:
        axes = axes.flip(0).roll(1, 0)
    grad_s = block_scan(grad_reads.flip(1), None, log_rho, -turns, block, axes).flip(1)
    grad_rows = grad_s.permute(3, 2, 1, 0, 4).reshape(dim, batch * blocks, 2 * order)
    grad_x = torch.baddbmm(grad_flat[..., :block], grad_rows, summary.transpose(1, 2))
    grad_summary = torch.bmm(flat[..., :block].transpose(1, 2), grad_rows)

    one = torch.ones((), device=grad_y.device)
    q_re, q_im = complex_power(log_rho, turns, one, block)
    states = columns[..., block:].unflatten(-1, (2, order)).permute(3, 2, 1, 0, 4)
    grad_q_re = torch.einsum("cjbdn,cjbdn->dn", grad_s, states)
    grad_q_im = torch.einsum("jbdn,jbdn->dn", grad_s[1], states[0])
    grad_q_im = grad_q_im - torch.einsum("jbdn,jbdn->dn", grad_s[0], states[1])
    grad_log_rho = block * (grad_q_re * q_re + grad_q_im * q_im)
    grad_turns = 2 * math.pi * block * (grad_q_im * q_re - grad_q_re * q_im)
    grad_re = grad_reads[0, 0] + q_re * grad_s[0, 0] + q_im * grad_s[1, 0]
    grad_im = grad_reads[1, 0] + q_re * grad_s[1, 0] - q_im * grad_s[0, 0]
    grad_state = torch.stack([grad_re, grad_im], dim=-1)
    if keep is not None:
        grad_state = grad_state * keep[:, 0].view(-1, 1, 1, 1)
    grad_x = _from_columns(grad_x.view(dim, batch, blocks, block), length)
    return grad_x, grad_weight, grad_summary, grad_log_rho, grad_turns, grad_state


@_cema_blocks_backward.register_fake
def _(
    grad_y: Tensor,
    grad_entries: Tensor | None,
    columns: Tensor,
    weight: Tensor,
    summary: Tensor,
    log_rho: Tensor,
    turns: Tensor,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    shaped = [
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (grad_y, weight, summary, log_rho, turns)
    ]
    state = grad_y.new_empty(grad_y.shape[0], *log_rho.shape, 2)
    return shaped[0], shaped[1], shaped[2], shaped[3], shaped[4], state


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, summary, log_rho, turns, state, keep = inputs
    ctx.set_materialize_grads(False)
    ctx.shape, ctx.has_state = x.shape, state is not None
    ctx.save_for_backward(output[2], weight, summary, log_rho, turns, keep)


def _backward(
    ctx: Any, grad_y: Tensor | None, grad_entries: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    columns, weight, summary, log_rho, turns, keep = ctx.saved_tensors
    if grad_y is None:  # only the state takes part in the loss
        grad_y = columns.new_zeros(ctx.shape)
    *grads, grad_state = _cema_blocks_backward(
        grad_y, grad_entries, columns, weight, summary, log_rho, turns, keep
    )
    return (*grads, grad_state if ctx.has_state else None, None)


_cema_blocks.register_autograd(_backward, setup_context=_setup_context)


def _to_columns(x: Tensor, block: int) -> Tensor:
    """(B, L, D) -> (D, B, blocks, T), a view; the last block is filled up with zeros."""
    missing = -x.shape[1] % block
    if missing:
        x = F.pad(x, (0, 0, 0, missing))
    return x.unflatten(1, (-1, block)).permute(3, 0, 1, 2)


def _from_columns(columns: Tensor, length: int) -> Tensor:
    """(D, B, blocks, T) -> (B, L, D)."""
    dim, batch = columns.shape[:2]
    x = columns.reshape(dim, -1).t().contiguous().view(batch, -1, dim)
    return x if x.shape[1] == length else x[:, :length].contiguous()


def _keep_axes(keep: Tensor | None) -> Tensor | None:
    """(B, blocks) -> (blocks, B, 1, 1)."""
    return None if keep is None else keep.t()[..., None, None]


def _final_state(
    u: Tensor, summary: Tensor, entries: Tensor, c: CEMACoefficients, segments: Segments | None
) -> Tensor:
    """The state (B, D, N, 2) after the last step of u (B, L, D)."""
    block, order = summary.shape[1], c.p.shape[1]
    if segments is None:
        used = (u.shape[1] - 1) % block + 1
        tail, rows = u[:, -used:], summary[:, block - used :]  # the powers used - 1 .. 0
        last = entries[:, -1]  # (2, B, D, N)
        exponent = torch.tensor(used, device=u.device)
    else:
        index = (segments.block_used - 1).clamp(min=0) // block
        count = segments.block_used - index * block  # (B,), 0 for a row without tokens
        slots = torch.arange(block, device=u.device) - block + count.unsqueeze(1)
        slots = torch.where(slots >= 0, slots + index.unsqueeze(1) * block, u.shape[1])
        tail, rows = gather_slots(u, slots), summary  # the tail, moved to its block's end
        last = entries.take_along_dim(index.view(1, 1, -1, 1, 1), 1).squeeze(1)
        exponent = count.view(-1, 1, 1)
    added = torch.einsum("btd,dtk->bdk", tail, rows)
    q_re, q_im = complex_power(c.log_rho, c.turns, exponent)
    re = added[..., :order] + q_re * last[0] - q_im * last[1]
    im = added[..., order:] + q_re * last[1] + q_im * last[0]
    return torch.stack([re, im], dim=-1)
