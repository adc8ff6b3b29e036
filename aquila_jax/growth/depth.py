"""Which source layer every target layer comes from."""

import types
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from aquila_jax.errors import UserError


class Depth(NamedTuple):
    """The layers of a deeper model.

    Attributes:
        layers: int `[target]`, the source layer of each target layer.
        silent: bool `[target]`, layers that start by adding nothing to the residual.
    """

    layers: np.ndarray
    silent: np.ndarray

    @property
    def is_exact(self) -> bool:
        """Whether the function is kept: the source's layers in order, and silent ones between."""
        heard = self.layers[~self.silent]
        return np.array_equal(heard, np.arange(self.layers.max() + 1))


def _all_heard(layers: np.ndarray) -> Depth:
    return Depth(layers, np.zeros(layers.shape, bool))


def stacking(source: int, target: int) -> Depth:
    """The source's layers over and over: target layer l takes layer l mod `source`."""
    return _all_heard(np.arange(target) % source)


def interpolation(source: int, target: int) -> Depth:
    """Each layer repeated in place: target layer l takes layer floor(l * source / target).

    Equation 3 of arXiv 2408.06567 prints the ratio upside down, which would leave the source's
    range.
    """
    return _all_heard(np.arange(target) * source // target)


def solar(source: int, target: int) -> Depth:
    """SOLAR (arXiv 2312.15166): the first half of the target's layers, then the last ones.

    With m layers left out of each copy and an even target this is the paper's
    2 (`source` - m) = `target`; of an odd target the first copy has one more.

    Raises:
        UserError: the target is more than twice as deep.
    """
    if target > 2 * source:
        raise UserError(
            f"solar joins two copies of {source} layers, so the target's num_layers may be at "
            f"most {2 * source}, not {target}; use stacking or interpolation"
        )
    first = (target + 1) // 2
    return _all_heard(np.concatenate([np.arange(first), np.arange(source - target // 2, source)]))


def identity(source: int, target: int) -> Depth:
    """Layers inserted evenly, each a copy of the one before it that starts by adding nothing.

    LLaMA-Pro (arXiv 2401.02415): the outputs of attention and MLP begin at zero, so that the
    function is kept exactly.
    """
    layers = interpolation(source, target).layers
    silent = np.concatenate([[False], layers[1:] == layers[:-1]])
    return Depth(layers, silent)


DEPTH_MAPS: Mapping[str, Callable[[int, int], Depth]] = types.MappingProxyType(
    {
        "stacking": stacking,
        "interpolation": interpolation,
        "solar": solar,
        "identity": identity,
    }
)
