"""The programs of a run, traced on shapes for devices that need not be here."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aquila_jax import accounting, axes
from aquila_jax.axes import BATCH, KV_HEADS
from aquila_jax.errors import UserError
from aquila_jax.growth import apply_plan
from aquila_jax.nn import Transformer
from aquila_jax.nn.cache import extend, prefill, unroll
from aquila_jax.sharding import Layout, shardings_of
from aquila_jax.training.run import (
    ANY_STEPS,
    TrainRun,
    abstract_batch,
    abstract_params,
    build,
    model_on_mesh,
    placed,
)


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a run, ready to be compiled.

    Attributes:
        what: "train", "growth" or "decode".
        traced: by `jax.jit(...).trace`.
        layout: mesh and rules.
        resident: what it takes, by name: abstract arrays with their shardings.
        tokens: of one execution; 0 for a growth.
        model_flops: of one execution, by `aquila_jax.accounting`; 0 for a growth.
    """

    what: str
    traced: Any
    layout: Layout
    resident: Mapping[str, Any]
    tokens: int
    model_flops: float

    @property
    def slices(self) -> np.ndarray:
        """Which slice each device of the mesh is of, int `[devices]`."""
        devices = self.layout.mesh.devices.flat
        return np.asarray([getattr(device, "slice_index", None) or 0 for device in devices])

    @property
    def mesh_shape(self) -> list[tuple[str, int]]:
        """Names and sizes of the mesh's axes."""
        return list(self.layout.mesh.shape.items())


def train_program(run: TrainRun, devices: Sequence[Any] | None = None) -> Program:
    """The step that `train` runs.

    Raises:
        UserError: mesh, sharding or batch do not fit the devices or the model.
    """
    compiled = build(run, run.steps or ANY_STEPS, devices)
    batch = abstract_batch(run, compiled.layout)
    return Program(
        "train",
        compiled.train_step.trace(compiled.abstract, batch),
        compiled.layout,
        {
            "parameters": compiled.abstract.params,
            "optimizer": compiled.abstract.opt_state,
            "batch": batch,
        },
        run.data.batch_size * run.data.sequence_length,
        run.flops_per_step,
    )


def growth_program(run: TrainRun, devices: Sequence[Any] | None = None) -> Program:
    """The growth that `train` or `grow` runs before the first step, of parameters.

    Raises:
        UserError: the run grows nothing, or does not say what it grows.
    """
    if run.growth is None or run.init_from_model is None:
        raise UserError(
            "this run has no growth to plan: set TrainRun.growth, and TrainRun.init_from_model to "
            "the architecture that grows, as gin_configs/runs/scale_up.gin does"
        )
    _, layout = model_on_mesh(run, devices)
    plan, _ = run.growth.plan(run.init_from_model, run.model)
    source = abstract_params(run.init_from_model, layout)
    grow = jax.jit(
        functools.partial(apply_plan, plan, target=run.model, layout=layout.unless_single()),
        out_shardings=layout.params(run.model),
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    return Program("growth", grow.trace(source, key=key), layout, {"parameters": source}, 0, 0.0)


def decode_program(run: TrainRun, devices: Sequence[Any] | None = None) -> Program:
    """One next token for each of `batch_size` texts, whose caches hold `sequence_length` slots.

    Parameters lie as in training, in `dtype`; a row of the cache with its text, heads by the
    rules.

    Raises:
        UserError: mesh, sharding or batch do not fit the devices or the model.
    """
    _, layout = model_on_mesh(run, devices)
    config, dtype = run.model, jnp.dtype(run.dtype)
    model = Transformer(config, dtype=dtype, layout=layout.unless_single(), unrolled=True)
    shapes = axes.abstract_params(config, dtype)
    params = _unrolled(placed(shapes, layout.params(config)), run, layout)
    rows, slots = run.data.batch_size, run.data.sequence_length
    tokens_B1 = jax.ShapeDtypeStruct((rows, 1), jnp.int32, sharding=layout.batch())
    is_token_B1 = jax.ShapeDtypeStruct((rows, 1), jnp.bool_)
    _, cache = jax.eval_shape(
        functools.partial(prefill, model, capacity=slots), params, tokens_B1, is_token_B1
    )
    cache = jax.tree.map(functools.partial(_cache_leaf, layout), cache)

    def next_tokens(params: Any, tokens_B1: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        logits_BTV, cache = extend(model, params, tokens_B1, cache)
        return jnp.argmax(logits_BTV, axis=-1), cache

    step = jax.jit(
        next_tokens, donate_argnums=2, out_shardings=(layout.batch(), shardings_of(cache))
    )
    # Forward is a third of forward and backward, and a token sees the whole cache, not half.
    per_token = accounting.training_flops_per_token(config, 2 * slots) / 3
    return Program(
        "decode",
        step.trace(params, tokens_B1, cache),
        layout,
        {"parameters": params, "cache": cache},
        rows,
        rows * per_token,
    )


def _unrolled(params: Any, run: TrainRun, layout: Layout) -> Any:
    """Abstract parameters by layer, sharded as their stacks are."""
    shapes = jax.eval_shape(functools.partial(unroll, config=run.model), params)
    by_name = {
        _by_layer(path) if parameter.axes[0] in axes.LAYER_AXES else path: path
        for path, parameter in axes.parameters(run.model).items()
    }
    shardings = {
        path: layout.layer_sharding(by_name.get(path) or by_name[_by_layer(path)], run.model)
        for path in axes.flatten(shapes)
    }
    return placed(shapes, axes.unflatten(shardings))


def _by_layer(path: str) -> str:
    """A layer's leaf without the layer's number."""
    return "layer/" + path.partition("/")[2]


def _cache_leaf(layout: Layout, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    logical: tuple[str | None, ...] = ()
    if leaf.ndim >= 4:
        logical = (*(None,) * (leaf.ndim - 4), BATCH, None, KV_HEADS, None)
    elif leaf.ndim:
        logical = (BATCH, *(None,) * (leaf.ndim - 1))
    sharding = layout.sharding(logical, "the cache")
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


PROGRAMS = {"train": train_program, "growth": growth_program, "decode": decode_program}
