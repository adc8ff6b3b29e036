"""The shape of a decoder: a frozen, typed, architecture-only configuration and its presets.

How to train is not here: that is arguments of functions (see `aquila_jax.training`).
"""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

import jax

from aquila_jax.errors import UserError

_COUNTS = (
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
# Counts that may be 0.
_EXPERT_COUNTS = ("num_experts", "experts_per_token", "expert_mlp_dim", "shared_mlp_dim")
# What a dense model has no use for, and must leave as it is.
_MIXTURE_SHAPE = {
    "expert_mlp_dim": 0, "shared_mlp_dim": 0, "moe_every": 1, "router_scores": "softmax",
    "router_scale": 1.0, "router_bias": False,
}  # fmt: skip

ROUTER_SCORES = ("softmax", "sigmoid")

ROPE_SCALINGS = ("linear", "llama3")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies changed so that a trained model reads longer texts.

    Attributes:
        kind: "linear" (every frequency divided by `factor`: positions lie closer, arXiv
            2306.15595) or "llama3" (low frequencies divided, high ones kept, those between
            interpolated, as Llama 3.1 does).
        factor: what frequencies are divided by; at least 1.
        low_freq_factor: of "llama3": frequencies that turn fewer times than this within
            `original_context_length` are divided.
        high_freq_factor: of "llama3": those that turn more often than this are kept.
        original_context_length: of "llama3": tokens in a text of the first training.

    Raises:
        UserError: the kind is unknown, a number is out of its range, or "linear" is given what
            only "llama3" uses.
    """

    kind: str
    factor: float
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    original_context_length: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ROPE_SCALINGS:
            raise UserError(
                f"no rope_scaling of kind {self.kind!r}; there are {', '.join(ROPE_SCALINGS)}"
            )
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UserError(f"rope_scaling's {field.name} must be a number, not {value!r}")
        if not 1 <= self.factor < float("inf"):
            raise UserError(f"rope_scaling's factor must be at least 1, not {self.factor}")
        length, low, high = (
            self.original_context_length, self.low_freq_factor, self.high_freq_factor
        )  # fmt: skip
        if self.kind == "linear" and (length or low or high):
            raise UserError("rope_scaling of kind 'linear' has no parameter but its factor")
        if self.kind == "llama3" and not (
            isinstance(length, int) and length > 0 and 0 < low < high < float("inf")
        ):
            raise UserError(
                f"rope_scaling of kind 'llama3' needs original_context_length ({length}) and "
                f"low_freq_factor ({low}) positive, and high_freq_factor ({high}) above the latter"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RopeScaling":
        """From plain values by field name.

        Raises:
            UserError: a field is unknown or missing, or a value is not valid.
        """
        try:
            return cls(**values)
        except TypeError as error:
            raise UserError(f"not a whole RopeScaling: {error}") from error


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Llama-like decoder, dense or with a mixture of experts in every n-th layer.

    RMSNorm before attention and MLP, rotary positions, grouped-query attention, SwiGLU.
    Registered as a static pytree, so that functions taking and returning it can be jitted.

    Attributes:
        vocab_size: V, rows of the embedding.
        embed_dim: D, the residual width.
        num_layers: L.
        num_heads: N, query heads.
        num_kv_heads: K, key/value heads (KV groups); divides N.
        head_dim: H, the width of one head; even, because rotary positions turn pairs.
        mlp_dim: F, the hidden width of a dense MLP.
        context_length: the longest sequence the model is meant for, in tokens.
        rope_theta: base of the rotary frequencies.
        rope_scaling: how these frequencies were changed afterwards; None is not at all.
        norm_eps: added to the mean square in every RMSNorm.
        qkv_bias: whether query, key and value projections have a bias.
        qk_norm: whether every head's query and key are normalised, with a gain, before they turn.
        tie_embeddings: whether the output head is the embedding's transpose.
        num_experts: E, experts in a layer that has them; 0 is a dense model.
        experts_per_token: k, how many experts a token visits; 0 exactly when dense.
        renormalize_gates: whether the k chosen gates are divided by their sum.
        expert_mlp_dim: the hidden width of one expert; 0 is that of a dense MLP. Read `expert_dim`.
        shared_mlp_dim: S, the hidden width of a shared expert, which every token visits and whose
            output counts with weight 1; 0 is none.
        shared_expert_gate: whether the shared expert's output counts with the sigmoid of a score
            of the token's own, rather than with weight 1.
        moe_every: n, so that layers n - 1, 2 n - 1, ... have experts and the others a dense MLP;
            divides L.
        router_scores: what gates are made of: the "softmax" of the router's logits over all
            experts, or each one's "sigmoid".
        router_scale: what gates are multiplied by in the end.
        router_bias: whether experts are chosen by score plus a bias of their own, which does not
            weigh their outputs and has no gradient: training moves it against the load (arXiv
            2408.15664).
    """

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    context_length: int = 4096
    rope_theta: float = 1e6
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    qkv_bias: bool = True
    qk_norm: bool = False
    tie_embeddings: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    renormalize_gates: bool = True
    expert_mlp_dim: int = 0
    shared_mlp_dim: int = 0
    shared_expert_gate: bool = False
    moe_every: int = 1
    router_scores: str = "softmax"
    router_scale: float = 1.0
    router_bias: bool = False

    def __post_init__(self) -> None:
        for name in (*_COUNTS, *_EXPERT_COUNTS):
            value, least = getattr(self, name), 0 if name in _EXPERT_COUNTS else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                kind = "an integer, 0 or more" if least == 0 else "a positive integer"
                raise UserError(f"ModelConfig.{name} must be {kind}, not {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads "
                f"({self.num_kv_heads}): every KV group serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim ({self.head_dim}) must be even: rotary positions turn pairs")
        if not (self.norm_eps > 0 and self.rope_theta > 0):
            raise UserError(
                f"norm_eps ({self.norm_eps}) and rope_theta ({self.rope_theta}) must be positive"
            )
        if not isinstance(self.rope_scaling, RopeScaling | None):
            raise UserError(f"rope_scaling must be a RopeScaling, not {self.rope_scaling!r}")
        k, num_experts = self.experts_per_token, self.num_experts
        if not (1 <= k <= num_experts or k == num_experts == 0):
            raise UserError(
                f"experts_per_token ({k}) must lie between 1 and num_experts ({num_experts}), "
                "or both be 0 for a dense model"
            )
        self._check_mixture_shape()

    def _check_mixture_shape(self) -> None:
        for name, unused in _MIXTURE_SHAPE.items():
            if not self.is_moe and getattr(self, name) != unused:
                raise UserError(
                    f"{name} ({getattr(self, name)}) shapes a mixture of experts, and num_experts "
                    f"is 0: set num_experts and experts_per_token, or leave {name} at {unused}"
                )
        if self.router_scores not in ROUTER_SCORES:
            raise UserError(
                f"router_scores must be one of {', '.join(ROUTER_SCORES)}, "
                f"not {self.router_scores!r}"
            )
        if not 0 < self.router_scale < float("inf"):
            raise UserError(f"router_scale must be positive, not {self.router_scale}")
        if self.shared_expert_gate and not self.shared_mlp_dim:
            raise UserError(
                "shared_expert_gate weighs a shared expert, and shared_mlp_dim is 0: set "
                "shared_mlp_dim, or shared_expert_gate to False"
            )
        if self.num_layers % self.moe_every:
            raise UserError(
                f"num_layers ({self.num_layers}) must be a multiple of moe_every "
                f"({self.moe_every}), which ends every group of so many layers with experts: "
                "change either; moe_every=1 has experts in every layer"
            )

    @property
    def is_moe(self) -> bool:
        """Whether some layers hold experts."""
        return self.num_experts > 0

    def has_experts(self, layer: int) -> bool:
        """Whether this layer, counted from 0, is one of those that hold experts."""
        return self.is_moe and (layer + 1) % self.moe_every == 0

    @property
    def expert_dim(self) -> int:
        """F of one expert: `expert_mlp_dim`, or `mlp_dim` where that is 0."""
        return self.expert_mlp_dim or self.mlp_dim

    @property
    def heads_per_group(self) -> int:
        """G, query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    def to_dict(self) -> dict[str, Any]:
        """Plain values by field name, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """The inverse of `to_dict`.

        Raises:
            UserError: a field is unknown or missing.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise UserError(f"unknown ModelConfig fields {unknown}; known are {sorted(known)}")
        scaling = values.get("rope_scaling")
        if isinstance(scaling, Mapping):
            values = {**values, "rope_scaling": RopeScaling.from_dict(scaling)}
        try:
            return cls(**values)
        except TypeError as error:
            raise UserError(f"not a whole ModelConfig: {error}") from error


_DENSE_1_8B = ModelConfig(
    vocab_size=151851,
    embed_dim=2048,
    num_layers=24,
    num_heads=32,
    num_kv_heads=32,
    head_dim=64,
    mlp_dim=5504,
    context_length=2048,
)
_DENSE_7B = ModelConfig(
    vocab_size=151851,
    embed_dim=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=14336,
)
_DENSE_16B = dataclasses.replace(
    _DENSE_7B, embed_dim=5120, num_layers=40, num_heads=40, mlp_dim=20480
)
_TOY = ModelConfig(
    vocab_size=4096,
    embed_dim=96,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    mlp_dim=256,
    context_length=256,
    rope_theta=1e4,
)
_TOY_LARGE = dataclasses.replace(_TOY, embed_dim=128, num_layers=4, num_heads=6, mlp_dim=352)


def _eight_experts(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, num_experts=8, experts_per_token=2)


PRESETS: Mapping[str, ModelConfig] = types.MappingProxyType(
    {
        # AquilaMoE (arXiv 2408.06567), Table 3; vocabulary, rotary base and norm epsilon from
        # the released configurations; 8 KV groups at 7B from its model card (the table says 32).
        "aquila3_1_8b": _DENSE_1_8B,
        "aquila3_8x1_8b": _eight_experts(_DENSE_1_8B),
        "aquila3_7b": _DENSE_7B,
        "aquila3_16b": _DENSE_16B,
        "aquila3_8x16b": _eight_experts(_DENSE_16B),
        # The same three stages for two CPU cores. 96 -> 128 wide is no whole multiple, as the
        # paper's 4096 -> 5120, and 2 -> 3 query heads a KV group stand for its 4 -> 5.
        "toy_dense": _TOY,
        "toy_large": _TOY_LARGE,
        "toy_moe": _eight_experts(_TOY_LARGE),
    }
)


def preset(name: str, **changes: Any) -> ModelConfig:
    """A named configuration, with single fields changed by keyword.

    Example:
        >>> preset("aquila3_7b").embed_dim, preset("aquila3_7b", num_layers=40).num_layers
        (4096, 40)

    Raises:
        UserError: the name is unknown, or the changed configuration is not valid.
    """
    if name not in PRESETS:
        raise UserError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    return ModelConfig.from_dict({**PRESETS[name].to_dict(), **changes})
