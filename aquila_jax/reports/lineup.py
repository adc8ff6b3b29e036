"""Puts runs in order: which follow each other, which is a control, what each is called."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from aquila_jax.errors import UserError
from aquila_jax.reports import words
from aquila_jax.reports.records import MEAN, Run, Stage


@dataclass(frozen=True)
class Entry:
    """One row of the report: a stage, and its run where that was given.

    Attributes:
        label: What the report calls it, different for every entry: `2 scale-up`.
        stages: The lineage up to and including the stage.
        run: The run; None for an ancestor that is known from a later run's ledger alone.
        is_control: A from-scratch run of the very model that another lineage grew.
        slot: Number of the colour, counted for the runs and for the controls apart.
    """

    label: str
    stages: tuple[Stage, ...]
    run: Run | None
    is_control: bool = False
    slot: int = 0

    @property
    def stage(self) -> Stage:
        """The entry's own stage."""
        return self.stages[-1]

    @property
    def total_flops(self) -> float:
        """Training FLOPs from the beginning of the lineage to the end of the stage."""
        return math.fsum(stage.flops for stage in self.stages)

    @property
    def style(self) -> str:
        """Name of the colour, from the start again after six: `s0` for runs, `c0` for controls."""
        return f"c{self.slot % 3}" if self.is_control else f"s{self.slot % 6}"

    @property
    def legend(self) -> str:
        """Label and size: `3 scale-out · 9.8M (3.4M active)`."""
        stage, size = self.stage, words.count(self.stage.parameters)
        if stage.active_parameters != stage.parameters:
            size += f" ({words.count(stage.active_parameters)} active)"
        return f"{self.label} · {size}"

    @property
    def last_loss(self) -> float:
        """Mean validation loss at the end, or the latest of an unfinished run; NaN if none."""
        if MEAN in self.stage.validation_end:
            return self.stage.validation_end[MEAN]
        if self.run is not None and self.run.validation.has("loss"):
            return float(self.run.validation.column("loss")[-1])
        return math.nan


def is_control(run: Run, runs: Sequence[Run]) -> bool:
    """Whether `run` is a from-scratch run of a model that one of `runs` grew instead."""
    return (
        len(run.stages) == 1
        and run.stage.origin == "scratch"
        and any(
            len(other.stages) > 1
            and other.stage.model == run.stage.model
            and other.stages[0] != run.stage
            for other in runs
        )
    )


def lineup(runs: Sequence[Run]) -> tuple[Entry, ...]:
    """Every stage of every lineage once, in order of depth, the controls last.

    Args:
        runs: At least one run; lineages may share their first stages.

    Returns:
        One entry for every run, and one for every ancestor that no run was given for.

    Raises:
        UserError: No run was given, or one was given twice.
    """
    if not runs:
        raise UserError("a report needs at least one MODEL_DIR")
    directories = [run.directory.resolve() for run in runs]
    for directory in directories:
        if directories.count(directory) > 1:
            raise UserError(f"{directory} was given twice: give each MODEL_DIR once")
    entries = [
        Entry(words.clip(run.stage.name, 24), run.stages, run, is_control(run, runs))
        for run in runs
    ]
    given = [entry.stages for entry in entries]
    for run in runs:
        for depth in range(1, len(run.stages)):
            lineage = run.stages[:depth]
            if lineage not in given:
                given.append(lineage)
                entries.append(Entry(words.clip(lineage[-1].name, 24), lineage, None))
    entries.sort(key=lambda entry: (entry.is_control, len(entry.stages)))
    return _coloured(_labelled(entries))


def tips(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """The entries that no other continues, controls aside, those of most stages first."""
    found = [
        entry
        for entry in entries
        if not entry.is_control
        and not any(
            len(other.stages) > len(entry.stages)
            and other.stages[: len(entry.stages)] == entry.stages
            for other in entries
        )
    ]
    return tuple(sorted(found, key=lambda entry: -len(entry.stages)))


def _labelled(entries: Sequence[Entry]) -> list[Entry]:
    def label(entry: Entry) -> str:
        if not entry.is_control:
            return f"{len(entry.stages)} {entry.label}"
        return entry.label if "control" in entry.label.lower() else f"control {entry.label}"

    labelled = [replace(entry, label=label(entry)) for entry in entries]
    # Two branches of one lineage may bear the same name: tell them by method, then by directory.
    for detail in (_method, _directory):
        labels = [entry.label for entry in labelled]
        labelled = [
            replace(entry, label=f"{entry.label} [{detail(entry)}]")
            if labels.count(entry.label) > 1 and detail(entry)
            else entry
            for entry in labelled
        ]
    return labelled


def _method(entry: Entry) -> str:
    return entry.stage.method


def _directory(entry: Entry) -> str:
    return words.clip(entry.run.directory.resolve().name, 20) if entry.run else "ledger"


def _coloured(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    slots = {True: 0, False: 0}
    coloured = []
    for entry in entries:
        coloured.append(replace(entry, slot=slots[entry.is_control]))
        slots[entry.is_control] += entry.run is not None
    return tuple(coloured)
