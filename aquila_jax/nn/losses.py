"""The language-model loss."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class WeightedSum(NamedTuple):
    """A sum and the weight it is over, so that means of parts combine exactly.

    Attributes:
        total: sum of weighted losses, in nats.
        weight: sum of weights; tokens, where weights are 0 and 1.
    """

    total: jax.Array
    weight: jax.Array

    @property
    def mean(self) -> jax.Array:
        """Loss per weight; 0 where there is no weight."""
        return self.total / jnp.maximum(self.weight, 1e-9)


def cross_entropy(
    logits_BTV: Float[Array, "B T V"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
) -> WeightedSum:
    """Negative log-likelihood of the targets, in nats, float32 at least.

    Args:
        logits_BTV: unnormalised log-probabilities.
        targets_BT: token ids.
        weights_BT: 0 where a target does not count, as on padding.
    """
    losses_BT = token_cross_entropy(logits_BTV, targets_BT)
    return WeightedSum(jnp.sum(losses_BT * weights_BT), weights_BT.sum())


def token_cross_entropy(
    logits_BTV: Float[Array, "B T V"], targets_BT: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """The same, of every token by itself."""
    logits_BTV = logits_BTV.astype(jnp.promote_types(logits_BTV.dtype, jnp.float32))
    log_normaliser_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    picked_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return log_normaliser_BT - picked_BT
