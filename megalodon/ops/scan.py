"""A scan of a complex linear recurrence over blocks, in real arithmetic.

    entry_{b+1} = keep_{b+1} * (q entry_b + s_b)

for b = 0 .. n - 1. States are pairs of real tensors (2, n, B, D, N): real part, imaginary part.
The loop runs inside groups of a fixed number of blocks, for all groups at once, and the groups
are joined by the same scan: log(n) loops of at most `GROUP` rounds, whatever the length.
"""

import math

import torch
from torch import Tensor

GROUP = 16


def complex_power(
    log_rho: Tensor, turns: Tensor, exponent: Tensor, scale: int = 1
) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of q^(scale t), for q = exp(log_rho + 2 pi i turns) and an exponent
    t; tensors broadcast.

    The magnitude is exp(scale t log rho). The angle is reduced to one turn after the scale, which
    is exact where that is a power of two, and again before it becomes radians.
    """
    exponent = exponent.to(log_rho.dtype)
    magnitude = (log_rho * (exponent * scale)).exp()
    if scale > 1:
        turns = turns * scale
        turns = turns - turns.detach().floor()
    turns = turns * exponent
    angle = (turns - turns.detach().floor()) * (2 * math.pi)
    return magnitude * angle.cos(), magnitude * angle.sin()


def block_scan_reference(
    s: Tensor,
    first: Tensor | None,
    log_rho: Tensor,
    turns: Tensor,
    step: int,
    keep: Tensor | None = None,
) -> Tensor:
    """The recurrence, one block after the other. Arguments as :func:`block_scan`."""
    q = torch.polar((log_rho * step).exp(), turns * (2 * math.pi * step))
    entry = torch.complex(*(torch.zeros_like(s[:, 0]) if first is None else first))
    entries = []
    for b in range(s.shape[1]):
        if keep is not None:
            entry = entry * keep[b]
        entries.append(entry)
        entry = q * entry + torch.complex(s[0, b], s[1, b])
    return torch.view_as_real(torch.stack(entries)).movedim(-1, 0)


def block_scan(
    s: Tensor,
    first: Tensor | None,
    log_rho: Tensor,
    turns: Tensor,
    step: int,
    keep: Tensor | None = None,
    through: Tensor | None = None,
) -> Tensor:
    """States on entry to each of n blocks. Not differentiable: its backward is itself, reversed.

    Args:
        s: (2, n, B, D, N), what each block adds.
        first: (2, B, D, N), the state before the first block; ``None`` for zero.
        log_rho, turns: (D, N), the decay and the phase of one time step.
        step: time steps in a block.
        keep: (n, B, 1, 1), 0 where a block starts afresh; ``None`` for 1.
        through: (n, B, 1, 1), a further factor on q; ``None`` for 1.
    """
    n = s.shape[1]
    one = torch.ones((), device=s.device)
    q_re, q_im = complex_power(log_rho, turns, one, step)
    if n <= GROUP:
        entries = torch.empty_like(s)
        state = torch.zeros_like(s[:, 0]) if first is None else first
        for b in range(n):
            if keep is not None:
                state = state * keep[b]
            entries[:, b] = state
            if b < n - 1:
                state = _advance(
                    state if through is None else state * through[b], s[:, b], q_re, q_im
                )
        return entries

    groups = -(-n // GROUP)
    keep, through = (None if t is None else _grouped(t, groups) for t in (keep, through))
    s = _grouped(s, groups)
    local = torch.empty_like(s)  # (2, groups, GROUP, B, D, N), as if each group began at zero
    state = torch.zeros_like(s[:, :, 0])
    reach = None if keep is None and through is None else s.new_ones(groups, *s.shape[3:4], 1, 1)
    factors = []
    for b in range(GROUP):
        if keep is not None and b:
            state = state * keep[:, b]
            reach = reach * keep[:, b]  # type: ignore[operator]
        local[:, :, b] = state
        if reach is not None:
            factors.append(reach)
        if through is not None:
            state = state * through[:, b]
            reach = reach * through[:, b]  # type: ignore[operator]
        state = _advance(state, s[:, :, b], q_re, q_im)
    entry = block_scan(
        state,
        first,
        log_rho,
        turns,
        step * GROUP,
        None if keep is None else keep[:, 0],
        reach,
    )  # (2, groups, B, D, N)
    for b in range(GROUP):
        p_re, p_im = complex_power(log_rho, turns, one * b, step)
        reaching = entry if not factors else entry * factors[b]
        local[:, :, b] = _advance(reaching, local[:, :, b], p_re, p_im)
    return local.flatten(1, 2)[:, :n]


def _advance(state: Tensor, s: Tensor, q_re: Tensor, q_im: Tensor) -> Tensor:
    """q * state + s for pairs (2, ...)."""
    re, im = state
    return torch.stack(
        [
            torch.addcmul(torch.addcmul(s[0], q_re, re), q_im, im, value=-1),
            torch.addcmul(torch.addcmul(s[1], q_re, im), q_im, re),
        ]
    )


def _grouped(t: Tensor, groups: int) -> Tensor:
    """Pad the block axis with zeros, and split it into (groups, GROUP); B and two more follow."""
    axis = t.dim() - 4
    missing = groups * GROUP - t.shape[axis]
    if missing:
        shape = list(t.shape)
        shape[axis] = missing
        t = torch.cat([t, t.new_zeros(shape)], dim=axis)
    return t.unflatten(axis, (groups, GROUP))
