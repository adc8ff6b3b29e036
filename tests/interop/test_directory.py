"""A directory is read whole and right, or refused with the file or the tensor."""

import json
import re
import shutil

import numpy as np
import pytest

from aquila_jax import UserError, axes
from aquila_jax.interop import Directory, arrays, slices

from .conftest import BIASED, CONFIGS, DENSE, MIXTURE, edit_json, edit_tensors

NORM = "model.norm.weight"


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 4000])
def test_slices_are_views_of_the_saved_leaves(saved, random_params, config, max_shard_bytes):
    directory = Directory(saved(config, max_shard_bytes=max_shard_bytes))
    leaves = axes.flatten(random_params(config))
    assert directory.config == config
    for item in slices(config).values():
        part = directory.read(item.path, item.layer, item.expert)
        np.testing.assert_array_equal(part, leaves[item.path][item.index])
        assert directory.dtype(item.path) == np.float32
        assert not part.flags.owndata
        assert not part.flags.writeable


def test_opening_reads_headers_only(saved, monkeypatch):
    path = saved(max_shard_bytes=4000)
    monkeypatch.setattr("mmap.mmap", None)
    assert Directory(path).config == DENSE


def test_missing_unknown_and_misshapen_tensors_are_listed_together(saved):
    path = saved()

    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.7.mlp.up_proj.weight"] = dict(tensors[NORM])
        tensors["model.layers.0.self_attn.q_proj.weight"]["shape"] = [12, 24]

    edit_tensors(path / "model.safetensors", change)
    with pytest.raises(UserError) as caught:
        Directory(path)
    message = str(caught.value)
    assert "missing: model.layers.1.mlp.up_proj.weight" in message
    assert "unknown: model.layers.7.mlp.up_proj.weight" in message
    assert "another shape: model.layers.0.self_attn.q_proj.weight (12, 24) for (24, 12)" in message
    assert "\n" not in message


def test_a_long_list_is_shortened(saved):
    path = saved()
    edit_json(path / "config.json", num_hidden_layers=9)
    with pytest.raises(UserError, match=r"missing: .* and 46 more"):
        Directory(path)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (DENSE, {"vocab_size": 62}, r"lm_head\.weight \(61, 12\) for \(62, 12\)"),
        (DENSE, {"num_hidden_layers": 2}, r"unknown: .*layers\.2\."),
        (DENSE, {"attention_bias": True}, r"missing: .*o_proj\.bias"),
        (DENSE, {"model_type": "qwen2"}, r"missing: .*k_proj\.bias"),
        (BIASED, {"model_type": "llama"}, r"unknown: .*k_proj\.bias"),
        (MIXTURE, {"num_local_experts": 5}, r"missing: .*experts\.4\."),
        (MIXTURE, {"model_type": "mistral"}, "unknown: .*block_sparse_moe"),
    ],
    ids=str,
)
def test_a_configuration_of_another_model_is_refused(saved, config, changes, message):
    path = saved(config)
    edit_json(path / "config.json", **changes)
    with pytest.raises(UserError, match=message):
        Directory(path)


def test_what_is_harmless_is_ignored(saved, random_params):
    config = CONFIGS["llama, tied"]
    path = saved(config)

    def add(tensors):
        frequencies = {"dtype": "F32", "shape": [3], "data": bytes(12)}
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = frequencies
        tensors["model.rotary_emb.inv_freq"] = frequencies
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    edit_tensors(path / "model.safetensors", add)
    assert Directory(path).config == config


def test_a_second_head_of_another_shape_is_not_harmless(saved):
    path = saved(CONFIGS["llama, tied"])

    def add(tensors):
        tensors["lm_head.weight"] = tensors[NORM]

    edit_tensors(path / "model.safetensors", add)
    with pytest.raises(UserError, match=r"lm_head\.weight \(12,\) for \(61, 12\)"):
        Directory(path)


def test_an_untied_model_needs_its_head(saved):
    path = saved(CONFIGS["llama, tied"])
    edit_json(path / "config.json", tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"missing: lm_head\.weight"):
        Directory(path)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_bias_of_the_attention_output_must_be_zero(saved, value):
    path = saved(BIASED)
    edit_json(path / "config.json", model_type="llama", attention_bias=True)

    def add(tensors):
        for layer in range(3):
            bias = np.zeros(12, np.float32)
            bias[5] = value if layer == 2 else 0
            tensors[f"model.layers.{layer}.self_attn.o_proj.bias"] = {
                "dtype": "F32",
                "shape": [12],
                "data": bias.tobytes(),
            }

    edit_tensors(path / "model.safetensors", add)
    if value:
        with pytest.raises(UserError, match=r"layers\.2\.self_attn\.o_proj\.bias is not zero"):
            Directory(path)
    else:
        assert Directory(path).config == BIASED


def test_a_leaf_of_two_types_has_the_wider_one(saved):
    path = saved(dtype="bfloat16")

    def widen(tensors):
        norm = np.full(12, 0.1, np.float32)
        tensors["model.layers.1.input_layernorm.weight"] |= {"dtype": "F32", "data": norm.tobytes()}

    edit_tensors(path / "model.safetensors", widen)
    directory = Directory(path)
    assert directory.dtype("layers/pre_attention_norm/scale") == np.float32
    assert directory.dtype("layers/pre_mlp_norm/scale") == arrays.BFLOAT16
    assert directory.read("layers/pre_attention_norm/scale", 1)[0] == np.float32(0.1)


def test_tensors_of_other_types_are_refused(saved):
    path = saved()

    def change(tensors):
        tensors[NORM] |= {"dtype": "F8_E4M3", "data": bytes(12)}

    edit_tensors(path / "model.safetensors", change)
    message = rf"of a type other than F32, BF16, F16: F8_E4M3: {re.escape(NORM)}"
    with pytest.raises(UserError, match=message):
        Directory(path)


class TestShards:
    @pytest.fixture
    def path(self, saved):
        return saved(max_shard_bytes=4000)

    def shards(self, path):
        return sorted(path.glob("model-*.safetensors"))

    def test_a_missing_one_is_named(self, path):
        self.shards(path)[1].unlink()
        with pytest.raises(UserError, match=r"names model-00002-of-000\d\d\.safetensors, which is"):
            Directory(path)

    def test_a_truncated_one_is_named(self, path):
        shard = self.shards(path)[2]
        shard.write_bytes(shard.read_bytes()[:-5])
        with pytest.raises(UserError, match=rf"{shard.name} is no whole .* truncated"):
            Directory(path)

    def test_a_corrupt_one_is_named(self, path):
        shard = self.shards(path)[0]
        shard.write_bytes(b"\xff" * shard.stat().st_size)
        with pytest.raises(UserError, match=rf"{shard.name} is no whole safetensors file"):
            Directory(path)

    def test_two_swapped_are_noticed(self, path):
        first, second = self.shards(path)[:2]
        first.rename(path / "other")
        second.rename(first)
        (path / "other").rename(second)
        with pytest.raises(UserError, match="disagree about tensors: named but not there: model"):
            Directory(path)

    def test_an_index_that_leaves_a_tensor_out_is_noticed(self, path):
        index = path / "model.safetensors.index.json"
        weight_map = json.loads(index.read_text())["weight_map"]
        weight_map.pop(NORM)
        edit_json(index, weight_map=weight_map)
        with pytest.raises(UserError, match=rf"there but not named: {re.escape(NORM)} in model-"):
            Directory(path)

    @pytest.mark.parametrize("outside", ["../elsewhere.safetensors", "/etc/passwd", ""])
    def test_an_index_names_files_of_its_directory_only(self, path, outside):
        index = path / "model.safetensors.index.json"
        edit_json(index, weight_map={NORM: outside})
        with pytest.raises(UserError, match=r"index\.json names"):
            Directory(path)

    @pytest.mark.parametrize("weight_map", [None, [], {NORM: 3}, {NORM: ["a"]}], ids=str)
    def test_an_index_without_a_map_is_refused(self, path, weight_map):
        edit_json(path / "model.safetensors.index.json", weight_map=weight_map)
        with pytest.raises(UserError, match=r"index\.json has no weight_map"):
            Directory(path)


def test_a_directory_without_weights_says_what_is_read(saved):
    path = saved()
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"neither model\.safetensors nor .* \(\.bin, \.pth\)"):
        Directory(path)


def test_a_directory_without_configuration_is_refused(saved):
    path = saved()
    (path / "config.json").unlink()
    with pytest.raises(UserError, match=r"cannot read .*config\.json"):
        Directory(path)
    shutil.rmtree(path)
    with pytest.raises(UserError, match=r"cannot read .*config\.json"):
        Directory(path)
