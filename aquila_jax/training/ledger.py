"""What a model has cost so far: tokens, FLOPs and seconds of every stage, parents included."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aquila_jax import accounting
from aquila_jax.config import ModelConfig
from aquila_jax.errors import UserError
from aquila_jax.files import write_json

LEDGER_FILE = "ledger.json"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training run of a lineage.

    Attributes:
        name: what the run calls itself.
        origin: "scratch", "restored", "scale_up" or "scale_out".
        method: the growth's method; "" where nothing grew.
        model: the trained configuration.
        planned_steps: steps the stage is to take.
        steps: steps taken, each with a batch of its own.
        tokens: target tokens trained on; padding does not count.
        flops: model FLOPs spent (`accounting.training_flops_per_token`), padding included.
        seconds: wall time of the loop, compilation and validation included.
        validation_start: loss in nats per token by language, and "mean", before the first step.
        validation_end: the same after the last step so far at which it was measured.
        skipped: steps whose update was not made (`aquila_jax.training.guard`).
        spent: seconds of every kind (`aquila_jax.training.times`), restarts included.
    """

    name: str
    origin: str
    method: str
    model: ModelConfig
    planned_steps: int
    steps: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    validation_start: Mapping[str, float] | None = None
    validation_end: Mapping[str, float] | None = None
    skipped: int = 0
    spent: Mapping[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with parameter counts for readers."""
        return {
            **dataclasses.asdict(self),
            "parameters": accounting.num_parameters(self.model),
            "active_parameters": accounting.num_active_parameters(self.model),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Stage":
        """The inverse of `to_dict`."""
        names = {field.name for field in dataclasses.fields(cls)}
        known = {name: value for name, value in values.items() if name in names}
        return cls(**{**known, "model": ModelConfig.from_dict(values["model"])})


@dataclasses.dataclass(frozen=True)
class Ledger:
    """The stages of a lineage, oldest first; the last is the current run.

    A converted model has none: what it cost is not known.
    """

    stages: tuple[Stage, ...]

    @property
    def current(self) -> Stage:
        """The stage of the current run.

        Raises:
            UserError: nothing was trained yet: the model was converted.
        """
        if not self.stages:
            raise UserError(
                "this MODEL_DIR holds a converted model and no run: name it in TrainRun.init_from, "
                "and train in another MODEL_DIR"
            )
        return self.stages[-1]

    @property
    def totals(self) -> dict[str, float]:
        """Tokens, FLOPs and seconds over all stages."""
        return {
            name: sum(getattr(stage, name) for stage in self.stages)
            for name in ("tokens", "flops", "seconds")
        }

    def begin(self, stage: Stage) -> "Ledger":
        """A ledger with one more stage."""
        return Ledger((*self.stages, stage))

    def update(self, **changes: Any) -> "Ledger":
        """A ledger whose current stage has these fields changed."""
        return Ledger((*self.stages[:-1], dataclasses.replace(self.current, **changes)))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {"stages": [stage.to_dict() for stage in self.stages]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Ledger":
        """The inverse of `to_dict`."""
        return cls(tuple(Stage.from_dict(stage) for stage in values["stages"]))

    def write(self, model_dir: Path) -> None:
        """Replace the ledger file of `model_dir`."""
        write_json(model_dir / LEDGER_FILE, self.to_dict())


def steps_for_flops(flops: float, flops_per_step: float) -> int:
    """The whole number of steps nearest to a budget, one at least.

    Raises:
        UserError: the budget is not positive.
    """
    if flops <= 0:
        raise UserError(f"a budget of {flops:g} FLOPs trains nothing: has its run been trained?")
    return max(1, round(flops / flops_per_step))
