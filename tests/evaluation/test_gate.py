import numpy as np
import pytest

from aquila_jax.errors import UserError
from aquila_jax.evaluation.gate import BETTER, NOISE, WORSE, Results, compare, difference

COUNT = 400


def results(values, *, higher_is_better=True, weights=None):
    return Results(list(values), weights or [1.0] * len(values), higher_is_better)


def test_intervals_are_those_of_the_normal_approximation():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, COUNT))
    found = difference("t", results(first), results(second))
    gains = second - first
    half = 1.96 * gains.std() / np.sqrt(COUNT)
    assert found.low == pytest.approx(gains.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(gains.mean() + half, abs=0.1 * half)


def test_items_that_are_hard_for_both_do_not_hide_a_difference():
    hard = 100 * np.random.default_rng(1).normal(size=COUNT)
    small = np.random.default_rng(2).normal(loc=0.5, size=COUNT)
    assert difference("t", results(hard), results(hard + small)).verdict == BETTER


def test_verdicts_know_which_way_is_up():
    base = np.zeros(COUNT)
    noise = np.random.default_rng(3).normal(size=COUNT)
    up, down = noise - noise.mean() + 1, noise - noise.mean() - 1
    assert difference("t", results(base), results(up)).verdict == BETTER
    assert difference("t", results(base), results(down)).verdict == WORSE
    assert difference("t", results(base), results(noise - noise.mean())).verdict == NOISE
    losses = [results(x, higher_is_better=False) for x in (base, up)]
    assert difference("t", *losses).verdict == WORSE


def test_equal_models_are_within_noise():
    same = results([0.0, 1.0, 1.0])
    assert difference("t", same, same).verdict == NOISE


def test_rounding_that_moves_every_item_alike_is_noise():
    losses = np.random.default_rng(4).uniform(1, 2, size=COUNT)
    base = results(losses, higher_is_better=False)
    for factor, verdict in ((1 - 2e-5, NOISE), (1 + 2e-5, NOISE), (0.999, BETTER), (1.001, WORSE)):
        other = results(losses * factor, higher_is_better=False)
        assert difference("t", base, other).verdict == verdict


def test_weights_make_the_mean_of_all_bytes():
    first = results([1.0, 2.0], weights=[3.0, 1.0])
    assert first.mean == pytest.approx(1.25)


def test_every_stage_is_compared_with_the_one_before():
    stages = [{"a": results([float(i)] * 5)} for i in (1, 3, 2)]
    found = compare(stages)
    assert [[(d.task, d.verdict) for d in row] for row in found] == [
        [("a", BETTER)],
        [("a", WORSE)],
    ]


def test_what_cannot_be_compared_is_said():
    one, two = {"a": results([1.0])}, {"a": results([1.0, 2.0])}
    with pytest.raises(UserError, match="two models"):
        compare([one])
    with pytest.raises(UserError, match="different tasks"):
        compare([one, {"b": results([1.0])}])
    with pytest.raises(UserError, match="same items"):
        compare([one, two])
