"""Pieces of unequal length from every device to every other, and gradients back the same way."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Moves(NamedTuple):
    """What one device sends and gets: pieces by target device, as many for each.

    Attributes:
        starts: where pieces begin here.
        sent: their lengths.
        targets: where they are put at their target.
        received: lengths of what arrives, by source.
    """

    starts: jax.Array
    sent: jax.Array
    targets: jax.Array
    received: jax.Array


def move(
    mesh_axes: tuple[str, ...], there: Moves, back: Moves, num_rows: int, rows_MD: jax.Array
) -> jax.Array:
    """`num_rows` rows, with every piece that was sent here at its place, and zeros elsewhere.

    Differentiable by the rows: their gradients take the moves `back`.
    """
    return _move(mesh_axes, num_rows, rows_MD.shape[0], rows_MD, there, back)


def _value(
    mesh_axes: tuple[str, ...],
    num_rows: int,
    num_sent: int,
    rows_MD: jax.Array,
    there: Moves,
    back: Moves,
) -> jax.Array:
    def ragged(rows_MD: jax.Array, there: Moves) -> jax.Array:
        out_MD = jnp.zeros((num_rows, rows_MD.shape[1]), rows_MD.dtype)
        return lax.ragged_all_to_all(rows_MD, out_MD, *there, axis_name=_only(mesh_axes))

    def emulated(rows_MD: jax.Array, there: Moves) -> jax.Array:
        return _emulated(mesh_axes, num_rows, rows_MD, there)

    # XLA has no ragged exchange on a CPU.
    return lax.platform_dependent(rows_MD, there, cpu=emulated, default=ragged)


def _forward(
    mesh_axes: tuple[str, ...],
    num_rows: int,
    num_sent: int,
    rows_MD: jax.Array,
    there: Moves,
    back: Moves,
) -> tuple[jax.Array, Any]:
    return _value(mesh_axes, num_rows, num_sent, rows_MD, there, back), (there, back)


def _backward(
    mesh_axes: tuple[str, ...], num_rows: int, num_sent: int, residuals: Any, gradient: jax.Array
) -> tuple[jax.Array, None, None]:
    there, back = residuals
    return _value(mesh_axes, num_sent, num_rows, gradient, back, there), None, None


_move = jax.custom_vjp(_value, nondiff_argnums=(0, 1, 2))
_move.defvjp(_forward, _backward)


def _only(mesh_axes: tuple[str, ...]) -> Any:
    return mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes


def _emulated(
    mesh_axes: tuple[str, ...], num_rows: int, rows_MD: jax.Array, there: Moves
) -> jax.Array:
    """Every device is told all rows, and picks those sent to it."""
    here = lax.axis_index(mesh_axes)
    rows_AMD, (starts, sent, targets, _) = jax.tree.map(
        lambda x: lax.all_gather(x, mesh_axes), (rows_MD, there)
    )
    devices = rows_AMD.shape[0]

    def to_me(of_pieces: jax.Array) -> jax.Array:
        return of_pieces.reshape(devices, devices, -1)[:, here].reshape(-1)

    starts, sent, targets = (to_me(x) for x in (starts, sent, targets))
    # Of every row that may arrive: the piece it is in, if any, and where it comes from.
    offset_MP = jnp.arange(num_rows)[:, None] - targets
    is_in_MP = (offset_MP >= 0) & (offset_MP < sent)
    piece_M = jnp.argmax(is_in_MP, axis=1)
    device_M = piece_M // (starts.shape[0] // devices)
    row_M = starts[piece_M] + jnp.arange(num_rows) - targets[piece_M]
    arrives_M = is_in_MP.any(axis=1)
    picked_MD = rows_AMD[device_M, jnp.where(arrives_M, row_M, 0)]
    return jnp.where(arrives_M[:, None], picked_MD, 0)
