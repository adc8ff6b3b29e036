"""Which element of which tensor on disk each element of ours is."""

import dataclasses
import math

import numpy as np
import pytest

from aquila_jax import UserError, axes
from aquila_jax.interop import Slice, layout, slices

from .conftest import BIASED, CONFIGS, DENSE, MIXTURE, WEIGHED

N, K, H, D = DENSE.num_heads, DENSE.num_kv_heads, DENSE.head_dim, DENSE.embed_dim


def on_disk(config, path, leaf, **where):
    item = Slice(path, **where)
    return layout.to_file(np.asarray(leaf)[item.index], axes.parameters(config)[path], config)


@pytest.mark.parametrize(("path", "heads"), [("query", N), ("key", K), ("value", K)])
def test_rows_of_q_k_v_are_heads_one_after_the_other(random_params, path, heads):
    leaf = random_params(BIASED)["layers"]["attention"][path]
    bias = random_params(BIASED)["layers"]["attention"][f"{path}_bias"]
    weight = on_disk(BIASED, f"layers/attention/{path}", leaf, layer=1)
    flat_bias = on_disk(BIASED, f"layers/attention/{path}_bias", bias, layer=1)
    assert weight.shape == (heads * H, D)
    assert flat_bias.shape == (heads * H,)
    for head in range(heads):
        for channel in range(H):
            np.testing.assert_array_equal(weight[head * H + channel], leaf[1, :, head, channel])
            assert flat_bias[head * H + channel] == bias[1, head, channel]


def test_columns_of_the_attention_output_are_heads_one_after_the_other(random_params):
    leaf = random_params(DENSE)["layers"]["attention"]["out"]
    weight = on_disk(DENSE, "layers/attention/out", leaf, layer=2)
    assert weight.shape == (D, N * H)
    for head in range(N):
        for channel in range(H):
            np.testing.assert_array_equal(weight[:, head * H + channel], leaf[2, head, channel])


def test_linear_weights_are_transposed_and_embeddings_are_not(random_params):
    params = random_params(DENSE)
    for name in ("gate", "up", "down"):
        leaf = params["layers"]["mlp"][name]
        weight = on_disk(DENSE, f"layers/mlp/{name}", leaf, layer=0)
        np.testing.assert_array_equal(weight, leaf[0].T)
    head = params["lm_head"]["kernel"]
    np.testing.assert_array_equal(on_disk(DENSE, "lm_head/kernel", head), head.T)
    embedding = params["token_embedder"]["embedding"]
    found = on_disk(DENSE, "token_embedder/embedding", embedding)
    np.testing.assert_array_equal(found, embedding)


def test_experts_are_tensors_of_their_own_and_the_router_is_one(random_params):
    moe = random_params(MIXTURE)["layers"]["moe"]
    for name in ("gate", "up", "down"):
        weight = on_disk(MIXTURE, f"layers/moe/{name}", moe[name], layer=1, expert=3)
        np.testing.assert_array_equal(weight, moe[name][1, 3].T)
    router = on_disk(MIXTURE, "layers/moe/router", moe["router"], layer=1)
    np.testing.assert_array_equal(router, moe["router"][1].T)


def test_the_names_are_those_of_the_families():
    names = list(slices(BIASED))
    assert names[0] == "model.embed_tokens.weight"
    assert names[-2:] == ["model.norm.weight", "lm_head.weight"]
    assert sorted(name for name in names if ".1." in name) == [
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.post_attention_layernorm.weight",
        "model.layers.1.self_attn.k_proj.bias",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.1.self_attn.q_proj.bias",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.self_attn.v_proj.bias",
        "model.layers.1.self_attn.v_proj.weight",
    ]
    experts = {name: item for name, item in slices(MIXTURE).items() if ".2.block_sparse" in name}
    assert experts.pop("model.layers.2.block_sparse_moe.gate.weight").path == "layers/moe/router"
    w1, w2, w3 = (
        f"model.layers.2.block_sparse_moe.experts.3.{w}.weight" for w in ("w1", "w2", "w3")
    )
    assert experts[w1] == Slice("layers/moe/gate", 2, 3)
    assert experts[w2] == Slice("layers/moe/down", 2, 3)
    assert experts[w3] == Slice("layers/moe/up", 2, 3)
    assert len(experts) == 3 * 4


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_slices_are_all_of_the_parameters_and_go_there_and_back_as_views(config, random_params):
    parameters, params = axes.parameters(config), axes.flatten(random_params(config))
    seen = dict.fromkeys(parameters, 0)
    for item in slices(config).values():
        part = params[item.path][item.index]
        stored = layout.to_file(part, parameters[item.path], config)
        assert stored.shape == layout.file_shape(parameters[item.path], config)
        stored = np.ascontiguousarray(stored)
        back = layout.from_file(stored, parameters[item.path], config)
        np.testing.assert_array_equal(back, part)
        assert np.shares_memory(back, stored)
        again = layout.to_file(back, parameters[item.path], config)
        assert np.shares_memory(again, stored)
        assert again.flags.c_contiguous
        seen[item.path] += part.size
    assert seen == {path: math.prod(p.shape(config)) for path, p in parameters.items()}


def test_every_parameter_has_a_name():
    paths = {path for config in CONFIGS.values() for path in axes.parameters(config)}
    assert paths == {path for config in CONFIGS.values() for path in layout.names(config)}


def test_qwen_names_experts_in_its_own_way():
    names = slices(WEIGHED)
    mlp = "model.layers.2.mlp"
    for ours, theirs in (("gate", "gate"), ("up", "up"), ("down", "down")):
        assert names[f"{mlp}.experts.3.{theirs}_proj.weight"] == Slice(f"layers/moe/{ours}", 2, 3)
        shared = names[f"{mlp}.shared_expert.{theirs}_proj.weight"]
        assert shared == Slice(f"layers/moe/shared_{ours}", 2)
    assert names[f"{mlp}.gate.weight"] == Slice("layers/moe/router", 2)
    assert names[f"{mlp}.shared_expert_gate.weight"] == Slice("layers/moe/shared_router", 2)
    weight = axes.parameters(WEIGHED)["layers/moe/shared_router"]
    assert layout.file_shape(weight, WEIGHED) == (1, D)


def test_the_number_on_disk_is_the_depth_and_not_the_place_in_a_stack(random_params):
    config = CONFIGS["qwen3_moe, every second"]
    names, attention = slices(config), "model.layers.3.self_attn"
    assert names["model.layers.2.mlp.up_proj.weight"] == Slice("layers/mlp/up", 1)
    assert names["model.layers.3.mlp.gate.weight"] == Slice("layers/moe/router", 1)
    assert names["model.layers.3.mlp.experts.0.up_proj.weight"] == Slice("layers/moe/up", 1, 0)
    assert names[f"{attention}.q_norm.weight"] == Slice("layers/attention/query_norm", 3)
    assert names[f"{attention}.k_norm.weight"] == Slice("layers/attention/key_norm", 3)
    assert "model.layers.2.mlp.gate.weight" not in names
    depths = [int(name.split(".")[2]) for name in names if name.startswith("model.layers")]
    assert depths == sorted(depths)
    for name, item in names.items():
        assert layout.checked_name(config, item) == name
    with pytest.raises(ValueError, match="name one tensor"):
        layout.checked_name(config, Slice("layers/mlp/up", 2))


@pytest.mark.parametrize(
    "item",
    [
        Slice("layers/mlp/gate", 0),
        Slice("layers/moe/gate", 0),
        Slice("layers/moe/gate", 0, 4),
        Slice("layers/moe/gate", 3, 0),
        Slice("layers/moe/gate", -1, 0),
        Slice("layers/moe/router", 0, 0),
        Slice("layers/attention/query"),
        Slice("final_norm/scale", 0),
    ],
    ids=str,
)
def test_a_slice_that_does_not_exist_is_refused(item):
    with pytest.raises(ValueError, match=r"name one tensor|has no") as caught:
        layout.checked_name(MIXTURE, item)
    assert not isinstance(caught.value, UserError)


def test_leaves_without_tensors_are_refused():
    with pytest.raises(UserError, match=r"no Hugging Face family here has tensors for layers/m"):
        slices(dataclasses.replace(MIXTURE, shared_mlp_dim=8))
