"""The one vocabulary: axis names, and for every parameter the axes it has, reads and writes.

Sharding, growth, initialisation and conversion are all tables keyed by these names, so a new
parameter is described once, here.

Dimension letters, used in einsums and as suffixes of array names everywhere:

====  =====================  ====  =============================================
B     batch                  F     mlp, expert_mlp (hidden units of an MLP)
T     tokens                 E     experts
D     embed (residual)       C     capacity (slots of an expert)
N     query heads            V     vocabulary
K     key/value heads        L     layers, or some: moe_layers, dense_layers
G     query heads a group    H     head dim
S     shared_mlp (as F, of the expert that every token visits)
====  ===========================================================================

Around a mixture tokens stand in one row, and there N is tokens, k the choices of each, and M rows
in the order of experts (`aquila_jax.kernels`). Attention to a cache has S for cached tokens.

The query-head axis is group-major: flat head n is head n % G of group n // G.

Parameters of layers are stacked in order of depth: over all layers, or, where only some layers
have experts, over those that have the parameter (`layers_of`).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from aquila_jax.config import ModelConfig

BATCH = "batch"
TOKENS = "tokens"
EMBED = "embed"
Q_HEADS = "q_heads"
KV_HEADS = "kv_heads"
HEAD_DIM = "head_dim"
MLP = "mlp"
EXPERT_MLP = "expert_mlp"
SHARED_MLP = "shared_mlp"
EXPERTS = "experts"
VOCAB = "vocab"
LAYERS = "layers"
MOE_LAYERS = "moe_layers"
DENSE_LAYERS = "dense_layers"

AXES = (
    BATCH, TOKENS, EMBED, Q_HEADS, KV_HEADS, HEAD_DIM, MLP, EXPERT_MLP, SHARED_MLP, EXPERTS, VOCAB,
    LAYERS, MOE_LAYERS, DENSE_LAYERS,
)  # fmt: skip

# Axes that stack layers; a parameter has at most one of them.
LAYER_AXES = (LAYERS, MOE_LAYERS, DENSE_LAYERS)

# Axes that stack equal things: neither read nor written by a matrix.
STACK_AXES = (*LAYER_AXES, EXPERTS)


def layers_of(config: ModelConfig, axis: str) -> tuple[int, ...]:
    """The layers, by depth, whose parameters lie along `axis`, one of `LAYER_AXES`."""
    layers = range(config.num_layers)
    if axis == LAYERS:
        return tuple(layers)
    return tuple(layer for layer in layers if config.has_experts(layer) == (axis == MOE_LAYERS))


_SIZES: Mapping[str, Callable[[ModelConfig], int]] = {
    EMBED: lambda config: config.embed_dim,
    Q_HEADS: lambda config: config.num_heads,
    KV_HEADS: lambda config: config.num_kv_heads,
    HEAD_DIM: lambda config: config.head_dim,
    MLP: lambda config: config.mlp_dim,
    EXPERT_MLP: lambda config: config.expert_dim,
    SHARED_MLP: lambda config: config.shared_mlp_dim,
    EXPERTS: lambda config: config.num_experts,
    VOCAB: lambda config: config.vocab_size,
    **{axis: lambda config, axis=axis: len(layers_of(config, axis)) for axis in LAYER_AXES},
}


def axis_size(config: ModelConfig, axis: str) -> int:
    """How long `axis` is in parameters of `config`."""
    return _SIZES[axis](config)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """What one parameter is made of.

    Attributes:
        axes: one axis name for every dimension.
        reads: the axes contracted with the parameter's input.
        writes: the axes of the parameter's output.
        is_gain: whether it multiplies a normalised vector channel by channel.
    """

    axes: tuple[str, ...]
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    is_gain: bool = False

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """The parameter's shape in a model of `config`."""
        return tuple(axis_size(config, axis) for axis in self.axes)

    def fan_in(self, config: ModelConfig) -> int:
        """Elements of the input that one output is a sum over; 1 for biases and gains."""
        return math.prod(axis_size(config, axis) for axis in self.reads)


def stack_axes(parameter: Parameter) -> tuple[str, ...]:
    """The leading axes that stack slices of their own; a router computes with its experts."""
    computed = (*parameter.reads, *parameter.writes)
    return tuple(axis for axis in parameter.axes if axis in STACK_AXES and axis not in computed)


def is_matrix(parameter: Parameter) -> bool:
    """Whether inputs are contracted; an embedding is looked up."""
    return bool(parameter.reads) and VOCAB not in parameter.reads


def _gain(*axes: str) -> Parameter:
    return Parameter(axes, is_gain=True)


_TRUNK = {
    "token_embedder/embedding": Parameter((VOCAB, EMBED), (VOCAB,), (EMBED,)),
    "layers/pre_attention_norm/scale": _gain(LAYERS, EMBED),
    "layers/attention/query": Parameter(
        (LAYERS, EMBED, Q_HEADS, HEAD_DIM), (EMBED,), (Q_HEADS, HEAD_DIM)
    ),
    "layers/attention/key": Parameter(
        (LAYERS, EMBED, KV_HEADS, HEAD_DIM), (EMBED,), (KV_HEADS, HEAD_DIM)
    ),
    "layers/attention/value": Parameter(
        (LAYERS, EMBED, KV_HEADS, HEAD_DIM), (EMBED,), (KV_HEADS, HEAD_DIM)
    ),
    "layers/attention/out": Parameter(
        (LAYERS, Q_HEADS, HEAD_DIM, EMBED), (Q_HEADS, HEAD_DIM), (EMBED,)
    ),
    "layers/pre_mlp_norm/scale": _gain(LAYERS, EMBED),
    "final_norm/scale": _gain(EMBED),
}
_QKV_BIAS = {
    "layers/attention/query_bias": Parameter(
        (LAYERS, Q_HEADS, HEAD_DIM), writes=(Q_HEADS, HEAD_DIM)
    ),
    "layers/attention/key_bias": Parameter(
        (LAYERS, KV_HEADS, HEAD_DIM), writes=(KV_HEADS, HEAD_DIM)
    ),
    "layers/attention/value_bias": Parameter(
        (LAYERS, KV_HEADS, HEAD_DIM), writes=(KV_HEADS, HEAD_DIM)
    ),
}
_QK_NORM = {
    "layers/attention/query_norm": _gain(LAYERS, HEAD_DIM),
    "layers/attention/key_norm": _gain(LAYERS, HEAD_DIM),
}
_DENSE_MLP = {
    "layers/mlp/gate": Parameter((LAYERS, EMBED, MLP), (EMBED,), (MLP,)),
    "layers/mlp/up": Parameter((LAYERS, EMBED, MLP), (EMBED,), (MLP,)),
    "layers/mlp/down": Parameter((LAYERS, MLP, EMBED), (MLP,), (EMBED,)),
}
_EXPERTS = {
    "layers/moe/router": Parameter((LAYERS, EMBED, EXPERTS), (EMBED,), (EXPERTS,)),
    "layers/moe/gate": Parameter((LAYERS, EXPERTS, EMBED, EXPERT_MLP), (EMBED,), (EXPERT_MLP,)),
    "layers/moe/up": Parameter((LAYERS, EXPERTS, EMBED, EXPERT_MLP), (EMBED,), (EXPERT_MLP,)),
    "layers/moe/down": Parameter((LAYERS, EXPERTS, EXPERT_MLP, EMBED), (EXPERT_MLP,), (EMBED,)),
}
_SHARED_EXPERT = {
    "layers/moe/shared_gate": Parameter((LAYERS, EMBED, SHARED_MLP), (EMBED,), (SHARED_MLP,)),
    "layers/moe/shared_up": Parameter((LAYERS, EMBED, SHARED_MLP), (EMBED,), (SHARED_MLP,)),
    "layers/moe/shared_down": Parameter((LAYERS, SHARED_MLP, EMBED), (SHARED_MLP,), (EMBED,)),
}
_ROUTER_BIAS = {"layers/moe/router_bias": Parameter((LAYERS, EXPERTS), writes=(EXPERTS,))}
_SHARED_ROUTER = {"layers/moe/shared_router": Parameter((LAYERS, EMBED), (EMBED,))}
_HEAD = {"lm_head/kernel": Parameter((EMBED, VOCAB), (EMBED,), (VOCAB,))}


def parameters(config: ModelConfig) -> dict[str, Parameter]:
    """Every parameter of a model of `config`, by its path ("layers/attention/query")."""
    return {
        **_TRUNK,
        **(_QKV_BIAS if config.qkv_bias else {}),
        **(_QK_NORM if config.qk_norm else {}),
        **_feed_forward(config),
        **({} if config.tie_embeddings else _HEAD),
    }


def _feed_forward(config: ModelConfig) -> dict[str, Parameter]:
    """Parameters of MLPs and mixtures, stacked over the layers that have them."""
    if not config.is_moe:
        return _DENSE_MLP
    mixture = {
        **_EXPERTS,
        **(_ROUTER_BIAS if config.router_bias else {}),
        **(_SHARED_EXPERT if config.shared_mlp_dim else {}),
        **(_SHARED_ROUTER if config.shared_expert_gate else {}),
    }
    if config.moe_every == 1:
        return mixture
    return {**_stacked(_DENSE_MLP, DENSE_LAYERS), **_stacked(mixture, MOE_LAYERS)}


def _stacked(group: Mapping[str, Parameter], axis: str) -> dict[str, Parameter]:
    """The same parameters, with `axis` for the layers axis, which comes first."""
    return {path: dataclasses.replace(p, axes=(axis, *p.axes[1:])) for path, p in group.items()}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested parameter tree as one dict from "a/b/c" to leaf."""
    return dict(_leaves(tree, prefix))


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def abstract_params(config: ModelConfig, dtype: DTypeLike = jnp.float32) -> dict[str, Any]:
    """Shapes and dtypes of a model's parameters, as nested `jax.ShapeDtypeStruct`s."""
    return unflatten(
        {
            path: jax.ShapeDtypeStruct(parameter.shape(config), dtype)
            for path, parameter in parameters(config).items()
        }
    )
