import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax import Transformer, axes

KINDS = [
    {},
    {"tie_embeddings": True},
    {"qkv_bias": False},
    {"num_experts": 4, "experts_per_token": 2},
    {"num_experts": 4, "experts_per_token": 2, "tie_embeddings": True, "qkv_bias": False},
]


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_the_model_has_exactly_the_parameters_of_the_vocabulary(tiny, changes):
    config = dataclasses.replace(tiny, **changes)
    tokens = jnp.zeros((1, 3), jnp.int32)
    variables = jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens)
    assert variables["params"] == axes.abstract_params(config)


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_every_axis_of_a_matrix_is_read_or_written_or_stacked(tiny, changes):
    config = dataclasses.replace(tiny, **changes)
    matrices = {path: p for path, p in axes.parameters(config).items() if p.reads}
    assert len(matrices) >= 8
    for path, parameter in matrices.items():
        stacked = [axis for axis in parameter.axes if axis in axes.STACK_AXES]
        if path.endswith("router"):
            stacked.remove(axes.EXPERTS)
        parts = [*parameter.reads, *parameter.writes, *stacked]
        assert sorted(parts) == sorted(parameter.axes), path


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_what_is_no_matrix_is_a_gain_of_the_residual_or_a_bias_of_heads(tiny, changes):
    config = dataclasses.replace(tiny, **changes)
    for path, parameter in axes.parameters(config).items():
        if not parameter.reads:
            assert parameter.is_gain == path.endswith("scale"), path
            written = (axes.EMBED,) if parameter.is_gain else parameter.writes
            assert tuple(a for a in parameter.axes if a != axes.LAYERS) == written, path


def test_shapes_are_in_the_documented_order(tiny):
    flat = axes.flatten(
        axes.abstract_params(dataclasses.replace(tiny, num_experts=5, experts_per_token=2))
    )
    shapes = {path: leaf.shape for path, leaf in flat.items()}
    assert shapes["token_embedder/embedding"] == (61, 12)
    assert shapes["layers/attention/query"] == (3, 12, 4, 6)
    assert shapes["layers/attention/key"] == (3, 12, 2, 6)
    assert shapes["layers/attention/out"] == (3, 4, 6, 12)
    assert shapes["layers/attention/query_bias"] == (3, 4, 6)
    assert shapes["layers/moe/router"] == (3, 12, 5)
    assert shapes["layers/moe/up"] == (3, 5, 12, 20)
    assert shapes["layers/moe/down"] == (3, 5, 20, 12)
    assert shapes["lm_head/kernel"] == (12, 61)


def test_unflatten_is_the_inverse_of_flatten():
    tree = {"a": {"b": 1, "c": {"d": np.zeros(3)}}, "e": 2}
    flat = axes.flatten(tree)
    assert list(flat) == ["a/b", "a/c/d", "e"]
    assert axes.unflatten(flat) == tree
    assert axes.unflatten(flat)["a"]["c"]["d"] is tree["a"]["c"]["d"]


def test_fan_in_is_what_one_output_sums_over(tiny):
    parameters = axes.parameters(tiny)
    fan_ins = {path: parameter.fan_in(tiny) for path, parameter in parameters.items()}
    assert fan_ins["layers/attention/query"] == 12
    assert fan_ins["layers/attention/out"] == 4 * 6
    assert fan_ins["layers/mlp/down"] == 20
    assert fan_ins["layers/attention/query_bias"] == 1


def test_abstract_parameters_have_the_asked_dtype(tiny):
    leaves = jax.tree.leaves(axes.abstract_params(tiny, jnp.bfloat16))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}
