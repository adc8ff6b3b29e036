"""config.json and ModelConfig say the same, or the difference is refused."""

import dataclasses
import json
import re

import pytest

from aquila_jax import UserError, preset
from aquila_jax.config import PRESETS, ModelConfig
from aquila_jax.interop import families
from aquila_jax.interop.families import HubConfig, family_of, to_hub

from .conftest import (
    BIASED,
    CONFIGS,
    DENSE,
    FINE_GRAINED,
    LINEAR,
    LLAMA3,
    MIXTURE,
    WEIGHED,
    edit_json,
)


@pytest.fixture
def written(tmp_path):
    def write(config=DENSE, **changes):
        (tmp_path / "config.json").write_text(json.dumps(to_hub(config, "float32")))
        edit_json(tmp_path / "config.json", **changes)
        return HubConfig.read(tmp_path)

    return write


def minimal(model_type, **values):
    """What the hub's oldest files say, and no more."""
    return {
        "model_type": model_type,
        "vocab_size": 61,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "intermediate_size": 20,
        "max_position_embeddings": 32,
        **values,
    }


LLAMA3_KEYS = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
QWEN3_MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 7}
QWEN2_MOE = {**QWEN3_MOE, "shared_expert_intermediate_size": 9}


@pytest.fixture
def parsed(tmp_path):
    def parse(values):
        (tmp_path / "config.json").write_text(json.dumps(values))
        return HubConfig.read(tmp_path).to_model()

    return parse


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_goes_there_and_back(written, name):
    config = CONFIGS[name]
    assert family_of(config) == name.split(",")[0]
    assert written(config).to_model() == config


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_exported(written, name):
    assert written(preset(name)).to_model() == preset(name)


def test_every_field_is_said_or_refused_by_name(written):
    other = ModelConfig(
        vocab_size=62,
        embed_dim=16,
        num_layers=6,
        num_heads=8,
        num_kv_heads=4,
        head_dim=8,
        mlp_dim=24,
        context_length=64,
        rope_theta=1e3,
        rope_scaling=LLAMA3,
        norm_eps=1e-2,
        qkv_bias=True,
        qk_norm=True,
        tie_embeddings=True,
        num_experts=6,
        experts_per_token=3,
        renormalize_gates=False,
        expert_mlp_dim=24,
        shared_mlp_dim=8,
        shared_expert_gate=True,
        moe_every=3,
        router_scores="sigmoid",
        router_scale=2.0,
        router_bias=True,
    )
    refused = {}
    for field in dataclasses.fields(ModelConfig):
        value = getattr(other, field.name)
        assert value != getattr(MIXTURE, field.name), "give every field another value"
        # Only a shared expert can be weighed.
        with_it = {"shared_mlp_dim": 8} if field.name == "shared_expert_gate" else {}
        changed = dataclasses.replace(MIXTURE, **{field.name: value}, **with_it)
        try:
            assert written(changed).to_model() == families.as_read(changed) != MIXTURE
        except UserError as error:
            refused[field.name] = str(error)
    of_routers = {"router_scores", "router_scale", "router_bias"}
    assert set(refused) == {"renormalize_gates", "shared_mlp_dim", "moe_every"} | of_routers
    for name, message in refused.items():
        assert f" {name}={getattr(other, name)!r} (but {getattr(MIXTURE, name)!r})" in message


def test_what_qwens_mixtures_cannot_say_is_refused_by_name(written):
    for base, changes in (
        (FINE_GRAINED, {"qkv_bias": True}),
        (FINE_GRAINED, {"shared_mlp_dim": 8}),
        (FINE_GRAINED, {"shared_mlp_dim": 8, "shared_expert_gate": True}),
        (MIXTURE, {"shared_mlp_dim": 8, "qkv_bias": True}),
        (dataclasses.replace(DENSE, qk_norm=True), {"qkv_bias": True}),
    ):
        (first, *_) = changes
        with pytest.raises(UserError, match=rf"no Hugging Face family here.* {first}="):
            written(dataclasses.replace(base, **changes))
    for changes in ({"qkv_bias": False}, {"renormalize_gates": False}, {"moe_every": 3}):
        config = dataclasses.replace(WEIGHED, **changes)
        assert written(config).to_model() == config


def test_qwens_experts_as_wide_as_an_mlp_are_told_by_0(written):
    config = dataclasses.replace(FINE_GRAINED, expert_mlp_dim=FINE_GRAINED.mlp_dim)
    read = written(config).to_model()
    assert read == families.as_read(config) == dataclasses.replace(config, expert_mlp_dim=0)


def test_the_width_of_experts_is_that_of_the_family(written):
    config = dataclasses.replace(MIXTURE, mlp_dim=999, expert_mlp_dim=24)
    assert written(config).to_model() == dataclasses.replace(MIXTURE, mlp_dim=24)


def test_gates_of_a_dense_model_are_nobodys_business(written):
    config = dataclasses.replace(DENSE, renormalize_gates=False)
    assert written(config).to_model() == DENSE


@pytest.mark.parametrize(
    ("model_type", "theta", "eps", "kv_heads", "biased"),
    [
        ("llama", 1e4, 1e-6, 8, False),
        ("qwen2", 1e4, 1e-6, 8, True),
        ("mistral", 1e4, 1e-6, 8, False),
        ("mixtral", 1e6, 1e-5, 8, False),
        ("qwen3", 1e4, 1e-6, 8, False),
        ("qwen3_moe", 1e4, 1e-6, 4, False),
        ("qwen2_moe", 1e4, 1e-6, 16, True),
        ("aquiladense", 1e4, 1e-6, 8, True),
        ("aquilamoe", 1e4, 1e-6, 8, True),
    ],
)
def test_absent_keys_mean_what_transformers_takes_them_for(
    parsed, model_type, theta, eps, kv_heads, biased
):
    values = minimal(model_type)
    if model_type in ("qwen2", "qwen3"):
        values["num_key_value_heads"] = 8
    if model_type == "qwen2_moe":
        values |= {"num_attention_heads": 16, "hidden_size": 32, **QWEN2_MOE}
    if model_type == "qwen3_moe":
        values |= QWEN3_MOE
    if model_type == "mistral":
        values["max_position_embeddings"] = 4096
    if model_type in ("mixtral", "aquilamoe"):
        values |= {"num_local_experts": 8, "num_experts_per_tok": 2}
    config = parsed(values)
    assert (config.rope_theta, config.norm_eps) == (theta, eps)
    assert (config.num_kv_heads, config.head_dim) == (kv_heads, 128 if model_type == "qwen3" else 2)
    assert config.qkv_bias == biased
    assert config.qk_norm == ("qwen3" in model_type)
    assert config.renormalize_gates == (model_type not in ("qwen2_moe", "qwen3_moe"))
    assert config.moe_every == 1
    assert not config.tie_embeddings


@pytest.mark.parametrize(
    "said",
    [
        {"rope_theta": 500.0},
        {"rope_theta": 500, "rope_scaling": None},
        {"rope_theta": 500.0, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_theta": 500.0, "rope_parameters": {"rope_type": "default"}},
    ],
    ids=str,
)
def test_the_rotary_base_is_found_where_old_and_new_files_say_it(parsed, said):
    assert parsed(minimal("llama", **said)).rope_theta == 500.0


@pytest.mark.parametrize(
    ("said", "scaling"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 3}}, LINEAR),
        ({"rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 3.0}}, LINEAR),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3_KEYS}}, LLAMA3),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3_KEYS}}, LLAMA3),
    ],
    ids=str,
)
def test_rotary_scaling_is_found_where_old_and_new_files_say_it(parsed, said, scaling):
    for model_type in ("llama", "qwen3"):
        values = minimal(model_type, **{"rope_theta": 500.0, "num_key_value_heads": 8, **said})
        assert parsed(values).rope_scaling == scaling
        assert parsed(values).rope_theta == 500.0


def test_experts_of_qwen_are_counted_under_either_name(parsed):
    values = minimal("qwen3_moe", **QWEN3_MOE, norm_topk_prob=True, decoder_sparse_step=3)
    values["num_local_experts"] = values.pop("num_experts")
    config = parsed(values)
    assert (config.num_experts, config.experts_per_token, config.expert_mlp_dim) == (6, 2, 7)
    assert (config.mlp_dim, config.moe_every, config.renormalize_gates) == (20, 3, True)
    assert config.shared_mlp_dim == 0
    weighed = parsed(minimal("qwen2_moe", **QWEN2_MOE, num_key_value_heads=8))
    assert (weighed.shared_mlp_dim, weighed.shared_expert_gate) == (9, True)


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 32}),
        ("mixtral", {"sliding_window": 4096}),
        ("qwen3", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3}),
        ("qwen3_moe", {"sliding_window": 8, **QWEN3_MOE}),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": False}),
        ("qwen2", {"sliding_window": 8}),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3}),
    ],
)
def test_a_window_that_hides_nothing_is_accepted(parsed, model_type, said):
    values = minimal(model_type, num_key_value_heads=8, **said)
    if model_type == "mixtral":
        values |= {"num_local_experts": 8, "num_experts_per_tok": 2}
    assert parsed(values).context_length == 32


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not known; there are llama, qwen2"),
        ({"model_type": None}, "model_type"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"vocab_size": "61"}, "vocab_size must be an integer, not '61'"),
        ({"num_key_value_heads": 3}, "num_heads (4) must be a multiple of num_kv_heads (3)"),
        ({"head_dim": 5}, "head_dim (5) must be even"),
        ({"head_dim": None, "hidden_size": 13}, "13 does not divide into 4 heads"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"rms_norm_eps": "small"}, "must be numbers, not 'small'"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "'llama3' lacks low_freq_factor, high_freq_factor, original_max_position_embeddings",
        ),
        ({"rope_scaling": {"type": "linear"}}, "type 'linear' lacks factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "at least 1, not 0.5"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported yet"),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "default"},
            },
            "of different types",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "'yarn'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "differs by layer"),
        ({"rope_scaling": "linear"}, "differs by layer"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"model_type": "mistral", "sliding_window": 16}, "sliding_window 16 is shorter"),
        (
            {"model_type": "mistral", "max_position_embeddings": 8192},
            "sliding_window 4096 is shorter than max_position_embeddings 8192",
        ),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 8,
                "max_window_layers": 2,
            },
            "sliding_window 8",
        ),
        ({"model_type": "mixtral"}, "num_local_experts is missing"),
        ({"model_type": "qwen3_moe"}, "num_experts is missing"),
        ({"model_type": "qwen2_moe", **QWEN3_MOE}, "shared_expert_intermediate_size is missing"),
        (
            {"model_type": "qwen2_moe", **QWEN2_MOE, "shared_expert_intermediate_size": 0},
            "shared_expert_intermediate_size must be positive",
        ),
        (
            {"model_type": "qwen3_moe", **QWEN3_MOE, "mlp_only_layers": [0]},
            "mlp_only_layers [0] are not supported",
        ),
        (
            {"model_type": "qwen3_moe", **QWEN3_MOE, "decoder_sparse_step": 2},
            "num_layers (3) must be a multiple of moe_every (2)",
        ),
        (
            {
                "model_type": "qwen3_moe",
                **QWEN3_MOE,
                "use_sliding_window": True,
                "sliding_window": 8,
                "max_window_layers": 3,
            },
            "sliding_window 8",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_said_is_refused_with_the_file_and_the_reason(written, changes, reason):
    with pytest.raises(UserError, match=re.escape(reason)) as caught:
        written(**changes).to_model()
    assert "config.json: " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "\udcff"])
def test_a_file_that_is_no_object_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"config\.json"):
        HubConfig.read(tmp_path)


def test_no_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*config\.json: No such file"):
        HubConfig.read(tmp_path)


def test_tokens_are_those_of_the_source_or_none(tmp_path):
    assert to_hub(BIASED, "bfloat16")["bos_token_id"] is None
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 7, "eos_token_id": [8, 9]}))
    values = to_hub(BIASED, "bfloat16", tokens_of=tmp_path)
    assert (values["bos_token_id"], values["eos_token_id"]) == (7, [8, 9])
    assert values["pad_token_id"] is None
    assert values["torch_dtype"] == "bfloat16"
