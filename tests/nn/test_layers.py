import re
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax import RopeScaling, Transformer, preset
from aquila_jax.config import ModelConfig
from aquila_jax.kernels.attention import causal_mask
from aquila_jax.nn.layers import (
    GatedMLP,
    project,
    rms_norm,
    rotary,
    rotary_frequencies,
    rotation,
    weights,
)
from aquila_jax.planning import parse_topology
from aquila_jax.planning.topology import devices_of
from aquila_jax.sharding import Layout, MeshShape

from .reference import frequency, rotate

THETA = 50.0


def turn(x, positions, scaling=None):
    """Heads of 8 channels, turned by their positions."""
    config = preset("toy_dense", head_dim=8, rope_theta=THETA, rope_scaling=scaling)
    x = jnp.asarray(x)
    return np.asarray(rotary(x, rotation(config, jnp.asarray(positions), x.dtype)))


def turned(vector, position):
    return turn(vector.astype(np.float32)[None, None, None], [[position]])[0, 0, 0]


def test_rotary_scores_depend_only_on_the_distance():
    query, key = np.random.default_rng(0).normal(size=(2, 8))
    scores = [turned(query, 5 + shift) @ turned(key, 2 + shift) for shift in (0, 1, 9, 30)]
    np.testing.assert_allclose(scores, scores[0], rtol=0, atol=1e-5)
    assert abs(turned(query, 6) @ turned(key, 2) - scores[0]) > 1e-2


def test_rotary_keeps_lengths_and_position_zero():
    vector = np.random.default_rng(1).normal(size=8)
    np.testing.assert_allclose(turned(vector, 0), vector, rtol=1e-6)
    assert np.linalg.norm(turned(vector, 17)) == pytest.approx(np.linalg.norm(vector), rel=1e-6)
    assert np.abs(turned(vector, 17) - vector).max() > 0.1


def test_rotary_turns_every_head_by_complex_frequencies():
    x = np.random.default_rng(2).normal(size=(2, 5, 3, 8))
    positions = np.array([[0, 1, 2, 3, 4], [0, 1, 0, 1, 2]])
    with jax.enable_x64(True):
        result = turn(x, positions)
    for row in range(2):
        for head in range(3):
            expected = rotate(x[row, :, head], positions[row], THETA)
            np.testing.assert_allclose(result[row, :, head], expected, rtol=0, atol=1e-12)


SCALINGS = [
    None,
    RopeScaling("linear", 4.0),
    RopeScaling("llama3", 8.0, 1.0, 4.0, 64),
    RopeScaling("llama3", 32.0, 1.0, 4.0, 8192),
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_scaled_frequencies_equal_their_formula_pair_by_pair(scaling):
    expected = [frequency(i, 32, 5e5, scaling) for i in range(32)]
    np.testing.assert_allclose(rotary_frequencies(64, 5e5, scaling), expected, rtol=1e-12)


def test_llama3_keeps_high_frequencies_divides_low_ones_and_is_monotonic_between():
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
    plain, scaled = rotary_frequencies(64, 5e5), rotary_frequencies(64, 5e5, scaling)
    turns = 64 * plain / (2 * np.pi)
    assert (scaled[turns > 4] == plain[turns > 4]).all()
    np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 8, rtol=1e-15)
    between = (scaled / plain)[(turns > 1) & (turns < 4)]
    assert len(between) >= 2
    assert ((between > 1 / 8) & (between < 1)).all()
    assert (np.diff(between) < 0).all()


def test_linear_scaling_is_positions_closer_together():
    x = np.random.default_rng(3).normal(size=(1, 4, 2, 8)).astype(np.float32)
    positions = np.array([[0, 2, 4, 6]])
    scaled = turn(x, positions, RopeScaling("linear", 2.0))
    np.testing.assert_allclose(scaled, turn(x, positions // 2), atol=1e-6)


def test_heads_are_normalised_one_by_one_and_in_float32():
    heads = np.random.default_rng(4).normal(size=(2, 3, 4, 6))
    gain = np.arange(1.0, 7.0)
    length = np.sqrt((heads**2).mean(axis=-1, keepdims=True) + 0.1)
    normalised = rms_norm(jnp.asarray(heads, jnp.float32), jnp.asarray(gain, jnp.float32), 0.1)
    np.testing.assert_allclose(normalised, heads / length * gain, rtol=1e-5)
    rough = rms_norm(jnp.asarray(heads, jnp.bfloat16), jnp.asarray(gain, jnp.float32), 0.1)
    assert rough.dtype == jnp.bfloat16
    np.testing.assert_allclose(rough.astype(np.float32), normalised, rtol=0.02)


def test_the_mask_shows_earlier_tokens_of_the_same_document():
    segments = np.array([[1, 1, 2, 2, 0]])
    expected = [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    np.testing.assert_array_equal(causal_mask(jnp.asarray(segments))[0, 0], expected)


def test_annotated_shapes_are_checked_in_these_tests():
    with pytest.raises(Exception, match="Type-check error"):
        causal_mask(jnp.zeros((2, 3, 4), jnp.int32))


@pytest.mark.parametrize("sizes", [{}, {"model": 2}], ids=["one device", "mesh"])
@pytest.mark.parametrize(
    ("x", "kernel", "letters"),
    [
        ((2, 3, 8), (8, 5), "BTD,DF->BTF"),
        ((2, 3, 8), (8, 2, 4), "BTD,DNH->BTNH"),
        ((2, 3, 2, 4), (2, 4, 5), "BTNH,NHD->BTD"),
    ],
)
def test_a_projection_is_its_sum_of_products_wherever_it_is_computed(x, kernel, letters, sizes):
    layout = Layout(MeshShape(**sizes).build(jax.devices()[:2])) if sizes else None
    rng = np.random.default_rng(3)
    operands = rng.normal(size=x), rng.normal(size=kernel)
    with jax.enable_x64(True):
        value, pull = jax.vjp(
            lambda x, kernel: project(x, kernel, layout), *map(jnp.asarray, operands)
        )
        gradients = pull(jnp.ones_like(value))
    expected = np.einsum(letters, *operands)
    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-12)
    left, right, out = letters.replace("->", ",").split(",")
    # The gradient of the sum of all results.
    ones = np.ones(expected.shape)
    by_x = np.einsum(f"{out},{right}->{left}", ones, operands[1])
    by_kernel = np.einsum(f"{left},{out}->{right}", operands[0], ones)
    np.testing.assert_allclose(gradients[0], by_x, rtol=0, atol=1e-12)
    np.testing.assert_allclose(gradients[1], by_kernel, rtol=0, atol=1e-12)


def test_an_mlp_keeps_what_its_products_give_and_no_activated_units(tiny):
    mlp, x = GatedMLP(tiny, jnp.float32), jnp.ones((2, 5, tiny.embed_dim))
    params = mlp.init(jax.random.key(0), x)

    def pull(params, x):
        return jax.vjp(mlp.apply, params, x)[1]

    kept = jax.tree.leaves(jax.eval_shape(pull, params, x))
    hidden = (2, 5, tiny.mlp_dim)
    assert [leaf.shape for leaf in kept].count(hidden) == 2


class Holder(nn.Module):
    """One matrix, as layers read it in bfloat16."""

    config: ModelConfig

    @nn.compact
    def __call__(self):
        return weights(self, self.config, "lm_head/kernel", jnp.bfloat16)


def test_rounded_weights_are_what_a_plain_conversion_gives(tiny):
    scales = 2.0 ** np.arange(-60, 61, 120 / (tiny.embed_dim - 1))
    kernel = np.random.default_rng(5).normal(size=(tiny.embed_dim, tiny.vocab_size))
    kernel = jnp.asarray(kernel * scales[:, None], jnp.float32)

    def rounded(kernel) -> jax.Array:
        return cast(jax.Array, Holder(tiny).apply({"params": {"kernel": kernel}}))

    found, pull = jax.vjp(rounded, kernel)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, kernel.astype(jnp.bfloat16))
    np.testing.assert_array_equal(pull(found)[0], found.astype(jnp.float32))


def test_weights_that_are_narrow_already_are_read_as_they_lie(tiny):
    """Anything done to them would be a copy, and a kernel's operand must be written out."""
    kernel = jnp.ones((tiny.embed_dim, tiny.vocab_size), jnp.bfloat16)
    program = jax.make_jaxpr(Holder(tiny).apply)({"params": {"kernel": kernel}})
    assert not program.eqns


def test_on_a_tpu_one_layer_is_rounded_at_a_time():
    """No copy of all layers' weights stands beside them."""
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu")
    layers = 7
    model = Transformer(preset("toy_dense", num_layers=layers), dtype=jnp.bfloat16)
    device = jax.sharding.SingleDeviceSharding(devices_of(parse_topology("v5e:2x2"))[0])
    tokens = jax.ShapeDtypeStruct((2, 128), jnp.int32, sharding=device)
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        jax.eval_shape(model.init, jax.random.key(0), tokens),
    )
    with jax.default_matmul_precision("default"):
        program = jax.jit(model.apply).lower(params, tokens).compile().as_text() or ""
    dtypes = set(re.findall(rf"\b(\w+)\[{layers},\d+,", program))
    assert dtypes == {"f32"}
