"""Finds room for labels beside points, for whoever draws them."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

# Directions to try, the first preferred: right, below, above, then the corners.
_DIRECTIONS = ((1, 0), (0, 1), (-1, 1), (1, 1), (1, -1), (0, -1), (-1, -1), (-1, 0))
_DISTANCES = (1.0, 2.2, 3.6, 5.0)


def place_labels(
    anchors: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    obstacles: Float[np.ndarray, "n 2"],
    bounds: tuple[float, float],
    gap: float = 8.0,
) -> list[tuple[float, float]]:
    """Centres for labels so that none covers another, and as little else as possible.

    Args:
        anchors: The point each label belongs to, in pixels, y downwards.
        sizes: Width and height of each label.
        obstacles: Points of the lines, dense enough that a label over a line covers some.
        bounds: Width and height of the canvas that labels stay inside.
        gap: Distance between a point and its label.

    Returns:
        The centre of every label, in the order of the anchors.
    """
    boxes: list[tuple[float, float, float, float]] = []
    for anchor, size in zip(anchors, sizes, strict=True):
        candidates = _candidates(anchor, size, gap)
        costs = [
            _cost(box, boxes, obstacles, bounds) + 0.4 * rank for rank, box in enumerate(candidates)
        ]
        boxes.append(candidates[int(np.argmin(costs))])
    return [((left + right) / 2, (top + bottom) / 2) for left, top, right, bottom in boxes]


def _candidates(
    anchor: tuple[float, float], size: tuple[float, float], gap: float
) -> list[tuple[float, float, float, float]]:
    (x, y), (width, height) = anchor, size
    boxes = []
    for distance in _DISTANCES:
        for across, down in _DIRECTIONS:
            centre_x = x + across * (width / 2 + gap * distance)
            centre_y = y + down * (height / 2 + gap * distance)
            left, top = centre_x - width / 2, centre_y - height / 2
            boxes.append((left, top, left + width, top + height))
    return boxes


def _cost(
    box: tuple[float, float, float, float],
    placed: Sequence[tuple[float, float, float, float]],
    obstacles: Float[np.ndarray, "n 2"],
    bounds: tuple[float, float],
) -> float:
    left, top, right, bottom = box
    if left < 0 or top < 0 or right > bounds[0] or bottom > bounds[1]:
        return 1e6
    if any(left < r and right > lo and top < b and bottom > t for lo, t, r, b in placed):
        return 1e5
    x, y = obstacles[:, 0], obstacles[:, 1]
    return float(np.sum((x > left) & (x < right) & (y > top) & (y < bottom)))


def densify(points: Float[np.ndarray, "n 2"], spacing: float = 4.0) -> Float[np.ndarray, "m 2"]:
    """Points along a polyline, at most `spacing` pixels apart."""
    if len(points) < 2:
        return points
    lengths = np.hypot(*np.diff(points, axis=0).T)
    along = np.concatenate([[0.0], np.cumsum(lengths)])
    at = np.linspace(0.0, along[-1], max(2, min(4000, int(along[-1] / spacing) + 2)))
    return np.stack([np.interp(at, along, points[:, k]) for k in (0, 1)], axis=1)
