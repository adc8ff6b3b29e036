"""How rows reach the devices of their experts, and come back. Inside `shard_map`.

Devices that split the tokens of one mixture are its sources: those with other experts, and those
with other hidden units of the same experts. A device makes room for M rows, its buffer, in which
an expert's queue is made of the sources' queues, one after the other.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from aquila_jax.kernels import permute, unpermute
from aquila_jax.nn.moe.queues import Queues
from aquila_jax.nn.moe.ragged import Moves, move

# From rows in a buffer to the experts' outputs, given the rows of every expert that is here; and
# perhaps the rows' gates, by which outputs are then weighted.
Compute = Callable[..., jax.Array]

# Columns of the arrays in which gates travel: numbers that a TPU moves at once.
_LANES = 128


class Fabric(NamedTuple):
    """The mesh axes that a mixture talks over; none on a single device.

    Attributes:
        expert_axes: over which experts are split.
        hidden_axes: over which their hidden units are split.
        expert_shards: X.
        hidden_shards: H.
        exchange: "all_to_all" or "gather".
    """

    expert_axes: tuple[str, ...] = ()
    hidden_axes: tuple[str, ...] = ()
    expert_shards: int = 1
    hidden_shards: int = 1
    exchange: str = "gather"

    @property
    def axes(self) -> tuple[str, ...]:
        """Over which sources are spread: the order of sources is this order."""
        return self.expert_axes + self.hidden_axes

    @property
    def num_sources(self) -> int:
        """A = X H."""
        return self.expert_shards * self.hidden_shards


class Buffers(NamedTuple):
    """Where everything lies in the buffers of all devices; the same numbers on all sources.

    Attributes:
        lengths_XHE: int32 length of every source's queue for every expert.
        starts_XHE: where that queue begins in the buffer of the expert's device.
        num_rows: M.
    """

    lengths_XHE: jax.Array
    starts_XHE: jax.Array
    num_rows: int

    def sent(self) -> jax.Array:
        """[X, H, E]: how much of every queue finds room."""
        return jnp.clip(self.num_rows - self.starts_XHE, 0, self.lengths_XHE)


def buffers(queues: Queues, fabric: Fabric, num_rows: int) -> Buffers:
    """Tell all sources how long one's queues are."""
    num_experts = queues.lengths_E.shape[0]
    shape = (fabric.expert_shards, fabric.hidden_shards, num_experts)
    lengths_AE = _gather(queues.lengths_E[None], fabric.axes)
    total_XE = lengths_AE.sum(axis=0).reshape(fabric.expert_shards, -1)
    first_E = (jnp.cumsum(total_XE, axis=1) - total_XE).reshape(-1)
    starts_AE = first_E + jnp.cumsum(lengths_AE, axis=0) - lengths_AE
    return Buffers(lengths_AE.reshape(shape), starts_AE.reshape(shape), num_rows)


def slots_in_buffers(queues: Queues, places: Buffers, fabric: Fabric) -> jax.Array:
    """Each pair's row in the buffer of its expert's device; -1 where it is dropped."""
    starts_E = places.starts_XHE[_index(fabric.expert_axes), _index(fabric.hidden_axes)]
    slots_Nk = starts_E[queues.experts_Nk] + queues.order_Nk
    has_room_Nk = (queues.order_Nk >= 0) & (slots_Nk < places.num_rows)
    return jnp.where(has_room_Nk, slots_Nk, -1)


def on_one_device(
    x_ND: jax.Array, gates_Nk: jax.Array, slots_Nk: jax.Array, places: Buffers, compute: Compute
) -> jax.Array:
    """All experts are here: nothing is exchanged."""
    # A permutation is quicker to follow than slots of which some may be missing.
    all_rows = places.num_rows == slots_Nk.size
    rows_MD = permute(x_ND, slots_Nk, num_rows=None if all_rows else places.num_rows)
    return unpermute(compute(rows_MD, places.lengths_XHE[0, 0]), slots_Nk, gates_Nk)


def by_gather(
    x_ND: jax.Array,
    gates_Nk: jax.Array,
    experts_Nk: jax.Array,
    slots_Nk: jax.Array,
    places: Buffers,
    fabric: Fabric,
    compute: Compute,
) -> jax.Array:
    """All tokens to all devices; each adds what its experts say; the sums are shared out."""
    here, per_device = _index(fabric.expert_axes), places.lengths_XHE.shape[2]
    per_device //= fabric.expert_shards
    # Rows are numbered through the buffers of all devices; of others' there are none here.
    numbers_Nk = jnp.where(slots_Nk < 0, -1, slots_Nk + experts_Nk // per_device * places.num_rows)
    gathered = (_gather(array, fabric.axes) for array in (x_ND, gates_Nk, numbers_Nk))
    all_x_ND, all_gates_Nk, all_numbers_Nk = gathered
    mine_Nk = all_numbers_Nk - here * places.num_rows
    mine_Nk = jnp.where(all_numbers_Nk < 0, -1, mine_Nk)
    rows_MD = compute(
        permute(all_x_ND, mine_Nk, num_rows=places.num_rows),
        _here(places.sent().sum(axis=(0, 1)), fabric),
    )
    return _scatter_sum(unpermute(rows_MD, mine_Nk, all_gates_Nk), fabric.axes)


def by_all_to_all(
    x_ND: jax.Array,
    gates_Nk: jax.Array,
    queues: Queues,
    places: Buffers,
    fabric: Fabric,
    compute: Compute,
    *,
    is_fixed: bool,
) -> jax.Array:
    """Every row to its expert's device with its gate, and its weighted output back.

    A gate's gradient is then known where its row is computed, so a recomputation for the backward
    pass needs no outputs, and neither the last product nor the way back is done again. Devices that
    share experts first gather their tokens, and share out the sums in the end.

    Args:
        x_ND: this device's tokens.
        gates_Nk: their weights.
        queues: their places.
        places: where queues lie in buffers.
        fabric: the mesh axes.
        compute: the experts.
        is_fixed: whether all queues are equally long.
    """
    mine, first_XE = _index(fabric.expert_axes), _first_rows(places)
    lengths_HE = places.lengths_XHE[mine]
    starts_HE = first_XE[mine] + jnp.cumsum(lengths_HE, axis=0) - lengths_HE
    starts_E = starts_HE[_index(fabric.hidden_axes)]
    slots_Nk = starts_E[queues.experts_Nk] + queues.order_Nk
    slots_Nk = jnp.where(queues.order_Nk < 0, -1, slots_Nk)
    gathered = (_gather(array, fabric.hidden_axes) for array in (x_ND, gates_Nk, slots_Nk))
    all_x_ND, all_gates_Nk, all_slots_Nk = gathered
    if is_fixed:
        num_rows = places.num_rows  # as many leave as arrive
        send = functools.partial(_swap_slots, places, fabric, is_return=False)
        send_back = functools.partial(_swap_slots, places, fabric, is_return=True)
    else:
        num_rows = all_slots_Nk.size
        there, back = _moves(places, first_XE, fabric)
        send = functools.partial(move, fabric.expert_axes, there, back, places.num_rows)
        send_back = functools.partial(move, fabric.expert_axes, back, there, num_rows)
    arrived_MD = send(permute(all_x_ND, all_slots_Nk, num_rows=num_rows))
    gates_PL = jnp.broadcast_to(all_gates_Nk.reshape(-1, 1), (all_gates_Nk.size, _LANES))
    gates_ML = send(permute(gates_PL, all_slots_Nk.reshape(-1, 1), num_rows=num_rows))
    sizes_E = _here(places.sent().sum(axis=(0, 1)), fabric)
    rows_MD = send_back(compute(arrived_MD, sizes_E, gates_ML[:, 0]))
    return _scatter_sum(unpermute(rows_MD, all_slots_Nk, None), fabric.hidden_axes)


def _first_rows(places: Buffers) -> jax.Array:
    """[X, E]: where an expert's rows begin among those that a shard's devices send."""
    lengths_XE = places.lengths_XHE.sum(axis=1)
    return jnp.cumsum(lengths_XE, axis=1) - lengths_XE


def _moves(places: Buffers, first_XE: jax.Array, fabric: Fabric) -> tuple[Moves, Moves]:
    """Which rows go where: a piece for every shard's every expert; and how outputs come back."""
    mine, shards = _index(fabric.expert_axes), fabric.expert_shards

    def for_my_experts(x_XE: jax.Array) -> jax.Array:
        return x_XE.reshape(shards, shards, -1)[:, mine].reshape(-1)

    sent_XE, starts_XE = places.sent().sum(axis=1), places.starts_XHE[:, 0]
    there = Moves(first_XE[mine], sent_XE[mine], starts_XE[mine], for_my_experts(sent_XE))
    back = Moves(for_my_experts(starts_XE), there.received, for_my_experts(first_XE), there.sent)
    return there, back


def _swap_slots(
    places: Buffers, fabric: Fabric, rows_MD: jax.Array, *, is_return: bool
) -> jax.Array:
    """Rows by target shard, expert there, slot -> by expert here, source shard, slot; or back."""
    shards, num_experts = fabric.expert_shards, places.lengths_XHE.shape[2]
    by_expert = (num_experts // shards, shards, -1, rows_MD.shape[1])
    by_shard = (shards, num_experts // shards, -1, rows_MD.shape[1])
    rows = rows_MD.reshape(by_expert).swapaxes(0, 1) if is_return else rows_MD.reshape(by_shard)
    rows = lax.all_to_all(rows, fabric.expert_axes, 0, 0, tiled=True)
    rows = rows if is_return else rows.swapaxes(0, 1)
    return rows.reshape(rows_MD.shape)


def _here(x_E: jax.Array, fabric: Fabric) -> jax.Array:
    """The part of an array by expert that belongs to the experts of this device."""
    return x_E.reshape(fabric.expert_shards, -1)[_index(fabric.expert_axes)]


def _index(mesh_axes: tuple[str, ...]) -> Any:
    return lax.axis_index(mesh_axes) if mesh_axes else 0


def _gather(x: jax.Array, mesh_axes: tuple[str, ...]) -> jax.Array:
    """All devices' arrays, one after the other along the first dimension."""
    return lax.all_gather(x, mesh_axes, tiled=True) if mesh_axes else x


def _scatter_sum(x: jax.Array, mesh_axes: tuple[str, ...]) -> jax.Array:
    """This device's part of the first dimension of all devices' sum."""
    return lax.psum_scatter(x, mesh_axes, tiled=True) if mesh_axes else x
