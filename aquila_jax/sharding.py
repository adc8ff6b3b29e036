"""Meshes, and the one table from logical axes to mesh axes. Nothing else names mesh axes."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from aquila_jax import axes
from aquila_jax.config import ModelConfig
from aquila_jax.errors import UserError, check_number

# slice: whole copies of the model, one a slice, which tell each other over the slow network; data:
# whole copies; fsdp: parameters in shards, gathered for use; expert: experts in shards, and all
# else as by fsdp; model: heads, MLP units and vocabulary in shards.
MESH_AXES = ("slice", "data", "fsdp", "expert", "model")

# One logical axis may be split over several mesh axes. An axis that is absent is not split. What
# splits experts does not split the width of the same array.
DEFAULT_RULES: Mapping[str, tuple[str, ...]] = {
    axes.BATCH: ("slice", "data", "fsdp", "expert"),
    # Of the residual, between the parts of a layer.
    axes.TOKENS: ("model",),
    axes.EMBED: ("fsdp", "expert"),
    axes.Q_HEADS: ("model",),
    axes.KV_HEADS: ("model",),
    axes.MLP: ("model",),
    axes.EXPERT_MLP: ("model",),
    axes.SHARED_MLP: ("model",),
    axes.VOCAB: ("model",),
    axes.EXPERTS: ("expert",),
}


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """How many devices lie along each mesh axis; -1, in at most one place, takes what is left.

    Attributes:
        data: whole copies of the model.
        fsdp: shards of parameters and optimizer state.
        expert: shards of the experts, and of all else beside those of `fsdp`.
        model: shards of heads, MLP units and vocabulary.
        slices: slices of a multi-slice system, or any groups of devices between which the network
            is slow. By the default rules each holds a whole copy of the model.
    """

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    model: int = 1
    slices: int = 1

    def __post_init__(self) -> None:
        for name, size in dataclasses.asdict(self).items():
            check_number(f"MeshShape.{name}", size, is_whole=True)

    def build(self, devices: Sequence[Any] | None = None) -> Mesh:
        """The mesh over `devices` (all of them by default), with axes `MESH_AXES`.

        Raises:
            UserError: the sizes do not multiply to the number of devices, or `slices` is not the
                number of slices that they are of.
        """
        devices = jax.devices() if devices is None else devices
        fields = ["slices" if name == "slice" else name for name in MESH_AXES]
        sizes = [getattr(self, name) for name in fields]
        asked = ", ".join(f"{name}={size}" for name, size in zip(fields, sizes, strict=True))
        if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
            raise UserError(f"mesh sizes must be positive, with at most one -1, not {asked}")
        rest = math.prod(size for size in sizes if size != -1)
        sizes = [len(devices) // rest if size == -1 else size for size in sizes]
        if math.prod(sizes) != len(devices):
            raise UserError(f"a mesh of {asked} does not multiply to {len(devices)} devices")
        # Auto: the compiler propagates shardings from parameters, batch and constraints.
        axis_types = (AxisType.Auto,) * len(sizes)
        if sizes[0] == 1 and _num_slices(devices) == 1:
            # A side of the torus is split where the mesh asks for it: 8 experts on 16 x 16 chips.
            arranged = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
            return Mesh(arranged, MESH_AXES, axis_types=axis_types)
        return Mesh(_slice_by_slice(devices, sizes), MESH_AXES, axis_types=axis_types)


def _num_slices(devices: Sequence[Any]) -> int:
    return len({getattr(device, "slice_index", 0) for device in devices})


def _slice_by_slice(devices: Sequence[Any], sizes: Sequence[int]) -> Any:
    """Devices `[slice, ...]`, each slice arranged by its own network."""
    found = _num_slices(devices)
    if found == 1:
        # Not a system of slices: devices in a row stand for one.
        return np.asarray(devices).reshape(sizes)
    if found != sizes[0]:
        raise UserError(
            f"these {len(devices)} devices are of {found} slices, and the mesh has "
            f"slices={sizes[0]}: set MeshShape.slices to {found}"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (1, *sizes[1:]), (sizes[0], *(1 for _ in sizes[1:])), devices
    )


def mesh_shapes(num_devices: int, config: ModelConfig, num_slices: int = 1) -> list[MeshShape]:
    """Meshes worth trying for a model, those that are likely to send least first.

    Parameters lie over fsdp; experts of a mixture over as many devices as divide them; heads and
    units over at most eight. Slices hold copies.
    """
    shapes = []
    for model in (1, 2, 4, 8):
        for expert in range(max(config.num_experts, 1), 0, -1):
            rest, remainder = divmod(num_devices, model * expert * num_slices)
            if not remainder and max(config.num_experts, 1) % expert == 0:
                shapes.append(MeshShape(1, rest, expert, model, slices=num_slices))
    return shapes


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and the rules that place logical axes on it.

    Attributes:
        mesh: the devices.
        rules: logical axis -> mesh axes.

    Raises:
        UserError: a rule names an axis that is not in `axes.AXES`, or not in `MESH_AXES`.
    """

    mesh: Mesh
    rules: Mapping[str, tuple[str, ...]] = dataclasses.field(
        default_factory=lambda: dict(DEFAULT_RULES)
    )

    def __post_init__(self) -> None:
        for axis, mesh_axes in self.rules.items():
            if axis not in axes.AXES:
                raise UserError(
                    f"sharding rule for unknown axis {axis!r}; there are {', '.join(axes.AXES)}"
                )
            if isinstance(mesh_axes, str) or not set(mesh_axes) <= set(MESH_AXES):
                raise UserError(
                    f"the sharding rule of {axis} must be a tuple of mesh axes, as in "
                    f"('fsdp',), out of {', '.join(MESH_AXES)}; not {mesh_axes!r}"
                )

    def __hash__(self) -> int:
        # Modules that carry a layout are static arguments of jitted functions.
        return hash((self.mesh, tuple(sorted(self.rules.items()))))

    @classmethod
    def of(cls, mesh: Mesh, changes: Mapping[str, tuple[str, ...]]) -> "Layout":
        """`DEFAULT_RULES` with some of them changed, on `mesh`.

        Raises:
            UserError: a rule names an unknown axis.
        """
        return cls(mesh, {**DEFAULT_RULES, **changes})

    def unless_single(self) -> "Layout | None":
        """Itself; None on one device, where constraints only hide what the compiler could fuse."""
        return self if self.mesh.size > 1 else None

    def spec(self, logical: Sequence[str | None], name: str = "an array") -> PartitionSpec:
        """The partition of an array whose dimensions have these logical axes.

        Raises:
            UserError: two dimensions would be split over the same mesh axis.
        """
        parts = self._parts(logical)
        used = [mesh_axis for part in parts for mesh_axis in part]
        if len(used) != len(set(used)):
            raise UserError(
                f"{name} with axes {tuple(logical)} would be split twice over one mesh axis: "
                f"{parts}; change the sharding rules"
            )
        return PartitionSpec(*(part if part else None for part in parts))

    def params(self, config: ModelConfig) -> dict[str, Any]:
        """The sharding of every parameter, as nested `NamedSharding`s.

        Raises:
            UserError: a dimension does not divide over its mesh axes; names the parameter.
        """
        shardings = {
            path: NamedSharding(self.mesh, self.parameter_spec(path, config))
            for path in axes.parameters(config)
        }
        return axes.unflatten(shardings)

    def parameter_spec(self, path: str, config: ModelConfig) -> PartitionSpec:
        """The partition of one parameter.

        A vocabulary that its mesh axes do not divide (151851 is odd) is whole; they split the
        width of its matrices instead.

        Raises:
            UserError: a dimension does not divide over its mesh axes.
        """
        parameter = axes.parameters(config)[path]
        self.spec(parameter.axes, path)
        parts = dict(zip(parameter.axes, self._parts(parameter.axes), strict=True))
        if axes.EMBED in parts and axes.EXPERTS not in parts:
            parts[axes.EMBED] = self.width_axes(config)
        if axes.VOCAB in parts and config.vocab_size % self._num_devices(parts[axes.VOCAB]):
            parts[axes.EMBED] += parts[axes.VOCAB]
            parts[axes.VOCAB] = ()
        for axis, size in zip(parameter.axes, parameter.shape(config), strict=True):
            if size % (shards := self._num_devices(parts[axis])):
                raise UserError(
                    f"{path}: {axis} of {size} does not divide over the {shards} devices of mesh "
                    f"axes {parts[axis]}; choose another mesh or other sharding rules"
                )
        return PartitionSpec(*(part or None for part in parts.values()))

    def layer_sharding(self, path: str, config: ModelConfig) -> NamedSharding:
        """How one layer of a parameter lies: as its stack does, without the axis of layers."""
        spec = self.parameter_spec(path, config)
        is_stacked = axes.parameters(config)[path].axes[0] in axes.LAYER_AXES
        return NamedSharding(self.mesh, PartitionSpec(*spec[1:]) if is_stacked else spec)

    def shard_map(
        self, body: Callable[..., Any], inputs: Sequence[Any], outputs: Any
    ) -> Callable[..., Any]:
        """`body` on every device's shards, where it says itself what devices tell each other.

        Args:
            body: a function of arrays; what is not split over a mesh axis it must compute alike
                on all devices of that axis.
            inputs: the logical axes of every argument, or what `parameter_spec` gave.
            outputs: a tree like the result's, with the same for every array.
        """

        def spec(logical: Any) -> PartitionSpec:
            return logical if isinstance(logical, PartitionSpec) else self.spec(logical)

        def is_array(node: Any) -> bool:
            names = isinstance(node, tuple) and all(isinstance(n, str | None) for n in node)
            return names or isinstance(node, PartitionSpec)

        return jax.shard_map(
            body,
            mesh=self.mesh,
            in_specs=tuple(spec(logical) for logical in inputs),
            out_specs=jax.tree.map(spec, outputs, is_leaf=is_array),
            # Kernels of other libraries do not say over which axes their results vary.
            check_vma=False,
        )

    def mesh_axes(self, *logical: str) -> tuple[str, ...]:
        """The mesh axes over which any of these axes is split, those of one device left out.

        Names for the collectives of `jax.lax` inside `shard_map`.
        """
        return tuple(dict.fromkeys(name for axis in logical for name in self._mesh_axes(axis)))

    def width_axes(self, config: ModelConfig) -> tuple[str, ...]:
        """The mesh axes that split the width of parameters that are not experts'.

        All of the rule's, or where they do not divide the width those that split no experts.
        """
        width = self._mesh_axes(axes.EMBED)
        if config.embed_dim % self._num_devices(width):
            taken = self._mesh_axes(axes.EXPERTS)
            width = tuple(name for name in width if name not in taken)
        return width

    def shards(self, *logical: str) -> int:
        """Into how many parts these axes together split an array."""
        return self._num_devices(self.mesh_axes(*logical))

    def _parts(self, logical: Sequence[str | None]) -> list[tuple[str, ...]]:
        """What splits each dimension; experts come before the width beside them."""
        parts = [self._mesh_axes(axis) for axis in logical]
        if axes.EXPERTS in logical and axes.EMBED in logical:
            taken, width = self._mesh_axes(axes.EXPERTS), logical.index(axes.EMBED)
            parts[width] = tuple(name for name in parts[width] if name not in taken)
        return parts

    def _mesh_axes(self, axis: str | None) -> tuple[str, ...]:
        """Where a logical axis is split; a mesh axis of one device splits nothing."""
        rule = self.rules.get(axis, ()) if axis is not None else ()
        return tuple(mesh_axis for mesh_axis in rule if self.mesh.shape[mesh_axis] > 1)

    def sharding(self, logical: Sequence[str | None], name: str = "an array") -> NamedSharding:
        """Where an array whose dimensions have these logical axes lies.

        Raises:
            UserError: two dimensions would be split over the same mesh axis.
        """
        return NamedSharding(self.mesh, self.spec(logical, name))

    def batch(self) -> NamedSharding:
        """The sharding of every `[B, T]` array of a batch."""
        return NamedSharding(self.mesh, self.spec((axes.BATCH, None), "the batch"))

    def own_rows(self, batch_size: int) -> list[int]:
        """Which rows of a batch lie on devices of this process, in order."""
        shards = self.batch().addressable_devices_indices_map((batch_size, 1)).values()
        return sorted({row for shard in shards if shard for row in range(batch_size)[shard[0]]})

    def each_device(self) -> NamedSharding:
        """The sharding of an array with one element for every device."""
        return NamedSharding(self.mesh, PartitionSpec(MESH_AXES))

    def replicated(self) -> NamedSharding:
        """The sharding of what every device holds whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def platform(self) -> str:
        """What the devices are: "tpu", "gpu" or "cpu"."""
        return self.mesh.devices.flat[0].platform

    @property
    def batch_shards(self) -> int:
        """Into how many parts the batch is split; its size must be a multiple."""
        return self.shards(axes.BATCH)

    def constrain(self, x: jax.Array, *logical: str | None) -> jax.Array:
        """`x`, with its sharding fixed inside a jitted computation.

        Args:
            x: an array.
            logical: the axis of each dimension of it; None for one that is not split.
        """
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, self.spec(logical)))

    def join_width(self, matrix: jax.Array, logical: Sequence[str]) -> jax.Array:
        """A matrix of one layer, its width no longer split over what splits experts.

        So the compiler gathers it, and splits its gradient, in two steps. In one, XLA for TPUs (jax
        0.10) makes all-reduces of shards too narrow for its tiles, which move twice as much.

        Args:
            matrix: one with a dimension of the residual.
            logical: the axis of each dimension of it.
        """
        parts, taken = self._parts(logical), self._mesh_axes(axes.EXPERTS)
        width = logical.index(axes.EMBED)
        if not set(parts[width]) & set(taken):
            return matrix
        parts[width] = tuple(name for name in parts[width] if name not in taken)
        spec = PartitionSpec(*(part or None for part in parts))
        return jax.lax.with_sharding_constraint(matrix, NamedSharding(self.mesh, spec))

    def constrain_residual(self, x_BTD: jax.Array) -> jax.Array:
        """The residual between the parts of a layer: split over tokens too, where they divide.

        So norms and what is stored for the backward pass are shared by the devices that share the
        matrices (sequence parallelism, arXiv 2205.05198).
        """
        whole = x_BTD.shape[1] % self.shards(axes.TOKENS) != 0
        return self.constrain(x_BTD, axes.BATCH, None if whole else axes.TOKENS, None)

    def constrain_except(
        self, x: jax.Array, logical: Sequence[str | None], dim: int | None
    ) -> jax.Array:
        """`constrain`, but with no shards along `dim`, if one is named.

        Mesh axes that would split `dim` split another dimension as well: the longest that they
        divide. Where there is none the array stays as it is, and the compiler gathers what it
        must. A dimension that its rule does not divide is whole.
        """
        parts = self._parts(logical)
        moved: tuple[str, ...] = ()
        if dim is not None:
            moved, parts[dim] = parts[dim], ()
        if moved:
            sizes = {
                size: other
                for other, size in enumerate(x.shape)
                if other != dim and size % self._num_devices((*parts[other], *moved)) == 0
            }
            if not sizes:
                return x
            parts[sizes[max(sizes)]] += moved
        whole = [
            () if size % self._num_devices(part) else part
            for size, part in zip(x.shape, parts, strict=True)
        ]
        sharding = NamedSharding(self.mesh, PartitionSpec(*(part or None for part in whole)))
        return jax.lax.with_sharding_constraint(x, sharding)

    def _num_devices(self, mesh_axes: Sequence[str]) -> int:
        return math.prod(self.mesh.shape[axis] for axis in mesh_axes)


def shardings_of(abstract: Any) -> Any:
    """The sharding of every leaf of a tree of abstract arrays."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)
