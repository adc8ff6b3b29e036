"""Settings of a mixture's computation that mean nothing are refused with the ones that do."""

import math

import pytest

from aquila_jax import UserError
from aquila_jax.nn import Dispatch


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"strategy": "droples"}, "strategy must be one of dropless, capacity, reference, not"),
        ({"exchange": "ring"}, "exchange must be one of"),
        ({"balance": "local"}, "balance must be one of"),
        ({"capacity_factor": 0.0}, r"capacity_factor \(0.0\) must be above 0"),
        ({"capacity_factor": math.inf}, r"capacity_factor \(inf\)"),
        ({"capacity_factor": math.nan}, r"capacity_factor \(nan\)"),
        ({"buffer_factor": 0.5}, r"buffer_factor \(0.5\) must be 0, room for all, or at least 1"),
        ({"buffer_factor": -1.0}, r"buffer_factor \(-1.0\)"),
        ({"jitter": 1.0}, r"jitter \(1.0\) must be at least 0 and below 1"),
        ({"jitter": -0.1}, r"jitter \(-0.1\)"),
    ],
)
def test_a_setting_that_means_nothing_is_refused(changes, says):
    with pytest.raises(UserError, match=says):
        Dispatch(**changes)


@pytest.mark.parametrize("strategy", ["dropless", "capacity", "reference"])
def test_measuring_drops_nothing_and_keeps_the_rest(strategy):
    settings = Dispatch(strategy, "gather", buffer_factor=1.2, balance="sequence", jitter=0.1)
    measured = settings.without_drops()
    assert measured.jitter == 0
    assert measured.strategy != "capacity"
    kept = measured.exchange, measured.buffer_factor, measured.balance
    assert kept == ("gather", 1.2, "sequence")
    assert measured.without_drops() == measured
