"""What the pictures show, before anything is drawn: the lines and their limits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from aquila_jax.reports import words
from aquila_jax.reports.axes import Axis
from aquila_jax.reports.lineup import Entry
from aquila_jax.reports.records import MEAN

# A line in a picture shows no more points than this; the eye cannot tell, the page stays small.
MAX_POINTS = 240
# A jump is shown up to this many times the height of the curves that began from scratch.
_HEADROOM = 2.0


@dataclass(frozen=True)
class Line:
    """One line of a picture.

    Attributes:
        kind: `train` (thin), `validation` (strong, with markers), `link` (dotted: a growth) or
            `plain` (any other quantity).
        style: The entry's colour name.
        label: The entry's label.
        x: Positions on the axis.
        y: Values.
        steps: Step of every point.
        flops: Cumulative FLOPs of every point.
    """

    kind: str
    style: str
    label: str
    x: Float[np.ndarray, " points"]
    y: Float[np.ndarray, " points"]
    steps: Float[np.ndarray, " points"]
    flops: Float[np.ndarray, " points"]


@dataclass(frozen=True)
class Limits:
    """The part of the plane that a picture shows."""

    left: float
    right: float
    low: float
    high: float

    def shows(self, line: Line) -> np.ndarray:
        """For every point of `line`, whether it lies inside."""
        x_in = (line.x >= self.left) & (line.x <= self.right)
        return x_in & (line.y >= self.low) & (line.y <= self.high)


def loss_lines(entries: Sequence[Entry], axis: Axis, language: str = "") -> list[Line]:
    """Training loss (mean only), validation loss, and a link at every growth.

    Args:
        entries: The line-up; those without a run are left out.
        axis: The horizontal axis.
        language: A language of the validation; empty for the mean loss.

    Returns:
        The lines in drawing order: thin ones first.
    """
    column = f"loss_{language}" if language else "loss"
    shown = [entry for entry in entries if entry.run is not None]
    train = [] if language else [line_of(e, "train", axis, column, "train") for e in shown]
    links = [_link(entry, axis, language or MEAN, column) for entry in shown]
    validation = [line_of(e, "validation", axis, column, "validation") for e in shown]
    return [line for line in (*train, *links, *validation) if line is not None and len(line.x)]


def line_of(entry: Entry, split: str, axis: Axis, column: str, kind: str) -> Line | None:
    """One column of one run as a line; points that are not finite are left out."""
    if entry.run is None:
        return None
    rows = entry.run.train if split == "train" else entry.run.validation
    y = rows.column(column)
    x = axis.values(rows)
    kept = np.isfinite(x) & np.isfinite(y)
    if not kept.any():
        return None
    x, y = x[kept], y[kept]
    steps, flops = rows.column("step")[kept], rows.column("flops")[kept]
    if kind in ("train", "plain"):
        y = smooth(y, window=max(1, len(y) // 60))
    picked = np.unique(np.linspace(0, len(x) - 1, min(len(x), MAX_POINTS)).astype(int))
    columns = (x[picked], y[picked], steps[picked], flops[picked])
    return Line(kind, entry.style, entry.label, *columns)


def _link(entry: Entry, axis: Axis, loss: str, column: str) -> Line | None:
    """From where the stage before ended to where this one starts."""
    first = line_of(entry, "validation", axis, column, "validation")
    if len(entry.stages) < 2 or first is None:
        return None
    before = entry.stages[-2].validation_end.get(loss)
    if before is None or not math.isfinite(before):
        return None
    spent = sum(getattr(stage, axis.column) for stage in entry.stages[:-1])
    x = np.array([axis.positions(np.array([float(spent)]))[0], first.x[0]])
    if not np.isfinite(x).all():
        return None
    flops = np.array([sum(stage.flops for stage in entry.stages[:-1]), first.flops[0]])
    y = np.array([before, first.y[0]])
    return Line("link", entry.style, entry.label, x, y, np.zeros(2), flops)


def smooth(y: Float[np.ndarray, " n"], window: int) -> Float[np.ndarray, " n"]:
    """Centred moving mean over `window` points each way, narrower at both ends."""
    total = np.concatenate([[0.0], np.cumsum(y)])
    middle = np.arange(len(y))
    # The same reach on both sides keeps the ends where the data has them.
    reach = np.minimum(np.minimum(middle, len(y) - 1 - middle), window)
    return (total[middle + reach + 1] - total[middle - reach]) / (2 * reach + 1)


def limits(lines: Sequence[Line], axis: Axis) -> Limits | None:
    """What to show: on a logarithmic axis without the long run-up of the first stage.

    The first hundredth of the compute would take half of a logarithmic axis, so it begins
    where the first validation after a step is, or at that hundredth, whichever is later, but
    never so late that a whole stage is lost.

    Returns:
        The limits with a margin, or None where there is no line.
    """
    if not lines:
        return None
    ends = [float(line.x.max()) for line in lines]
    left, right = min(float(line.x.min()) for line in lines), max(ends)
    if axis.log:
        first = [float(line.x.min()) for line in lines if line.kind == "validation"]
        left = min(max(right - 2, min(first, default=left)), min(ends) - 0.3)
    # A linear axis shows the run-up, but it does not set the scale.
    early = left if axis.log or lines[-1].kind == "plain" else left + 0.02 * (right - left)
    if not any(end > early for end in ends):
        early = left
    heights: list[float] = []
    ceiling = _ceiling(lines, early)
    for line in lines:
        y = line.y[line.x >= early]
        if len(y):
            heights += _heights(line.kind, y)
    low, high = float(min(heights)), float(max(heights))
    if ceiling is not None and high > low:
        high = min(high, low + _HEADROOM * (ceiling - low))
    margin_x = 0.015 * (right - left) or abs(right) * 0.05 or 1.0
    margin_y = 0.06 * (high - low) or abs(high) * 0.05 or 1.0
    return Limits(left - margin_x, right + margin_x, low - 1.5 * margin_y, high + margin_y)


def _ceiling(lines: Sequence[Line], left: float) -> float | None:
    """Highest validation in sight of a run that did not begin by a growth.

    A growth may throw the loss far up for a few steps; showing all of it would press what
    matters, the ends, into one stripe.
    """
    grown = {line.label for line in lines if line.kind == "link"}
    tops = [
        line.y[line.x >= left].max()
        for line in lines
        if line.kind == "validation" and line.label not in grown and (line.x >= left).any()
    ]
    return float(max(tops)) if grown and tops else None


@dataclass(frozen=True)
class Callout:
    """A number written beside the point `(x, y)`."""

    style: str
    text: str
    x: float
    y: float


def callouts(lines: Sequence[Line], shown: Limits) -> list[Callout]:
    """The losses worth writing: every last validation, and every jump out of the frame."""
    found = [
        Callout(line.style, words.loss(line.y[-1]), float(line.x[-1]), float(line.y[-1]))
        for line in lines
        if line.kind == "validation" and shown.shows(line)[-1]
    ]
    jumps = [line for line in lines if line.kind == "link" and line.y[1] > shown.high]
    return found + [
        Callout(line.style, f"↑ {words.loss(line.y[1])}", float(line.x[1]), shown.high)
        for line in jumps
    ]


def _heights(kind: str, y: Float[np.ndarray, " n"]) -> list[float]:
    """Lowest and highest value to show; one spike must not flatten everything else."""
    if kind == "train":
        # Beside the validation points, which are all shown, the thin line may leave the frame.
        return np.percentile(y, [1, 97]).tolist()
    if kind == "plain":
        low, high = np.percentile(y, [2, 98])
        reach = 2 * (high - low)
        return [max(y.min(), low - reach), min(y.max(), high + reach)]
    return [y.min(), y.max()]
