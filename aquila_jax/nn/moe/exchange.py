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

    @property
    def sends_rows(self) -> bool:
        """Whether rows go to their expert's device, rather than all tokens to all."""
        return bool(self.expert_axes) and self.exchange == "all_to_all"


class Buffers(NamedTuple):
    """Where everything lies in the buffers of all devices; the same numbers on all sources.

    Where more is sent to a device than it has room for, it comes in rounds, each of M rows.

    Attributes:
        lengths_XHE: int32 length of every source's queue for every expert.
        starts_XHE: where that queue begins among all rows for the expert's device.
        num_rows: M.
        first_row: of all rows for a device, the first that comes in this round.
    """

    lengths_XHE: jax.Array
    starts_XHE: jax.Array
    num_rows: int
    first_row: int | jax.Array = 0

    def pieces(self) -> "Pieces":
        """What comes in this round: of the queues of all of a shard's devices together."""
        # They lie one behind the other.
        length_XE, start_XE = self.lengths_XHE.sum(axis=1), self.starts_XHE[:, 0]
        begin_XE = jnp.clip(self.first_row - start_XE, 0, length_XE)
        end_XE = jnp.clip(self.first_row + self.num_rows - start_XE, 0, length_XE)
        place_XE = jnp.clip(start_XE - self.first_row, 0, self.num_rows)
        return Pieces(begin_XE, end_XE - begin_XE, place_XE)

    def rounds(self, fabric: Fabric) -> jax.Array:
        """How many there must be until all devices have all rows."""
        sent_XE = self.lengths_XHE.sum(axis=(0, 1)).reshape(fabric.expert_shards, -1)
        return (sent_XE.sum(axis=1).max() + self.num_rows - 1) // max(self.num_rows, 1)


class Pieces(NamedTuple):
    """Of every shard's queue for every expert: what comes in one round.

    Attributes:
        begin_XE: where it begins in the queue.
        length_XE: how long it is.
        place_XE: where it is put in the buffer.
    """

    begin_XE: jax.Array
    length_XE: jax.Array
    place_XE: jax.Array


def buffers(queues: Queues, fabric: Fabric, num_rows: int) -> Buffers:
    """Tell all sources how long one's queues are."""
    num_experts = queues.lengths_E.shape[0]
    shape = (fabric.expert_shards, fabric.hidden_shards, num_experts)
    lengths_AE = _gather(queues.lengths_E[None], fabric.axes)
    total_XE = lengths_AE.sum(axis=0).reshape(fabric.expert_shards, -1)
    first_E = (jnp.cumsum(total_XE, axis=1) - total_XE).reshape(-1)
    starts_AE = first_E + jnp.cumsum(lengths_AE, axis=0) - lengths_AE
    return Buffers(lengths_AE.reshape(shape), starts_AE.reshape(shape), num_rows)


def slots_when_received(queues: Queues, places: Buffers, fabric: Fabric) -> jax.Array:
    """Each pair's row among those for its expert's device; -1 where it is dropped."""
    starts_E = places.starts_XHE[_index(fabric.expert_axes), _index(fabric.hidden_axes)]
    return _slots(queues, starts_E)


def slots_when_sent(queues: Queues, places: Buffers, fabric: Fabric) -> jax.Array:
    """Each pair's row among those that the devices of its shard send; -1 where it is dropped."""
    mine = _index(fabric.expert_axes)
    lengths_HE = places.lengths_XHE[mine]
    starts_HE = _first_rows(places)[mine] + jnp.cumsum(lengths_HE, axis=0) - lengths_HE
    return _slots(queues, starts_HE[_index(fabric.hidden_axes)])


def _slots(queues: Queues, starts_E: jax.Array) -> jax.Array:
    slots_Nk = starts_E[queues.experts_Nk] + queues.order_Nk
    return jnp.where(queues.order_Nk < 0, -1, slots_Nk)


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
    gathered = (_gather(array, fabric.axes) for array in (x_ND, gates_Nk, experts_Nk, slots_Nk))
    all_x_ND, all_gates_Nk, all_experts_Nk, all_slots_Nk = gathered
    # Another device's rows, those that are dropped and those of other rounds have no slot.
    is_mine_Nk = (all_experts_Nk // per_device == here) & (all_slots_Nk >= 0)
    mine_Nk = jnp.where(is_mine_Nk, all_slots_Nk - places.first_row, -1)
    rows_MD = compute(
        permute(all_x_ND, mine_Nk, num_rows=places.num_rows),
        _here(places.pieces().length_XE.sum(axis=0), fabric),
    )
    return _scatter_sum(unpermute(rows_MD, mine_Nk, all_gates_Nk), fabric.axes)


def by_all_to_all(
    x_ND: jax.Array,
    gates_Nk: jax.Array,
    slots_Nk: jax.Array,
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
        slots_Nk: their rows when sent.
        places: where queues lie in buffers.
        fabric: the mesh axes.
        compute: the experts.
        is_fixed: whether all queues are equally long.
    """
    gathered = (_gather(array, fabric.hidden_axes) for array in (x_ND, gates_Nk, slots_Nk))
    all_x_ND, all_gates_Nk, all_slots_Nk = gathered
    if is_fixed:
        num_rows = places.num_rows  # as many leave as arrive
        send = functools.partial(_swap_slots, places, fabric, is_return=False)
        send_back = functools.partial(_swap_slots, places, fabric, is_return=True)
    else:
        num_rows = all_slots_Nk.size
        there, back = _moves(places, fabric)
        send = functools.partial(move, fabric.expert_axes, there, back, places.num_rows)
        send_back = functools.partial(move, fabric.expert_axes, back, there, num_rows)
    arrived_MD = send(permute(all_x_ND, all_slots_Nk, num_rows=num_rows))
    gates_PL = jnp.broadcast_to(all_gates_Nk.reshape(-1, 1), (all_gates_Nk.size, _LANES))
    gates_ML = send(permute(gates_PL, all_slots_Nk.reshape(-1, 1), num_rows=num_rows))
    sizes_E = _here(places.pieces().length_XE.sum(axis=0), fabric)
    rows_MD = send_back(compute(arrived_MD, sizes_E, gates_ML[:, 0]))
    return _scatter_sum(unpermute(rows_MD, all_slots_Nk, None), fabric.hidden_axes)


def _first_rows(places: Buffers) -> jax.Array:
    """[X, E]: where an expert's rows begin among those that a shard's devices send."""
    lengths_XE = places.lengths_XHE.sum(axis=1)
    return jnp.cumsum(lengths_XE, axis=1) - lengths_XE


def _moves(places: Buffers, fabric: Fabric) -> tuple[Moves, Moves]:
    """Which rows go where: a piece for every shard's every expert; and how outputs come back."""
    mine, shards = _index(fabric.expert_axes), fabric.expert_shards
    pieces = places.pieces()
    from_XE = _first_rows(places) + pieces.begin_XE

    def for_my_experts(x_XE: jax.Array) -> jax.Array:
        return x_XE.reshape(shards, shards, -1)[:, mine].reshape(-1)

    sent_XE, place_XE = pieces.length_XE, pieces.place_XE
    there = Moves(from_XE[mine], sent_XE[mine], place_XE[mine], for_my_experts(sent_XE))
    back = Moves(for_my_experts(place_XE), there.received, for_my_experts(from_XE), there.sent)
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
