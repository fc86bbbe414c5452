"""Means, intervals and curves: against hand-computed numbers and tables of Student's t."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalodon_enwik8.report.tables import first_reach, half_width, loss_after, signed, spread


def test_an_interval_is_that_of_students_t():
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    assert half_width([1.0, 1.2]) == pytest.approx(12.7062 * 0.1, rel=1e-5)
    assert math.isnan(half_width([5.0]))


@given(
    st.dictionaries(st.integers(1, 500), st.floats(0.5, 8), max_size=9),
    st.floats(0.5, 8),
    st.floats(0, 1),
)
def test_a_curve_is_read_on_the_straight_lines_between_its_points(found, target, share):
    losses = {0: 6.0, **dict(sorted(found.items()))}
    for (a, loss_a), (b, loss_b) in itertools.pairwise(losses.items()):
        between = loss_after(losses, a + share * (b - a))
        assert between == pytest.approx(loss_a + share * (loss_b - loss_a), abs=1e-6)
    assert loss_after(losses, 501) == list(losses.values())[-1]
    steps = first_reach(losses, target)
    if steps is None:
        assert min(losses.values()) > target
    else:
        assert 0 <= steps <= max(losses)
        assert loss_after(losses, steps) == pytest.approx(min(target, 6.0), abs=1e-6)
        assert all(loss > target for step, loss in losses.items() if step < math.floor(steps))


def test_numbers_are_written_with_one_sign_and_no_negative_zero():
    assert [signed(x, 4) for x in (-0.00001, 0.00001, -0.5)] == ["0.0000", "0.0000", "−0.5000"]
    assert signed(1234.5, 0) == "+1,234"
    assert spread([1.0, 3.0], 2) == "2.00 ± 1.41"
    assert [spread([1.0], 1), spread([2.0, 2.0], 0), spread([math.nan, 1], 0)] == ["1.0", "2", "–"]
