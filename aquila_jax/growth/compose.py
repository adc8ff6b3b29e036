"""Growth as a table: for every leaf of the target, how it comes from the source.

A plan is data. It is checked for completeness before anything is computed, and the same plan
runs eagerly, under `jit` and under `eval_shape`.
"""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from aquila_jax import axes
from aquila_jax.config import ModelConfig
from aquila_jax.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Take:
    """Units taken along one dimension, each times a factor.

    Attributes:
        dim: dimension of the leaf.
        index: int `[target]`, the unit of the source that each unit of the target takes.
        scale: float64 `[target]`, what each taken unit is multiplied by; None for one.
    """

    dim: int
    index: np.ndarray
    scale: np.ndarray | None = None

    @property
    def is_identity(self) -> bool:
        """Whether nothing moves or changes (for an index onto as many units as it has)."""
        return self.scale is None and np.array_equal(self.index, np.arange(len(self.index)))


@dataclasses.dataclass(frozen=True, eq=False)
class UpperLayer:
    """AKI: new units of some dimensions hold what the layer above has for them.

    Attributes:
        layers: int `[target layers]`, the source layer that gives the new units.
        is_new: bool, broadcasts against the target leaf; where to use it.
    """

    layers: np.ndarray
    is_new: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Mapped:
    """A target leaf computed from one source leaf.

    Attributes:
        source: path of the source leaf.
        takes: width, one entry a dimension that changes.
        layers: depth, int `[target layers]`: source layers along dimension 0; None to keep.
        upper: what new units take from the layer above; needs `layers`.
        transpose: whether the source's two dimensions are swapped first (a tied head untied).
        repeat: `(dim, times)` to insert a new dimension of equal copies (experts), last.
    """

    source: str
    takes: Sequence[Take] = ()
    layers: np.ndarray | None = None
    upper: UpperLayer | None = None
    transpose: bool = False
    repeat: tuple[int, int] | None = None

    @property
    def origin(self) -> str:
        """Either "copied", where units are whole ones of the source, or "mapped": scaled, mixed."""
        same_values = all(take.scale is None for take in self.takes)
        return "copied" if same_values and self.upper is None else "mapped"

    @property
    def how(self) -> str:
        """One short phrase for a certificate."""
        parts = []
        if self.transpose:
            parts.append("transposed")
        if self.layers is not None and not np.array_equal(self.layers, np.arange(len(self.layers))):
            parts.append("layers taken")
        if any(not take.is_identity for take in self.takes):
            parts.append("units copied")
        if any(take.scale is not None for take in self.takes):
            parts.append("divided by copies")
        if self.upper is not None:
            parts.append("new units from the layer above")
        if self.repeat is not None:
            parts.append(f"{self.repeat[1]} equal experts")
        return ", ".join(parts) or "as it was"

    def apply(self, leaf: jax.Array) -> jax.Array:
        """The target leaf, in the source leaf's dtype; factors are applied in float32 at least."""
        if self.transpose:
            leaf = leaf.T
        grown = self._widen(_take(leaf, self.layers, 0))
        if self.upper is not None:
            above = self._widen(_take(leaf, self.upper.layers, 0))
            grown = jnp.where(self.upper.is_new, above, grown)
        if self.repeat is not None:
            dim, times = self.repeat
            grown = jnp.repeat(jnp.expand_dims(grown, dim), times, axis=dim)
        return grown

    def _widen(self, leaf: jax.Array) -> jax.Array:
        dtype = leaf.dtype
        wide = jnp.promote_types(dtype, jnp.float32)
        for take in self.takes:
            leaf = _take(leaf, take.index, take.dim)
            if take.scale is not None:
                shape = [1] * leaf.ndim
                shape[take.dim] = -1
                leaf = leaf.astype(wide) * jnp.asarray(take.scale, wide).reshape(shape)
        return leaf.astype(dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Fresh:
    """A target leaf that no source leaf gives: normal with mean 0.

    Attributes:
        std: standard deviation.
    """

    std: float
    source: None = None
    origin: str = "fresh"

    @property
    def how(self) -> str:
        """One short phrase for a certificate."""
        return f"normal, standard deviation {self.std:g}"


Plan = Mapping[str, Mapped | Fresh]


def _take(leaf: jax.Array, index: np.ndarray | None, dim: int) -> jax.Array:
    if index is None or (
        len(index) == leaf.shape[dim] and np.array_equal(index, np.arange(len(index)))
    ):
        return leaf
    return jnp.take(leaf, index, axis=dim)


def check_plan(plan: Plan, source: ModelConfig, target: ModelConfig) -> None:
    """Every target leaf is written once, and every source leaf is used.

    Raises:
        UserError: leaves are left over on either side; the message lists both.
    """
    wanted, given = set(axes.parameters(target)), set(axes.parameters(source))
    used = {rule.source for rule in plan.values() if rule.source is not None}
    problems = {
        "target leaves without a rule": wanted - set(plan),
        "rules for leaves the target lacks": set(plan) - wanted,
        "rules that read leaves the source lacks": used - given,
        "source leaves that nothing uses": given - used,
    }
    if any(problems.values()):
        listed = "; ".join(f"{what}: {sorted(paths)}" for what, paths in problems.items() if paths)
        raise UserError(f"the growth does not account for every leaf: {listed}")


def check_source(params: Mapping[str, Any], config: ModelConfig) -> None:
    """`params` has exactly the leaves and shapes of a model of `config`.

    Raises:
        UserError: naming the first leaves that are missing, unknown or of another shape.
    """
    flat, expected = axes.flatten(params), axes.parameters(config)
    if missing := sorted(set(expected) - set(flat)):
        raise UserError(f"the source parameters lack {missing}, which their config asks for")
    if unknown := sorted(set(flat) - set(expected)):
        raise UserError(f"the source parameters hold {unknown}, which their config does not have")
    for path, parameter in expected.items():
        if tuple(flat[path].shape) != parameter.shape(config):
            raise UserError(
                f"{path} has shape {tuple(flat[path].shape)}, but its config says "
                f"{parameter.shape(config)} for axes {parameter.axes}"
            )


def apply_plan(
    plan: Plan, params: Mapping[str, Any], target: ModelConfig, key: jax.Array | None
) -> dict[str, Any]:
    """The target's parameters.

    Args:
        plan: a plan that `check_plan` accepts.
        params: the source's nested parameters; not modified.
        target: configuration of the result.
        key: random key for fresh leaves; each folds its own path in, so that a leaf's values
            depend neither on the order nor on the number of the others.
    """
    flat = axes.flatten(params)
    dtype = jnp.result_type(*flat.values())
    grown = {}
    for path, parameter in axes.parameters(target).items():
        rule = plan[path]
        if isinstance(rule, Mapped):
            grown[path] = rule.apply(jnp.asarray(flat[rule.source]))
        else:
            grown[path] = _draw(rule, path, parameter.shape(target), dtype, key)
    return axes.unflatten(grown)


def _draw(
    rule: Fresh, path: str, shape: tuple[int, ...], dtype: DTypeLike, key: jax.Array | None
) -> jax.Array:
    if key is None:
        raise UserError(f"{path} is drawn at random: pass key=jax.random.key(seed)")
    leaf_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
    # Without the barrier jit merges constants, and the last bit differs from an eager call's.
    normal = jax.lax.optimization_barrier(jax.random.normal(leaf_key, shape, jnp.float32))
    return (rule.std * normal).astype(dtype)
