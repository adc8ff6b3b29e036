"""Logits equal those of PyTorch's transformers, both ways, family by family.

Runs where torch and transformers are installed: `make test-parity`.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest

from aquila_jax import load_hf, save_hf, scale_out
from aquila_jax.config import ModelConfig, RopeScaling
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
FINE_GRAINED = {"num_experts": 5, "experts_per_token": 2, "expert_mlp_dim": 12}
WEIGHED = {"shared_mlp_dim": 18, "shared_expert_gate": True}
# Of the rotary frequencies of heads of 6, the first is kept and the others are changed.
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 32)
CONFIGS = {
    "llama": DENSE,
    "llama, odd heads": dataclasses.replace(
        DENSE, embed_dim=45, num_heads=9, num_kv_heads=3, head_dim=10
    ),
    "llama, tied, wide heads": dataclasses.replace(DENSE, head_dim=8, tie_embeddings=True),
    "qwen2": dataclasses.replace(DENSE, qkv_bias=True, norm_eps=1e-3),
    "qwen2, odd heads": dataclasses.replace(DENSE, qkv_bias=True, embed_dim=22),
    "qwen2, tied": dataclasses.replace(DENSE, qkv_bias=True, tie_embeddings=True),
    "mistral": dataclasses.replace(DENSE, embed_dim=22),
    "mistral, one key head": dataclasses.replace(DENSE, num_heads=5, num_kv_heads=1),
    "mixtral": dataclasses.replace(DENSE, num_experts=4, experts_per_token=2),
    "mixtral, wide heads": dataclasses.replace(
        DENSE, num_experts=5, experts_per_token=3, head_dim=8
    ),
    "llama, linear": dataclasses.replace(DENSE, rope_scaling=RopeScaling("linear", 3.0)),
    "llama, llama3": dataclasses.replace(DENSE, rope_scaling=LLAMA3),
    "qwen2, llama3": dataclasses.replace(DENSE, qkv_bias=True, rope_scaling=LLAMA3),
    "mixtral, linear": dataclasses.replace(
        DENSE, num_experts=4, experts_per_token=2, rope_scaling=RopeScaling("linear", 2.0)
    ),
    "qwen3": dataclasses.replace(DENSE, qk_norm=True, norm_eps=1e-3, embed_dim=22),
    "qwen3, tied, llama3": dataclasses.replace(
        DENSE, qk_norm=True, tie_embeddings=True, head_dim=8, rope_scaling=LLAMA3
    ),
    "qwen3_moe": dataclasses.replace(DENSE, qk_norm=True, **FINE_GRAINED),
    "qwen3_moe, every third, tied": dataclasses.replace(
        DENSE, qk_norm=True, **FINE_GRAINED, moe_every=3, tie_embeddings=True, head_dim=8
    ),
    "qwen3_moe, plain gates, llama3": dataclasses.replace(
        DENSE,
        qk_norm=True,
        **FINE_GRAINED,
        num_layers=4,
        moe_every=2,
        renormalize_gates=False,
        rope_scaling=LLAMA3,
    ),
    "qwen2_moe": dataclasses.replace(
        DENSE, qkv_bias=True, **FINE_GRAINED, **WEIGHED, renormalize_gates=False
    ),
    "qwen2_moe, no biases": dataclasses.replace(DENSE, **FINE_GRAINED, **WEIGHED, moe_every=3),
}
TOKENS = np.random.default_rng(0).integers(DENSE.vocab_size, size=(3, 20))


def their_rope(config: ModelConfig) -> dict[str, float | str]:
    scaling = config.rope_scaling
    rope = {"rope_type": "default" if scaling is None else scaling.kind}
    rope |= {"rope_theta": config.rope_theta}
    if scaling is not None:
        rope |= {"factor": scaling.factor}
    if scaling is not None and scaling.kind == "llama3":
        rope |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context_length,
        }
    return rope


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
        "rope_parameters": their_rope(config),
        "tie_word_embeddings": config.tie_embeddings,
    }
    if model_type == "mistral":
        options["sliding_window"] = None
    if config.is_moe:
        options |= {"num_experts_per_tok": config.experts_per_token}
    if model_type == "mixtral":
        options |= {"num_local_experts": config.num_experts}
    if model_type in ("qwen2_moe", "qwen3_moe"):
        options |= {
            "num_experts": config.num_experts,
            "moe_intermediate_size": config.expert_mlp_dim,
            "decoder_sparse_step": config.moe_every,
            "norm_topk_prob": config.renormalize_gates,
        }
    if model_type == "qwen2_moe":
        options |= {
            "qkv_bias": config.qkv_bias,
            "shared_expert_intermediate_size": config.shared_mlp_dim,
        }
    return transformers.AutoConfig.for_model(model_type, **options)


def their_logits(model, tokens: np.ndarray = TOKENS) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens)).logits.numpy()


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


@pytest.mark.parametrize(
    "name",
    [
        "llama, odd heads", "llama, linear", "llama, llama3", "qwen2, odd heads", "mistral",
        "qwen3", "mixtral", "qwen2_moe", "qwen3_moe",
    ],
)  # fmt: skip
def test_a_text_of_more_than_2048_tokens_gives_the_same_logits(tmp_path, model_logits, name):
    config = dataclasses.replace(CONFIGS[name], context_length=4096, rope_theta=10_000.0)
    tokens = np.random.default_rng(1).integers(config.vocab_size, size=(1, 2100))
    model = their_random_model(config, name.split(",")[0])
    model.save_pretrained(tmp_path)
    params, read = load_hf(tmp_path)
    assert read == config
    theirs = their_logits(model, tokens)
    ours = model_logits(config, params, jax.numpy.asarray(tokens))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-4 * np.abs(theirs).max())


def test_a_mixture_with_biases_is_loaded_as_one_of_qwen2(tmp_path, random_params, model_logits):
    config = dataclasses.replace(CONFIGS["mixtral"], qkv_bias=True)
    params = random_params(config)
    save_hf(params, config, tmp_path / "model", dtype="float32", family="qwen2_moe")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True, dtype=torch.float32
    )
    assert not any(report.values()), report
    ours = model_logits(config, params, jax.numpy.asarray(TOKENS))
    np.testing.assert_allclose(ours, their_logits(model), rtol=0, atol=1e-4)


def test_a_dense_qwen3_becomes_a_qwen3_moe_that_computes_the_same(tmp_path):
    model = their_random_model(CONFIGS["qwen3, tied, llama3"], "qwen3")
    model.save_pretrained(tmp_path / "dense")
    params, config = load_hf(tmp_path / "dense")
    grown = scale_out(
        params, config, num_experts=4, granularity=2, moe_every=3, key=jax.random.key(0)
    )
    save_hf(grown.params, grown.config, tmp_path / "mixture", dtype="float32")
    mixture = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "mixture", dtype=torch.float32
    )
    assert type(mixture).__name__ == "Qwen3MoeForCausalLM"
    assert mixture.config.num_experts == 8
    np.testing.assert_allclose(their_logits(mixture), their_logits(model), rtol=0, atol=1e-4)


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


@pytest.mark.parametrize("name", ["llama, linear", "qwen3, tied, llama3"])
def test_rotary_scaling_in_the_old_words_is_read_as_transformers_reads_it(
    tmp_path, random_params, model_logits, name
):
    config = CONFIGS[name]
    save_hf(random_params(config), config, tmp_path / "model", dtype="float32")
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    scaling = values["rope_scaling"]
    scaling["type"] = scaling.pop("rope_type")
    (tmp_path / "model" / "config.json").write_text(json.dumps(values))
    params, read = load_hf(tmp_path / "model")
    assert read == config
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32
    )
    ours = model_logits(config, params, jax.numpy.asarray(TOKENS))
    np.testing.assert_allclose(ours, their_logits(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "qwen3_moe"])
def test_biases_of_query_key_and_value_only(tmp_path, model_logits, model_type):
    """Their attention_bias means four biases; we can say it while the fourth is zero."""
    without = CONFIGS[model_type]
    options = their_config(without, model_type)
    options.attention_bias = True
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("o_proj.bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    params, config = load_hf(tmp_path)
    assert config == dataclasses.replace(without, qkv_bias=True)
    assert Directory(tmp_path).model_type == model_type
    ours = model_logits(config, params, jax.numpy.asarray(TOKENS))
    np.testing.assert_allclose(ours, their_logits(model), rtol=0, atol=1e-4)
