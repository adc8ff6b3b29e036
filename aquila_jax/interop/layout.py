"""Hugging Face's tensors of a model: their names, their shapes, and which part of ours each is.

Families name their tensors alike but for mixtures, which have two ways, so the names are a table.
The layout needs none: it follows from what `aquila_jax.axes` says a parameter reads and writes.
In memory layers and experts are stacked and inputs come first, `query [L, D, N, H]`; on disk
every layer and every expert is a tensor of its own and outputs come first, `[N * H, D]`.
"""

import dataclasses
import functools
import math
import types
from collections.abc import Iterator, Mapping

import numpy as np

from aquila_jax import axes
from aquila_jax.axes import Parameter
from aquila_jax.config import ModelConfig
from aquila_jax.errors import UserError, few
from aquila_jax.interop.families import has_qwen_mixture

_NAMES: Mapping[str, str] = {
    "token_embedder/embedding": "model.embed_tokens.weight",
    "layers/pre_attention_norm/scale": "model.layers.{layer}.input_layernorm.weight",
    "layers/attention/query": "model.layers.{layer}.self_attn.q_proj.weight",
    "layers/attention/query_bias": "model.layers.{layer}.self_attn.q_proj.bias",
    "layers/attention/key": "model.layers.{layer}.self_attn.k_proj.weight",
    "layers/attention/key_bias": "model.layers.{layer}.self_attn.k_proj.bias",
    "layers/attention/value": "model.layers.{layer}.self_attn.v_proj.weight",
    "layers/attention/value_bias": "model.layers.{layer}.self_attn.v_proj.bias",
    "layers/attention/query_norm": "model.layers.{layer}.self_attn.q_norm.weight",
    "layers/attention/key_norm": "model.layers.{layer}.self_attn.k_norm.weight",
    "layers/attention/out": "model.layers.{layer}.self_attn.o_proj.weight",
    "layers/pre_mlp_norm/scale": "model.layers.{layer}.post_attention_layernorm.weight",
    "layers/mlp/gate": "model.layers.{layer}.mlp.gate_proj.weight",
    "layers/mlp/up": "model.layers.{layer}.mlp.up_proj.weight",
    "layers/mlp/down": "model.layers.{layer}.mlp.down_proj.weight",
    "final_norm/scale": "model.norm.weight",
    "lm_head/kernel": "lm_head.weight",
}
_MIXTRAL_NAMES: Mapping[str, str] = {
    "layers/moe/router": "model.layers.{layer}.block_sparse_moe.gate.weight",
    "layers/moe/gate": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
    "layers/moe/up": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
    "layers/moe/down": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
}
_QWEN_NAMES: Mapping[str, str] = {
    "layers/moe/router": "model.layers.{layer}.mlp.gate.weight",
    "layers/moe/gate": "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
    "layers/moe/up": "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
    "layers/moe/down": "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",
    "layers/moe/shared_gate": "model.layers.{layer}.mlp.shared_expert.gate_proj.weight",
    "layers/moe/shared_up": "model.layers.{layer}.mlp.shared_expert.up_proj.weight",
    "layers/moe/shared_down": "model.layers.{layer}.mlp.shared_expert.down_proj.weight",
    "layers/moe/shared_router": "model.layers.{layer}.mlp.shared_expert_gate.weight",
}
HEAD = _NAMES["lm_head/kernel"]


@dataclasses.dataclass(frozen=True)
class Slice:
    """What is one tensor on disk: a leaf of ours, or one layer of it, or one expert of one layer.

    Attributes:
        path: the leaf, as in `axes.parameters`.
        layer: index along its layers axis, which is the depth only where all layers have the
            leaf; None where it has none.
        expert: index along its stack of experts; None where it has none.
    """

    path: str
    layer: int | None = None
    expert: int | None = None

    @property
    def index(self) -> tuple[int, ...]:
        """Where the slice lies along the leading axes of its leaf."""
        return tuple(i for i in (self.layer, self.expert) if i is not None)


@functools.lru_cache(maxsize=8)
def names(config: ModelConfig) -> Mapping[str, str]:
    """What each leaf is called on disk, with `{layer}` for the depth and `{expert}`.

    There are names for more leaves than a model has, and none for what no family has.
    """
    experts = _QWEN_NAMES if has_qwen_mixture(config) else _MIXTRAL_NAMES
    return types.MappingProxyType({**_NAMES, **(experts if config.is_moe else {})})


def slice_shape(parameter: Parameter, config: ModelConfig) -> tuple[int, ...]:
    """The shape of one slice in our layout."""
    return parameter.shape(config)[len(axes.stack_axes(parameter)) :]


def file_shape(parameter: Parameter, config: ModelConfig) -> tuple[int, ...]:
    """The shape of one slice on disk: heads joined, and outputs before inputs."""
    shape, num_inputs = slice_shape(parameter, config), len(parameter.reads)
    inputs, outputs = math.prod(shape[:num_inputs]), math.prod(shape[num_inputs:])
    if axes.is_matrix(parameter):
        return (outputs, inputs)
    return (inputs, outputs) if parameter.reads else (outputs,)


def from_file(array: np.ndarray, parameter: Parameter, config: ModelConfig) -> np.ndarray:
    """A tensor as files have it, a matrix `[outputs, inputs]`, as a view in our layout."""
    array = array.T if axes.is_matrix(parameter) else array
    return array.reshape(slice_shape(parameter, config))


def to_file(array: np.ndarray, parameter: Parameter, config: ModelConfig) -> np.ndarray:
    """The inverse of `from_file`; a view where the array's strides allow it."""
    shape = file_shape(parameter, config)
    return array.reshape(shape[::-1]).T if axes.is_matrix(parameter) else array.reshape(shape)


@functools.lru_cache(maxsize=8)
def slices(config: ModelConfig) -> Mapping[str, Slice]:
    """Every tensor of a model by its name on disk, layer after layer: the order of our files.

    Raises:
        UserError: the model has leaves that no family here has tensors for.
    """
    before: list[Slice] = []
    layered: list[str] = []
    after: list[Slice] = []
    parameters = axes.parameters(config)
    for path, parameter in parameters.items():
        if path not in names(config):
            raise UserError(f"no Hugging Face family here has tensors for {path}")
        if parameter.axes[0] in axes.LAYER_AXES:
            layered.append(path)
        else:
            (after if layered else before).append(Slice(path))
    unrolled = [
        item
        for depth in range(config.num_layers)
        for path in layered
        for item in _slices_at(config, path, parameters[path], depth)
    ]
    items = (*before, *unrolled, *after)
    return types.MappingProxyType({tensor_name(config, item): item for item in items})


def _slices_at(config: ModelConfig, path: str, parameter: Parameter, depth: int) -> Iterator[Slice]:
    """What one layer has of a leaf: nothing, one slice, or one of every expert."""
    depths = axes.layers_of(config, parameter.axes[0])
    if depth in depths:
        is_unrolled = axes.EXPERTS in axes.stack_axes(parameter)
        for expert in range(config.num_experts) if is_unrolled else [None]:
            yield Slice(path, depths.index(depth), expert)


def tensor_name(config: ModelConfig, item: Slice) -> str:
    """The slice's name on disk."""
    axis = axes.parameters(config)[item.path].axes[0]
    depth = None if item.layer is None else axes.layers_of(config, axis)[item.layer]
    return names(config)[item.path].format(layer=depth, expert=item.expert)


def checked_name(config: ModelConfig, item: Slice) -> str:
    """`tensor_name` of a slice that may not exist.

    Raises:
        ValueError: a model of `config` has no such slice.
    """
    parameter = axes.parameters(config).get(item.path)
    if parameter is None:
        raise ValueError(f"a model of {config} has no {item.path!r}")
    stacked = axes.stack_axes(parameter)
    layers = next((axis for axis in stacked if axis in axes.LAYER_AXES), axes.LAYERS)
    for axis, index in {layers: item.layer, axes.EXPERTS: item.expert}.items():
        size = axes.axis_size(config, axis) if axis in stacked else 0
        if (index is None) != (axis not in stacked) or not (index is None or 0 <= index < size):
            raise ValueError(f"{item} does not name one tensor: {item.path} has {size} {axis}")
    return tensor_name(config, item)


def check_names_and_shapes(
    where: str,
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    optional: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """The tensors found are those expected; optional ones may be there too.

    Args:
        where: what holds them, for the message.
        expected: shapes by name.
        found: the same.
        optional: the same.

    Raises:
        UserError: listing the tensors that are missing, unknown and of another shape.
    """
    allowed = {**expected, **(optional or {})}
    refuse_listed(
        f"the tensors of {where} are not those of its configuration",
        {
            "missing": sorted(set(expected) - set(found)),
            "unknown": sorted(set(found) - set(allowed)),
            "of another shape": [
                f"{name} {found[name]} for {shape}"
                for name, shape in allowed.items()
                if found.get(name, shape) != shape
            ],
        },
    )


def refuse_listed(what: str, problems: Mapping[str, list[str]]) -> None:
    """Refuse what has problems, listing the first few of every kind.

    Raises:
        UserError: there is any.
    """
    if any(problems.values()):
        listed = "; ".join(
            f"{kind}: {few([*map(printable, names)])}" for kind, names in problems.items() if names
        )
        raise UserError(f"{what}: {listed}")


def printable(name: str) -> str:
    """A name from a file, which may be anything, for a message of one line."""
    return name if name.isprintable() else repr(name)
