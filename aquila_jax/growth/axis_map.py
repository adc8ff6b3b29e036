"""Which source unit every target unit of an axis copies."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from aquila_jax.axes import (
    EMBED,
    EXPERT_MLP,
    EXPERTS,
    HEAD_DIM,
    KV_HEADS,
    MLP,
    Q_HEADS,
    SHARED_MLP,
    axis_size,
)
from aquila_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True, eq=False)
class AxisMap:
    """A surjection from the target's units of one axis onto the source's.

    Attributes:
        index: g, int `[target]`; target unit j copies source unit g[j].
        source_size: units the source has; every one of them is copied at least once.
    """

    index: np.ndarray
    source_size: int

    @property
    def is_identity(self) -> bool:
        """Whether the axis keeps its units and their order."""
        return np.array_equal(self.index, np.arange(self.source_size))

    @property
    def growth(self) -> float:
        """Target units for every source unit."""
        return len(self.index) / self.source_size

    @property
    def copies(self) -> np.ndarray:
        """c, int `[target]`: how many target units share the source of unit j."""
        return np.bincount(self.index, minlength=self.source_size)[self.index]

    @property
    def is_new(self) -> np.ndarray:
        """Bool `[target]`: false on the first copy of every source unit, true on the others."""
        new = np.ones(self.index.shape, dtype=bool)
        new[np.unique(self.index, return_index=True)[1]] = False
        return new


def circular(source: int, target: int) -> AxisMap:
    """Net2Net's copies from left to right: unit j copies unit j mod `source`."""
    return AxisMap(np.arange(target) % max(source, 1), source)


def within_groups(source: ModelConfig, target: ModelConfig) -> AxisMap:
    """Query heads: a target's group takes a whole group of the source, its heads `circular`.

    A query head stays with the key and value it attends to: AquilaMoE's AKI-Pro for
    grouped-query attention (arXiv 2408.06567, section on GQA). Target group k takes source group
    k mod K, as its key and value do.
    """
    group, head = np.divmod(np.arange(target.num_heads), target.heads_per_group)
    taken = (group % source.num_kv_heads) * source.heads_per_group + head % source.heads_per_group
    return AxisMap(taken, source.num_heads)


def width_maps(source: ModelConfig, target: ModelConfig) -> Mapping[str, AxisMap]:
    """The map of every width axis from `source` to `target`.

    Expects configurations that `aquila_jax.growth.check_growth` accepts. The vocabulary is not
    here: new tokens copy none.
    """
    maps = {
        axis: circular(axis_size(source, axis), axis_size(target, axis))
        for axis in (EMBED, MLP, KV_HEADS, HEAD_DIM)
    }
    maps[Q_HEADS] = within_groups(source, target)
    if source.is_moe:
        for axis in (EXPERTS, EXPERT_MLP, SHARED_MLP):
            maps[axis] = circular(axis_size(source, axis), axis_size(target, axis))
    return maps
