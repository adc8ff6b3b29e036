"""Pieces of unequal length between devices: what arrives, and how gradients go back."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from aquila_jax.nn.moe.ragged import Moves, move
from aquila_jax.sharding import MeshShape

DEVICES, ROWS, ROOM, WIDTH = 4, 10, 16, 3


def draw():
    """Lengths of every piece, where it begins at its source, and where it is put."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 3, (DEVICES, DEVICES))
    lengths[1, 2], lengths[3] = 0, 0  # nothing to one, nothing from one
    starts = np.cumsum(lengths, axis=1) - lengths
    targets = np.cumsum(lengths, axis=0) - lengths + 1  # the first row of each gets nothing
    rows = rng.normal(size=(DEVICES, ROWS, WIDTH)).astype(np.float32)
    return lengths, starts, targets, rows


def by_hand(lengths, starts, targets, rows):
    arrived = np.zeros((DEVICES, ROOM, WIDTH), np.float32)
    for source, target in np.ndindex(DEVICES, DEVICES):
        count, at = lengths[source, target], targets[source, target]
        first = starts[source, target]
        arrived[target, at : at + count] = rows[source, first : first + count]
    return arrived


def test_every_piece_arrives_at_its_place_and_gradients_take_the_way_back():
    lengths, starts, targets, rows = draw()
    mesh = MeshShape(data=1, expert=DEVICES).build(jax.devices()[:DEVICES])
    (axis,) = (name for name, size in mesh.shape.items() if size > 1)
    there = Moves(*(jnp.asarray(x, jnp.int32) for x in (starts, lengths, targets, lengths.T)))
    turned = (targets.T, lengths.T, starts.T, lengths)
    back = Moves(*(jnp.asarray(x, jnp.int32) for x in turned))

    def on_device(rows, there, back):
        there, back = (Moves(*(x[0] for x in moves)) for moves in (there, back))
        return move((axis,), there, back, ROOM, rows[0])[None]

    split = PartitionSpec(axis)
    send = jax.shard_map(on_device, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    arrived, pull = jax.vjp(lambda rows: jax.jit(send)(rows, there, back), jnp.asarray(rows))
    np.testing.assert_array_equal(arrived, by_hand(lengths, starts, targets, rows))
    weights = np.random.default_rng(1).normal(size=arrived.shape).astype(np.float32)
    (gradient,) = pull(jnp.asarray(weights))
    expected = np.zeros_like(rows)
    for source, target in np.ndindex(DEVICES, DEVICES):
        count, at = lengths[source, target], targets[source, target]
        first = starts[source, target]
        expected[source, first : first + count] = weights[target, at : at + count]
    np.testing.assert_array_equal(gradient, expected)
