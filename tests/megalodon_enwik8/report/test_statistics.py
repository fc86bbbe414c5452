"""Means, intervals and curves: against hand-computed numbers and tables of Student's t."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalodon_enwik8.report.runs import Point
from megalodon_enwik8.report.statistics import estimate, first_reach, loss_after, paired
from megalodon_enwik8.report.tables import signed, spread


def test_mean_spread_and_interval_are_those_of_students_t() -> None:
    three = estimate([1.0, 2.0, 3.0])
    assert (three.mean, three.deviation) == (2.0, 1.0)
    assert three.half_width == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    assert estimate([1.0, 1.2]).half_width == pytest.approx(12.7062 * 0.1, rel=1e-5)
    one = estimate([5.0])
    assert one.mean == 5.0
    assert math.isnan(one.deviation)
    assert math.isnan(one.half_width)


def test_differences_are_taken_seed_by_seed() -> None:
    gap = paired([1.0, 2.0], [1.5, 2.7])
    assert gap.mean == pytest.approx(-0.6)
    assert gap.deviation == pytest.approx(0.1 * math.sqrt(2))


curves = st.lists(
    st.tuples(st.integers(1, 500), st.floats(0.1, 1e4), st.floats(0.5, 8)), min_size=1, max_size=9
)


@given(curves, st.floats(0.5, 8), st.floats(0, 1))
def test_a_curve_is_read_on_the_straight_lines_between_its_points(
    pieces: list[tuple[int, float, float]], target: float, share: float
) -> None:
    points = [Point(0, 0.0, 6.0)]
    for steps, seconds, loss in pieces:
        points.append(Point(points[-1].step + steps, points[-1].seconds + seconds, loss))
    for a, b in itertools.pairwise(points):
        between = loss_after(points, a.seconds + share * (b.seconds - a.seconds))
        assert between == pytest.approx(a.loss + share * (b.loss - a.loss), abs=1e-6)
    assert loss_after(points, points[-1].seconds + 1) == points[-1].loss
    reached = first_reach(points, target)
    if reached is None:
        assert min(point.loss for point in points) > target
    else:
        step, seconds = reached
        assert 0 <= step <= points[-1].step
        assert loss_after(points, seconds) == pytest.approx(min(target, 6.0), abs=1e-6)
        assert all(point.loss > target for point in points if point.step < math.floor(step))


def test_numbers_are_written_with_one_sign_and_no_negative_zero() -> None:
    assert [signed(x, 4) for x in (-0.00001, 0.00001, -0.5)] == ["0.0000", "0.0000", "−0.5000"]
    assert signed(1234.5, 0) == "+1,234"
    assert spread([1.0, 3.0], 2) == "2.00 ± 1.41"
    assert [spread([1.0], 1), spread([2.0, 2.0], 0), spread([math.nan, 1], 0)] == ["1.0", "2", "–"]
