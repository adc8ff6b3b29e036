"""What happened, in plain words computed from the numbers, whoever won."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aquila_jax.reports import words
from aquila_jax.reports.lineup import Entry, tips
from aquila_jax.reports.records import MEAN
from aquila_jax.reports.table import unfinished_note

# Compute within 5% is called the same; losses are compared at the three places we print.
_SAME_COMPUTE = 0.05
_KINDS = {"scale_up": "larger model", "scale_out": "mixture of experts"}


@dataclass(frozen=True)
class Comparison:
    """A grown run against a run of the same model from scratch.

    Attributes:
        compute: FLOPs of the grown lineage over those of the control.
        saving: How many times less compute the winner needed to reach the loser's final loss;
            None where no validation was logged by then, or nobody won.
    """

    grown: Entry
    control: Entry
    compute: float
    saving: float | None

    @property
    def winner(self) -> str:
        """`grown`, `scratch`, `tie`, or `open` while a loss is missing or a run unfinished."""
        grown, scratch = round(self.grown.last_loss, 3), round(self.control.last_loss, 3)
        if math.isnan(grown) and math.isnan(scratch):
            return "open"
        if not (self.grown.stage.finished and self.control.stage.finished):
            return "open"
        if grown == scratch:
            return "tie"
        # A loss that is NaN has diverged, and lost.
        return "grown" if grown < scratch or math.isnan(scratch) else "scratch"

    @property
    def same_compute(self) -> bool:
        """Whether both spent about as much."""
        return abs(self.compute - 1) <= _SAME_COMPUTE


def compare(entries: Sequence[Entry]) -> list[Comparison]:
    """Every grown run with every control of its model."""
    pairs = [
        (tip, other)
        for tip in tips(entries)
        if tip.run is not None and len(tip.stages) > 1
        for other in entries
        if other.is_control and other.stage.model == tip.stage.model
    ]
    return [_comparison(tip, control) for tip, control in pairs]


def _comparison(tip: Entry, control: Entry) -> Comparison:
    compute = tip.total_flops / control.total_flops if control.total_flops else math.inf
    bare = Comparison(tip, control, compute, None)
    if bare.winner not in ("grown", "scratch"):
        return bare
    winner, loser = (tip, control) if bare.winner == "grown" else (control, tip)
    spent = _flops_to_reach(winner, loser.last_loss)
    saving = loser.total_flops / spent if spent else None
    return Comparison(tip, control, compute, saving)


def _flops_to_reach(entry: Entry, loss: float) -> float | None:
    """Cumulative FLOPs of the first validation at `loss` or below."""
    if entry.run is None:
        return None
    reached = np.flatnonzero(entry.run.validation.column("loss") <= loss)
    flops = float(entry.run.validation.column("flops")[reached[0]]) if len(reached) else 0.0
    return flops if flops > 0 else None


def title(entries: Sequence[Entry]) -> str:
    """The result in one line."""
    comparisons = compare(entries)
    if not comparisons:
        return _title_alone(entries)
    first = comparisons[0]
    grown, scratch = words.loss(first.grown.last_loss), words.loss(first.control.last_loss)
    if first.winner == "open":
        return f"Not decided yet: {grown} grown, {scratch} from scratch"
    if first.winner == "tie":
        return f"A tie: grown and from scratch both end at {grown}"
    grown_won = first.winner == "grown"
    losses = f"{grown} against {scratch} from scratch"
    if not grown_won:
        losses = f"{scratch} against {grown} grown"
    name = "Growing" if grown_won else "From scratch"
    if first.same_compute:
        return f"{name} won: {losses}"
    times = first.compute if grown_won else 1 / first.compute if first.compute else math.inf
    return f"{name} ended lower, with {times:.2f} times the compute: {losses}"


def _title_alone(entries: Sequence[Entry]) -> str:
    tip = (*tips(entries), entries[0])[0]
    stages = len(tip.stages)
    after = "one stage" if stages == 1 else f"{stages} stages"
    if not tip.stage.finished:
        return f"At {words.loss(tip.last_loss)} in the last of {after}, unfinished"
    return f"Finished at {words.loss(tip.last_loss)} after {after}"


def sentences(entries: Sequence[Entry]) -> list[str]:
    """One sentence for every stage and every comparison, newest first."""
    told = []
    comparisons = compare(entries)
    for tip in tips(entries):
        mine = [c for c in comparisons if c.grown is tip]
        told.append(_stage_sentence(tip, [_scratch_clause(c) for c in mine]))
        told += [text for c in mine if (text := _saving_sentence(c))]
    inner = [e for e in entries if not e.is_control and e not in tips(entries)]
    told += [_stage_sentence(entry, []) for entry in reversed(inner)]
    told += [f"{unfinished_note(e)}." for e in entries if not e.stage.finished]
    if comparisons:
        told.append(
            "Every curve is a single run: a gap as small as the spread between seeds says nothing."
        )
    return list(dict.fromkeys(told))


def _stage_sentence(entry: Entry, clauses: Sequence[str]) -> str:
    stage, end = entry.stage, words.loss(entry.last_loss)
    start = words.loss(stage.validation_start.get(MEAN))
    last = f"finished at {end}" if stage.finished else f"stands at {end}"
    if len(entry.stages) < 2 or stage.origin not in _KINDS:
        text = f"{_capital(_kind(entry))} started at {start} from scratch and {last}"
    else:
        before = words.loss(entry.stages[-2].validation_end.get(MEAN))
        parent = _kind_before(entry)
        text = (
            f"Started the {_KINDS[stage.origin]} ({entry.label}) at {start} "
            f"({parent} ended at {before}) and {last}"
        )
    return "; ".join([text, *clauses]) + "."


def _scratch_clause(comparison: Comparison) -> str:
    control = comparison.control
    compute = "the same compute"
    if not comparison.same_compute:
        times = 1 / comparison.compute if comparison.compute else math.inf
        compute = f"{times:.2f} times the compute"
    state = "" if control.stage.finished else ", unfinished"
    return f"from scratch with {compute}{state}: {words.loss(control.last_loss)}"


def _saving_sentence(comparison: Comparison) -> str:
    saving = comparison.saving
    if saving is None or saving < 1.005:
        return ""
    if comparison.winner == "grown":
        who, whom = "The grown lineage", "the run from scratch"
    else:
        who, whom = "The run from scratch", "the grown lineage"
    return f"{who} passed the final loss of {whom} with {saving:.2f} times less compute."


def _kind(entry: Entry) -> str:
    shape = "mixture of experts" if entry.stage.experts else "dense model"
    return f"the {shape} ({entry.label})"


def _kind_before(entry: Entry) -> str:
    if entry.stage.origin == "scale_up":
        return "the smaller one"
    return "the mixture before it" if entry.stages[-2].experts else "the dense model"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
