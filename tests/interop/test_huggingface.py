"""Whole models there and back, on one device and on a mesh."""

import dataclasses

import jax
import numpy as np
import pytest

import aquila_jax
from aquila_jax import UserError, axes, load_hf, save_hf
from aquila_jax.interop import Directory, arrays, huggingface
from aquila_jax.sharding import Layout, MeshShape

from .conftest import CONFIGS, DENSE, FINE_GRAINED, MIXTURE, WEIGHED, edit_tensors


def assert_same(found, expected):
    found, expected = axes.flatten(found), axes.flatten(expected)
    assert set(found) == set(expected)
    for path, leaf in found.items():
        assert leaf.dtype == expected[path].dtype, path
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 4000], ids=["one file", "several"])
def test_a_model_goes_there_and_back_bit_for_bit(
    tmp_path, random_params, config, dtype, max_shard_bytes
):
    params = random_params(config, dtype=dtype)
    save_hf(params, config, tmp_path / "model", dtype=dtype, max_shard_bytes=max_shard_bytes)
    assert (tmp_path / "model" / "model.safetensors").exists() == (max_shard_bytes > 4000)
    found, read = load_hf(tmp_path / "model")
    assert read == config
    assert all(isinstance(leaf, jax.Array) for leaf in axes.flatten(found).values())
    assert_same(found, params)


def test_the_loaded_model_computes_what_the_saved_one_did(
    tmp_path, random_params, random_batch, model_logits
):
    params, tokens = random_params(MIXTURE), random_batch(MIXTURE)["tokens"]
    save_hf(jax.tree.map(jax.numpy.asarray, params), MIXTURE, tmp_path / "model", dtype="float32")
    found, config = load_hf(tmp_path / "model")
    np.testing.assert_array_equal(
        model_logits(config, found, tokens), model_logits(MIXTURE, params, tokens)
    )


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
def test_dtypes_are_converted_on_request(saved, random_params, stored, wanted):
    found, _ = load_hf(saved(dtype=stored), dtype=wanted)
    expected = jax.tree.map(lambda x: x.astype(stored).astype(wanted), random_params(DENSE))
    assert_same(found, expected)


def test_a_leaf_of_two_types_is_read_as_the_wider_one(saved, random_params):
    path = saved(dtype="bfloat16")

    def widen(tensors):
        norm = np.full(12, 0.1, np.float32)
        tensors["model.layers.1.input_layernorm.weight"] |= {"dtype": "F32", "data": norm.tobytes()}

    edit_tensors(path / "model.safetensors", widen)
    scale = load_hf(path)[0]["layers"]["pre_attention_norm"]["scale"]
    expected = random_params(DENSE)["layers"]["pre_attention_norm"]["scale"]
    expected = expected.astype(arrays.BFLOAT16).astype(np.float32)
    expected[1] = 0.1
    assert scale.dtype == np.float32
    np.testing.assert_array_equal(scale, expected)


MESHES = [
    MeshShape(data=8),
    MeshShape(fsdp=4, model=2),
    MeshShape(fsdp=2, expert=2, model=2),
    MeshShape(data=2, expert=4),
]


# In width and experts what every mesh above divides.
SPLIT = {"vocab_size": 64, "expert_mlp_dim": 8, "embed_dim": 16}
ON_MESHES = {
    "aquilamoe": dataclasses.replace(MIXTURE, vocab_size=64, qkv_bias=True),
    "qwen3_moe": dataclasses.replace(FINE_GRAINED, **SPLIT, num_layers=4, moe_every=2),
    "qwen2_moe": dataclasses.replace(WEIGHED, **SPLIT, shared_mlp_dim=10),
}


@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize("config", ON_MESHES.values(), ids=ON_MESHES)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_on_a_mesh_every_device_gets_its_part(saved, random_params, shape, config, dtype):
    shardings = Layout(shape.build()).params(config)
    params, read = load_hf(saved(config), dtype=dtype, shardings=shardings)
    assert read == config
    wanted = jax.tree.map(lambda leaf: leaf.astype(dtype or leaf.dtype), random_params(config))
    assert_same(params, wanted)
    flat = axes.flatten(shardings)
    for path, leaf in axes.flatten(params).items():
        assert leaf.sharding == flat[path]
        for shard in leaf.addressable_shards:
            part = axes.flatten(wanted)[path][shard.index]
            np.testing.assert_array_equal(shard.data, part)


def test_an_array_split_over_layers_reads_each_layer_once(saved, monkeypatch):
    config = dataclasses.replace(DENSE, num_layers=8, vocab_size=64)
    layout = Layout.of(MeshShape(fsdp=8).build(), {"layers": ("fsdp",), "embed": ()})
    seen = []
    real = Directory.read

    def read(self, *where):
        seen.append(where)
        return real(self, *where)

    path = saved(config)
    monkeypatch.setattr(Directory, "read", read)
    load_hf(path, shardings=layout.params(config))
    assert len(seen) == len(set(seen))


def test_host_memory_is_one_shard(saved, monkeypatch):
    config = dataclasses.replace(MIXTURE, vocab_size=64)
    layout = Layout(MeshShape(fsdp=2, expert=2, model=2).build())
    path, sizes = saved(config), {}
    real = huggingface._read_block

    def read_block(directory, leaf, *rest):
        block = real(directory, leaf, *rest)
        sizes.setdefault(leaf, []).append(block.size)
        return block

    monkeypatch.setattr(huggingface, "_read_block", read_block)
    load_hf(path, shardings=layout.params(config))
    whole = {path: parameter.shape(config) for path, parameter in axes.parameters(config).items()}
    gate = sizes["layers/moe/gate"]
    assert [size * 8 for size in gate] == [np.prod(whole["layers/moe/gate"])] * 8
    # Split by fsdp and expert; replicas are read once.
    assert [size * 4 for size in sizes["final_norm/scale"]] == [
        np.prod(whole["final_norm/scale"])
    ] * 4


def test_a_model_on_a_mesh_is_saved(tmp_path, random_params):
    config = dataclasses.replace(MIXTURE, vocab_size=64)
    shardings = Layout(MeshShape(fsdp=2, expert=2, model=2).build()).params(config)
    params = jax.device_put(random_params(config), shardings)
    save_hf(params, config, tmp_path / "model", dtype="float32")
    assert_same(load_hf(tmp_path / "model")[0], random_params(config))


def test_shardings_of_another_model_are_refused(saved):
    layout = Layout(MeshShape(data=8).build())
    with pytest.raises(UserError, match=r"shardings .* differ in layers/moe/router"):
        load_hf(saved(), shardings={**layout.params(DENSE), "layers/moe/router": None})


def test_parameters_of_another_configuration_are_refused(tmp_path, random_params):
    params = random_params(DENSE)
    wider = dataclasses.replace(DENSE, mlp_dim=21)
    with pytest.raises(UserError, match=r"layers/mlp/gate has shape \(3, 12, 20\)"):
        save_hf(params, wider, tmp_path / "model")
    with pytest.raises(UserError, match=r"differ in lm_head/kernel"):
        save_hf(params, dataclasses.replace(DENSE, tie_embeddings=True), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_fails_leaves_nothing(tmp_path, random_params):
    params = random_params(DENSE)
    params["layers"]["mlp"]["up"][2, 3, 4] = 1e6
    with pytest.raises(UserError, match=r"layers\.2\.mlp\.up_proj\.weight holds values beyond"):
        save_hf(params, DENSE, tmp_path / "model", dtype="float16", max_shard_bytes=4000)
    assert list(tmp_path.iterdir()) == []


def test_the_library_offers_both():
    assert aquila_jax.load_hf is load_hf
    assert aquila_jax.save_hf is save_hf
