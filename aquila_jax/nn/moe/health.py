"""How a model's mixtures fare, layer by layer, and the biases that keep their load even."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Of a report: what rows of metrics have as a mean over layers, and layer by layer.
_BY_LAYER = ("router_entropy", "gate_confidence", "dropped_fraction")
_LOSSES = ("load_balance_loss", "router_z_loss", "router_max_z_loss")


def router_metrics(reports: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """A step's metrics of its mixtures.

    Args:
        reports: as `aquila_jax.nn.forward` gives them.

    Returns:
        Means over layers of losses and health; `busiest_expert_load` and `idlest_expert_load`,
        the extremes over layers and experts as multiples of the average; `router_not_finite`, how
        many tokens' logits were not, over all layers; and by layer, under the name and
        `_by_layer`, `load` `[L, E]` (shares that sum to 1), entropy, confidence and drops `[L]`.
    """
    load_LE = reports["load_E"]
    num_experts = load_LE.shape[1]
    return {
        **{name: reports[name].mean() for name in (*_LOSSES, *_BY_LAYER)},
        "busiest_expert_load": load_LE.max() * num_experts,
        "idlest_expert_load": load_LE.min() * num_experts,
        "router_not_finite": reports["not_finite"].sum(),
        "load_by_layer": load_LE,
        **{f"{name}_by_layer": reports[name] for name in _BY_LAYER},
    }


def expert_similarity(params: Mapping[str, Any]) -> Float[Array, " L"]:
    """Mean cosine between two experts' weights, by layer: 1 right after copies were made.

    Over all pairs at once: the squared length of the sum of E unit vectors is E and all their
    cosines. The mean over the three matrices; 1 where there is one expert.

    Args:
        params: of a model that has experts.
    """
    mixture = params["layers"]["moe"]
    return jnp.stack([_mean_cosine(mixture[name]) for name in ("gate", "up", "down")]).mean(axis=0)


def _mean_cosine(weights_LEDF: jax.Array) -> jax.Array:
    num_experts = weights_LEDF.shape[1]
    if num_experts == 1:
        return jnp.ones(weights_LEDF.shape[0], weights_LEDF.dtype)
    length_LE = jnp.sqrt(jnp.sum(jnp.square(weights_LEDF), axis=(2, 3)))
    inverse_LE = 1 / jnp.maximum(length_LE, jnp.finfo(weights_LEDF.dtype).tiny)
    sum_LDF = jnp.einsum("LEDF,LE->LDF", weights_LEDF, inverse_LE, precision="highest")
    square_L = jnp.sum(jnp.square(sum_LDF), axis=(1, 2))
    return (square_L - num_experts) / (num_experts * (num_experts - 1))


def balance_biases(
    params: Mapping[str, Any], load_LE: Float[Array, "L E"], rate: float
) -> dict[str, Any]:
    """`params` with every router bias a step nearer to an even load (arXiv 2408.15664, alg. 1).

    Biases of experts with less than the average go up by `rate`, those of others down. They live
    among the parameters, so that checkpoints, growth and sharding know them; their gradient is
    zero and weight decay leaves them, so the optimizer does not move them.
    """
    layers = params["layers"]
    bias_LE = layers["moe"]["router_bias"]
    step_LE = rate * jnp.sign(1 / load_LE.shape[1] - load_LE)
    mixture = {**layers["moe"], "router_bias": bias_LE + step_LE.astype(bias_LE.dtype)}
    return {**params, "layers": {**layers, "moe": mixture}}
