"""Looking tokens up on a mesh equals looking them up in the whole table, gradients as well."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax import preset
from aquila_jax.axes import EMBED, VOCAB
from aquila_jax.nn.embeddings import embed
from aquila_jax.sharding import Layout, MeshShape


@pytest.mark.parametrize(
    ("sizes", "width", "rows"),
    [
        ({"expert": 2, "fsdp": 2, "data": 2}, 512, 8),  # exchanged over both
        (
            {"expert": 2, "fsdp": 4, "data": 1},
            256,
            8,
        ),  # exchanged over one, gathered over the other
        ({"fsdp": 8, "data": 1}, 64, 16),  # gathered
        ({"fsdp": 2, "model": 2, "data": 2}, 256, 8),  # the vocabulary is split
        ({"fsdp": 8, "data": 1}, 1024, 6),  # rows that do not divide
    ],
    ids=str,
)
def test_on_a_mesh_as_on_one_device(sizes, width, rows):
    config = dataclasses.replace(preset("toy_dense"), embed_dim=width, vocab_size=48)
    layout = Layout(MeshShape(**sizes).build())
    random = np.random.default_rng(0)
    table_VD = random.normal(size=(48, width)).astype(np.float32)
    tokens_BT = random.integers(0, 48, (rows, 5))
    bar_BTD = random.normal(size=(rows, 5, width)).astype(np.float32)

    @jax.jit
    def looked_up(table_VD, bar_BTD):
        x_BTD, pull_back = jax.vjp(
            lambda table_VD: embed(table_VD, jnp.asarray(tokens_BT), np.float32, config, layout),
            table_VD,
        )
        return x_BTD, pull_back(bar_BTD)[0]

    placed_VD = jax.device_put(table_VD, layout.sharding((VOCAB, EMBED)))
    x_BTD, gradient_VD = looked_up(placed_VD, bar_BTD)
    np.testing.assert_array_equal(x_BTD, table_VD[tokens_BT])
    expected_VD = np.zeros((48, width))
    np.add.at(expected_VD, tokens_BT, bar_BTD.astype(np.float64))
    np.testing.assert_allclose(gradient_VD, expected_VD, rtol=1e-5, atol=1e-5)


def test_gradients_of_one_token_are_added_in_the_dtype_of_the_table():
    config = dataclasses.replace(preset("toy_dense"), embed_dim=256, vocab_size=16)
    layout = Layout(MeshShape(fsdp=2, expert=2, data=2).build())
    tokens_BT = jnp.zeros((8, 128), jnp.int32)

    def total(table_VD):
        return embed(table_VD, tokens_BT, jnp.bfloat16, config, layout).sum(dtype=jnp.float32)

    gradient_VD = jax.jit(jax.grad(total))(jnp.ones((16, 256), jnp.float32))
    # bfloat16 sums of ones stop at 256.
    np.testing.assert_array_equal(gradient_VD[0], 1024.0)
