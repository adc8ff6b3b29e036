"""Layers in scans: all alike, or groups of dense layers that each end with one with experts."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from aquila_jax.config import ModelConfig
from aquila_jax.nn.attention import CACHE, KEY_VALUE
from aquila_jax.nn.layers import Rotation
from aquila_jax.nn.moe import DEFAULT_DISPATCH, JITTER, ROUTER, Dispatch
from aquila_jax.sharding import Layout


def scanned(layer: type[nn.Module], length: int) -> type[nn.Module]:
    """`length` times `layer`, whose parameters, caches and reports get a leading axis."""
    return nn.scan(
        layer,
        variable_axes={"params": 0, ROUTER: 0, KEY_VALUE: 0, CACHE: 0},
        split_rngs={"params": True, JITTER: True},
        in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType] - flax declares int
        length=length,
    )


class Group(nn.Module):
    """`moe_every` layers in turn: dense ones, scanned, then one with experts.

    Attributes:
        block: one layer, `aquila_jax.nn.transformer.Block`, perhaps with recomputation.
        config: the architecture.
        dtype: of activations.
        layout: where to place activations on a mesh.
        dispatch: how a mixture's tokens reach their experts.
    """

    block: type[nn.Module]
    config: ModelConfig
    dtype: DTypeLike
    layout: Layout | None = None
    dispatch: Dispatch = DEFAULT_DISPATCH

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        angles: Rotation,
        segment_ids_BT: Int[Array, "B T"],
        sees_cached_BTS: Bool[Array, "B T S"] | None = None,
    ) -> tuple[Float[Array, "B T D"], None]:
        """The new residual, and None for the scan over groups."""
        placed = (self.layout, self.dispatch)
        dense = scanned(self.block, self.config.moe_every - 1)
        for layers, has_experts, name in ((dense, False, "dense"), (self.block, True, "mixture")):
            layer = layers(self.config, self.dtype, has_experts, *placed, name=name)
            x_BTD, _ = layer(x_BTD, angles, segment_ids_BT, sees_cached_BTS)
        return x_BTD, None


def scanned_groups(config: ModelConfig, *, is_initializing: bool) -> type[nn.Module]:
    """All groups in a scan, with parameters stored as the vocabulary has them: stacks by depth.

    Args:
        config: the architecture.
        is_initializing: whether parameters are being made rather than used.
    """
    return nn.map_variables(
        scanned(Group, config.num_layers // config.moe_every),
        "params",
        trans_in_fn=functools.partial(_to_groups, config),
        trans_out_fn=functools.partial(_to_stacks, config),
        init=is_initializing,
    )


def _to_groups(config: ModelConfig, variables: dict[str, Any]) -> dict[str, Any]:
    """Stacks by depth as the scan wants them: `dense` [L/n, n-1, ...], `mixture` [L/n, ...]."""

    def grouped(leaf: jax.Array, layers: int) -> jax.Array:
        return leaf.reshape(-1, layers, *leaf.shape[1:])

    every = config.moe_every
    dense, mixture = {}, {}
    for name, part in variables["params"].items():
        if name == "moe":
            mixture[name] = part
        elif name == "mlp":
            dense[name] = jax.tree.map(lambda leaf: grouped(leaf, every - 1), part)
        else:
            dense[name] = jax.tree.map(lambda leaf: grouped(leaf, every)[:, :-1], part)
            mixture[name] = jax.tree.map(lambda leaf: grouped(leaf, every)[:, -1], part)
    return {"params": {"dense": dense, "mixture": mixture}}


def _to_stacks(config: ModelConfig, variables: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `_to_groups`."""

    def joined(dense: jax.Array, mixture: jax.Array) -> jax.Array:
        leaf = jnp.concatenate([dense, mixture[:, None]], axis=1)
        return leaf.reshape(config.num_layers, *leaf.shape[2:])

    dense, mixture = variables["params"]["dense"], variables["params"]["mixture"]
    stacks = {
        name: jax.tree.map(joined, dense[name], mixture[name]) for name in dense if name in mixture
    }
    stacks["moe"] = mixture["moe"]
    stacks["mlp"] = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), dense["mlp"])
    return {"params": stacks}
