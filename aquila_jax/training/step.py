"""The state of a run and the compiled steps that change and measure it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from aquila_jax.config import ModelConfig
from aquila_jax.errors import check_number
from aquila_jax.nn import Transformer, forward_losses
from aquila_jax.nn.moe import JITTER
from aquila_jax.nn.moe.health import balance_biases, router_metrics
from aquila_jax.sharding import Layout
from aquila_jax.training.guard import ACCEPTED, Guard, GuardState, choose, new_guard_state

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]
_DEFAULT_GUARD = Guard()


class TrainState(NamedTuple):
    """All that a step changes.

    Attributes:
        step: int32 scalar, batches used in this run.
        params: float32 parameters.
        opt_state: the optimizer's state.
        guard: which updates were skipped, and what is usual.
    """

    step: Any
    params: Any
    opt_state: Any
    guard: GuardState


@dataclasses.dataclass(frozen=True)
class RouterLosses:
    """How much a mixture's auxiliary losses weigh against the language-model loss.

    Attributes:
        load_balance: weight of the Switch load-balancing loss, averaged over layers.
        z: weight of the router z-loss, averaged over layers.
        max_z: weight of the mean square of the largest logit, averaged over layers: a z-loss that
            only pulls at the largest.
        bias_rate: how far a step moves every router bias against its expert's load, where the
            model has such biases (`ModelConfig.router_bias`); they are balance without a loss.

    Raises:
        UserError: one is not a number of at least 0.
    """

    load_balance: float = 1e-3
    z: float = 1e-2
    max_z: float = 0.0
    bias_rate: float = 1e-3

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            # Below 0 what is charged would be rewarded.
            check_number(f"RouterLosses.{name}", value, least=0)


def new_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), new_guard_state())


def state_shardings(state: TrainState, layout: Layout, config: ModelConfig) -> TrainState:
    """Where every leaf of `state` (arrays or shapes) lives: moments beside their parameter."""
    params = layout.params(config)
    structure = jax.tree.structure(params)
    opt_state = jax.tree.map(
        lambda node: params if jax.tree.structure(node) == structure else layout.replicated(),
        state.opt_state,
        is_leaf=lambda node: jax.tree.structure(node) == structure,
    )
    guard = jax.tree.map(lambda _: layout.replicated(), state.guard)
    return TrainState(layout.replicated(), params, opt_state, guard)


def loss_and_metrics(
    model: Transformer,
    router_losses: RouterLosses,
    params: Any,
    batch: Batch,
    rngs: Mapping[str, jax.Array] | None = None,
) -> tuple[jax.Array, Metrics]:
    """The loss that is minimised, and what it is made of.

    Args:
        model: the decoder.
        router_losses: weights of the auxiliary losses; unused by a dense model.
        params: its parameters.
        batch: `tokens`, `targets`, `segment_ids`, `positions` int32 and `loss_weights` float32,
            all `[B, T]`.
        rngs: random keys by stream, for what is drawn in training.

    Returns:
        The total, and metrics with `loss`, the language-model part, in nats per token.
    """
    losses, routing = forward_losses(model, params, batch, rngs)
    loss = losses.mean
    metrics = {"loss": loss}
    if model.config.is_moe:
        metrics |= router_metrics(routing)
        loss += router_losses.load_balance * metrics["load_balance_loss"]
        loss += router_losses.z * metrics["router_z_loss"]
        loss += router_losses.max_z * metrics["router_max_z_loss"]
    return loss, metrics


def accumulated(
    gradient_of: Callable[[Any, Batch], Any], params: Any, batch: Batch, micro_batches: int
) -> Any:
    """`gradient_of(params, batch)`, computed part by part of the batch.

    Every part counts by its share of the loss weights, so the mean over all tokens comes out
    whatever was packed where. Metrics are such means too.

    Args:
        gradient_of: gives floating-point arrays, all of them means over tokens.
        params: its first argument.
        batch: arrays `[B, ...]`; part i holds rows i, i + n, i + 2n, ..., so that every device's
            shard of the batch gives to every part.
        micro_batches: n, the number of parts; divides B.
    """
    if micro_batches == 1:
        return gradient_of(params, batch)
    parts = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(-1, micro_batches, *x.shape[1:]), 1, 0), dict(batch)
    )
    weight = jnp.maximum(batch["loss_weights"].sum(), 1e-9)

    def add(sums: Any, part: Batch) -> tuple[Any, None]:
        share = part["loss_weights"].sum() / weight
        means = gradient_of(params, part)
        return jax.tree.map(lambda total, mean: total + share * mean, sums, means), None

    shapes = jax.eval_shape(gradient_of, params, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    return jax.lax.scan(add, zeros, parts)[0]


def make_train_step(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    router_losses: RouterLosses,
    guard: Guard = _DEFAULT_GUARD,
    *,
    micro_batches: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """One update: gradient, clipping, AdamW. Jitted; the old state's memory is reused.

    With `micro_batches` the gradient is summed over so many parts of the batch, one after the
    other, whose activations then need not stand together. The gradient of the language-model loss
    is that of the whole batch however its tokens fall into parts; a router's auxiliary losses are
    taken over each part's tokens by themselves.

    Its metrics are those of the loss, `grad_norm`, `tokens` that count (int32), the guard's
    `verdict` (int32), and its counts `skipped_updates` and `skipped_in_a_row`.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        def loss_of(params: Any, part: Batch) -> tuple[jax.Array, Metrics]:
            return loss_and_metrics(model, router_losses, params, part, rngs)

        # Drawn anew from the step's number, so that a resumed run draws the same.
        key = jax.random.fold_in(jax.random.key(0), state.step)
        rngs = {JITTER: key} if model.dispatch.jitter else None

        gradient_of = jax.value_and_grad(loss_of, has_aux=True)
        (loss, metrics), gradients = accumulated(gradient_of, state.params, batch, micro_batches)
        metrics["grad_norm"] = optax.tree.norm(gradients)
        verdict, guarded = guard.judge(state.guard, loss, metrics["grad_norm"])
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        moved = optax.apply_updates(state.params, updates)
        if model.config.router_bias:
            moved = balance_biases(
                cast(Any, moved), metrics["load_by_layer"], router_losses.bias_rate
            )
        updated = moved, opt_state
        params, opt_state = choose(verdict == ACCEPTED, updated, (state.params, state.opt_state))
        metrics["tokens"] = jnp.count_nonzero(batch["loss_weights"])
        metrics["verdict"] = verdict
        metrics["skipped_updates"] = guarded.skipped
        metrics["skipped_in_a_row"] = guarded.in_a_row
        return TrainState(state.step + 1, params, opt_state, guarded), metrics

    return jax.jit(train_step, donate_argnums=0)
