"""Which checkpoints stay."""

from collections.abc import Sequence
from typing import Any, NamedTuple


class Saved(NamedTuple):
    """A checkpoint, as far as keeping it depends on it.

    Attributes:
        step: its step.
        validation_loss: nats per token, where it was measured at this very step.
        is_stage_end: whether it was the last step asked for.
    """

    step: int
    validation_loss: float | None = None
    is_stage_end: bool = False

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> "Saved":
        """Of the facts in a manifest."""
        return cls(facts["step"], facts["validation_loss"], facts["is_stage_end"])


class Keep(NamedTuple):
    """A checkpoint stays if any of these keeps it; the ends of stages always stay.

    Attributes:
        newest: how many of the newest.
        every: those whose step is a multiple of this; 0 keeps none for that.
        best: how many of the lowest validation losses, among those that were validated.
    """

    newest: int = 2
    every: int = 0
    best: int = 0

    def dropped(self, saved: Sequence[Saved]) -> list[int]:
        """The steps that nothing keeps."""
        in_order = sorted(saved)
        kept = {one.step for one in in_order[-self.newest :]}
        kept |= {one.step for one in in_order if one.is_stage_end}
        kept |= {one.step for one in in_order if self.every and one.step % self.every == 0}
        losses = [(one.validation_loss, one.step) for one in in_order]
        measured = sorted((loss, step) for loss, step in losses if loss is not None)
        kept |= {step for _, step in measured[: self.best]}
        return [one.step for one in in_order if one.step not in kept]
