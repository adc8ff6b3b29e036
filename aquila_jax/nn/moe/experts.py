"""The experts themselves, on rows sorted by expert, in fixed slots, or on every token."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from aquila_jax.axes import BATCH, EXPERT_MLP
from aquila_jax.kernels import grouped_matmul
from aquila_jax.nn.layers import gated_units
from aquila_jax.sharding import Layout


class Weights(NamedTuple):
    """Matrices of the experts that are here, in the dtype of activations."""

    gate_EDF: jax.Array
    up_EDF: jax.Array
    down_EFD: jax.Array


def on_sorted_rows(
    rows_MD: Float[Array, "M D"], weights: Weights, sizes_E: Int[Array, " E"]
) -> Float[Array, "M D"]:
    """Outputs of rows that are sorted by expert, `sizes_E` of each; those behind are undefined."""

    # Activated units are computed again for the backward pass: cheap, and as large as what is kept.
    @jax.checkpoint
    def read_out(gate_MF: jax.Array, up_MF: jax.Array, down_EFD: jax.Array) -> jax.Array:
        return grouped_matmul(nn.silu(gate_MF) * up_MF, down_EFD, sizes_E)

    gate_MF = grouped_matmul(rows_MD, weights.gate_EDF, sizes_E)
    up_MF = grouped_matmul(rows_MD, weights.up_EDF, sizes_E)
    return read_out(gate_MF, up_MF, weights.down_EFD)


def on_slots(rows_MD: Float[Array, "M D"], weights: Weights) -> Float[Array, "M D"]:
    """Outputs of rows of which every expert has equally many, those of one after the other."""
    num_experts, embed_dim, _ = weights.gate_EDF.shape
    rows_ECD = rows_MD.reshape(num_experts, -1, embed_dim)

    @jax.checkpoint
    def read_out(gate_ECF: jax.Array, up_ECF: jax.Array, down_EFD: jax.Array) -> jax.Array:
        return jnp.einsum("ECF,EFD->ECD", nn.silu(gate_ECF) * up_ECF, down_EFD)

    gate_ECF = jnp.einsum("ECD,EDF->ECF", rows_ECD, weights.gate_EDF)
    up_ECF = jnp.einsum("ECD,EDF->ECF", rows_ECD, weights.up_EDF)
    return read_out(gate_ECF, up_ECF, weights.down_EFD).reshape(rows_MD.shape)


def on_all_tokens(
    x_BTD: Float[Array, "B T D"],
    gates_BTE: Float[Array, "B T E"],
    weights: Weights,
    layout: Layout | None,
) -> Float[Array, "B T D"]:
    """The experts' outputs, weighted and summed: every expert on every token, one after the other.

    In turn rather than at once: the hidden units of one expert fit in a cache, those of all do
    not, and they are computed again for the backward pass rather than stored.
    """

    @jax.checkpoint
    def add_expert(sum_BTD: jax.Array, expert: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        gate_DF, up_DF, down_FD, gate_BT = expert
        hidden_BTF = gated_units(x_BTD, gate_DF, up_DF) * gate_BT[..., None]
        if layout is not None:
            hidden_BTF = layout.constrain(hidden_BTF, BATCH, None, EXPERT_MLP)
        return sum_BTD + jnp.einsum("BTF,FD->BTD", hidden_BTF, down_FD), None

    gates_EBT = jnp.moveaxis(gates_BTE.astype(x_BTD.dtype), -1, 0)
    out_BTD, _ = jax.lax.scan(add_expert, jnp.zeros_like(x_BTD), (*weights, gates_EBT))
    return out_BTD
