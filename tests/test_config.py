import dataclasses
import json
import re

import pytest

from aquila_jax import PRESETS, ModelConfig, RopeScaling, UserError, preset

MIXTURE = {"num_experts": 4, "experts_per_token": 2}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        *(
            ({field: value}, [field, repr(value)])
            for field in (
                "vocab_size",
                "embed_dim",
                "num_layers",
                "num_heads",
                "num_kv_heads",
                "head_dim",
                "mlp_dim",
                "context_length",
                "moe_every",
            )
            for value in (0, -1, 2.0, True, "4")
        ),
        ({"num_heads": 5}, ["num_heads (5)", "num_kv_heads (2)"]),
        ({"head_dim": 7}, ["head_dim (7)", "even"]),
        ({"norm_eps": 0.0}, ["norm_eps (0.0)", "positive"]),
        ({"norm_eps": float("nan")}, ["norm_eps (nan)", "positive"]),
        ({"rope_theta": -1.0}, ["rope_theta (-1.0)", "positive"]),
        ({"num_experts": 4}, ["experts_per_token (0)", "num_experts (4)"]),
        ({"experts_per_token": 2}, ["experts_per_token (2)", "num_experts (0)"]),
        (
            {"num_experts": 4, "experts_per_token": 5},
            ["experts_per_token (5)", "num_experts (4)"],
        ),
        ({"num_experts": 4.0, "experts_per_token": 2}, ["num_experts", "4.0"]),
        ({"num_experts": -1, "experts_per_token": -1}, ["num_experts", "-1"]),
        *(
            ({**MIXTURE, field: value}, [field, repr(value), "0 or more"])
            for field in ("expert_mlp_dim", "shared_mlp_dim")
            for value in (-1, 2.0, True, "4")
        ),
        *(
            ({field: 3}, [f"{field} (3)", "num_experts is 0", f"leave {field} at {default}"])
            for field, default in (("expert_mlp_dim", 0), ("shared_mlp_dim", 0), ("moe_every", 1))
        ),
        (
            {**MIXTURE, "moe_every": 2},
            ["num_layers (3)", "multiple of moe_every (2)", "moe_every=1"],
        ),
        ({**MIXTURE, "moe_every": 6}, ["num_layers (3)", "moe_every (6)"]),
        ({**MIXTURE, "shared_expert_gate": True}, ["shared_expert_gate", "shared_mlp_dim is 0"]),
        ({"rope_scaling": "linear"}, ["RopeScaling", "'linear'"]),
    ],
    ids=str,
)
def test_a_broken_invariant_names_its_values(tiny, changes, named):
    with pytest.raises(UserError) as error:
        dataclasses.replace(tiny, **changes)
    for words in named:
        assert words in str(error.value)


# AquilaMoE (arXiv 2408.06567), Table 3: context, layers, hidden, FFN, heads, KV groups.
PAPER = {
    "aquila3_1_8b": (2048, 24, 2048, 5504, 32, 32),
    "aquila3_8x1_8b": (2048, 24, 2048, 5504, 32, 32),
    "aquila3_7b": (4096, 32, 4096, 14336, 32, 8),
    "aquila3_16b": (4096, 40, 5120, 20480, 40, 8),
    "aquila3_8x16b": (4096, 40, 5120, 20480, 40, 8),
}


@pytest.mark.parametrize("name", PAPER)
def test_presets_are_the_papers(name):
    config = preset(name)
    sizes = (
        config.context_length,
        config.num_layers,
        config.embed_dim,
        config.mlp_dim,
        config.num_heads,
        config.num_kv_heads,
    )
    assert sizes == PAPER[name]
    assert config.vocab_size == 151851
    assert config.num_heads * config.head_dim == config.embed_dim
    assert (config.rope_theta, config.norm_eps) == (1e6, 1e-5)
    assert config.qkv_bias
    assert not config.tie_embeddings
    experts = (8, 2) if "8x" in name else (0, 0)
    assert (config.num_experts, config.experts_per_token) == experts
    assert config.is_moe == ("8x" in name)
    assert config.renormalize_gates


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_survives_json(name):
    config = preset(name)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize("scaling", [LLAMA3, RopeScaling("linear", 2.0)], ids=str)
def test_rotary_scaling_survives_json_and_tells_configurations_apart(tiny, scaling):
    config = dataclasses.replace(tiny, rope_scaling=scaling)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config != tiny
    assert len({config, tiny, dataclasses.replace(config)}) == 2
    assert preset("toy_dense", rope_scaling=scaling).rope_scaling == scaling
    assert preset("toy_dense", rope_scaling=dataclasses.asdict(scaling)).rope_scaling == scaling


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"kind": "yarn", "factor": 2.0}, "no rope_scaling of kind 'yarn'; there are linear"),
        ({"kind": "linear", "factor": 0.5}, "at least 1, not 0.5"),
        ({"kind": "linear", "factor": float("nan")}, "at least 1, not nan"),
        ({"kind": "linear", "factor": "2"}, "factor must be a number, not '2'"),
        ({"kind": "linear", "factor": True}, "factor must be a number, not True"),
        ({"kind": "linear", "factor": 2.0, "low_freq_factor": 1.0}, "no parameter but its factor"),
        ({"kind": "llama3", "factor": 8.0}, "needs original_context_length (0)"),
        ({**dataclasses.asdict(LLAMA3), "high_freq_factor": 1.0}, "high_freq_factor (1.0) above"),
        ({**dataclasses.asdict(LLAMA3), "original_context_length": 0.5}, "length (0.5)"),
        ({"kind": "linear"}, "not a whole RopeScaling: "),
        ({"kind": "linear", "factor": 2.0, "beta": 1}, "beta"),
    ],
    ids=str,
)
def test_rotary_scaling_that_means_nothing_is_refused(tiny, values, named):
    with pytest.raises(UserError, match=re.escape(named)) as caught:
        ModelConfig.from_dict({**tiny.to_dict(), "rope_scaling": values})
    assert "\n" not in str(caught.value)


def test_there_are_few_fields():
    assert len(dataclasses.fields(ModelConfig)) <= 25


def test_every_field_survives_a_dict(tiny):
    mixture = dataclasses.replace(tiny, **MIXTURE, expert_mlp_dim=7, shared_mlp_dim=9)
    changed = {
        name: not value if isinstance(value, bool) else value and value * 2
        for name, value in mixture.to_dict().items()
    }
    changed |= {"rope_scaling": dataclasses.asdict(LLAMA3), "router_scores": "sigmoid"}
    assert all(changed[name] != value for name, value in mixture.to_dict().items())
    assert ModelConfig.from_dict(changed).to_dict() == changed


def test_an_expert_is_as_wide_as_a_dense_mlp_unless_said_otherwise(tiny):
    mixture = dataclasses.replace(tiny, **MIXTURE)
    assert mixture.expert_dim == mixture.mlp_dim
    assert dataclasses.replace(mixture, expert_mlp_dim=7).expert_dim == 7
    assert dataclasses.replace(mixture, expert_mlp_dim=7).mlp_dim == tiny.mlp_dim


@pytest.mark.parametrize("every", [1, 2, 3, 6])
def test_the_last_layer_of_every_group_has_experts(tiny, every):
    config = dataclasses.replace(tiny, **MIXTURE, num_layers=6, moe_every=every)
    having = [layer for layer in range(6) if config.has_experts(layer)]
    assert having == list(range(every - 1, 6, every))
    assert not any(dataclasses.replace(tiny, num_layers=6).has_experts(i) for i in range(6))


def test_a_config_saved_before_these_shapes_is_read_as_it_was(tiny):
    values = dataclasses.replace(tiny, **MIXTURE).to_dict()
    later = ("expert_mlp_dim", "shared_mlp_dim", "moe_every", "qk_norm", "rope_scaling")
    for name in (*later, "shared_expert_gate"):
        del values[name]
    assert ModelConfig.from_dict(values) == dataclasses.replace(tiny, **MIXTURE)


def test_unknown_and_missing_fields_are_named(tiny):
    with pytest.raises(UserError, match=r"hidden_size.*known are.*embed_dim"):
        ModelConfig.from_dict({**tiny.to_dict(), "hidden_size": 3})
    values = tiny.to_dict()
    del values["embed_dim"]
    with pytest.raises(UserError, match="embed_dim"):
        ModelConfig.from_dict(values)


def test_a_preset_takes_changes_and_an_unknown_one_is_listed():
    changed = preset("aquila3_7b", num_layers=3)
    assert changed == dataclasses.replace(PRESETS["aquila3_7b"], num_layers=3)
    with pytest.raises(UserError, match=r"aquila9.*aquila3_7b"):
        preset("aquila9")
    with pytest.raises(UserError, match="layers_count"):
        preset("aquila3_7b", layers_count=3)
