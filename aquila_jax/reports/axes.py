"""Horizontal axes: what they show, and the numbers written along them."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from aquila_jax.reports import words
from aquila_jax.reports.metrics import Rows


@dataclass(frozen=True)
class Axis:
    """A horizontal axis: the column it shows, and how its numbers are written.

    A position is the column's number in units of `unit`; `log` axes show its log10, as the
    paper's figure does.
    """

    name: str
    column: str
    label: str
    log: bool
    tick: Callable[[float], str]
    unit: float = 1.0

    def values(self, rows: Rows) -> Float[np.ndarray, " rows"]:
        """Positions on the axis; NaN where there is none (the logarithm of 0)."""
        raw = rows.column(self.column)
        return self.positions(raw)

    def positions(self, raw: Float[np.ndarray, " rows"]) -> Float[np.ndarray, " rows"]:
        """Positions of the column's own numbers."""
        if not self.log:
            return raw / self.unit
        return np.log10(raw / self.unit, out=np.full(raw.shape, np.nan), where=raw > 0)


LOG_FLOPS = Axis("log FLOPs", "flops", "log₁₀ training FLOPs", True, lambda x: f"{x:.4g}")
FLOPS = Axis("FLOPs", "flops", "training FLOPs", False, words.power)
TOKENS = Axis("tokens", "tokens", "training tokens", False, words.count)


def time_axis(seconds: float) -> Axis:
    """Training time in the unit that suits a longest run of `seconds`."""
    units = {"days": 86400.0, "hours": 3600.0, "minutes": 60.0, "seconds": 1.0}
    name = next((name for name, size in units.items() if seconds >= 2 * size), "seconds")
    label = f"training time, {name}"
    return Axis("time", "seconds", label, False, lambda x: f"{x:.6g}", units[name])


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers (steps of 1, 2 or 5) between the limits, at most `most` of them."""
    if not high > low:
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(step * k for k in (1, 2, 5, 10, 20, 50) if (high - low) / (step * k) <= most - 1)
    first = math.ceil(low / step)
    last = math.floor(high / step)
    # The float remains of the division would print as 0.30000000000000004.
    return [round(k * step, 12 - math.floor(math.log10(step))) for k in range(first, last + 1)]
