import math

import pytest

from aquila_jax.reports import words


@pytest.mark.parametrize(
    ("number", "text"),
    [
        *((0, "0"), (950, "950"), (4100, "4.10K"), (999_600, "1.00M"), (3_240_000, "3.24M")),
        *((15_600_000, "15.6M"), (284e6, "284M"), (3.6e12, "3.60T"), (math.nan, "-")),
    ],
)
def test_count(number, text):
    assert words.count(number) == text


@pytest.mark.parametrize(("number", "text"), [(1.2e13, "1.20e13"), (0, "0"), (2e9, "2.00e9")])
def test_power(number, text):
    assert words.power(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.21, "4.2 s"), (61.2, "61 s"), (750, "12.5 min"), (12_240, "3.4 h"), (200_000, "2.3 d")],
)
def test_duration(seconds, text):
    assert words.duration(seconds) == text


def test_loss():
    assert words.loss(4.0521) == "4.052"
    assert words.loss(None) == words.MISSING
    assert words.loss(math.nan) == "NaN"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([12.5, 13.0, 13.5], ["12.5", "13.0", "13.5"]),
        ([0.00002, 0.00004], ["2e-5", "4e-5"]),
        ([20_000, 40_000], ["20.0K", "40.0K"]),
        ([3.0, 4.0], ["3", "4"]),
        ([13.0], ["13"]),
    ],
)
def test_axis(values, told):
    assert words.axis(values) == told


def test_shape_leaves_out_what_it_does_not_know():
    assert words.shape({"num_layers": 4, "num_experts": 0}) == "4 layers"
    assert words.shape({"num_experts": 8, "experts_per_token": 2}) == "8 experts, 2 a token"
