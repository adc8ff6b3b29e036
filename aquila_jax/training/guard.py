"""Updates that are not made: those of a loss or gradient that is not finite, or far too large.

The decision is taken inside the compiled step, from values that are the same on every device, so
all hosts skip alike. A step whose update is skipped still counts and has used its batch; the
parameters and the optimizer's state stay as they were.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from aquila_jax.errors import check_number

# A verdict, as a step's metrics hold it.
ACCEPTED, NOT_FINITE, SPIKE = 0, 1, 2
REASONS = {NOT_FINITE: "loss or gradient is not finite", SPIKE: "loss or gradient spiked"}

# Weight of the newest value in the running estimates, once as many steps have been seen.
_NEWEST = 0.01
# The least deviation that is reckoned with: nats of loss, and logarithm of the gradient's norm.
_LEAST_DEVIATION = 0.05


class GuardState(NamedTuple):
    """What the guard remembers, as arrays.

    Attributes:
        skipped: int32, updates not made in this run.
        in_a_row: int32, those since the last update that was made.
        accepted: int32, updates made.
        mean_2: float32 `[2]`, running mean of the loss and of the logarithm of the gradient's norm.
        variance_2: float32 `[2]`, their running variance.
    """

    skipped: Any
    in_a_row: Any
    accepted: Any
    mean_2: Any
    variance_2: Any


@dataclasses.dataclass(frozen=True)
class Guard:
    """When an update is skipped, and when a run gives up.

    A loss or gradient that is not finite is always skipped.

    Attributes:
        spike_deviations: how many standard deviations above its running mean the loss, or the
            logarithm of the gradient's norm, is a spike; 0 for no such test.
        spike_after: updates to make before there are spikes.
        stop_after: skipped updates in a row that end the run; the last checkpoint is kept.
    """

    spike_deviations: float = 10.0
    spike_after: int = 200
    stop_after: int = 20

    def __post_init__(self) -> None:
        check_number("Guard.spike_deviations", self.spike_deviations, least=0)
        for name in ("spike_after", "stop_after"):
            check_number(f"Guard.{name}", getattr(self, name), least=1, is_whole=True)

    def judge(
        self, state: GuardState, loss: jax.Array, gradient_norm: jax.Array
    ) -> tuple[jax.Array, GuardState]:
        """Whether the update is made, inside a compiled step.

        Args:
            state: before the step.
            loss: float32 scalar.
            gradient_norm: float32 scalar, of all gradients together, before clipping.

        Returns:
            int32 `ACCEPTED`, `NOT_FINITE` or `SPIKE`, and the state after the step.
        """
        tiny = jnp.finfo(jnp.float32).tiny
        values_2 = jnp.stack([loss, jnp.log(jnp.maximum(gradient_norm, tiny))])
        is_finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
        above_2 = values_2 - state.mean_2
        deviation_2 = jnp.maximum(jnp.sqrt(state.variance_2), _LEAST_DEVIATION)
        is_spike = (above_2 > self.spike_deviations * deviation_2).any()
        is_spike &= (self.spike_deviations > 0) & (state.accepted >= self.spike_after)
        verdict = jnp.where(is_finite, jnp.where(is_spike, SPIKE, ACCEPTED), NOT_FINITE)
        weight = jnp.maximum(_NEWEST, 1 / (state.accepted + 1))
        accepted = GuardState(
            state.skipped,
            jnp.zeros_like(state.in_a_row),
            state.accepted + 1,
            state.mean_2 + weight * above_2,
            (1 - weight) * (state.variance_2 + weight * above_2**2),
        )
        skipped = state._replace(skipped=state.skipped + 1, in_a_row=state.in_a_row + 1)
        return verdict, choose(verdict == ACCEPTED, accepted, skipped)


def new_guard_state() -> GuardState:
    """Before the first step."""
    # Each an array of its own: a step is given the memory of them all.
    counts = (jnp.zeros((), jnp.int32) for _ in range(3))
    estimates_2 = (jnp.zeros(2, jnp.float32) for _ in range(2))
    return GuardState(*counts, *estimates_2)


def choose(is_first: jax.Array, first: Any, second: Any) -> Any:
    """One of two trees of the same structure, by a scalar; neither has to be finite."""
    return jax.tree.map(lambda a, b: jnp.where(is_first, a, b), first, second)


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether no floating-point leaf holds NaN or infinity."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()
