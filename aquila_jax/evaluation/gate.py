"""Whether a stage is better than the one before: paired differences with confidence intervals."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from aquila_jax.errors import UserError

BETTER, WORSE, NOISE = "better", "worse", "within noise"
# Of the earlier mean: what float32 may make of one function computed in two shapes.
_ROUNDING = 1e-4
_RESAMPLES = 10_000
_CHUNK = 500


@dataclasses.dataclass(frozen=True)
class Difference:
    """A later model against an earlier one, on one task.

    Attributes:
        task: its name.
        first: the earlier model's mean.
        second: the later model's.
        low: the lower end of the 95% interval of the difference, second less first.
        high: its upper end.
        higher_is_better: true of accuracies, false of losses.
    """

    task: str
    first: float
    second: float
    low: float
    high: float
    higher_is_better: bool

    @property
    def verdict(self) -> str:
        """`BETTER` or `WORSE` where the interval leaves out 0, and `NOISE` where it does not.

        What is below a ten-thousandth of the earlier mean is 0: rounding moves every item alike.
        """
        rounding = _ROUNDING * abs(self.first)
        if self.low <= rounding and self.high >= -rounding:
            return NOISE
        return BETTER if (self.low > 0) == self.higher_is_better else WORSE


@dataclasses.dataclass(frozen=True)
class Results:
    """What one model did on one task, item by item.

    Attributes:
        values: a score or a loss for each item.
        weights: how much of the task each item is: 1 for questions; for texts their bytes.
        higher_is_better: true of accuracies, false of losses.
    """

    values: Sequence[float]
    weights: Sequence[float]
    higher_is_better: bool

    @property
    def mean(self) -> float:
        """The weighted mean."""
        return float(np.average(self.values, weights=self.weights))


def difference(task: str, first: Results, second: Results, *, seed: int = 0) -> Difference:
    """Two models on the same items: the difference, with a 95% interval by the paired bootstrap.

    Items are drawn with replacement, the same for both models, so that what is hard for both does
    not widen the interval (Koehn 2004, https://aclanthology.org/W04-3250).

    Args:
        task: its name.
        first: the earlier model's results.
        second: the later model's, on the same items in the same order.
        seed: of the draws.

    Raises:
        UserError: the results are of different items, or there are none.
    """
    if list(first.weights) != list(second.weights) or not len(first.weights):
        raise UserError(f"results on {task} are not of the same items: evaluate both models anew")
    weights = np.asarray(first.weights, np.float64)
    gains = (np.asarray(second.values, np.float64) - np.asarray(first.values)) * weights
    rng, means = np.random.default_rng(seed), []
    for _ in range(_RESAMPLES // _CHUNK):
        drawn = rng.integers(len(gains), size=(_CHUNK, len(gains)))
        means.append(gains[drawn].sum(axis=1) / weights[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Difference(
        task, first.mean, second.mean, float(low), float(high), first.higher_is_better
    )


def compare(results: Sequence[Mapping[str, Results]]) -> list[list[Difference]]:
    """Every model against the one before it, task by task.

    Args:
        results: of each model, in the order of stages, by task.

    Raises:
        UserError: fewer than two models, or they did different tasks.
    """
    if len(results) < 2:
        raise UserError("a comparison needs two models or more")
    return [
        [difference(task, before[task], after[task]) for task in _same_tasks(before, after)]
        for before, after in itertools.pairwise(results)
    ]


def _same_tasks(before: Mapping[str, Results], after: Mapping[str, Results]) -> list[str]:
    if set(before) != set(after):
        raise UserError(f"models did different tasks: {sorted(before)} and {sorted(after)}")
    return list(before)
