"""Logits equal those of PyTorch's transformers, both ways, family by family.

Runs where torch and transformers are installed: `make test-parity`.
"""

import dataclasses

import jax
import numpy as np
import pytest

from aquila_jax import load_hf, save_hf
from aquila_jax.config import ModelConfig
from aquila_jax.interop import Directory
from aquila_jax.interop.families import FAMILIES, family_of

REASON = "needs torch and transformers: run `make test-parity`"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

pytestmark = pytest.mark.parity

DENSE = ModelConfig(
    vocab_size=61,
    embed_dim=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_dim=40,
    context_length=32,
    rope_theta=100.0,
    qkv_bias=False,
)
CONFIGS = {
    "llama": DENSE,
    "llama, tied, wide heads": dataclasses.replace(DENSE, head_dim=8, tie_embeddings=True),
    "qwen2": dataclasses.replace(DENSE, qkv_bias=True, norm_eps=1e-3),
    "qwen2, odd heads": dataclasses.replace(DENSE, qkv_bias=True, embed_dim=22),
    "qwen2, tied": dataclasses.replace(DENSE, qkv_bias=True, tie_embeddings=True),
    "mistral": dataclasses.replace(DENSE, embed_dim=22),
    "mixtral": dataclasses.replace(DENSE, num_experts=4, experts_per_token=2),
    "mixtral, wide heads": dataclasses.replace(
        DENSE, num_experts=5, experts_per_token=3, head_dim=8
    ),
}
TOKENS = np.random.default_rng(0).integers(DENSE.vocab_size, size=(3, 20))


def their_config(config: ModelConfig, model_type: str):
    """A configuration of theirs, in their words and not through ours."""
    options = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
    }
    if model_type == "mistral":
        options["sliding_window"] = None
    if config.is_moe:
        options |= {"num_local_experts": config.num_experts}
        options |= {"num_experts_per_tok": config.experts_per_token}
    return transformers.AutoConfig.for_model(model_type, **options)


def their_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.from_numpy(TOKENS)).logits.numpy()


def their_random_model(config: ModelConfig, model_type: str):
    """A model of theirs, no parameter of which is at its initial value."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(their_config(config, model_type))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.float()


@pytest.mark.parametrize("name", CONFIGS)
def test_what_transformers_saves_we_read(tmp_path, model_logits, name):
    config, model_type = CONFIGS[name], name.split(",")[0]
    model = their_random_model(config, model_type)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    params, read = load_hf(tmp_path)
    assert read == config
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = model_logits(config, params, jax.numpy.asarray(TOKENS))
    np.testing.assert_allclose(ours, their_logits(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_we_save_transformers_reads(tmp_path, random_params, model_logits, name):
    config = CONFIGS[name]
    params = random_params(config)
    save_hf(params, config, tmp_path / "model", dtype="float32", max_shard_bytes=20_000)
    assert family_of(config) == name.split(",")[0]
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True, dtype=torch.float32
    )
    assert type(model).__name__ == FAMILIES[family_of(config)].architecture
    assert not any(report.values()), report
    ours = model_logits(config, params, jax.numpy.asarray(TOKENS))
    np.testing.assert_allclose(ours, their_logits(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_goes_through_transformers_unchanged(tmp_path, random_params, dtype):
    config = CONFIGS["qwen2, tied"]
    save_hf(random_params(config), config, tmp_path / "ours", dtype=dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert model.dtype == getattr(torch, dtype)
    model.save_pretrained(tmp_path / "theirs")
    first, second = load_hf(tmp_path / "ours"), load_hf(tmp_path / "theirs")
    assert first[1] == second[1]
    jax.tree.map(np.testing.assert_array_equal, first[0], second[0])


def test_llama_with_biases_of_query_key_and_value_only(tmp_path, model_logits):
    """Llama's attention_bias means four biases; we can say it while the fourth is zero."""
    options = their_config(DENSE, "llama")
    options.attention_bias = True
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("o_proj.bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    params, config = load_hf(tmp_path)
    assert config == dataclasses.replace(DENSE, qkv_bias=True)
    assert Directory(tmp_path).model_type == "llama"
    ours = model_logits(config, params, jax.numpy.asarray(TOKENS))
    np.testing.assert_allclose(ours, their_logits(model), rtol=0, atol=1e-4)
