import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aquila_jax.reports.axes import FLOPS, LOG_FLOPS, ticks, time_axis


def test_logarithm_of_nothing_has_no_place():
    np.testing.assert_array_equal(LOG_FLOPS.positions(np.array([0.0, 1e13])), [np.nan, 13.0])
    np.testing.assert_array_equal(FLOPS.positions(np.array([0.0, 1e13])), [0.0, 1e13])


@pytest.mark.parametrize(
    ("seconds", "unit", "position"),
    [(60, "seconds", 60), (600, "minutes", 10), (9000, "hours", 2.5), (864_000, "days", 10)],
)
def test_time_has_one_unit(seconds, unit, position):
    axis = time_axis(seconds)
    assert axis.label == f"training time, {unit}"
    assert axis.positions(np.array([float(seconds)]))[0] == position


@given(
    low=st.floats(-1e6, 1e6),
    size=st.floats(1e-6, 1e15),
    most=st.integers(3, 15),
)
def test_ticks_are_inside_and_few(low, size, most):
    high = low + size
    if high - low < 1e-9 * abs(low):
        return
    found = ticks(low, high, most)
    assert len(found) <= most
    slack = 1e-9 * (abs(low) + size)
    assert all(low - slack <= tick <= high + slack for tick in found)
