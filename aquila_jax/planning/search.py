"""Meshes, remats, batches and their parts tried one after the other; the best few are kept."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, cast

from aquila_jax.errors import UserError
from aquila_jax.nn.transformer import REMAT_POLICIES
from aquila_jax.planning.chips import Topology
from aquila_jax.planning.memory import shard_bytes
from aquila_jax.planning.plan import Plan, make_plan
from aquila_jax.planning.topology import devices_of
from aquila_jax.sharding import MeshShape, mesh_shapes
from aquila_jax.training.run import ANY_STEPS, TrainRun, build

# From the one that stores least to the one that stores all.
_REMATS = tuple(REMAT_POLICIES)[::-1]
_BATCH_FACTORS = (1, 2, 0.5)


def search(
    run: TrainRun,
    topology: Topology,
    budget: int,
    told: Callable[[Plan], None] = lambda plan: None,
) -> list[Plan]:
    """Plans of training steps that fit, those of most tokens a day first.

    The run's own mesh, remat and batch come first, then meshes in which its parameters and
    moments fit, those that send least by rule of thumb first. A remat that stores more is tried
    only where one that stores less fits. Where a step does not fit, its batch is taken in more
    micro-batches: as many as the size that the compiler asked for calls for.

    Args:
        run: the settings to vary.
        topology: where it would run.
        budget: how many steps to compile at most.
        told: called with every plan as it is made, also those that do not fit.

    Raises:
        UserError: no mesh holds the run's state, or nothing fits.
    """
    devices = devices_of(topology)
    plans: list[Plan] = []
    compiled = 0
    for shape, batch_size, rows in _candidates(run, topology, devices):
        remats, parts = list(_REMATS), run.micro_batches
        while remats and parts:
            if compiled == budget:
                return _ranked(plans, compiled)
            tried = _with(run, shape, batch_size, remats[0], parts)
            plan, _, _ = make_plan(tried, topology, devices=devices)
            compiled += 1
            told(plan)
            if plan.fits:
                plans.append(plan)
                remats.pop(0)
            else:
                parts = _more_parts(plan, rows)
    return _ranked(plans, compiled)


def _more_parts(plan: Plan, rows: int) -> int:
    """Micro-batches with which a step that did not fit may; 0 where there are none.

    As if temporaries shrank in proportion, which is the most that they do.

    Args:
        plan: of the step.
        rows: of the batch on one device; parts have whole rows.
    """
    parts = plan.settings["micro_batches"]
    room = max(plan.capacity - plan.memory.arguments, 1.0)
    least = max(parts + 1, parts * plan.memory.temporaries / room)
    return next((more for more in range(1, rows + 1) if more >= least and rows % more == 0), 0)


def _ranked(plans: list[Plan], compiled: int) -> list[Plan]:
    if not plans:
        raise UserError(
            f"none of {compiled} meshes, batches and remats fits: take more chips, or shorter rows"
        )
    # Equal bounds: the one that leaves more memory.
    return sorted(plans, key=lambda plan: (-plan.tokens_per_day, plan.memory.total))


def _with(
    run: TrainRun, shape: MeshShape, batch_size: int, remat: str, micro_batches: int
) -> TrainRun:
    data = dataclasses.replace(cast(Any, run.data), batch_size=batch_size)
    return dataclasses.replace(run, mesh=shape, data=data, remat=remat, micro_batches=micro_batches)


def _candidates(
    run: TrainRun, topology: Topology, devices: list[Any]
) -> Iterator[tuple[MeshShape, int, int]]:
    """Meshes, batches and rows of these on a device: nothing but activations is left to check."""
    capacity = topology.chip.hbm_bytes / topology.chip.devices
    shapes = [run.mesh, *mesh_shapes(len(devices), run.model, topology.slices)]
    sizes = [int(run.data.batch_size * factor) for factor in _BATCH_FACTORS]
    seen = set()
    for batch_size in filter(None, sizes):
        for shape in shapes:
            try:
                tried = _with(run, shape, batch_size, run.remat, run.micro_batches)
                compiled = build(tried, run.steps or ANY_STEPS, devices)
            except UserError:
                continue  # does not divide
            sizes_of_mesh = tuple(compiled.layout.mesh.shape.values())
            if (sizes_of_mesh, batch_size) in seen or shard_bytes(compiled.abstract) > capacity:
                continue
            seen.add((sizes_of_mesh, batch_size))
            yield shape, batch_size, batch_size // compiled.layout.batch_shards
