"""AdamW and its schedules, as descriptions that become optax transformations for a given length.

A description knows peak rates and fractions; the run knows how many steps there are.
"""

import dataclasses
from typing import Any, Protocol

import optax

from aquila_jax import axes
from aquila_jax.errors import UserError, check_number


class Schedule(Protocol):
    """How the learning rate moves over a run."""

    def build(self, steps: int) -> optax.Schedule:
        """The rate at every step of a run of `steps` steps."""
        ...


@dataclasses.dataclass(frozen=True)
class Cosine:
    """Linear warm-up, then half a cosine down.

    Attributes:
        peak: the highest learning rate.
        warmup_steps: steps from 0 to `peak`.
        end_fraction: the last rate, as a share of `peak`.
    """

    peak: float
    warmup_steps: int
    end_fraction: float = 0.1

    def __post_init__(self) -> None:
        _check_rates(self)

    def build(self, steps: int) -> optax.Schedule:
        """The schedule over `steps` steps."""
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=self.peak,
            warmup_steps=_checked_warmup(self.warmup_steps, steps),
            decay_steps=steps,
            end_value=self.peak * self.end_fraction,
        )


@dataclasses.dataclass(frozen=True)
class WarmupStableDecay:
    """Linear warm-up, a plateau, then a linear decay at the end (MiniCPM, arXiv 2404.06395).

    Attributes:
        peak: the rate of the plateau.
        warmup_steps: steps from 0 to `peak`.
        decay_fraction: share of all steps spent decaying.
        end_fraction: the last rate, as a share of `peak`.
    """

    peak: float
    warmup_steps: int
    decay_fraction: float = 0.2
    end_fraction: float = 0.1

    def __post_init__(self) -> None:
        _check_rates(self)
        check_number("decay_fraction", self.decay_fraction, least=0, most=1)

    def build(self, steps: int) -> optax.Schedule:
        """The schedule over `steps` steps."""
        warmup = _checked_warmup(self.warmup_steps, steps)
        decay = min(round(steps * self.decay_fraction), steps - warmup)
        return optax.join_schedules(
            [
                optax.linear_schedule(0.0, self.peak, warmup),
                optax.constant_schedule(self.peak),
                optax.linear_schedule(self.peak, self.peak * self.end_fraction, max(decay, 1)),
            ],
            boundaries=[warmup, steps - decay],
        )


def _check_rates(schedule: Cosine | WarmupStableDecay) -> None:
    check_number("peak", schedule.peak, least=0)
    check_number("warmup_steps", schedule.warmup_steps, least=0, is_whole=True)
    check_number("end_fraction", schedule.end_fraction, least=0, most=1)


def _checked_warmup(warmup_steps: int, steps: int) -> int:
    if not 0 <= warmup_steps < steps:
        raise UserError(
            f"warmup_steps ({warmup_steps}) must be at least 0 and below the run's {steps} steps"
        )
    return warmup_steps


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (arXiv 1711.05101) after clipping by the global norm.

    Attributes:
        schedule: the learning rate.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: on matrices; gains and biases do not decay.
        max_gradient_norm: gradients longer than this are scaled down to it.
    """

    schedule: Schedule
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_gradient_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("b1", "b2"):
            check_number(name, getattr(self, name), least=0, below=1)
        for name in ("eps", "weight_decay", "max_gradient_norm"):
            check_number(name, getattr(self, name), least=0)

    def build(self, steps: int, parameters: dict[str, axes.Parameter]) -> Any:
        """The optax transformation of a run of `steps` steps over these parameters."""
        decays = axes.unflatten({path: bool(p.reads) for path, p in parameters.items()})
        return optax.chain(
            optax.clip_by_global_norm(self.max_gradient_norm),
            optax.adamw(
                self.schedule.build(steps),
                b1=self.b1,
                b2=self.b2,
                eps=self.eps,
                weight_decay=self.weight_decay,
                mask=decays,
            ),
        )
