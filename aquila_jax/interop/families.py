"""Hugging Face's `config.json` and our configuration, family by family.

A family says which keys differ from the others' and what an absent key means. Whatever a
`config.json` asks for that a `ModelConfig` cannot say is refused with the reason.

`aquilamoe` and `aquiladense` are the names of the paper's release (arXiv 2408.06567). Its code is
not at hand: the tensors are taken to be named as Qwen2's attention (with biases of query, key and
value) and as Mixtral's experts, the configuration as theirs.
"""

import dataclasses
import json
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from aquila_jax.config import ROPE_SCALINGS, ModelConfig, RopeScaling
from aquila_jax.errors import UserError

CONFIG_FILE = "config.json"


@dataclasses.dataclass(frozen=True)
class Family:
    """What distinguishes one `model_type`.

    Attributes:
        architecture: the class that `transformers` loads it with.
        experts: the keys of its mixture by our fields; empty where it has none.
        qkv_bias: whether query, key and value have biases, where no key says so.
        bias_key: the key that says so; None where there is none.
        qk_norm: whether heads' queries and keys are normalised.
        norm_eps: `rms_norm_eps` where it is absent.
        rope_theta: the same.
        num_kv_heads: the same; None for as many as query heads.
        head_dim: the same; None for the width over the heads.
        sliding_window: the same; None for none.
        windowed: what turns the window on: "always", "flag" (`use_sliding_window`), or "depth"
            (that, in layers from `max_window_layers` on).
    """

    architecture: str
    experts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    qkv_bias: bool = False
    bias_key: str | None = None
    qk_norm: bool = False
    norm_eps: float = 1e-6
    rope_theta: float = 1e4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    sliding_window: int | None = None
    windowed: str = "always"


_MIXTRAL_KEYS = types.MappingProxyType(
    {"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"}
)
_QWEN3_KEYS = types.MappingProxyType(
    {
        "num_experts": "num_experts",
        "experts_per_token": "num_experts_per_tok",
        "expert_mlp_dim": "moe_intermediate_size",
        "moe_every": "decoder_sparse_step",
        "renormalize_gates": "norm_topk_prob",
    }
)
_QWEN2_KEYS = types.MappingProxyType(
    {**_QWEN3_KEYS, "shared_mlp_dim": "shared_expert_intermediate_size"}
)


FAMILIES: Mapping[str, Family] = types.MappingProxyType(
    {
        "llama": Family("LlamaForCausalLM", bias_key="attention_bias"),
        "qwen2": Family(
            "Qwen2ForCausalLM",
            qkv_bias=True,
            num_kv_heads=32,
            sliding_window=4096,
            windowed="depth",
        ),
        "qwen3": Family(
            "Qwen3ForCausalLM",
            bias_key="attention_bias",
            qk_norm=True,
            num_kv_heads=32,
            head_dim=128,
            sliding_window=4096,
            windowed="depth",
        ),
        "mistral": Family("MistralForCausalLM", num_kv_heads=8, sliding_window=4096),
        "mixtral": Family(
            "MixtralForCausalLM", _MIXTRAL_KEYS, norm_eps=1e-5, rope_theta=1e6, num_kv_heads=8
        ),
        "qwen2_moe": Family(
            "Qwen2MoeForCausalLM",
            _QWEN2_KEYS,
            qkv_bias=True,
            bias_key="qkv_bias",
            num_kv_heads=16,
            sliding_window=4096,
            windowed="flag",
        ),
        "qwen3_moe": Family(
            "Qwen3MoeForCausalLM",
            _QWEN3_KEYS,
            bias_key="attention_bias",
            qk_norm=True,
            num_kv_heads=4,
            sliding_window=4096,
            windowed="flag",
        ),
        "aquiladense": Family("AquilaDenseForCausalLM", qkv_bias=True),
        "aquilamoe": Family("AquilaMoeForCausalLM", _MIXTRAL_KEYS, qkv_bias=True),
    }
)

# The keys that every family has, and that have no default worth trusting.
_KEYS = {
    "vocab_size": "vocab_size",
    "embed_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "context_length": "max_position_embeddings",
}
# The keys of a scaling of rotary frequencies, by our fields.
_ROPE_KEYS: Mapping[str, Mapping[str, str]] = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_context_length": "original_max_position_embeddings",
    },
}
_TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


class HubConfig:
    """What a `config.json` says.

    Attributes:
        where: the file, for messages.
        values: its keys.
        model_type: its family's name in `FAMILIES`.

    Raises:
        UserError: it names no family known here.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.where = where
        self.values = values
        self.model_type = str(values.get("model_type"))
        if self.model_type not in FAMILIES:
            raise self.refusal(
                f"model_type {self.model_type!r} is not known; there are {', '.join(FAMILIES)}"
            )
        self._family = FAMILIES[self.model_type]

    @classmethod
    def read(cls, directory: Path) -> Self:
        """That of a directory.

        Raises:
            UserError: the file is absent, is no JSON object, or names no family known here.
        """
        path = directory / CONFIG_FILE
        return cls(read_json(path), str(path))

    def refusal(self, reason: str) -> UserError:
        """An error that names the file."""
        return UserError(f"{self.where}: {reason}")

    def to_model(self) -> ModelConfig:
        """The architecture.

        Raises:
            UserError: a key is absent or no number, or asks for what a `ModelConfig` cannot say.
        """
        self._refuse_what_we_lack()
        family = self._family
        counts = {field: self._count(key) for field, key in _KEYS.items()}
        self._refuse_sliding_window(counts["context_length"], counts["num_layers"])
        heads, width = counts["num_heads"], counts["embed_dim"]
        said = self._count("head_dim", family.head_dim or 0)
        head_dim = said or width // max(heads, 1)
        if not said and head_dim * heads != width:
            raise self.refusal(
                f"hidden_size {width} does not divide into {heads} heads, and no head_dim is given"
            )
        mixture, rope = self._mixture(counts["mlp_dim"]), self._rope()
        try:
            return ModelConfig.from_dict(
                {
                    **counts,
                    **mixture,
                    **rope,
                    "head_dim": head_dim,
                    "num_kv_heads": self._count(
                        "num_key_value_heads", family.num_kv_heads or heads
                    ),
                    "norm_eps": self._number(self.values.get("rms_norm_eps", family.norm_eps)),
                    "qkv_bias": self._has_biases(),
                    "qk_norm": family.qk_norm,
                    "tie_embeddings": self._flag("tie_word_embeddings"),
                }
            )
        except UserError as error:
            raise self.refusal(str(error)) from error

    @property
    def has_output_bias(self) -> bool:
        """Whether the attention's output projection has a bias as well."""
        return self._family.bias_key == "attention_bias" and self._has_biases()

    def _has_biases(self) -> bool:
        key, default = self._family.bias_key, self._family.qkv_bias
        return default if key is None else self._flag(key, default)

    def _mixture(self, mlp_dim: int) -> dict[str, Any]:
        """The fields of the mixture, where the family has one."""
        keys = dict(self._family.experts)
        if "renormalize_gates" not in keys:
            return {field: self._count(key) for field, key in keys.items()}
        if layers := self.values.get("mlp_only_layers"):
            raise self.refusal(
                f"mlp_only_layers {layers} are not supported: here every decoder_sparse_step-th "
                "layer has experts"
            )
        # What transformers 5 writes of qwen3_moe.
        if "num_experts" not in self.values and "num_local_experts" in self.values:
            keys["num_experts"] = "num_local_experts"
        renormalize_gates = self._flag(keys.pop("renormalize_gates"))
        moe_every = self._count(keys.pop("moe_every"), 1)
        fields = {field: self._count(key) for field, key in keys.items()}
        for field in ("expert_mlp_dim", "shared_mlp_dim"):
            # To a ModelConfig 0 is something else: as wide as a dense MLP, or not there.
            if fields.get(field) == 0:
                raise self.refusal(f"{keys[field]} must be positive")
        if fields["expert_mlp_dim"] == mlp_dim:
            fields["expert_mlp_dim"] = 0
        return {
            **fields,
            "moe_every": moe_every,
            "renormalize_gates": renormalize_gates,
            "shared_expert_gate": "shared_mlp_dim" in fields,
        }

    def _count(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise self.refusal(f"{key} is missing")
        if type(value) is not int:
            raise self.refusal(f"{key} must be an integer, not {value!r}")
        return value

    def _number(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refusal(f"rms_norm_eps and rope_theta must be numbers, not {value!r}")
        try:
            return float(value)
        except OverflowError as error:
            raise self.refusal("rms_norm_eps or rope_theta is too large") from error

    def _flag(self, key: str, default: bool = False) -> bool:
        return bool(self.values.get(key, default))

    def _rope(self) -> dict[str, Any]:
        """The base of the rotary frequencies and their scaling, from either place."""
        rope: dict[str, Any] = {"rope_theta": self.values.get("rope_theta")}
        kinds = {}
        for key in ("rope_scaling", "rope_parameters"):
            said = self.values.get(key) or {}
            if not isinstance(said, dict) or any(isinstance(v, dict) for v in said.values()):
                raise self.refusal(f"{key} {said!r} differs by layer, which is not supported yet")
            if said:
                kinds[key] = str(said.get("rope_type", said.get("type", "default")))
            rope.update(said)
        part = rope.get("partial_rotary_factor", self.values.get("partial_rotary_factor"))
        if part not in (None, 1, 1.0):
            raise self.refusal(
                f"partial_rotary_factor {part} is not supported: all of a head turns"
            )
        for key, kind in kinds.items():
            if kind not in ("default", *ROPE_SCALINGS):
                raise self.refusal(
                    f"{key} of type {kind!r} is not supported yet; there are default, "
                    f"{', '.join(ROPE_SCALINGS)}"
                )
        if len(set(kinds.values())) > 1:
            raise self.refusal("rope_scaling and rope_parameters are of different types")
        theta = rope["rope_theta"]
        return {
            "rope_theta": self._number(self._family.rope_theta if theta is None else theta),
            "rope_scaling": self._rope_scaling(next(iter(kinds.values()), "default"), rope),
        }

    def _rope_scaling(self, kind: str, rope: Mapping[str, Any]) -> RopeScaling | None:
        if kind == "default":
            return None
        fields = {field: rope.get(key) for field, key in _ROPE_KEYS[kind].items()}
        if missing := [_ROPE_KEYS[kind][field] for field, v in fields.items() if v is None]:
            raise self.refusal(f"rope_scaling of type {kind!r} lacks {', '.join(missing)}")
        try:
            return RopeScaling.from_dict({"kind": kind, **fields})
        except UserError as error:
            raise self.refusal(str(error)) from error

    def _refuse_what_we_lack(self) -> None:
        activation = self.values.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise self.refusal(
                f"hidden_act {activation!r} is not supported: the MLP here is SwiGLU"
            )
        if self._flag("mlp_bias"):
            raise self.refusal("mlp_bias is not supported: MLPs here have no biases")
        if self.values.get("quantization_config"):
            raise self.refusal("the weights are quantized; save them in bfloat16 first")

    def _refuse_sliding_window(self, context: int, num_layers: int) -> None:
        """A window no shorter than the context hides nothing."""
        windowed = self._family.windowed
        if windowed != "always" and not self._flag("use_sliding_window"):
            return
        if windowed == "depth" and self._count("max_window_layers", 28) >= num_layers:
            return
        window = self.values.get("sliding_window", self._family.sliding_window)
        if window is not None and not (type(window) is int and window >= context):
            raise self.refusal(
                f"sliding_window {window} is shorter than max_position_embeddings {context}, and "
                "attention here sees the whole context: to read the model as one of shorter "
                "context, set max_position_embeddings to the window or less"
            )


def has_qwen_mixture(config: ModelConfig) -> bool:
    """Whether the mixture is one of those that only qwen2_moe and qwen3_moe have."""
    return config.is_moe and (config.qk_norm or config.shared_expert_gate)


def family_of(config: ModelConfig) -> str:
    """The smallest family for `config`.

    Llama, qwen2, qwen3 or mistral; of mixtures qwen3_moe with norms of heads, qwen2_moe with a
    weighed shared expert, else mixtral or aquilamoe.
    """
    if has_qwen_mixture(config):
        return "qwen3_moe" if config.qk_norm else "qwen2_moe"
    if config.is_moe:
        return "aquilamoe" if config.qkv_bias else "mixtral"
    if config.qk_norm:
        return "qwen3"
    if config.qkv_bias:
        return "qwen2"
    # Llama insists that its heads divide its width, even where it is told the head's own width.
    return "mistral" if config.embed_dim % config.num_heads else "llama"


def to_hub(config: ModelConfig, dtype: str, tokens_of: Path | None = None) -> dict[str, Any]:
    """The `config.json` of `config`, as `transformers` reads it.

    Args:
        config: the architecture.
        dtype: of the tensors, as "bfloat16".
        tokens_of: a directory whose `config.json` says which tokens begin, end and pad a text.

    Raises:
        UserError: no family can say `config`, or `tokens_of` has an unreadable `config.json`.
    """
    model_type = family_of(config)
    values: dict[str, Any] = {
        "architectures": [FAMILIES[model_type].architecture],
        "model_type": model_type,
        **{key: getattr(as_read(config), field) for field, key in _KEYS.items()},
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": dtype,
        # Absent, they would be Llama's own tokens.
        **dict.fromkeys(_TOKEN_KEYS),
    }
    family = FAMILIES[model_type]
    if family.bias_key == "attention_bias":
        # It would stand for a bias of the output as well.
        values |= {"attention_bias": False}
    elif family.bias_key is not None:
        values |= {family.bias_key: config.qkv_bias}
    if model_type == "llama":
        values |= {"mlp_bias": False}
    elif family.windowed == "always":
        values |= {"sliding_window": None}
    else:
        values |= {"use_sliding_window": False}
    values |= {key: getattr(config, field) for field, key in family.experts.items()}
    if "expert_mlp_dim" in family.experts:
        values |= {family.experts["expert_mlp_dim"]: config.expert_dim, "mlp_only_layers": []}
    if config.rope_scaling is not None:
        values |= {"rope_scaling": _rope_scaling_of(config.rope_scaling)}
    _refuse_if_lost(config, values)
    if tokens_of is not None and (tokens_of / CONFIG_FILE).exists():
        said = read_json(tokens_of / CONFIG_FILE)
        values |= {key: said[key] for key in _TOKEN_KEYS if key in said}
    return values


def _rope_scaling_of(scaling: RopeScaling) -> dict[str, Any]:
    said = {key: getattr(scaling, field) for field, key in _ROPE_KEYS[scaling.kind].items()}
    return {"rope_type": scaling.kind, **said}


def _refuse_if_lost(config: ModelConfig, values: Mapping[str, Any]) -> None:
    """Whoever reads these values back must find all of `config` in them."""
    wanted, read = as_read(config).to_dict(), HubConfig(values, CONFIG_FILE).to_model().to_dict()
    lost = [
        f"{field}={value!r} (but {read[field]!r})"
        for field, value in wanted.items()
        if value != read[field]
    ]
    if lost:
        raise UserError(
            f"no Hugging Face family here, {values['model_type']} being the nearest, can say "
            f"{', '.join(lost)}; train on with what it can say before exporting"
        )


def as_read(config: ModelConfig) -> ModelConfig:
    """The same architecture in the words in which it comes back from a `config.json`."""
    if not config.is_moe:
        # A dense model has no gates.
        return dataclasses.replace(config, renormalize_gates=True)
    if has_qwen_mixture(config):
        expert_mlp_dim = 0 if config.expert_dim == config.mlp_dim else config.expert_dim
        return dataclasses.replace(config, expert_mlp_dim=expert_mlp_dim)
    if config.moe_every == 1:
        # Where every layer has experts, their width is the only one.
        return dataclasses.replace(config, mlp_dim=config.expert_dim, expert_mlp_dim=0)
    return config


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: there is none.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); fetch or write it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(values).__name__}")
    return values
