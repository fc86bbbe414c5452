"""Means over seeds, differences by seed, and curves read between their points."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

# Student's t: 97.5 % lie below, for 1 to 30 degrees of freedom.
_T = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip


@dataclass(frozen=True)
class Summary:
    """Values of several seeds. One value has neither spread nor interval: both are nan."""

    count: int
    mean: float
    deviation: float  # the sample standard deviation
    half_width: float  # of the 95 % interval of the mean

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width

    @property
    def sign(self) -> int:
        """-1 or 1 where the whole interval lies on that side of zero, else 0."""
        return -1 if self.high < 0 else 1 if self.low > 0 else 0

    def touches(self, other: Summary) -> bool:
        """Whether the two intervals have a point in common."""
        return self.low <= other.high and other.low <= self.high


def summarize(values: Sequence[float]) -> Summary:
    """Mean, spread and 95 % interval of at least one value."""
    count, mean = len(values), statistics.fmean(values)
    if count == 1:
        return Summary(1, mean, math.nan, math.nan)
    deviation = statistics.stdev(values)
    quantile = _T[min(count - 1, len(_T)) - 1]  # beyond the table a little too wide, never narrow
    return Summary(count, mean, deviation, quantile * deviation / math.sqrt(count))


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Summary:
    """Ours minus theirs, seed by seed. Both have the same seeds."""
    return summarize([value - theirs[seed] for seed, value in sorted(ours.items())])


def leader(gap: Summary, our_name: str, their_name: str) -> str | None:
    """Who has the lower loss, where `gap` is ours minus theirs; None if that is undecided."""
    if gap.mean == 0 or (gap.count > 1 and not gap.sign):
        return None
    return our_name if gap.mean < 0 else their_name


class Point(NamedTuple):
    """A validation: after so many steps, and so many seconds of training."""

    step: int
    seconds: float
    loss: float


def loss_after(points: Sequence[Point], seconds: float) -> float:
    """The loss after so many seconds, on the straight line between two validations.

    points: from the start to the end of a run. Before the first and after the last: theirs.
    """
    before = points[0]
    for point in points:
        if point.seconds > seconds:
            length = point.seconds - before.seconds
            share = (seconds - before.seconds) / length if length > 0 else 0.0
            return before.loss + max(0.0, share) * (point.loss - before.loss)
        before = point
    return before.loss


def first_reach(points: Sequence[Point], loss: float) -> tuple[float, float] | None:
    """Steps and seconds after which the loss is first as low as `loss`; None if it never is.

    Between two validations the loss is taken to fall in a straight line.
    """
    before = points[0]
    for point in points:
        if point.loss <= loss:
            fall = before.loss - point.loss
            share = (before.loss - loss) / fall if fall > 0 else 1.0
            return (
                before.step + share * (point.step - before.step),
                before.seconds + share * (point.seconds - before.seconds),
            )
        before = point
    return None
