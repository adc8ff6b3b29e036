"""The paper's picture, drawn again: loss against log10 of the training FLOPs, all stages."""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aquila_jax.errors import UserError
from aquila_jax.reports.axes import FLOPS, LOG_FLOPS, Axis
from aquila_jax.reports.curves import Limits, Line, callouts, limits, loss_lines
from aquila_jax.reports.lineup import Entry, lineup
from aquila_jax.reports.placement import densify, place_labels
from aquila_jax.reports.records import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# After Okabe and Ito: told apart by people with any colour vision, and by lightness in print.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#a3479b", "#b8860b", "#3aa5dd")
GREYS = ("#6b7280", "#9aa1ac", "#4b5563")
_DASHES = ((0, (5, 2)), (0, (2, 1.5)), (0, (7, 2, 2, 2)))
_INK, _FAINT = "#1f2933", "#e4e7eb"
_SIZE_INCHES, _DPI = (9.6, 5.6), 200


def loss_figure(runs: Sequence[Run], path: str | Path, *, log: bool = True) -> Path:
    """Draws the losses of all runs into one PNG of 1920 by 1120 pixels.

    Args:
        runs: The runs of one report, in any order.
        path: The file to write.
        log: Show log10 of the cumulative FLOPs, as the paper does; otherwise the FLOPs.

    Returns:
        The path.

    Raises:
        UserError: No run was given, one was given twice, or none has logged a loss.
    """
    entries, axis = lineup(runs), LOG_FLOPS if log else FLOPS
    lines = loss_lines(entries, axis)
    shown = limits(lines, axis)
    if shown is None:
        names = ", ".join(str(run.directory) for run in runs)
        raise UserError(f"no loss was logged in {names}: train further with `aquila train`")
    with _quiet():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=_SIZE_INCHES, dpi=_DPI, facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        axes: Axes = figure.add_subplot()
        _frame(axes, axis, shown)
        for line in lines:
            _draw(axes, line)
        _legend(axes, entries)
        figure.canvas.draw()
        _annotate(figure, axes, lines, shown)
        figure.savefig(path, format="png", metadata={"Software": "aquila_jax"})
    return Path(path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences remarks on font caches and on letters that a font lacks."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _look(style: str) -> dict[str, Any]:
    slot = int(style[1:])
    if style.startswith("c"):
        return {"color": GREYS[slot % len(GREYS)], "linestyle": _DASHES[slot % len(_DASHES)]}
    return {"color": COLOURS[slot % len(COLOURS)], "linestyle": "-"}


def _draw(axes: "Axes", line: Line) -> None:
    look = _look(line.style)
    if line.kind == "train":
        axes.plot(line.x, line.y, **{**look, "linestyle": "-"}, linewidth=0.9, alpha=0.4)
    elif line.kind == "link":
        # A jump out of the frame ends at the frame, where its height is written.
        start, end = zip(line.x, np.minimum(line.y, axes.get_ylim()[1]), strict=True)
        # A growth that keeps the loss leaves no room for an arrow between its two points.
        if abs(np.diff(axes.transData.transform([start, end])[:, 1])) < 24 * axes.figure.dpi / 72:
            return
        arrow = {
            "arrowstyle": "-|>,head_width=0.22,head_length=0.45",
            "linestyle": (0, (1.2, 1.6)),
            "color": look["color"],
            "linewidth": 1.4,
            "shrinkA": 3,
            "shrinkB": 4,
        }
        axes.annotate("", xy=end, xytext=start, arrowprops=arrow, annotation_clip=True, zorder=4)
    else:
        axes.plot(
            *(line.x, line.y),
            **look,
            linewidth=2.0,
            marker="o",
            markersize=4.6 if len(line.x) <= 40 else 2.6,
            markeredgecolor="white",
            markeredgewidth=0.8 if len(line.x) <= 40 else 0.3,
            zorder=3 if line.style.startswith("s") else 2.5,
        )


def _frame(axes: "Axes", axis: Axis, shown: Limits) -> None:
    axes.set_xlim(shown.left, shown.right)
    axes.set_ylim(shown.low, shown.high)
    label = "log$_{10}$ of the training FLOPs, all stages" if axis.log else axis.label
    axes.set_xlabel(label, fontsize=10.5, color=_INK, labelpad=8)
    axes.set_ylabel("loss, nats per token", fontsize=10.5, color=_INK, labelpad=8)
    title = "Validation loss (points) and training loss (thin), stage after stage"
    axes.set_title(title, loc="left", fontsize=12, color=_INK, pad=12, fontweight="semibold")
    axes.grid(color=_FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.autoscale(False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9aa5b1")
    axes.tick_params(colors="#52606d", labelsize=9.5, length=3)


def _legend(axes: "Axes", entries: Sequence[Entry]) -> None:
    from matplotlib.lines import Line2D

    shown = [entry for entry in entries if entry.run is not None]
    handles = [
        Line2D([], [], **_look(entry.style), linewidth=2.2, marker="o", markeredgecolor="white")
        for entry in shown
    ]
    legend = axes.legend(
        handles,
        [entry.legend for entry in shown],
        loc="best",
        fontsize=9.5,
        framealpha=0.92,
        edgecolor="white",
        labelcolor=_INK,
        handlelength=2.6,
        labelspacing=0.55,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _annotate(figure: "Figure", axes: "Axes", lines: Sequence[Line], shown: Limits) -> None:
    """Writes the losses that count beside their points."""
    height = figure.canvas.get_width_height()[1]

    def pixels(line: Line) -> np.ndarray:
        at = np.asarray(axes.transData.transform(np.stack([line.x, line.y], axis=1)))
        return np.stack([at[:, 0], height - at[:, 1]], axis=1)

    told = callouts(lines, shown)
    point = figure.dpi / 72
    at = np.asarray(axes.transData.transform([(callout.x, callout.y) for callout in told]))
    places = place_labels(
        [(float(x), height - float(y)) for x, y in at],
        [(len(callout.text) * 6.6 * point, 11 * point) for callout in told],
        np.concatenate([densify(pixels(line), 2 * point) for line in lines]),
        (float(axes.bbox.x1), height - float(axes.bbox.y0) - 2 * point),
        gap=4 * point,
    )
    back = axes.transData.inverted()
    for callout, (x, y) in zip(told, places, strict=True):
        axes.annotate(
            callout.text,
            xy=tuple(back.transform((x, height - y))),
            ha="center",
            va="center",
            fontsize=10,
            fontweight="bold",
            color=_look(callout.style)["color"],
            bbox={"boxstyle": "round,pad=0.12", "facecolor": "white", "alpha": 0.8, "linewidth": 0},
            annotation_clip=False,
            zorder=5,
        )
