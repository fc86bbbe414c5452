"""Means over seeds with Student's t, differences by seed, and curves read between their points."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megalodon_enwik8.safety import UserError


@dataclass(frozen=True)
class Estimate:
    """The mean of values of several seeds. One value has neither spread nor interval: nan."""

    mean: float
    deviation: float  # the sample standard deviation
    half_width: float  # of the mean's 95 % interval


def estimate(values: Sequence[float]) -> Estimate:
    """Of at least one value."""
    mean, count = float(np.mean(values)), len(values)
    if count == 1:
        return Estimate(mean, math.nan, math.nan)
    try:  # here, since tables of benchmarks do without
        from scipy.stats import t  # type: ignore[import-untyped]
    except ImportError:
        raise UserError('intervals need scipy: pip install -e ".[report]"') from None
    deviation = float(np.std(values, ddof=1))
    return Estimate(mean, deviation, float(t.ppf(0.975, count - 1)) * deviation / math.sqrt(count))


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """Ours minus theirs, seed by seed: both in the order of the same seeds."""
    return estimate([a - b for a, b in zip(ours, theirs, strict=True)])


def loss_after(losses: Mapping[int, float], steps: float) -> float:
    """On the straight line between two validations; beyond the ends, theirs."""
    return float(np.interp(steps, list(losses), list(losses.values())))


def first_reach(losses: Mapping[int, float], loss: float) -> float | None:
    """Steps after which the loss is first as low as `loss`; None if it never is."""
    steps = list(losses)
    after = next((i for i, step in enumerate(steps) if losses[step] <= loss), None)
    if after is None:
        return None
    ends = [steps[after], steps[max(0, after - 1)]]
    return float(np.interp(loss, [losses[step] for step in ends], ends))
