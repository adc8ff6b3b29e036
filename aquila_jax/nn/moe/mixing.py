"""From logits to the mixture's output: on one device, or in shards of a mesh."""

import functools
import logging
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from aquila_jax.axes import BATCH, EMBED, EXPERT_MLP, EXPERTS
from aquila_jax.config import ModelConfig
from aquila_jax.errors import UserError
from aquila_jax.kernels import Backend, Routed, Scores, route
from aquila_jax.nn.moe.exchange import (
    Buffers,
    Fabric,
    buffers,
    by_all_to_all,
    by_gather,
    on_one_device,
    slots_when_received,
    slots_when_sent,
)
from aquila_jax.nn.moe.experts import (
    Shards,
    Weights,
    on_all_tokens,
    on_slots,
    on_sorted_rows,
)
from aquila_jax.nn.moe.queues import Queues, capacity_of, endless, limited, renormalised
from aquila_jax.nn.moe.rounds import sum_of_rounds
from aquila_jax.nn.moe.router import Report, Sums, report, sums_of
from aquila_jax.nn.moe.settings import Dispatch
from aquila_jax.nn.moe.traffic import cheapest
from aquila_jax.sharding import Layout

# Below this, room is cheap and a round is not: of a few tokens all may go to one device.
_FEWEST_ROWS = 1024


def mix(
    config: ModelConfig,
    dispatch: Dispatch,
    x_BTD: Float[Array, "B T D"],
    logits_BTE: Float[Array, "B T E"],
    is_token_BT: Bool[Array, "B T"],
    bias_E: Float[Array, " E"],
    weights: Weights,
    layout: Layout | None = None,
) -> tuple[jax.Array, Report]:
    """The experts' outputs for tokens whose router logits are known.

    Args:
        config: the architecture.
        dispatch: how to compute.
        x_BTD: inputs of the experts, in the dtype of `weights`.
        logits_BTE: router logits, float32 at least.
        is_token_BT: false on padding, which is routed but neither counted nor charged.
        bias_E: added to the scores where experts are chosen, if the model has such a bias.
        weights: all experts' matrices.
        layout: how they and the batch are split over a mesh.

    Returns:
        The outputs, in the dtype of the inputs, and what the router did.

    Raises:
        UserError: experts are in shards that the batch is not split over, or do not divide over
            theirs.
    """
    if layout is None or layout.mesh.size == 1:
        layout = None
    elif (fold := _rows_in_one(layout, dispatch, x_BTD)) > 1:
        x, logits, is_token = _join_rows(fold, x_BTD, logits_BTE, is_token_BT)
        out_BTD, said = mix(config, dispatch, x, logits, is_token, bias_E, weights, layout)
        return out_BTD.reshape(x_BTD.shape), said
    elif dispatch.strategy != "reference":
        dispatch = _checked(config, dispatch, layout, x_BTD)
    if dispatch.strategy == "reference":
        return _mix_by_reference(
            config, dispatch, x_BTD, logits_BTE, is_token_BT, bias_E, weights, layout
        )
    if layout is None:
        body = functools.partial(mix_shard, config, dispatch, Fabric(), ())
        out_BTD, sums = body(x_BTD, logits_BTE, is_token_BT, bias_E, *weights)
        device_groups = 1
    else:
        fabric = fabric_of(layout, dispatch, config.experts_per_token)
        embed_axes = (axis for axis in layout.mesh_axes(EMBED) if axis not in fabric.expert_axes)
        body = functools.partial(mix_shard, config, dispatch, fabric, tuple(embed_axes))
        tokens, matrix = (BATCH, EXPERT_MLP), (EXPERTS, EMBED, EXPERT_MLP)
        wide = (*tokens, None)
        specs: list[Any] = [wide if name.endswith("E") else tokens for name in Sums._fields]
        out_BTD, sums = layout.shard_map(
            body,
            (wide, wide, tokens, (None,), matrix, matrix, (EXPERTS, EXPERT_MLP, EMBED)),
            (wide, Sums(*specs)),
        )(x_BTD, logits_BTE, is_token_BT, bias_E, *weights)
        device_groups = layout.batch_shards
    return out_BTD, report(sums, config.experts_per_token, dispatch.balance, device_groups)


def fabric_of(layout: Layout, dispatch: Dispatch, experts_per_token: int) -> Fabric:
    """The mesh axes that a mixture talks over, and how."""
    shards, hidden = layout.shards(EXPERTS), layout.shards(EXPERT_MLP)
    exchange = dispatch.exchange
    if exchange == "auto":
        exchange = cheapest(experts_per_token, shards, hidden)
    expert_axes, hidden_axes = layout.mesh_axes(EXPERTS), layout.mesh_axes(EXPERT_MLP)
    return Fabric(expert_axes, hidden_axes, shards, hidden, exchange)


def _checked(config: ModelConfig, dispatch: Dispatch, layout: Layout, x_BTD: jax.Array) -> Dispatch:
    """`dispatch`, or the reference where the batch does not divide over the devices.

    Tokens are split over all devices that experts are split over: rows over those of the batch,
    the tokens of a row over those of hidden units, so that nothing is computed twice.
    """
    if not set(layout.mesh_axes(EXPERTS)) <= set(layout.mesh_axes(BATCH)):
        raise UserError(
            f"experts are split over mesh axes {layout.mesh_axes(EXPERTS)} that the batch "
            f"({layout.mesh_axes(BATCH)}) is not: add them to the sharding rule of {BATCH}, or "
            "set Dispatch.strategy to 'reference'"
        )
    for axis, size in ((EXPERTS, config.num_experts), (EXPERT_MLP, config.expert_dim)):
        if size % layout.shards(axis):
            raise UserError(
                f"{axis} of {size} do not divide over the {layout.shards(axis)} devices of mesh "
                f"axes {layout.mesh_axes(axis)}: choose another mesh or other sharding rules"
            )
    rows, length, _ = x_BTD.shape
    row_shards, token_shards = layout.shards(BATCH), layout.shards(EXPERT_MLP)
    if rows % row_shards == 0 and length % token_shards == 0:
        return dispatch
    _log_reference_once(
        f"{rows} rows of {length} tokens do not divide over {row_shards} x {token_shards} devices"
    )
    return Dispatch(strategy="reference", balance=dispatch.balance)


def _rows_in_one(layout: Layout, dispatch: Dispatch, x_BTD: jax.Array) -> int:
    """How many short rows to take for one, so that its tokens divide: while texts are generated.

    Not where the load is balanced row by row.
    """
    (rows, length, _), token_shards = x_BTD.shape, layout.shards(EXPERT_MLP)
    if length % token_shards == 0 or rows % (layout.shards(BATCH) * token_shards):
        return 1
    by_row = dispatch.strategy == "reference" or dispatch.balance == "sequence"
    return 1 if by_row else token_shards


def _join_rows(fold: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Arrays `[B, T, ...]` with `fold` neighbouring rows in one."""
    return tuple(x.reshape(x.shape[0] // fold, x.shape[1] * fold, *x.shape[2:]) for x in arrays)


@functools.cache
def _log_reference_once(why: str) -> None:
    logging.getLogger(__name__).warning("every expert computes every token: %s", why)


def _mix_by_reference(
    config: ModelConfig,
    dispatch: Dispatch,
    x_BTD: jax.Array,
    logits_BTE: jax.Array,
    is_token_BT: jax.Array,
    bias_E: jax.Array,
    weights: Weights,
    layout: Layout | None,
) -> tuple[jax.Array, Report]:
    rows, length, num_experts = logits_BTE.shape
    # The compiler splits plain operations over a mesh, but no kernel.
    routed = _route(config, dispatch, logits_BTE, is_token_BT, bias_E, backend="reference")
    tokens_N1 = jnp.arange(rows * length)[:, None]
    gates_NE = jnp.zeros((rows * length, num_experts), routed.gates_Nk.dtype)
    gates_NE = gates_NE.at[tokens_N1, routed.experts_Nk].set(routed.gates_Nk)
    gates_BTE = gates_NE.reshape(rows, length, num_experts) * config.router_scale
    out_BTD = on_all_tokens(x_BTD, gates_BTE, weights, layout)
    k, queues = config.experts_per_token, endless(routed)
    sums = sums_of(logits_BTE, is_token_BT, routed, queues, queues.order_Nk, k)
    device_groups = 1 if layout is None else math.gcd(layout.batch_shards, rows)
    return out_BTD, report(sums, k, dispatch.balance, device_groups)


def mix_shard(
    config: ModelConfig,
    dispatch: Dispatch,
    fabric: Fabric,
    embed_axes: tuple[str, ...],
    x_BTD: jax.Array,
    logits_BTE: jax.Array,
    is_token_BT: jax.Array,
    bias_E: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
) -> tuple[jax.Array, Sums]:
    """`mix` on one device's tokens and experts.

    Weights are split over `embed_axes`, and gathered for use.
    """
    k = config.experts_per_token
    routed = _route(config, dispatch, logits_BTE, is_token_BT, bias_E)
    queues = _queues(config, dispatch, routed, is_token_BT.reshape(-1))
    num_tokens = routed.gates_Nk.shape[0]
    num_rows = _num_rows(config, dispatch, fabric, num_tokens)
    places = buffers(queues, fabric, num_rows)
    slots_Nk = slots_when_received(queues, places, fabric)
    one_round = functools.partial(_one_round, dispatch, fabric, embed_axes, num_rows)
    arrays = (
        x_BTD.reshape(-1, x_BTD.shape[-1]),
        queues.gates_Nk * config.router_scale,
        Weights(gate_EDF, up_EDF, down_EFD),
    )
    where = (
        queues.experts_Nk,
        slots_when_sent(queues, places, fabric) if fabric.sends_rows else slots_Nk,
        places.lengths_XHE,
        places.starts_XHE,
    )
    if num_rows >= _most_rows(config, dispatch, fabric, num_tokens):
        out_ND = one_round(0, arrays, where)
    else:
        # Devices with other tokens may need more, and wait in them for this one's part of weights.
        rounds = places.rounds(fabric)
        rounds = lax.pmax(rounds, embed_axes) if embed_axes else rounds
        out_ND = sum_of_rounds(one_round, rounds, arrays, where)
    sums = sums_of(logits_BTE, is_token_BT, routed, queues, slots_Nk, k)
    return out_ND.reshape(x_BTD.shape), sums


def _one_round(
    dispatch: Dispatch,
    fabric: Fabric,
    embed_axes: tuple[str, ...],
    num_rows: int,
    number: Any,
    arrays: tuple[jax.Array, jax.Array, Weights],
    where: tuple[jax.Array, ...],
) -> jax.Array:
    """What the rows of one round add to the outputs of this device's tokens."""
    x_ND, gates_Nk, matrices = arrays
    experts_Nk, slots_Nk, lengths_XHE, starts_XHE = where
    places = Buffers(lengths_XHE, starts_XHE, num_rows, number * num_rows)
    weights, is_fixed = Shards(*matrices, embed_axes), dispatch.strategy == "capacity"

    def compute(
        rows_MD: jax.Array, sizes_E: jax.Array, gates_M: jax.Array | None = None
    ) -> jax.Array:
        if is_fixed:
            return on_slots(rows_MD, weights, gates_M)
        return on_sorted_rows(rows_MD, weights, sizes_E, gates_M)

    if not fabric.axes:
        return on_one_device(x_ND, gates_Nk, slots_Nk, places, compute)
    if fabric.sends_rows:
        return by_all_to_all(x_ND, gates_Nk, slots_Nk, places, fabric, compute, is_fixed=is_fixed)
    return by_gather(x_ND, gates_Nk, experts_Nk, slots_Nk, places, fabric, compute)


def _falls_back(config: ModelConfig, dispatch: Dispatch) -> bool:
    """Whether tokens are routed to one expert more, to fall back on."""
    is_limited = dispatch.strategy == "capacity" and dispatch.overflow
    return is_limited and config.experts_per_token < config.num_experts


def _route(
    config: ModelConfig,
    dispatch: Dispatch,
    logits_BTE: jax.Array,
    is_token_BT: jax.Array,
    bias_E: jax.Array,
    backend: Backend = "auto",
) -> Routed:
    falls_back = _falls_back(config, dispatch)
    return route(
        logits_BTE.reshape(-1, config.num_experts),
        is_token_BT.reshape(-1),
        experts_per_token=config.experts_per_token + falls_back,
        # Whose sum gates are divided by is known when places are.
        renormalize=config.renormalize_gates and not falls_back,
        scores=cast(Scores, config.router_scores),
        bias_E=bias_E if config.router_bias else None,
        sequences=max(logits_BTE.shape[0], 1),
        backend=backend,
    )


def _queues(
    config: ModelConfig, dispatch: Dispatch, routed: Routed, is_token_N: jax.Array
) -> Queues:
    if dispatch.strategy != "capacity":
        return endless(routed)
    k = config.experts_per_token
    queues = limited(routed, is_token_N, k, _capacity(config, dispatch, is_token_N.shape[0]))
    if _falls_back(config, dispatch):
        queues = renormalised(queues, k, config.renormalize_gates)
    return queues


def _capacity(config: ModelConfig, dispatch: Dispatch, num_tokens: int) -> int:
    return capacity_of(
        dispatch.capacity_factor, num_tokens, config.experts_per_token, config.num_experts
    )


def filled_share(config: ModelConfig, dispatch: Dispatch, layout: Layout) -> float:
    """Which part of the rows that devices make room for is filled by a long, balanced batch."""
    if not config.is_moe or dispatch.strategy != "dropless":
        return 1.0
    fabric, tokens = fabric_of(layout, dispatch, config.experts_per_token), 2**16
    rows = _num_rows(config, dispatch, fabric, tokens)
    average = tokens * fabric.num_sources * config.experts_per_token / fabric.expert_shards
    return min(average / rows, 1.0)


def _num_rows(config: ModelConfig, dispatch: Dispatch, fabric: Fabric, num_tokens: int) -> int:
    """M: rows that a device makes room for at once, when sources have `num_tokens` each."""
    most = _most_rows(config, dispatch, fabric, num_tokens)
    if dispatch.strategy == "capacity" or not dispatch.buffer_factor or fabric.expert_shards == 1:
        return most
    average = num_tokens * fabric.num_sources * config.experts_per_token / fabric.expert_shards
    return min(most, max(math.ceil(dispatch.buffer_factor * average), _FEWEST_ROWS))


def _most_rows(config: ModelConfig, dispatch: Dispatch, fabric: Fabric, num_tokens: int) -> int:
    """As many as can be sent to one device."""
    experts_here = config.num_experts // fabric.expert_shards
    if dispatch.strategy == "capacity":
        return _capacity(config, dispatch, num_tokens) * fabric.num_sources * experts_here
    return num_tokens * fabric.num_sources * min(config.experts_per_token, experts_here)
