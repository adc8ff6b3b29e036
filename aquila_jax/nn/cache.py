"""Keys and values of earlier tokens, kept so that a next token costs one token's work."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from aquila_jax import axes
from aquila_jax.axes import LAYER_AXES
from aquila_jax.config import ModelConfig
from aquila_jax.nn.attention import CACHE, KEY_VALUE
from aquila_jax.nn.transformer import Transformer


class Cache(NamedTuple):
    """What a batch of texts has behind it. All rows fill their slots together.

    Attributes:
        layers: turned keys and values, `[..., B, S, K, H]`, as the `CACHE` collection of
            `Transformer` has them: stacked by layer and group, or each layer's by itself where
            layers are unrolled.
        segment_ids_BS: int32, 0 where a slot is padding or still free.
        length: int32 scalar, slots that are taken.
        num_tokens_B: int32, how many of them are tokens: the position of the next.
    """

    layers: Any
    segment_ids_BS: jax.Array
    length: jax.Array
    num_tokens_B: jax.Array


def prefill(
    model: Transformer, params: Any, tokens_BT: jax.Array, is_token_BT: jax.Array, *, capacity: int
) -> tuple[jax.Array, Cache]:
    """Read whole prompts.

    Args:
        model: the decoder.
        params: its parameters.
        tokens_BT: prompts, padded anywhere: left, right or between.
        is_token_BT: false on padding.
        capacity: S, slots of the cache; at least T plus the tokens that will follow.

    Returns:
        Logits `[B, T, V]`, those of padding meaningless, and the cache.
    """
    segment_ids_BT = is_token_BT.astype(jnp.int32)
    positions_BT = jnp.maximum(jnp.cumsum(segment_ids_BT, axis=1) - 1, 0)
    logits_BTV, variables = model.apply(
        {"params": params}, tokens_BT, segment_ids_BT, positions_BT, mutable=[KEY_VALUE]
    )
    free = capacity - tokens_BT.shape[1]

    def with_free_slots(new: jax.Array) -> jax.Array:
        return jnp.pad(new, [(0, 0)] * (new.ndim - 3) + [(0, free), (0, 0), (0, 0)])

    cache = Cache(
        jax.tree.map(with_free_slots, cast(Mapping[str, Any], variables)[KEY_VALUE]),
        jnp.pad(segment_ids_BT, [(0, 0), (0, free)]),
        jnp.asarray(tokens_BT.shape[1], jnp.int32),
        segment_ids_BT.sum(axis=1),
    )
    return cast(jax.Array, logits_BTV), cache


def extend(
    model: Transformer, params: Any, tokens_BT: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Read T further tokens of every row; T is 1 while text is generated.

    Args:
        model: the decoder.
        params: its parameters.
        tokens_BT: what follows in each row; no padding.
        cache: what came before, with at least T free slots.

    Returns:
        Logits `[B, T, V]` equal to those of whole texts, and the longer cache.
    """
    num_tokens = tokens_BT.shape[1]
    segment_ids_BT = jnp.ones_like(tokens_BT)
    logits_BTV, variables = model.apply(
        {"params": params, CACHE: {**cache.layers, "segment_ids": cache.segment_ids_BS}},
        tokens_BT,
        segment_ids_BT,
        cache.num_tokens_B[:, None] + jnp.arange(num_tokens),
        mutable=[KEY_VALUE],
    )

    def write(axis_from_end: int, slots: jax.Array, new: jax.Array) -> jax.Array:
        axis = slots.ndim - axis_from_end
        return jax.lax.dynamic_update_slice_in_dim(slots, new, cache.length, axis)

    longer = Cache(
        jax.tree.map(
            functools.partial(write, 3),
            cache.layers,
            cast(Mapping[str, Any], variables)[KEY_VALUE],
        ),
        write(1, cache.segment_ids_BS, segment_ids_BT),
        cache.length + num_tokens,
        cache.num_tokens_B + num_tokens,
    )
    return cast(jax.Array, logits_BTV), longer


def unroll(params: Any, config: ModelConfig) -> dict[str, Any]:
    """Parameters for `Transformer(..., unrolled=True)`: `layer_0`, `layer_1`, ... for `layers`.

    Args:
        params: nested parameters, layers stacked by depth.
        config: the architecture.
    """
    unrolled: dict[str, Any] = {}
    for path, leaf in axes.flatten(params).items():
        prefix, _, name = path.partition("/")
        axis = axes.parameters(config)[path].axes[0]
        if axis not in LAYER_AXES:
            unrolled[path] = leaf
            continue
        for index, layer in enumerate(axes.layers_of(config, axis)):
            unrolled[f"{prefix.removesuffix('s')}_{layer}/{name}"] = leaf[index]
    return axes.unflatten(unrolled)
