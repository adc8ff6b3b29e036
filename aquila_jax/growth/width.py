"""Width operators: along every axis, what a copy is multiplied by when written and when read.

The same axis maps serve every operator. Unit j of the target copies unit g[j] of the source, is
written times s[j] and read times r[j]. The function is kept when

    the copies of every unit have s r in sum 1                      (hidden units, heads)
    and the copies of every residual channel have s^2 in sum D'/D   (RMSNorm's mean is kept),

or when s is 0, or r is 0, for a copy that does not count. Norm gains and epsilon stay as they
are. See the derivation in `docs/growth.md`.
"""

import dataclasses
import types
import zlib
from collections.abc import Callable, Mapping

import numpy as np

from aquila_jax import axes
from aquila_jax.axes import EMBED, VOCAB, Parameter
from aquila_jax.config import ModelConfig
from aquila_jax.errors import UserError
from aquila_jax.growth.axis_map import AxisMap, width_maps
from aquila_jax.growth.depth import Depth
from aquila_jax.growth.rules import Extend, Mapped, Noise, Take, UpperLayer


@dataclasses.dataclass(frozen=True, eq=False)
class Scales:
    """What the copies along one axis are multiplied by.

    Attributes:
        write: s, float64 `[target]`.
        read: r, float64 `[target]`.
        is_split: whether copies share the reading, so that it may be split unevenly.
    """

    write: np.ndarray
    read: np.ndarray
    is_split: bool = True


def copied(axis_map: AxisMap) -> Scales:
    """Net2Net: written as they are, read in equal parts."""
    return Scales(np.ones(len(axis_map.index)), 1.0 / axis_map.copies)


def isometric(axis_map: AxisMap) -> Scales:
    """Copies written so that the mean square over channels is kept at any ratio."""
    write = np.sqrt(axis_map.growth / axis_map.copies)
    return Scales(write, 1.0 / (axis_map.copies * write))


def padded(axis_map: AxisMap) -> Scales:
    """New channels start at zero, and are read as if they were copies."""
    scale = np.sqrt(axis_map.growth)
    write = np.where(axis_map.is_new, 0.0, scale)
    return Scales(write, np.full(len(axis_map.index), 1.0 / scale), is_split=False)


def unread(axis_map: AxisMap) -> Scales:
    """New units are written in full, and read by zeros."""
    return Scales(np.ones(len(axis_map.index)), np.where(axis_map.is_new, 0.0, 1.0), is_split=False)


@dataclasses.dataclass(frozen=True)
class Operator:
    """A width operator.

    Attributes:
        residual: scales of the residual channels.
        hidden: scales of query heads, KV groups and MLP units.
        uses_upper: whether new units hold what the layer above has for them.
        depth: the depth operator that it is used with unless another is named.
    """

    residual: Callable[[AxisMap], Scales]
    hidden: Callable[[AxisMap], Scales]
    uses_upper: bool
    depth: str

    def keeps_width(self, source: ModelConfig, target: ModelConfig) -> bool:
        """Whether the function survives the width of `target`, depth aside."""
        maps = width_maps(source, target)
        if all(axis_map.is_identity for axis_map in maps.values()):
            return True
        hidden_is_exact = not self.uses_upper or self.hidden is unread
        whole = target.embed_dim % source.embed_dim == 0
        return hidden_is_exact and (whole or self.residual is not copied)


OPERATORS: Mapping[str, Operator] = types.MappingProxyType(
    {
        # Net2Net (arXiv 1511.05641), bert2BERT (arXiv 2110.07143), AquilaMoE (arXiv 2408.06567).
        "fpi": Operator(copied, copied, uses_upper=False, depth="interpolation"),
        # LEMON (arXiv 2310.07999) for RMSNorm: exact at any ratio.
        "isometric": Operator(isometric, copied, uses_upper=False, depth="identity"),
        "zero_pad": Operator(padded, unread, uses_upper=False, depth="identity"),
        "aki": Operator(copied, copied, uses_upper=True, depth="stacking"),
        "aki_pro": Operator(copied, copied, uses_upper=True, depth="interpolation"),
        # Ours: AKI's knowledge on the way in, nothing on the way out until training reads it.
        "latent": Operator(padded, unread, uses_upper=True, depth="identity"),
    }
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What may be chosen beside the operator.

    Attributes:
        uneven: whether reading is split into random parts, which tells copies apart (LEMON).
        noise: standard deviation of noise on new units, in units of a fresh matrix's.
        new_head: what the head gives new tokens: "mean" of the others' or "zero".
        seed: of the random parts.
    """

    uneven: bool = False
    noise: float = 0.0
    new_head: str = "mean"
    seed: int = 0


def width_plan(
    operator: Operator, source: ModelConfig, target: ModelConfig, depth: Depth, options: Options
) -> dict[str, Mapped]:
    """The rule of every leaf of `target`."""
    maps = width_maps(source, target)
    scales = {
        axis: (operator.residual if axis == EMBED else operator.hidden)(axis_map)
        for axis, axis_map in maps.items()
    }
    if options.uneven:
        scales = {axis: _unevenly(scales[axis], maps[axis], axis, options.seed) for axis in maps}
    plan = {}
    for path, parameter in axes.parameters(target).items():
        # A head that was tied takes its rows from the embedding.
        untied = path == "lm_head/kernel" and source.tie_embeddings
        stack = _stack(parameter, source, target, depth)
        layers, silent = stack if stack is not None else (None, None)
        above = _above(parameter, source, layers) if operator.uses_upper else None
        plan[path] = Mapped(
            source="token_embedder/embedding" if untied else path,
            transpose=untied,
            extend=_new_tokens(parameter, source, target, options),
            layers=layers,
            takes=_takes(parameter, maps, scales, operator.uses_upper, target.tie_embeddings),
            upper=_upper(parameter, maps, above),
            silent=silent if EMBED in parameter.writes and depth.silent.any() else None,
            noise=_noise(parameter, maps, target, options),
        )
    return plan


def _stack(
    parameter: Parameter, source: ModelConfig, target: ModelConfig, depth: Depth
) -> Depth | None:
    """Where in the source's stack a leaf's layers are; None for a leaf without layers.

    Raises:
        UserError: experts would have to come from a dense layer, or the other way round.
    """
    axis = parameter.axes[0]
    if axis not in axes.LAYER_AXES:
        return None
    theirs = {layer: place for place, layer in enumerate(axes.layers_of(source, axis))}
    mine = np.array(axes.layers_of(target, axis))
    taken = depth.layers[mine]
    if not set(taken.tolist()) <= set(theirs):
        raise UserError(
            f"with experts in every {source.moe_every} layers this depth would make them from "
            "dense layers: use stacking, which keeps the order of the two"
        )
    return Depth(np.array([theirs[layer] for layer in taken.tolist()]), depth.silent[mine])


def _above(
    parameter: Parameter, source: ModelConfig, layers: np.ndarray | None
) -> np.ndarray | None:
    """The next layer of the source that has this parameter; the last one's is its own."""
    if layers is None:
        return None
    return np.minimum(layers + 1, len(axes.layers_of(source, parameter.axes[0])) - 1)


def _takes(
    parameter: Parameter,
    maps: Mapping[str, AxisMap],
    scales: Mapping[str, Scales],
    uses_upper: bool,
    fold_head: bool,
) -> tuple[Take, ...]:
    """One entry for every dimension that changes.

    With tied embeddings the head reads what the embedding writes, so the final norm's gain,
    which only the head reads, takes what is left: r / s.

    A gradient is what comes in times what comes back: the units that a matrix reads hold s times
    the source's values, and those it writes receive r times the source's gradients. Copies that
    start at zero, or hold another layer's values, receive what the source cannot tell.
    """
    is_final_norm = parameter.is_gain and parameter.axes[0] not in axes.LAYER_AXES
    takes = []
    for dim, axis in enumerate(parameter.axes):
        axis_map = maps.get(axis)
        if axis_map is None or axis_map.is_identity:
            continue
        write, read = scales[axis].write, scales[axis].read
        is_told = ~axis_map.is_new if uses_upper and axis != EMBED else np.ones(len(write), bool)
        if axis in parameter.reads:
            scale, gradient = read, np.where(is_told, write, 0)
        elif axis in parameter.writes:
            scale, gradient = write, np.where(write > 0, read, 0)
        elif parameter.is_gain and is_final_norm and fold_head:
            scale, gradient = np.divide(read, write, out=read.copy(), where=write > 0), write**2
        elif parameter.is_gain:
            scale, gradient = np.ones(len(write)), write * read
        else:
            scale = gradient = np.ones(len(write))
        takes.append(Take(dim, axis_map.index, _unless_one(scale), _unless_one(gradient)))
    return tuple(takes)


def _unless_one(factors: np.ndarray) -> np.ndarray | None:
    return None if (factors == 1).all() else factors


def _unevenly(scales: Scales, axis_map: AxisMap, axis: str, seed: int) -> Scales:
    """The same scales with reading split into random positive parts."""
    if not scales.is_split:
        return scales
    rng = np.random.default_rng((seed, zlib.crc32(axis.encode())))
    parts = rng.uniform(0.5, 1.5, len(axis_map.index))
    shares = parts / np.bincount(axis_map.index, parts)[axis_map.index]
    return Scales(scales.write, shares / scales.write)


def _upper(
    parameter: Parameter, maps: Mapping[str, AxisMap], above: np.ndarray | None
) -> UpperLayer | None:
    """Where AKI looks at the layer above: on new units of the axes a parameter writes."""
    is_new = _is_new(parameter, parameter.writes, maps)
    return None if above is None or not is_new.any() else UpperLayer(above, is_new)


def _is_new(
    parameter: Parameter, among: tuple[str, ...], maps: Mapping[str, AxisMap]
) -> np.ndarray:
    """Bool, broadcasts against the leaf: elements of a new unit of any of the axes `among`."""
    is_new = np.zeros((1,) * len(parameter.axes), dtype=bool)
    for dim, axis in enumerate(parameter.axes):
        if axis in among and axis in maps and not maps[axis].is_identity:
            shape = [1] * len(parameter.axes)
            shape[dim] = -1
            is_new = is_new | maps[axis].is_new.reshape(shape)
    return is_new


def _noise(
    parameter: Parameter, maps: Mapping[str, AxisMap], target: ModelConfig, options: Options
) -> Noise | None:
    is_new = _is_new(parameter, parameter.axes, maps)
    if options.noise == 0 or not parameter.reads or VOCAB in parameter.axes or not is_new.any():
        return None
    std = options.noise / np.sqrt(parameter.fan_in(target))
    return Noise(std, is_new, f"noise of {options.noise:g} initial deviations on new units")


def _new_tokens(
    parameter: Parameter, source: ModelConfig, target: ModelConfig, options: Options
) -> Extend | None:
    if VOCAB not in parameter.axes or source.vocab_size == target.vocab_size:
        return None
    fill = options.new_head if VOCAB in parameter.writes else "mean"
    return Extend(parameter.axes.index(VOCAB), target.vocab_size, fill)
