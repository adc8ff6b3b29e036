"""GGUF files: one made here and damaged, and a real pretrained model."""

import dataclasses
import sys

import gguf
import jax
import numpy as np
import pytest

from aquila_jax import UserError, axes
from aquila_jax.config import ModelConfig
from aquila_jax.interop import gguf_file, layout, load_gguf, slices

# Widths are multiples of 32, the length of a quantized block.
CONFIG = ModelConfig(
    vocab_size=96,
    embed_dim=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    mlp_dim=96,
    context_length=32,
    rope_theta=100.0,
    norm_eps=1e-5,
    qkv_bias=False,
)
F32 = gguf.GGMLQuantizationType.F32


def interleave(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """What a converter to GGUF does to query and key: rows i and i + H / 2 become neighbours."""
    heads = rows.reshape(num_heads, -1, rows.shape[-1])
    half = heads.shape[1] // 2
    order = [row for i in range(half) for row in (i, i + half)]
    return heads[:, order].reshape(rows.shape)


def write(
    path, params, config=CONFIG, kind=F32, skip=(), extra=None, metadata=None, architecture="llama"
):
    """Write a model; `metadata` changes keys, and None removes one."""
    leaves, parameters = axes.flatten(params), axes.parameters(config)
    writer = gguf.GGUFWriter(path, architecture)
    values = {
        "vocab_size": config.vocab_size,
        "context_length": config.context_length,
        "embedding_length": config.embed_dim,
        "block_count": config.num_layers,
        "feed_forward_length": config.mlp_dim,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_theta,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        **(metadata or {}),
    }
    for key, value in values.items():
        if isinstance(value, float):
            writer.add_float32(f"llama.{key}", value)
        elif isinstance(value, str):
            writer.add_string(f"llama.{key}", value)
        elif isinstance(value, list):
            writer.add_array(f"llama.{key}", value)
        elif value is not None:
            writer.add_uint32(f"llama.{key}", value)
    for item in slices(config).values():
        name = gguf_file._NAMES[item.path].format(layer=item.layer)
        rows = layout.to_file(leaves[item.path][item.index], parameters[item.path], config)
        if item.path.endswith("/query"):
            rows = interleave(rows, config.num_heads)
        if item.path.endswith("/key"):
            rows = interleave(rows, config.num_kv_heads)
        rows = np.ascontiguousarray(rows)
        if name not in skip:
            if rows.ndim == 1 or kind == F32:
                writer.add_tensor(name, rows)
            else:
                writer.add_tensor(name, gguf.quants.quantize(rows, kind), raw_dtype=kind)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_in_full_precision_comes_back_bit_for_bit(tmp_path, random_params, tied):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    params = random_params(config)
    found, read = load_gguf(write(tmp_path / "model.gguf", params, config))
    assert read == config
    jax.tree.map(np.testing.assert_array_equal, found, params)


@pytest.mark.parametrize(
    ("kind", "error"),
    [("F16", 5e-4), ("BF16", 4e-3), ("Q8_0", 5e-3), ("Q4_0", 0.09), ("Q4_1", 0.09)],
)
def test_quantized_weights_are_near_the_originals(tmp_path, random_params, kind, error):
    kind, params = gguf.GGMLQuantizationType[kind], random_params(CONFIG)
    found, _ = load_gguf(write(tmp_path / "model.gguf", params, kind=kind))

    def compare(one, other):
        assert one.dtype == np.float32
        np.testing.assert_allclose(one, other, rtol=0, atol=error * np.abs(other).max() * 1.5)

    jax.tree.map(compare, found, params)


def test_a_directory_with_one_file_is_that_file(tmp_path, random_params):
    write(tmp_path / "model.gguf", random_params(CONFIG))
    assert load_gguf(tmp_path)[1] == CONFIG
    params, _ = load_gguf(tmp_path, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in axes.flatten(params).values()} == {"bfloat16"}
    write(tmp_path / "other.gguf", random_params(CONFIG))
    with pytest.raises(UserError, match=r"one \.gguf file, not model\.gguf, other\.gguf"):
        load_gguf(tmp_path)


def test_absent_metadata_means_what_llama_cpp_takes_it_for(tmp_path, random_params):
    config = dataclasses.replace(CONFIG, num_kv_heads=4, head_dim=16, rope_theta=1e4)
    absent = (
        "vocab_size",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "rope.dimension_count",
        "rope.freq_base",
    )
    params, metadata = random_params(config), dict.fromkeys(absent)
    path = write(tmp_path / "model.gguf", params, config, metadata=metadata)
    assert load_gguf(path)[1] == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "qwen2"}, "a model of 'qwen2'; only llama"),
        (
            {"metadata": {"embedding_length": None}},
            r"llama\.embedding_length must be one number, not None",
        ),
        (
            {"metadata": {"attention.head_count_kv": [2, 1]}},
            r"head_count_kv must be one number, not \[2, 1\]",
        ),
        ({"metadata": {"rope.dimension_count": 16}}, "only 16 of 32 channels of a head turn"),
        ({"metadata": {"attention.value_length": 16}}, "values are not as wide as keys"),
        ({"metadata": {"rope.scaling.type": "linear"}}, r"scaled rotary positions \(linear\)"),
        ({"extra": {"rope_freqs.weight": np.ones(16, np.float32)}}, "scaled rotary positions"),
        ({"metadata": {"expert_count": 8}}, "mixtures of experts"),
        ({"metadata": {"attention.head_count_kv": 3}}, "multiple of num_kv_heads"),
        ({"skip": ["blk.1.ffn_up.weight"]}, r"missing: blk\.1\.ffn_up\.weight"),
        (
            {"extra": {"blk.0.attn_q.bias": np.ones(8, np.float32)}},
            r"unknown: blk\.0\.attn_q\.bias",
        ),
        ({"metadata": {"feed_forward_length": 95}}, r"ffn_gate\.weight \(96, 64\) for \(95, 64\)"),
        (
            {"skip": ["token_embd.weight"], "metadata": {"vocab_size": None}},
            "vocab_size must be a positive",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_refused_with_the_reason(tmp_path, random_params, changes, message):
    path = write(tmp_path / "model.gguf", random_params(CONFIG), **changes)
    with pytest.raises(UserError, match=message) as caught:
        load_gguf(path)
    assert "model.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_refused(tmp_path, random_params):
    content = write(tmp_path / "model.gguf", random_params(CONFIG)).read_bytes()
    damaged = tmp_path / "damaged.gguf"
    for length in (0, 3, 10, 30, 200, 900, len(content) // 2, len(content) - 1):
        damaged.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"damaged\.gguf is no whole GGUF file"):
            load_gguf(damaged)
    damaged.write_bytes(b"GGML" + content[4:])
    with pytest.raises(UserError, match="no whole GGUF file"):
        load_gguf(damaged)


def test_no_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        load_gguf(tmp_path / "model.gguf")
    with pytest.raises(UserError, match=r"one \.gguf file, not none"):
        load_gguf(tmp_path)


def test_without_the_package_the_way_to_get_it_is_told(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").touch()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'aquila-jax\[gguf\]'"):
        load_gguf(tmp_path)


def test_a_pretrained_model_predicts_as_well_as_it_does_elsewhere(pretrained):
    """SmolLM2-135M on the middle of the speeches: 3.4623 nats a token, as transformers has it."""
    config = pretrained.config
    assert (config.num_layers, config.embed_dim, config.tie_embeddings) == (30, 576, True)
    assert (config.norm_eps, config.rope_theta) == (1e-5, 1e5)
    assert pretrained.loss(pretrained.params, config) == pytest.approx(3.4623, abs=0.002)
