"""A scan of a complex linear recurrence over blocks, in place.

    x_b = q x_{b-1} + s_b

for b = 0 .. n - 1, or from n - 1 down. Neighbouring runs of 1, 2, 4, 8 blocks are joined: one
operation adds what the one leaves to all blocks of the other, in all pairs of runs at once. The
groups of `GROUP` blocks that come of it are joined by the same scan over their ends.
"""

import math

import torch
from torch import Tensor

GROUP = 16
"""Blocks in a group; a power of two, so that angles reduce exactly."""


def complex_power(
    log_q: Tensor, exponent: Tensor | None = None, scale: int = 1
) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of q^(scale t), for log q (..., 2) in nepers and turns and an
    exponent t, ``None`` for 1; tensors broadcast.

    The magnitude is exp(scale t log rho). The angle is reduced to one turn after the scale, which
    is exact where that is a power of two, and again before it becomes radians.
    """
    log_rho, turns = log_q.unbind(-1)
    if scale > 1:
        log_rho, turns = log_rho * scale, (turns * scale).frac()
    if exponent is not None:
        exponent = exponent.to(log_rho.dtype)
        log_rho, turns = log_rho * exponent, (turns * exponent).frac()
    magnitude, angle = log_rho.exp(), turns * (2 * math.pi)
    return magnitude * angle.cos(), magnitude * angle.sin()


def block_scan_reference(
    s: Tensor, q: Tensor, document: Tensor | None = None, *, reverse: bool = False
) -> Tensor:
    """The recurrence, one block after the other: s (D, B, n, N), q (D, N), document (B, n)."""
    found, before = s.clone(), None
    for b in reversed(range(s.shape[2])) if reverse else range(s.shape[2]):
        if before is not None:
            step = q.unsqueeze(1) * found[:, :, before]
            if document is not None:
                step = step * (document[:, b] == document[:, before]).unsqueeze(-1)
            found[:, :, b] += step
        before = b
    return found


def q_powers(log_q: Tensor, jump: int, jumps: int, steps: int = -1) -> Tensor:
    """q^jump, q^(2 jump) .. q^(jumps jump), and q^0 .. q^steps behind them, for a log q (D, N, 2)
    in nepers and turns: complex (jumps + steps + 1, D, N). Not differentiable.

    The angle of q^jump is reduced to one turn, which is exact where jump is a power of two. From
    the eighth on, single steps come by doubling: a chain of products that short rounds no worse,
    and exponentials cost a CPU thirty times as much.
    """
    known = min(steps, 8)
    first = jumps + known + 1
    counts = torch.arange(max(known, jumps) + 1, dtype=log_q.dtype, device=log_q.device)
    counts = counts.view(-1, 1, 1, 1)
    logs = log_q.new_empty(first, *log_q.shape)
    far = log_q * jump
    far[..., 1].frac_()
    torch.mul(far, counts[1 : jumps + 1], out=logs[:jumps])
    torch.mul(log_q, counts[: known + 1], out=logs[jumps:])
    magnitude, angle = logs[..., 0].exp(), logs[..., 1] * (2 * math.pi)
    size = (jumps + steps + 1, *log_q.shape[:2])
    powers = log_q.new_empty(size, dtype=log_q.dtype.to_complex())
    torch.polar(magnitude, angle, out=powers[:first])
    near = powers[jumps:]
    while known < steps:
        more = min(known, steps - known)
        torch.mul(near[1 : more + 1], near[known], out=near[known + 1 : known + more + 1])
        known += more
    return powers


def scan_jumps(blocks: int) -> int:
    """How many powers of q :func:`block_scan` takes, for the state before the first as well."""
    return GROUP - 1 if blocks > GROUP else 1 << max(0, (blocks - 1).bit_length() - 1)


def block_scan(
    s: Tensor,
    log_q: Tensor,
    step: int,
    powers: Tensor,
    document: Tensor | None = None,
    *,
    reverse: bool = False,
) -> None:
    """What each block leaves, in place of what it adds. Not differentiable: its backward is itself,
    reversed.

    Args:
        s: complex (D, B, n, N), what each block adds.
        log_q: (D, N, 2), as in :func:`q_powers`.
        step: time steps in a block.
        powers: complex (:func:`scan_jumps` of n, D, N), q^step, q^(2 step) and so on; if reversed
            their conjugates, from the last to the first.
        document: (B, n), non-decreasing along n; blocks of different ones do not meet.
        reverse: whether the last block comes first; the scan is then one with the conjugate of q.
    """
    n = s.shape[2]

    def meet(t: Tensor, size: int, period: int) -> tuple[Tensor, Tensor]:
        """Runs of `size` blocks, (D, B, runs, N, size), and the block next to each, from which
        it takes over, (D, B, runs, N, 1)."""
        if reverse:
            runs, edges = t.unfold(2, size, period), t[:, :, size::period]
        else:  # from the end, so that the run which may be cut short is the first
            start = (n - size) % period or period
            runs, edges = t[:, :, start:].unfold(2, size, period), t[:, :, start - 1 :: period]
        count = min(runs.shape[2], edges.shape[2])
        return runs[:, :, :count], edges[:, :, :count].unsqueeze(-1)

    def advance(size: int, period: int, inner: slice = slice(None)) -> None:
        runs, edges = meet(s, size, period)
        runs = runs[..., inner]
        far = powers[-runs.shape[-1] :] if reverse else powers[: runs.shape[-1]]
        factor = far.permute(1, 2, 0)[:, None, None]  # (D, 1, 1, N, size)
        if document is not None:
            here, there = meet(document[None, :, :, None], size, period)
            factor = factor * (here[..., inner] == there)
        runs.addcmul_(factor, edges)

    size = 1
    while size < min(n, GROUP):
        advance(size, 2 * size)
        size *= 2
    if n > GROUP:
        ends = slice(0 if reverse else (n - 1) % GROUP, None, GROUP)
        groups = -(-n // GROUP)
        further = q_powers(log_q, step * GROUP, scan_jumps(groups))
        block_scan(
            s[:, :, ends],
            log_q,
            step * GROUP,
            further.flip(0).conj_physical() if reverse else further,
            None if document is None else document[:, ends],
            reverse=reverse,
        )
        advance(GROUP, GROUP, slice(1, None) if reverse else slice(0, -1))
