"""What the router did with the tokens, what it is charged for, and how healthy it is."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from aquila_jax.kernels import Routed
from aquila_jax.nn.moe.queues import Queues

# A mean over no tokens is 0 over this.
_FEW = 1e-9


class Sums(NamedTuple):
    """Sums over the real tokens of a part of the batch, of which losses and health are made.

    Rows of the batch may be in shards (B) and so may their tokens (S shards), so that every
    device gives an array of its own part and sums of parts combine exactly.

    Attributes:
        counts_BSE: float pairs of each expert in each row.
        probability_BSE: sums of the probability of each expert.
        tokens_BS: how many tokens each row has.
        z_PS: sum of logsumexp(logits)^2, by device, as what follows.
        max_z_PS: sum of max(logits)^2.
        entropy_PS: sum of the entropy of the probabilities, in nats.
        confidence_PS: sum of the weight of first choices.
        dropped_PS: pairs that found no place.
        not_finite_PS: tokens with logits that are not finite.
    """

    counts_BSE: jax.Array
    probability_BSE: jax.Array
    tokens_BS: jax.Array
    z_PS: jax.Array
    max_z_PS: jax.Array
    entropy_PS: jax.Array
    confidence_PS: jax.Array
    dropped_PS: jax.Array
    not_finite_PS: jax.Array


class Report(NamedTuple):
    """What a mixture tells of a batch, float32; means are over real tokens.

    Attributes:
        load_balance_loss: E * sum over experts of (share of choices) * (mean probability);
            1 when balanced, E when all goes to one expert (Switch, arXiv 2101.03961, eq. 4).
        router_z_loss: mean of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5).
        router_max_z_loss: mean of max(logits)^2.
        load_E: share of the choices that each expert got; sums to 1.
        router_entropy: mean entropy of the probabilities over experts, in nats; log E at most.
        gate_confidence: mean weight of a token's first choice.
        dropped_fraction: share of the choices that found no place.
        not_finite: tokens whose router logits are not finite.
    """

    load_balance_loss: jax.Array
    router_z_loss: jax.Array
    router_max_z_loss: jax.Array
    load_E: jax.Array
    router_entropy: jax.Array
    gate_confidence: jax.Array
    dropped_fraction: jax.Array
    not_finite: jax.Array


def sums_of(
    logits_BTE: Float[Array, "B T E"],
    is_token_BT: Bool[Array, "B T"],
    routed: Routed,
    queues: Queues,
    slots_Nk: jax.Array,
    experts_per_token: int,
) -> Sums:
    """The sums of one part of the batch.

    Args:
        logits_BTE: router logits.
        is_token_BT: false on padding, which is in no sum.
        routed: what was chosen.
        queues: with what weight.
        slots_Nk: negative where a pair was dropped.
        experts_per_token: k, of the choices; one column more is one to fall back on.
    """
    rows, length, num_experts = logits_BTE.shape
    wide = jnp.promote_types(logits_BTE.dtype, jnp.float32)
    logits_BTE = logits_BTE.astype(wide)
    is_token_N = is_token_BT.reshape(-1)
    if routed.experts_Nk.shape[1] == experts_per_token:
        counts_BE = routed.real_counts_BE
    else:
        chosen_Nk = routed.experts_Nk[:, :experts_per_token]
        chosen_BTk = chosen_Nk.reshape(rows, length, experts_per_token)
        chosen_BTE = jax.nn.one_hot(chosen_BTk, num_experts, dtype=jnp.int32).sum(axis=2)
        counts_BE = jnp.sum(chosen_BTE * is_token_BT[..., None], axis=1)
    served_N = jnp.sum(slots_Nk >= 0, axis=1)
    log_probability_BTE = jax.nn.log_softmax(logits_BTE, axis=-1)
    entropy_BT = -jnp.sum(jnp.exp(log_probability_BTE) * log_probability_BTE, axis=-1)

    def total(x: jax.Array) -> jax.Array:
        # Not a product with 0 or 1: padding may hold NaN.
        return jnp.sum(jnp.where(is_token_N, x.reshape(-1), 0)).astype(wide)[None, None]

    return Sums(
        counts_BSE=counts_BE.astype(wide)[:, None],
        probability_BSE=routed.probability_sum_BE[:, None],
        tokens_BS=is_token_BT.sum(axis=1).astype(wide)[:, None],
        z_PS=routed.z_sum[None, None],
        max_z_PS=total(jnp.square(logits_BTE.max(axis=-1))),
        entropy_PS=jax.lax.stop_gradient(total(entropy_BT)),
        confidence_PS=jax.lax.stop_gradient(total(queues.gates_Nk[:, 0])),
        dropped_PS=total(experts_per_token - served_N),
        not_finite_PS=routed.not_finite.astype(wide)[None, None],
    )


def report(sums: Sums, experts_per_token: int, balance: str, device_groups: int) -> Report:
    """Losses and health of the whole batch.

    Args:
        sums: of all its parts.
        experts_per_token: k.
        balance: over what tokens the load-balancing loss is taken; see `Dispatch.balance`.
        device_groups: into how many parts rows are split, for the balance by device.
    """
    counts_BE, probability_BE = sums.counts_BSE.sum(axis=1), sums.probability_BSE.sum(axis=1)
    tokens_B = sums.tokens_BS.sum(axis=1)
    tokens = jnp.maximum(tokens_B.sum(), _FEW)
    groups = {"global": 1, "device": device_groups, "sequence": tokens_B.shape[0]}[balance]
    counts_GE, probability_GE, tokens_G = (
        x.reshape(groups, -1, *x.shape[1:]).sum(axis=1)
        for x in (counts_BE, probability_BE, tokens_B)
    )
    # A group counts with its tokens: E * sum(share * mean probability) * tokens.
    share_GE = counts_GE / jnp.maximum(tokens_G[:, None] * experts_per_token, _FEW)
    unbalance_G = counts_BE.shape[1] * jnp.sum(share_GE * probability_GE, axis=1)

    def mean(x: jax.Array) -> jax.Array:
        return x.sum() / tokens

    return Report(
        load_balance_loss=mean(unbalance_G),
        router_z_loss=mean(sums.z_PS),
        router_max_z_loss=mean(sums.max_z_PS),
        load_E=counts_BE.sum(axis=0) / (tokens * experts_per_token),
        router_entropy=mean(sums.entropy_PS),
        gate_confidence=mean(sums.confidence_PS),
        dropped_fraction=mean(sums.dropped_PS) / experts_per_token,
        not_finite=sums.not_finite_PS.sum(),
    )
