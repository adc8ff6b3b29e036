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

from aquila_jax.config import ModelConfig
from aquila_jax.errors import UserError

CONFIG_FILE = "config.json"


@dataclasses.dataclass(frozen=True)
class Family:
    """What distinguishes one `model_type`.

    Attributes:
        architecture: the class that `transformers` loads it with.
        is_moe: whether its layers are mixtures of experts.
        qkv_bias: whether query, key and value have biases; None where `attention_bias` says.
        norm_eps: `rms_norm_eps` where it is absent.
        rope_theta: the same.
        num_kv_heads: the same; None for as many as query heads.
        sliding_window: the same; None for none.
    """

    architecture: str
    is_moe: bool = False
    qkv_bias: bool | None = False
    norm_eps: float = 1e-6
    rope_theta: float = 1e4
    num_kv_heads: int | None = None
    sliding_window: int | None = None


FAMILIES: Mapping[str, Family] = types.MappingProxyType(
    {
        "llama": Family("LlamaForCausalLM", qkv_bias=None),
        "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, num_kv_heads=32, sliding_window=4096),
        "mistral": Family("MistralForCausalLM", num_kv_heads=8, sliding_window=4096),
        "mixtral": Family(
            "MixtralForCausalLM", is_moe=True, norm_eps=1e-5, rope_theta=1e6, num_kv_heads=8
        ),
        "aquiladense": Family("AquilaDenseForCausalLM", qkv_bias=True),
        "aquilamoe": Family("AquilaMoeForCausalLM", is_moe=True, qkv_bias=True),
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
_EXPERT_KEYS = {"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"}
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
        keys = {**_KEYS, **(_EXPERT_KEYS if family.is_moe else {})}
        counts = {field: self._count(key) for field, key in keys.items()}
        self._refuse_sliding_window(counts["context_length"], counts["num_layers"])
        heads, width = counts["num_heads"], counts["embed_dim"]
        head_dim = self._count("head_dim", 0) or width // max(heads, 1)
        if not self.values.get("head_dim") and head_dim * heads != width:
            raise self.refusal(
                f"hidden_size {width} does not divide into {heads} heads, and no head_dim is given"
            )
        qkv_bias = self._flag("attention_bias") if family.qkv_bias is None else family.qkv_bias
        try:
            return ModelConfig.from_dict(
                {
                    **counts,
                    "head_dim": head_dim,
                    "num_kv_heads": self._count(
                        "num_key_value_heads", family.num_kv_heads or heads
                    ),
                    "rope_theta": self._rope_theta(),
                    "norm_eps": self._number(self.values.get("rms_norm_eps", family.norm_eps)),
                    "qkv_bias": qkv_bias,
                    "tie_embeddings": self._flag("tie_word_embeddings"),
                }
            )
        except UserError as error:
            raise self.refusal(str(error)) from error

    @property
    def has_output_bias(self) -> bool:
        """Whether the attention's output projection has a bias as well."""
        return self._family.qkv_bias is None and self._flag("attention_bias")

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
        return float(value)

    def _flag(self, key: str) -> bool:
        return bool(self.values.get(key, False))

    def _rope_theta(self) -> float:
        """The base of the rotary frequencies, from either place; other frequencies are refused."""
        rope: dict[str, Any] = {"rope_theta": self.values.get("rope_theta")}
        for key in ("rope_scaling", "rope_parameters"):
            said = self.values.get(key) or {}
            if not isinstance(said, dict) or any(isinstance(v, dict) for v in said.values()):
                raise self.refusal(f"{key} {said!r} differs by layer, which is not supported yet")
            kind = said.get("rope_type", said.get("type", "default"))
            if kind != "default":
                raise self.refusal(
                    f"{key} of type {kind!r} is not supported yet: rotary positions here are "
                    "those of rope_theta alone"
                )
            rope.update(said)
        part = rope.get("partial_rotary_factor", self.values.get("partial_rotary_factor"))
        if part not in (None, 1, 1.0):
            raise self.refusal(
                f"partial_rotary_factor {part} is not supported: all of a head turns"
            )
        theta = rope["rope_theta"]
        return self._number(self._family.rope_theta if theta is None else theta)

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
        if self.model_type == "qwen2" and (
            not self._flag("use_sliding_window")
            or self._count("max_window_layers", 28) >= num_layers
        ):
            return
        window = self.values.get("sliding_window", self._family.sliding_window)
        if window is not None and not (type(window) is int and window >= context):
            raise self.refusal(
                f"sliding_window {window} is shorter than max_position_embeddings {context}, and "
                "attention here sees the whole context: to read the model as one of shorter "
                "context, set max_position_embeddings to the window or less"
            )


def family_of(config: ModelConfig) -> str:
    """The smallest family for `config`: llama, qwen2, mistral, mixtral or aquilamoe."""
    if config.is_moe:
        return "aquilamoe" if config.qkv_bias else "mixtral"
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
    if model_type == "llama":
        values |= {"attention_bias": False, "mlp_bias": False}
    elif model_type == "qwen2":
        values |= {"use_sliding_window": False}
    else:
        values |= {"sliding_window": None}
    if config.is_moe:
        values |= {key: getattr(config, field) for field, key in _EXPERT_KEYS.items()}
    _refuse_if_lost(config, values)
    if tokens_of is not None and (tokens_of / CONFIG_FILE).exists():
        said = read_json(tokens_of / CONFIG_FILE)
        values |= {key: said[key] for key in _TOKEN_KEYS if key in said}
    return values


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
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); fetch or write it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(values).__name__}")
    return values
