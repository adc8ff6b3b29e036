"""Which source unit every target unit of an axis copies."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from aquila_jax.axes import (
    EMBED,
    EXPERTS,
    HEAD_DIM,
    KV_HEADS,
    MLP,
    Q_HEADS,
    VOCAB,
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
    return AxisMap(np.arange(target) % source, source)


def within_groups(groups: int, source: int, target: int) -> AxisMap:
    """`circular` inside each of `groups` equal blocks of the axis.

    A query head stays with the key and value it attends to: AquilaMoE's AKI-Pro for
    grouped-query attention (arXiv 2408.06567, section on GQA).

    Args:
        groups: KV groups, the same in source and target.
        source: units in all groups of the source, a multiple of `groups`.
        target: units in all groups of the target, a multiple of `groups`.
    """
    per_group_source, per_group_target = source // groups, target // groups
    group, head = np.divmod(np.arange(target), per_group_target)
    return AxisMap(group * per_group_source + head % per_group_source, source)


def width_maps(source: ModelConfig, target: ModelConfig) -> Mapping[str, AxisMap]:
    """The map of every width axis from `source` to `target`.

    Expects configurations that `aquila_jax.growth.check_growth` accepts.
    """
    maps = {
        axis: circular(axis_size(source, axis), axis_size(target, axis))
        for axis in (EMBED, MLP, KV_HEADS, HEAD_DIM, VOCAB)
    }
    maps[Q_HEADS] = within_groups(source.num_kv_heads, source.num_heads, target.num_heads)
    if source.is_moe:
        maps[EXPERTS] = circular(source.num_experts, target.num_experts)
    return maps
