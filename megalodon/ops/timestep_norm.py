"""TimestepNorm: group normalisation with statistics that are cumulative over time.

Ma et al. 2024 (arXiv 2404.08801), section 3.3. For group ``g`` of ``D / G`` channels, at step
``t``, over all scalars of the group at steps ``1..t``::

    M_t = mean, V_t = population variance
    y_t = (x_t - M_t) / sqrt(V_t + eps) * (weight + 1) + bias

The weight is stored minus one, so that weight decay pulls the effective scale to one.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .elementwise import fresh
from .parts import Parts
from .precision import wide_dtype, without_autocast
from .segments import Segments


class TimestepNormState(NamedTuple):
    """Statistics of everything seen so far.

    steps: (B,) int64, the steps seen. mean, var: (B, G), in :func:`statistics_dtype`.
    """

    steps: Tensor
    mean: Tensor
    var: Tensor


def statistics_dtype(x: Tensor) -> torch.dtype:
    """float64 where the device has it: at a million steps a float32 mean stops moving, because
    one step's share of it is smaller than its last digit."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def initial_state(x: Tensor, num_groups: int) -> TimestepNormState:
    """The state before the first step of ``x`` (B, L, D)."""
    batch, dtype = x.shape[0], statistics_dtype(x)
    count = torch.zeros(batch, dtype=torch.int64, device=x.device)
    mean, var = torch.zeros(2, batch, num_groups, dtype=dtype, device=x.device)
    return TimestepNormState(count, mean, var)


def timestep_norm_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    state: TimestepNormState | None = None,
) -> tuple[Tensor, TimestepNormState]:
    """The definition, one step after the other. Arguments as :func:`timestep_norm`."""
    batch, length, dim = x.shape
    count, mean, var = initial_state(x, num_groups) if state is None else state
    groups = x.reshape(batch, length, num_groups, -1).to(mean.dtype)
    outputs = []
    for t in range(length):
        step = groups[:, t]  # (B, G, D/G)
        step_mean = step.mean(-1)
        step_var = (step - step_mean.unsqueeze(-1)).square().mean(-1)
        seen, total = count.unsqueeze(-1), count.unsqueeze(-1) + 1
        delta = step_mean - mean  # Chan et al. 1983, merging one step into the past
        var = (var * seen + step_var) / total + delta.square() * seen / total**2
        mean = mean + delta / total
        count = count + 1
        normed = (step - mean.unsqueeze(-1)) * (var + eps).rsqrt().unsqueeze(-1)
        outputs.append(normed.reshape(batch, dim))
    normed = torch.stack(outputs, dim=1)
    y = normed * (weight + 1).to(normed.dtype) + bias.to(normed.dtype)
    return y.to(x.dtype), TimestepNormState(count, mean, var)


@without_autocast
def timestep_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    state: TimestepNormState | None = None,
    segments: Segments | None = None,
    dtype: torch.dtype | None = None,
    parts: Parts | None = None,
) -> tuple[Tensor, TimestepNormState]:
    """TimestepNorm of a whole piece of text at once, as a cumulative sum.

    Args:
        x: (B, L, D), L >= 1, float32, float64 or bfloat16.
        weight, bias: (D,), the scale minus one and the shift.
        num_groups: G, a divisor of D.
        eps: added to the variance.
        state: what came before; ``None`` for the start of a text.
        segments: where padding and document borders lie; ``None`` for plain text.
        dtype: of y; ``None`` for that of x. Statistics are kept in :func:`statistics_dtype`.
        parts: of which x is one; then there is neither a state nor segments. ``None``: all of it.

    Returns:
        y (B, L, D), and the state after the last step.
    """
    dtype = dtype or x.dtype
    if state is None:
        state = initial_state(x, num_groups)
    if segments is None and x.shape[1] == 1 and parts is None:
        return _step(x, weight, bias, num_groups, eps, state, dtype)
    if segments is None:
        norm = _TimestepNorm.apply if parts is None else _norm_of_part
        y, mean, var = norm(x, weight, bias, *state, num_groups, eps, dtype, parts)
        return y, TimestepNormState(state.steps + x.shape[1], mean, var)

    groups = x.unflatten(-1, (num_groups, -1)).to(wide_dtype(x))
    step_mean, step_var = _step_statistics(groups)
    mean, var = _segment_statistics(step_mean, step_var, state, segments)
    rstd = (var + eps).rsqrt()
    normed = (groups - mean.unsqueeze(-1).to(groups.dtype)) * rstd.unsqueeze(-1).to(groups.dtype)
    y = torch.addcmul(bias.to(groups.dtype), normed.flatten(-2), (weight + 1).to(groups.dtype))
    # A row without a valid step keeps its state.
    last, seen = segments.last.view(-1, 1, 1), segments.any_valid.view(-1, 1)
    final_mean = mean.take_along_dim(last, 1).squeeze(1)
    final_var = var.take_along_dim(last, 1).squeeze(1)
    return y.to(dtype), TimestepNormState(
        segments.final_count(state.steps),
        torch.where(seen, final_mean, state.mean),
        torch.where(seen, final_var, state.var),
    )


def _step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    state: TimestepNormState,
    dtype: torch.dtype,
) -> tuple[Tensor, TimestepNormState]:
    """One step, for decoding: the same formulas with few and small operations."""
    groups = x.reshape(x.shape[0], num_groups, -1).to(state.mean.dtype)  # (B, G, D/G)
    step_var, step_mean = torch.var_mean(groups, -1, correction=0)
    steps = state.steps + 1
    inverse = steps.unsqueeze(1).to(groups.dtype).reciprocal()
    delta = step_mean - state.mean
    mean = torch.addcmul(state.mean, delta, inverse)
    # delta (step_mean - mean) is delta^2 (t-1)/t, which is never negative.
    var = torch.lerp(state.var, torch.addcmul(step_var, delta, step_mean - mean), inverse)
    normed = (groups - mean.unsqueeze(-1)) * (var + eps).rsqrt().unsqueeze(-1)
    normed = normed.to(wide_dtype(x)).view(x.shape)
    y = torch.addcmul(normed + bias, normed, weight)
    return y.to(dtype), TimestepNormState(steps, mean, var)


def _step_statistics(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance of each step's own group, (B, L, G, D/G) -> 2 x (B, L, G)."""
    size = groups.shape[-1]
    mean = groups.sum(-1) / size
    centred = groups - mean.unsqueeze(-1)
    return mean, torch.linalg.vecdot(centred, centred) / size


def _statistics_before(step_mean: Tensor, step_var: Tensor, parts: Parts) -> TimestepNormState:
    """The state after all parts before this one, whose steps have statistics (B, L, G), by merging
    the parts' mean and variance (Chan et al. 1983)."""
    batch, length, _ = step_mean.shape
    var, mean = torch.var_mean(step_mean, 1, correction=0)
    summary = torch.stack([mean, step_var.mean(1) + var])
    means, variances = parts.gather(summary)[: parts.rank].unbind(1)
    steps = torch.full((batch,), parts.rank * length, device=step_mean.device)
    if not parts.rank:
        return TimestepNormState(steps, torch.zeros_like(mean), torch.zeros_like(var))
    mean = means.mean(0)
    return TimestepNormState(steps, mean, (variances + (means - mean).square()).mean(0))


def _spread(x: Tensor, size: int) -> Tensor:
    """(B, L, G) -> (B, L, G, size), each number written out for its group: operations then run
    over contiguous memory, which broadcasting over a short last axis would not."""
    return x.unsqueeze(-1).expand(*x.shape, size).contiguous()


def _cumulative_statistics(
    step_mean: Tensor, step_var: Tensor, state: TimestepNormState
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the steps' statistics into M_t and V_t, each (B, L, G); and 1/t, (B, L, 1).

    The variance is a sum of non-negative terms, never a difference of two large sums::

        t V_t = sum_s v_s + (m_s - M_{s-1})^2 (s-1)/s
    """
    dtype = state.mean.dtype
    seen = state.steps.to(dtype).view(-1, 1, 1)
    steps = torch.arange(1, step_mean.shape[1] + 1, dtype=dtype, device=step_mean.device)
    total = seen + steps.view(1, -1, 1)
    inverse = total.reciprocal()
    start = state.mean.unsqueeze(1)
    # Shifted by the mean on entry, so that the sums stay small.
    mean = start + (step_mean - start).cumsum(1) * inverse
    previous = torch.cat([start, mean[:, :-1]], dim=1)
    terms = step_var + (step_mean - previous).square() * (total - 1) * inverse
    var = (state.var.unsqueeze(1) * seen + terms.cumsum(1)) * inverse
    return mean, var, inverse


def _segment_statistics(
    step_mean: Tensor, step_var: Tensor, state: TimestepNormState, segments: Segments
) -> tuple[Tensor, Tensor]:
    """As :func:`_cumulative_statistics`, with padding left out and documents kept apart."""
    dtype = state.mean.dtype
    weight = segments.mask.unsqueeze(-1).to(dtype)
    total = segments.count(state.steps).unsqueeze(-1).to(dtype)  # (B, L, 1), own step included
    inverse = total.clamp(min=1).reciprocal()
    carried = segments.continues.unsqueeze(-1).to(dtype)  # 1 where the entry state still counts
    seen = state.steps.to(dtype).view(-1, 1, 1) * carried
    start = state.mean.unsqueeze(1) * carried
    mean = start + segments.cumsum((step_mean - start) * weight) * inverse
    # Where the step's own weight is taken out again, M_{t-1} remains; at a first step its
    # factor (t-1)/t is zero.
    before = (total - 1).clamp(min=1)
    previous = (mean * total - step_mean) / before
    terms = step_var + (step_mean - previous).square() * (total - 1).clamp(min=0) * inverse
    var = (state.var.unsqueeze(1) * seen + segments.cumsum(terms * weight)) * inverse
    return mean, var


class _TimestepNorm(torch.autograd.Function):
    """Forward and backward with no full-size intermediate kept but the input.

    With population statistics over s <= t, and n_t the steps seen,
    ``dM_t/dx_s = 1/(n_t d)`` and ``dV_t/dx_s = 2 (x_s - M_t)/(n_t d)``: the backward is two
    reversed cumulative sums over per-group numbers.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        count: Tensor,
        mean0: Tensor,
        var0: Tensor,
        num_groups: int,
        eps: float,
        y_dtype: torch.dtype,
        parts: Parts | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = wide_dtype(x)
        groups = x.unflatten(-1, (num_groups, -1)).to(dtype)
        step_mean, step_var = (t.to(mean0.dtype) for t in _step_statistics(groups))
        if parts is not None:
            count, mean0, var0 = _statistics_before(step_mean, step_var, parts)
        mean, var, inverse = _cumulative_statistics(
            step_mean, step_var, TimestepNormState(count, mean0, var0)
        )
        rstd = (var + eps).rsqrt()
        size = groups.shape[-1]
        y = groups - _spread(mean.to(dtype), size)
        y *= _spread(rstd.to(dtype), size)
        y = torch.addcmul(bias.to(dtype), y.flatten(-2), (weight + 1).to(dtype))
        ctx.save_for_backward(x, weight, count, mean0, mean, rstd, inverse)
        ctx.bias_dtype, ctx.parts = bias.dtype, parts
        return fresh(y.to(y_dtype)), mean[:, -1].clone(), var[:, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_mean: Tensor, grad_var: Tensor) -> tuple:
        x, weight, count, mean0, mean, rstd, inverse = ctx.saved_tensors
        dtype, groups = wide_dtype(x), mean.shape[-1]
        size = x.shape[-1] // groups

        def by_group(full: Tensor) -> Tensor:
            return full.unflatten(-1, (groups, size)).to(dtype)

        grad_y, scale = by_group(grad_y), by_group(weight + 1)
        rstd_x = _spread(rstd.to(dtype), size)
        centred = by_group(x) - _spread(mean.to(dtype), size)
        grad_weight = ((grad_y * centred).mul_(rstd_x)).sum((0, 1)).flatten()
        grad_bias = grad_y.sum((0, 1)).flatten()
        grad_x = (grad_y * scale).mul_(rstd_x)
        # Per group, in the dtype of the statistics: to the mean, and to the variance.
        to_mean = -grad_x.sum(-1).to(mean.dtype)
        to_var = torch.linalg.vecdot(grad_x, centred).to(mean.dtype) * rstd.square() * -0.5
        to_mean[:, -1] += grad_mean
        to_var[:, -1] += grad_var
        to_mean, to_var = to_mean * inverse, to_var * (2 * inverse)
        slope = _reverse_cumsum(to_var / size)
        offset = _reverse_cumsum((to_mean - to_var * mean) / size)
        if ctx.parts is not None:  # what the parts behind this one add to each of its steps
            sums = ctx.parts.gather(torch.stack([slope[:, :1], offset[:, :1]]))
            behind = sums[ctx.parts.rank + 1 :].sum(0)
            slope, offset = slope + behind[0], offset + behind[1]
        # (x - M) slope + (offset + M slope): centred, so that a large mean does not cancel.
        offset = offset + mean * slope
        grad_x.addcmul_(centred, _spread(slope.to(dtype), size))
        grad_x += _spread(offset.to(dtype), size)
        grad_x = grad_x.flatten(-2).to(x.dtype)
        seen = count.to(mean.dtype).unsqueeze(-1)
        start = mean0.unsqueeze(1)
        grad_mean0 = seen * (to_mean + to_var * (start - mean)).sum(1)
        grad_var0 = seen * (to_var / 2).sum(1)
        return (
            grad_x,
            grad_weight.to(weight.dtype),
            grad_bias.to(ctx.bias_dtype),
            None,
            grad_mean0,
            grad_var0,
            None,
            None,
            None,
            None,
        )


@torch.compiler.disable
def _norm_of_part(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """A compiler cannot follow what processes tell each other."""
    found: tuple[Tensor, Tensor, Tensor] = _TimestepNorm.apply(*args)
    return found


def _reverse_cumsum(x: Tensor) -> Tensor:
    """Sum over steps t >= s, (B, L, G)."""
    return x.flip(1).cumsum(1).flip(1)
