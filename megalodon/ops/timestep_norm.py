"""TimestepNorm: group normalisation with statistics that are cumulative over time.

Ma et al. 2024 (arXiv 2404.08801), section 3.2. For group ``g`` of ``D / G`` channels, at step
``t``, over all scalars of the group at steps ``1..t``::

    M_t = mean, V_t = population variance
    y_t = (x_t - M_t) / sqrt(V_t + eps) * (weight + 1) + bias

The weight is stored minus one, so that weight decay pulls the effective scale to one.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling

from ..time_parallel import TimeGroup
from .precision import wide_dtype, without_autocast
from .segments import Segments, sums_over_time

SLOW_VAR_MEAN_ON = "cpu"
"""The device on which mean and variance of a few numbers as one operation take 16 times as long."""


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


class StepCounts(NamedTuple):
    """What all norms of a call have in common: of each step the number t of steps up to it, and
    t / (t - 1), both (B or 1, L, 1). The latter is 1 at the first step, where it meets a zero."""

    total: Tensor
    ratio: Tensor


def step_counts(x: Tensor, seen: Tensor | int = 0, segments: Segments | None = None) -> StepCounts:
    """The counts of x (B, L, ...), of whose rows `seen`, an int or (B,), steps were seen before;
    with segments it is (B,), and each document has counts of its own."""
    dtype = statistics_dtype(x)
    if segments is None:
        total = torch.arange(1, x.shape[1] + 1, dtype=dtype, device=x.device).view(1, -1, 1)
        total = total + (seen.view(-1, 1, 1) if isinstance(seen, Tensor) else seen)
    else:
        assert isinstance(seen, Tensor)
        total = segments.count(seen).unsqueeze(-1).to(dtype)
    return StepCounts(total, total / (total - 1).clamp(min=1))


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
    *,
    counts: StepCounts | None = None,
    return_state: bool = True,
    time: TimeGroup | None = None,
) -> tuple[Tensor, TimestepNormState | None]:
    """TimestepNorm of a whole piece of text at once, as a cumulative sum.

    Args:
        x: (B, L, D), L >= 1, float32, float64 or bfloat16.
        weight, bias: (D,), the scale minus one and the shift.
        num_groups: G, a divisor of D.
        eps: added to the variance.
        state: what came before; ``None`` for the start of a text.
        segments: where padding and document borders lie; ``None`` for plain text.
        dtype: of y; ``None`` for that of x. Statistics are kept in :func:`statistics_dtype`.
        counts: where the caller has them; ``None``: made of the state.
        return_state: whether the state after the last step is wanted.
        time: the processes that share the text; then there is no state before it, and there are
            no segments. ``None``: x is all of it.

    Returns:
        y (B, L, D), 0 at padding, and the state after the last step or ``None``.
    """
    dtype = dtype or x.dtype
    single = x.shape[1] == 1 and segments is None and time is None
    if state is None and (segments is not None or single):
        state = initial_state(x, num_groups)
    if single:
        assert state is not None
        return _step(x, weight, bias, num_groups, eps, state, dtype)
    before = 0 if time is None else time.rank * x.shape[1]
    counts = counts or step_counts(x, before if state is None else state.steps, segments)
    _, mean0, var0 = state or (None, None, None)
    given = (x, weight, bias, counts, mean0, var0, num_groups, eps, dtype, segments, time)
    if time is not None:
        y, mean, var = _norm_of_part(*given)
    elif segments is not None or is_compiling():
        # A compiler does by itself what the function does, and keeps the code of no such one.
        y, mean, var = _norm(*given)[:3]
    else:
        y, mean, var = _TimestepNorm.apply(*given)
    if segments is not None:  # padding before all text has no variance to be divided by
        y = y.masked_fill(~segments.mask.unsqueeze(-1), 0.0)
    if not return_state:
        return y, None
    if segments is None:
        steps = counts.total[:, -1, 0].long().expand(x.shape[0])
        return y, TimestepNormState(steps, mean[:, -1].clone(), var[:, -1].clone())
    assert state is not None
    return y, TimestepNormState(
        segments.final_count(state.steps),
        segments.final(mean, state.mean),
        segments.final(var, state.var),
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


def _by_group(x: Tensor, num_groups: int) -> Tensor:
    """(..., D) -> (..., G, D/G), in float32 at least."""
    return x.unflatten(-1, (num_groups, -1)).to(wide_dtype(x))


def _step_statistics(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance of each step's own group, (B, L, G, D/G) -> 2 x (B, L, G)."""
    if groups.device.type != SLOW_VAR_MEAN_ON:
        var, mean = torch.var_mean(groups, -1, correction=0)
        return mean, var
    mean = groups.mean(-1)
    centred = groups - mean.detach().unsqueeze(-1)  # to which the variance has no slope
    return mean, centred.square().mean(-1)


def _statistics_before(
    step_mean: Tensor, step_var: Tensor, time: TimeGroup
) -> tuple[Tensor | None, Tensor | None]:
    """M_0 and V_0 of a part whose steps have statistics (B, L, G): those of the parts before it,
    merged (Chan et al. 1983)."""
    step_mean, step_var = (t.to(statistics_dtype(t)) for t in (step_mean, step_var))
    var, mean = torch.var_mean(step_mean, 1, correction=0)
    summary = torch.stack([mean, step_var.mean(1) + var])
    means, variances = time.gather(summary)[: time.rank].unbind(1)
    if not time.rank:
        return None, None
    mean = means.mean(0)
    return mean, (variances + (means - mean).square()).mean(0)


def _cumulative_statistics(
    step_mean: Tensor,
    step_var: Tensor,
    counts: StepCounts,
    mean0: Tensor | None,
    var0: Tensor | None,
    segments: Segments | None,
) -> tuple[Tensor, Tensor]:
    """Merge the steps' statistics into M_t and V_t, each (B, L, G), after M_0 and V_0, if any.
    With segments these are there; padding is left out and documents are kept apart.

    The variance is a sum of non-negative terms, never a difference of two large sums::

        t V_t = sum_s v_s + (m_s - M_s)^2 s/(s-1)
    """
    total, ratio = counts
    if mean0 is None or var0 is None:
        mean = sums_over_time(step_mean, total.dtype) / total
        terms = torch.addcmul(step_var, (step_mean - mean).square(), ratio)
        return mean, sums_over_time(terms) / total
    # Shifted by the mean on entry, so that the sums stay small.
    start, seen = mean0.unsqueeze(1), total[:, :1] - 1
    if segments is not None:
        continues = segments.continues.unsqueeze(-1)
        start, seen = start * continues, seen * continues
    cumsum = sums_over_time if segments is None else segments.cumsum
    mean = start + cumsum(step_mean - start) / total
    terms = torch.addcmul(step_var, (step_mean - mean).square(), ratio)
    return mean, torch.addcmul(cumsum(terms), var0.unsqueeze(1), seen) / total


def _norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    counts: StepCounts,
    mean0: Tensor | None,
    var0: Tensor | None,
    num_groups: int,
    eps: float,
    y_dtype: torch.dtype,
    segments: Segments | None,
    time: TimeGroup | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y (B, L, D), M_t and V_t; and the mean and 1 / sqrt(V + eps) that y was made with."""
    groups = _by_group(x, num_groups)
    dtype = groups.dtype
    step_mean, step_var = _step_statistics(groups)
    if time is not None:
        mean0, var0 = _statistics_before(step_mean, step_var, time)
    mean, var = _cumulative_statistics(step_mean, step_var, counts, mean0, var0, segments)
    used_mean, rstd = mean.to(dtype), (var.to(dtype) + eps).rsqrt()
    # By another view than the statistics have: else a compiler would keep groups - mean as well.
    steps, mean_x, rstd_x = (t.flatten(0, 1) for t in (groups, used_mean, rstd))
    normed = (steps - mean_x.unsqueeze(-1)) * rstd_x.unsqueeze(-1)
    y = torch.addcmul(bias.to(dtype), normed.view(x.shape), (weight + 1).to(dtype))
    return y.to(y_dtype), mean, var, used_mean, rstd


class _TimestepNorm(torch.autograd.Function):
    """:func:`_norm` with no full-size intermediate kept but the input.

    With population statistics over s <= t, and n_t the steps seen,
    ``dM_t/dx_s = 1/(n_t d)`` and ``dV_t/dx_s = 2 (x_s - M_t)/(n_t d)``: the backward is two
    reversed cumulative sums over per-group numbers.
    """

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, var, *used = _norm(*given)
        x, weight, bias, counts, mean0, *_ = given
        ctx.save_for_backward(x, weight, counts.total, mean0, *used)
        ctx.bias_dtype, ctx.time = bias.dtype, given[-1]
        ctx.set_materialize_grads(False)
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_y: Tensor | None, grad_mean: Tensor | None, grad_var: Tensor | None
    ) -> tuple:
        x, weight, total, mean0, mean, rstd = ctx.saved_tensors
        grad_y = torch.zeros_like(x) if grad_y is None else grad_y
        groups, size = mean.shape[-1], x.shape[-1] // mean.shape[-1]
        normed = (_by_group(x, groups) - mean.unsqueeze(-1)).mul_(rstd.unsqueeze(-1))
        grad, scale = _by_group(grad_y, groups), _by_group(weight + 1, groups)
        along = grad * normed
        grad_weight, grad_bias = (t.sum((0, 1)).flatten() for t in (along, grad))
        grad_x = grad * scale
        # Per group, in the dtype of the statistics: minus what goes to M_t and to V_t, the latter
        # twice, over n_t d.
        share = rstd / total
        to_mean = grad_x.mean(-1) * share
        to_var = along.mul_(scale).mean(-1) * share * rstd
        if grad_mean is not None:
            to_mean -= grad_mean / (total * size)
        if grad_var is not None:
            to_var -= grad_var * 2 / (total * size)
        both = torch.cat([to_var, torch.addcmul(to_mean, to_var, mean, value=-1)], dim=-1)
        both = sums_over_time(both.flip(1)).flip(1)  # sums over t >= s
        if ctx.time is not None:
            both += ctx.time.gather(both[:, :1])[ctx.time.rank + 1 :].sum(0)
        slope, offset = both.chunk(2, dim=-1)
        grad_mean0 = grad_var0 = None
        if mean0 is not None:
            seen = (total[:, 0] - 1) * size
            grad_mean0 = -seen * torch.addcmul(offset[:, 0], slope[:, 0], mean0)
            grad_var0 = slope[:, 0] * seen * -0.5
        # Centred, so that a large mean does not cancel: x slope = (x - M) slope + M slope.
        offset = torch.addcmul(offset, slope, mean).to(mean.dtype)
        grad_x = grad_x.mul_(rstd.unsqueeze(-1)).sub_(offset.unsqueeze(-1))
        grad_x.addcmul_(normed, (slope / rstd).to(mean.dtype).unsqueeze(-1), value=-1)
        of_norm = (grad_weight.to(weight.dtype), grad_bias.to(ctx.bias_dtype))
        nothing = [None] * 5
        return grad_x.flatten(-2).to(x.dtype), *of_norm, None, grad_mean0, grad_var0, *nothing


_norm_of_part = torch.compiler.disable(_TimestepNorm.apply)
"""A compiler cannot follow what processes tell each other."""
