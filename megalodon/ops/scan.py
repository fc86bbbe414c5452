"""A scan of a complex linear recurrence over blocks.

    x_{b+1} = through_b q x_b + s_b

for b = 0 .. n - 1, or from n - 1 down. The blocks lie in groups, so that one round of the loop
takes a step in all groups at once; the groups are joined by the same scan. That is log(n) loops
of at most `GROUP` rounds, whatever the length.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 16
"""Blocks in a group; a power of two, so that angles reduce exactly."""


def group_blocks(blocks: int) -> tuple[int, int]:
    """How many blocks a group has, and how many groups; their product is at least `blocks`."""
    return min(blocks, GROUP), -(-blocks // GROUP)


def complex_power(
    log_rho: Tensor, turns: Tensor, exponent: Tensor | None = None, scale: int = 1
) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of q^(scale t), for q = exp(log_rho + 2 pi i turns) and an exponent
    t, ``None`` for 1; tensors broadcast.

    The magnitude is exp(scale t log rho). The angle is reduced to one turn after the scale, which
    is exact where that is a power of two, and again before it becomes radians.
    """
    if scale > 1:
        log_rho, turns = log_rho * scale, _reduced(turns * scale)
    if exponent is not None:
        exponent = exponent.to(log_rho.dtype)
        log_rho, turns = log_rho * exponent, _reduced(turns * exponent)
    magnitude, angle = log_rho.exp(), turns * (2 * math.pi)
    return magnitude * angle.cos(), magnitude * angle.sin()


def _reduced(turns: Tensor) -> Tensor:
    return turns - turns.detach().floor()


def block_scan_reference(
    s: Tensor,
    first: Tensor | None,
    log_rho: Tensor,
    turns: Tensor,
    step: int,
    through: Tensor | None = None,
    *,
    reverse: bool = False,
) -> Tensor:
    """The recurrence, one block after the other. Arguments as :func:`block_scan`."""
    q = torch.polar((log_rho * step).exp(), turns * (2 * math.pi * step))
    size, groups = s.shape[:2]
    state = torch.zeros_like(s[0, 0]) if first is None else first
    entries = torch.empty_like(s)
    blocks = [(b, g) for g in range(groups) for b in range(size)]
    for b, g in reversed(blocks) if reverse else blocks:
        entries[b, g] = state
        if through is not None:
            state = state * through[b, g, :, None, None]
        state = q * state + s[b, g]
    return entries


def block_scan(
    s: Tensor,
    first: Tensor | None,
    log_rho: Tensor,
    turns: Tensor,
    step: int,
    through: Tensor | None = None,
    *,
    reverse: bool = False,
) -> Tensor:
    """States on entry to each block. Not differentiable: its backward is itself, reversed.

    Args:
        s: complex (size, groups, B, D, N), what each block adds. Block t stands at [t % size,
            t // size], so that blocks of one round have one index.
        first: complex (B, D, N), the state before the first block; ``None`` for zero.
        log_rho, turns: (D, N), the decay and the phase of one time step.
        step: time steps in a block.
        through: (size, groups, B), a further factor on q; ``None`` for 1.
        reverse: whether the last block comes first.

    Returns:
        A tensor of the shape of s.
    """
    size, groups = s.shape[:2]
    q = torch.complex(*complex_power(log_rho, turns, scale=step))
    rounds = range(size - 1, -1, -1) if reverse else range(size)

    def advance(state: Tensor, b: int, out: Tensor) -> None:
        if through is not None:
            state = state * through[b, :, :, None, None]
        torch.addcmul(s[b], q, state, out=out)

    entries = torch.empty_like(s)
    start = entries[rounds[0]]
    if groups == 1:
        start[0] = 0 if first is None else first
    else:
        # What each group adds by itself; then the same scan over the groups.
        state = s[rounds[0]]
        for b in rounds[1:]:
            advance(state, b, state := torch.empty_like(state))
        reach = None if through is None else through.prod(0)
        start.copy_(_scan_groups(state, first, log_rho, turns, step * size, reach, reverse))
    for before, b in pairwise(rounds):
        advance(entries[before], before, entries[b])
    return entries


def _scan_groups(
    s: Tensor,
    first: Tensor | None,
    log_rho: Tensor,
    turns: Tensor,
    step: int,
    through: Tensor | None,
    reverse: bool,
) -> Tensor:
    """:func:`block_scan` of blocks in order: s (n, B, D, N), through (n, B)."""
    n = s.shape[0]
    size, groups = group_blocks(n)
    missing = size * groups - n
    before, after = (missing, 0) if reverse else (0, missing)  # where the scan comes last

    def lay_out(t: Tensor) -> Tensor:
        filled = F.pad(t, [0, 0] * (t.dim() - 1) + [before, after])
        return filled.unflatten(0, (groups, size)).transpose(0, 1)

    s = lay_out(s).contiguous()
    through = None if through is None else lay_out(through)
    entries = block_scan(s, first, log_rho, turns, step, through, reverse=reverse)
    return entries.transpose(0, 1).flatten(0, 1)[before : before + n]
