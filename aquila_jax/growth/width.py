"""Width operators: a scale for every axis a parameter reads or writes.

The same axis maps serve every operator; an operator is only its scales, and whether new units
look at the layer above. See the table in `docs/growth.md`.
"""

from collections.abc import Mapping

import numpy as np

from aquila_jax import axes
from aquila_jax.axes import LAYERS, VOCAB, Parameter
from aquila_jax.config import ModelConfig
from aquila_jax.growth.axis_map import AxisMap, width_maps
from aquila_jax.growth.compose import Mapped, Plan, Take, UpperLayer


def fpi_plan(source: ModelConfig, target: ModelConfig, layers: np.ndarray) -> Plan:
    """Function-preserving initialisation: copy what is written, divide what is read.

    Exact when the depth is kept and the target's width is a whole multiple of the source's:
    otherwise channels copied once more than others weigh more in RMSNorm's mean square.

    Args:
        source: configuration of the source.
        target: configuration of the target.
        layers: int `[target layers]`, the source layer of each target layer.

    References:
        Net2Net (Chen et al., arXiv 1511.05641); bert2BERT (Chen et al., arXiv 2110.07143);
        AquilaMoE (arXiv 2408.06567).
    """
    return _plan(source, target, layers, upper_layers=None)


def aki_plan(source: ModelConfig, target: ModelConfig, layers: np.ndarray) -> Plan:
    """Advanced knowledge initialisation: FPI, but new units come from the layer above.

    New query heads, MLP units and residual channels of a layer's matrices are taken from source
    layer l + 1 after the same expansion of its inputs (the last layer from itself), which breaks
    the symmetry between copies. Embedding, head and norms stay FPI. Not function preserving.

    References:
        bert2BERT (arXiv 2110.07143); AquilaMoE (arXiv 2408.06567).
    """
    upper_layers = np.minimum(layers + 1, source.num_layers - 1)
    return _plan(source, target, layers, upper_layers)


def _plan(
    source: ModelConfig,
    target: ModelConfig,
    layers: np.ndarray,
    upper_layers: np.ndarray | None,
) -> Plan:
    maps = width_maps(source, target)
    plan = {}
    for path, parameter in axes.parameters(target).items():
        # A head that was tied takes its rows from the embedding.
        untied = path == "lm_head/kernel" and source.tie_embeddings
        stacked = LAYERS in parameter.axes
        plan[path] = Mapped(
            source="token_embedder/embedding" if untied else path,
            takes=_takes(parameter, maps, fold_head=target.tie_embeddings),
            layers=layers if stacked else None,
            upper=_upper(parameter, maps, upper_layers) if stacked else None,
            transpose=untied,
        )
    return plan


def _takes(parameter: Parameter, maps: Mapping[str, AxisMap], fold_head: bool) -> tuple[Take, ...]:
    """One entry for every dimension that changes.

    With tied embeddings the head cannot be divided without dividing the embedding, so the final
    norm's gain, which only the head reads, takes the division.
    """
    is_final_norm = parameter.is_gain and LAYERS not in parameter.axes
    takes = []
    for dim, axis in enumerate(parameter.axes):
        axis_map = maps.get(axis)
        if axis_map is None or axis_map.is_identity:
            continue
        divided = axis in parameter.reads or (fold_head and is_final_norm)
        scale = 1.0 / axis_map.copies if divided and axis != VOCAB else None
        takes.append(Take(dim, axis_map.index, scale))
    return tuple(takes)


def _upper(
    parameter: Parameter, maps: Mapping[str, AxisMap], upper_layers: np.ndarray | None
) -> UpperLayer | None:
    """Where AKI looks at the layer above: on new units of the axes a parameter writes."""
    is_new = np.zeros((1,) * len(parameter.axes), dtype=bool)
    for dim, axis in enumerate(parameter.axes):
        if axis in parameter.writes and axis in maps and not maps[axis].is_identity:
            shape = [1] * len(parameter.axes)
            shape[dim] = -1
            is_new = is_new | maps[axis].is_new.reshape(shape)
    if upper_layers is None or not is_new.any():
        return None
    return UpperLayer(upper_layers, is_new)


def is_fpi_exact(source: ModelConfig, target: ModelConfig) -> bool:
    """Whether FPI keeps the function of `source`."""
    return target.num_layers == source.num_layers and target.embed_dim % source.embed_dim == 0


def is_same_shape(source: ModelConfig, target: ModelConfig) -> bool:
    """Whether nothing grows, so that every operator is a copy."""
    return target.num_layers == source.num_layers and all(
        axis_map.is_identity for axis_map in width_maps(source, target).values()
    )
