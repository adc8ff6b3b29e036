"""Which source layer every target layer comes from."""

from collections.abc import Callable, Mapping

import numpy as np


def stacking(source: int, target: int) -> np.ndarray:
    """The source's layers over and over: target layer l takes layer l mod `source`."""
    return np.arange(target) % source


def interpolation(source: int, target: int) -> np.ndarray:
    """Each layer repeated in place: target layer l takes layer floor(l * source / target).

    Equation 3 of arXiv 2408.06567 prints the ratio upside down, which would leave the source's
    range.
    """
    return np.arange(target) * source // target


DEPTH_MAPS: Mapping[str, Callable[[int, int], np.ndarray]] = {
    "stacking": stacking,
    "interpolation": interpolation,
}
