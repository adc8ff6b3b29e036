import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax import Transformer, axes

MIXTURE = {"num_experts": 5, "experts_per_token": 2}
EVERY_SECOND = {
    **MIXTURE, "num_layers": 6, "moe_every": 2, "expert_mlp_dim": 7, "shared_mlp_dim": 9
}  # fmt: skip

KINDS = [
    {},
    {"tie_embeddings": True},
    {"qkv_bias": False},
    {"num_experts": 4, "experts_per_token": 2},
    {"num_experts": 4, "experts_per_token": 2, "tie_embeddings": True, "qkv_bias": False},
    {**MIXTURE, "expert_mlp_dim": 7},
    {**MIXTURE, "shared_mlp_dim": 9},
    {**MIXTURE, "moe_every": 3},
    EVERY_SECOND,
    {"qk_norm": True},
    {**EVERY_SECOND, "qk_norm": True, "shared_expert_gate": True},
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
        if path.endswith("/router"):
            stacked.remove(axes.EXPERTS)
        parts = [*parameter.reads, *parameter.writes, *stacked]
        assert sorted(parts) == sorted(parameter.axes), path


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_what_is_no_matrix_is_a_gain_of_the_residual_or_of_heads_or_a_bias(tiny, changes):
    config = dataclasses.replace(tiny, **changes)
    for path, parameter in axes.parameters(config).items():
        if not parameter.reads:
            assert parameter.is_gain == path.endswith(("scale", "query_norm", "key_norm")), path
            gained = axes.HEAD_DIM if "attention" in path.split("/") else axes.EMBED
            written = (gained,) if parameter.is_gain else parameter.writes
            assert tuple(a for a in parameter.axes if a != axes.LAYERS) == written, path


def shapes_of(config):
    flat = axes.flatten(axes.abstract_params(config))
    return {path: leaf.shape for path, leaf in flat.items()}


def test_shapes_are_in_the_documented_order(tiny):
    shapes = shapes_of(dataclasses.replace(tiny, **MIXTURE))
    assert shapes["token_embedder/embedding"] == (61, 12)
    assert shapes["layers/attention/query"] == (3, 12, 4, 6)
    assert shapes["layers/attention/key"] == (3, 12, 2, 6)
    assert shapes["layers/attention/out"] == (3, 4, 6, 12)
    assert shapes["layers/attention/query_bias"] == (3, 4, 6)
    assert shapes["layers/moe/router"] == (3, 12, 5)
    assert shapes["layers/moe/up"] == (3, 5, 12, 20)
    assert shapes["layers/moe/down"] == (3, 5, 20, 12)
    assert shapes["lm_head/kernel"] == (12, 61)


def test_heads_share_the_gains_of_their_norms_and_a_shared_expert_has_one_score(tiny):
    config = dataclasses.replace(tiny, **EVERY_SECOND, qk_norm=True, shared_expert_gate=True)
    shapes = shapes_of(config)
    assert shapes["layers/attention/query_norm"] == (6, 6)
    assert shapes["layers/attention/key_norm"] == (6, 6)
    assert shapes["layers/moe/shared_router"] == (3, 12)
    assert axes.parameters(config)["layers/moe/shared_router"].fan_in(config) == 12


def test_only_the_shapes_of_mixtures_change_where_some_layers_are_dense(tiny):
    shapes = shapes_of(dataclasses.replace(tiny, **EVERY_SECOND))
    assert {path: shape for path, shape in shapes.items() if "/m" in path} == {
        "layers/mlp/gate": (3, 12, 20),
        "layers/mlp/up": (3, 12, 20),
        "layers/mlp/down": (3, 20, 12),
        "layers/moe/router": (3, 12, 5),
        "layers/moe/gate": (3, 5, 12, 7),
        "layers/moe/up": (3, 5, 12, 7),
        "layers/moe/down": (3, 5, 7, 12),
        "layers/moe/shared_gate": (3, 12, 9),
        "layers/moe/shared_up": (3, 12, 9),
        "layers/moe/shared_down": (3, 9, 12),
    }
    deep = shapes_of(dataclasses.replace(tiny, num_layers=6))
    trunk = {path: shape for path, shape in shapes.items() if "/m" not in path}
    assert trunk == {path: shape for path, shape in deep.items() if "/m" not in path}


@pytest.mark.parametrize(
    ("changes", "with_experts", "dense"),
    [
        ({}, (), (0, 1, 2)),
        (MIXTURE, (0, 1, 2), ()),
        ({**MIXTURE, "moe_every": 3}, (2,), (0, 1)),
        (EVERY_SECOND, (1, 3, 5), (0, 2, 4)),
    ],
    ids=str,
)
def test_every_nth_layer_has_experts(tiny, changes, with_experts, dense):
    config = dataclasses.replace(tiny, **changes)
    assert axes.layers_of(config, axes.MOE_LAYERS) == with_experts
    assert axes.layers_of(config, axes.DENSE_LAYERS) == dense
    assert axes.layers_of(config, axes.LAYERS) == tuple(range(config.num_layers))
    assert axes.axis_size(config, axes.MOE_LAYERS) == len(with_experts)
    assert axes.axis_size(config, axes.DENSE_LAYERS) == len(dense)


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_layers_are_stacked_once_and_first(tiny, changes):
    config = dataclasses.replace(tiny, **changes)
    for path, parameter in axes.parameters(config).items():
        places = [i for i, axis in enumerate(parameter.axes) if axis in axes.LAYER_AXES]
        assert places == ([0] if path.startswith("layers/") else []), path
        if config.moe_every == 1:
            assert not {axes.MOE_LAYERS, axes.DENSE_LAYERS} & set(parameter.axes), path


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
