"""Which pairs (token, choice) wait for which expert, and in what order."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from aquila_jax.kernels import TINY, Routed


class Queues(NamedTuple):
    """The pairs of one device's tokens, and their places in the queues of all experts.

    Attributes:
        gates_Nk: weight of each pair.
        experts_Nk: int32 expert of each pair.
        order_Nk: int32 place in that expert's queue, from 0; -1 where the pair is dropped.
        lengths_E: int32 places of each queue; with a fixed capacity some may be empty.
    """

    gates_Nk: jax.Array
    experts_Nk: jax.Array
    order_Nk: jax.Array
    lengths_E: jax.Array


def endless(routed: Routed) -> Queues:
    """Every pair waits, whatever the length."""
    first_E = jnp.cumsum(routed.counts_E) - routed.counts_E
    order_Nk = routed.slots_Nk - first_E[routed.experts_Nk]
    return Queues(routed.gates_Nk, routed.experts_Nk, order_Nk, routed.counts_E)


def capacity_of(
    factor: int | float, num_tokens: int, experts_per_token: int, num_experts: int
) -> int:
    """C: slots of an expert, at least 1 where there are tokens, and no more than tokens."""
    slots = math.ceil(factor * num_tokens * experts_per_token / num_experts)
    return min(max(slots, 1), num_tokens)


def limited(routed: Routed, is_token_N: jax.Array, experts_per_token: int, capacity: int) -> Queues:
    """At most `capacity` pairs wait for an expert; first choices before second ones.

    Args:
        routed: with k columns, or with one more: the choice that a token falls back on for the
            first of its k pairs that finds no place.
        is_token_N: false on padding, which takes no place.
        experts_per_token: k.
        capacity: C.
    """
    num_experts = routed.counts_E.shape[0]
    chosen_Nk = routed.experts_Nk[:, :experts_per_token]
    is_waiting_Nk = jnp.broadcast_to(is_token_N[:, None], chosen_Nk.shape)
    none_E = jnp.zeros(num_experts, jnp.int32)
    order_Nk, taken_E = _line_up(chosen_Nk, is_waiting_Nk, none_E, capacity)
    if routed.experts_Nk.shape[1] > experts_per_token:
        falls_back_N = is_token_N & (order_Nk < 0).any(axis=1)
        spare_N1 = routed.experts_Nk[:, experts_per_token:]
        spare_order_N1, _ = _line_up(spare_N1, falls_back_N[:, None], taken_E, capacity)
        order_Nk = jnp.concatenate([order_Nk, spare_order_N1], axis=1)
    lengths_E = jnp.full(num_experts, capacity, jnp.int32)
    return Queues(routed.gates_Nk, routed.experts_Nk, order_Nk, lengths_E)


def _line_up(
    experts_Nk: jax.Array, is_waiting_Nk: jax.Array, taken_E: jax.Array, capacity: int
) -> tuple[jax.Array, jax.Array]:
    """Places of pairs behind those `taken_E` already, choice after choice; and those taken then."""
    num_tokens, num_choices = experts_Nk.shape
    experts_P, is_waiting_P = experts_Nk.T.reshape(-1), is_waiting_Nk.T.reshape(-1)
    waiting_PE = jax.nn.one_hot(experts_P, taken_E.shape[0], dtype=jnp.int32)
    waiting_PE *= is_waiting_P[:, None]
    until_PE = jnp.cumsum(waiting_PE, axis=0)
    before_P = jnp.take_along_axis(until_PE, experts_P[:, None], axis=1)[:, 0] - 1
    order_P = taken_E[experts_P] + before_P
    order_P = jnp.where(is_waiting_P & (order_P < capacity), order_P, -1)
    taken_E = jnp.minimum(taken_E + waiting_PE.sum(axis=0), capacity)
    return order_P.reshape(num_choices, num_tokens).T, taken_E


def renormalised(queues: Queues, experts_per_token: int, renormalize: bool) -> Queues:
    """Gates of a token with a choice to fall back on, which were left as scores.

    The weights of the k pairs that count: the k choices, or with the spare one where it was
    taken, in place of the first that was dropped.
    """
    gates_Nk, order_Nk = queues.gates_Nk, queues.order_Nk
    is_spare_taken_N = order_Nk[:, experts_per_token] >= 0
    is_dropped_Nk = order_Nk[:, :experts_per_token] < 0
    is_replaced_Nk = is_dropped_Nk & (jnp.cumsum(is_dropped_Nk, axis=1) == 1)
    counts_Nk = jnp.concatenate(
        [~(is_replaced_Nk & is_spare_taken_N[:, None]), is_spare_taken_N[:, None]], axis=1
    )
    gates_Nk = jnp.where(counts_Nk, gates_Nk, 0)
    if renormalize:
        gates_Nk /= gates_Nk.sum(axis=1, keepdims=True) + TINY
    return queues._replace(gates_Nk=gates_Nk)
