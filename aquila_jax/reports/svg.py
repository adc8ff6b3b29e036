"""Draws lines as inline SVG that follows the page's colours and answers the pointer."""

import html
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from jaxtyping import Float

from aquila_jax.reports import words
from aquila_jax.reports.axes import Axis, ticks
from aquila_jax.reports.curves import Limits, Line, callouts, limits
from aquila_jax.reports.placement import densify, place_labels

_LETTER = 6.9  # Width of a digit of the 12-pixel labels, in pixels.


@dataclass(frozen=True)
class Canvas:
    """Size and wording of one picture, lengths in pixels.

    Attributes:
        title: Read out in place of the picture.
        value: How a value is written, on the axis and at the pointer.
        unit: What a value is, told at the pointer.
        ends: Write the last value of every line with markers beside its last point.
    """

    width: int
    height: int
    title: str
    value: Callable[[float], str]
    unit: str
    ends: bool = False

    left, top, bottom, right = 54, 12, 42, 14

    def pixels(
        self, x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], shown: Limits
    ) -> Float[np.ndarray, "n 2"]:
        """Where points lie in the picture."""
        across, down = self.width - self.left - self.right, self.height - self.top - self.bottom
        right = (x - shown.left) / (shown.right - shown.left)
        lower = (shown.high - y) / (shown.high - shown.low)
        return np.stack([self.left + right * across, self.top + lower * down], axis=1)

    def place(self, line: Line, shown: Limits) -> Float[np.ndarray, "points 2"]:
        """Pixels of every point of `line`; a growth that jumps out of the frame ends at it."""
        y = np.minimum(line.y, shown.high) if line.kind == "link" else line.y
        return self.pixels(line.x, y, shown)


def esc(text: object) -> str:
    """`text` for any place in the page, attribute values included."""
    return html.escape(str(text), quote=True)


def chart(lines: Sequence[Line], axis: Axis, canvas: Canvas) -> str:
    """One picture as an SVG element; the empty string where there is nothing to show."""
    shown = limits(lines, axis)
    if shown is None:
        return ""
    if canvas.ends:
        # Room for the numbers below the lowest points.
        height = canvas.height - canvas.top - canvas.bottom
        extra = 24 / (height - 24) * (shown.high - shown.low)
        shown = replace(shown, low=shown.low - extra)
    placed = [(line, canvas.place(line, shown)) for line in lines]
    across = canvas.width - canvas.left - canvas.right
    down = canvas.height - canvas.top - canvas.bottom
    corner = f"{canvas.left} {canvas.top}"
    body = [
        _grid(axis, canvas, shown),
        # A nested element clips what leaves the frame, without names that must be unique.
        f'<svg x="{canvas.left}" y="{canvas.top}" width="{across}" height="{down}" '
        f'viewBox="{corner} {across} {down}">',
        *(_line(line, points) for line, points in placed),
        "</svg>",
        *(_markers(line, points, shown) for line, points in placed if line.kind == "validation"),
        _numbers(placed, canvas, shown) if canvas.ends else "",
    ]
    label = esc(canvas.title)
    return (
        f'<svg viewBox="0 0 {canvas.width} {canvas.height}" role="img" aria-label="{label}" '
        f"data-points='{_hover_data(placed, canvas, shown)}'>{''.join(body)}</svg>"
    )


def _grid(axis: Axis, canvas: Canvas, shown: Limits) -> str:
    bottom, right = canvas.height - canvas.bottom, canvas.width - canvas.right
    parts = []
    heights = ticks(shown.low, shown.high, max(3, canvas.height // 30))
    for value, told in zip(heights, words.axis(heights), strict=True):
        share = (shown.high - value) / (shown.high - shown.low)
        y = canvas.top + share * (bottom - canvas.top)
        parts.append(f'<path class="grid" d="M{canvas.left} {y:.1f}H{right}"/>')
        parts.append(_text(canvas.left - 7, y + 4, told, "end"))
    places = [x for x in ticks(shown.left, shown.right, max(3, canvas.width // 62)) if x >= 0]
    told = words.axis(places) if axis.log else [axis.tick(x) for x in places]
    for value, text in zip(places, told, strict=True):
        share = (value - shown.left) / (shown.right - shown.left)
        x = canvas.left + share * (right - canvas.left)
        parts.append(f'<path class="grid" d="M{x:.1f} {canvas.top}V{bottom}"/>')
        # The last number would reach out of the picture.
        parts.append(_text(min(x, canvas.width - 3.6 * len(text)), bottom + 16, text, "middle"))
    parts.append(f'<path class="axis" d="M{canvas.left} {bottom}H{right}"/>')
    middle = (canvas.left + right) / 2
    parts.append(_text(middle, canvas.height - 6, axis.label, "middle", "name"))
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str, style: str = "tick") -> str:
    return (
        f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{esc(text)}</text>'
    )


def _line(line: Line, points: Float[np.ndarray, "n 2"]) -> str:
    if line.kind == "link" and abs(points[1, 1] - points[0, 1]) < 18:
        return ""
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    drawn = f'<path class="line {line.kind} {line.style}" d="{path}"/>'
    return drawn + (_head(line, points) if line.kind == "link" else "")


def _head(line: Line, points: Float[np.ndarray, "2 2"]) -> str:
    """The head of a growth's arrow: up where the loss rose, down where it fell."""
    (_, from_y), (x, y) = points
    back = math.copysign(1.0, from_y - y)
    tip, base = y + 4 * back, y + 13 * back
    path = f"M{x:.1f} {tip:.1f}L{x - 4.5:.1f} {base:.1f}H{x + 4.5:.1f}Z"
    return f'<path class="arrow {line.style}" d="{path}"/>'


def _markers(line: Line, points: Float[np.ndarray, "n 2"], shown: Limits) -> str:
    radius = 3.6 if len(line.x) <= 40 else 1.8
    dots = [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>'
        for (x, y), inside in zip(points, shown.shows(line), strict=True)
        if inside
    ]
    return f'<g class="dots {line.style}">{"".join(dots)}</g>'


def _numbers(placed: Sequence[tuple[Line, np.ndarray]], canvas: Canvas, shown: Limits) -> str:
    told = callouts([line for line, _ in placed], shown)
    if not told:
        return ""
    at = canvas.pixels(np.array([c.x for c in told]), np.array([c.y for c in told]), shown)
    places = place_labels(
        [(float(x), float(y)) for x, y in at],
        [(len(callout.text) * _LETTER, 13.0) for callout in told],
        np.concatenate([densify(points) for _, points in placed]),
        (canvas.width, canvas.height - canvas.bottom - 2),
    )
    return "".join(
        _text(x, y + 4, callout.text, "middle", f"end {callout.style}")
        for callout, (x, y) in zip(told, places, strict=True)
    )


def _hover_data(placed: Sequence[tuple[Line, np.ndarray]], canvas: Canvas, shown: Limits) -> str:
    """What the page's script needs to name the point nearest to the pointer."""
    series, value = [], canvas.value
    for line, points in placed:
        if line.kind == "link":
            continue
        inside = shown.shows(line)
        rows = zip(
            points[inside], line.steps[inside], line.flops[inside], line.y[inside], strict=True
        )
        found = [
            (round(float(x), 1), round(float(y), 1), int(step), words.power(flops), value(float(v)))
            for (x, y), step, flops, v in rows
        ]
        unit = {"train": f"training {canvas.unit}", "validation": f"validation {canvas.unit}"}
        name = unit.get(line.kind, canvas.unit)
        series.append({"label": line.label, "style": line.style, "name": name, "points": found})
    text = json.dumps(series, separators=(",", ":"), ensure_ascii=False)
    return html.escape(text, quote=False).replace("'", "&#39;")


def strips(shares: Sequence[tuple[str, float]]) -> str:
    """A bar cut by shares: `(style, share)`, shares adding up to 1."""
    edges = np.concatenate([[0.0], np.cumsum([share for _, share in shares])]) * 400
    parts = [
        f'<rect class="{style}" x="{a:.2f}" y="0" width="{max(0.0, b - a):.2f}" height="10"/>'
        for (style, _), (a, b) in zip(shares, pairwise(edges), strict=True)
    ]
    return (
        '<svg class="bar" viewBox="0 0 400 10" preserveAspectRatio="none" aria-hidden="true">'
        f"{''.join(parts)}</svg>"
    )
