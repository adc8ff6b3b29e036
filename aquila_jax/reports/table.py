"""The stages as a table: for the terminal here, and the same cells for the page."""

from collections.abc import Sequence
from dataclasses import dataclass

from aquila_jax.reports import words
from aquila_jax.reports.lineup import Entry, lineup
from aquila_jax.reports.records import MEAN, Run

MAX_WIDTH = 148
_GAP = "  "


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column names the stage, the others hold numbers."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def stage_table(runs: Sequence[Run]) -> str:
    """What each stage cost and reached, as aligned plain text.

    Args:
        runs: The runs of one report, in any order.

    Returns:
        Lines of fewer than 150 characters, without a line feed at the end. Columns that do not
        fit (many languages) go on in further blocks below, each beginning with the stage.

    Raises:
        UserError: No run was given, or one was given twice.
    """
    table = tabulate(lineup(runs))
    blocks = [_aligned(table, columns) for columns in _blocks(table)]
    return "\n\n".join([*blocks, "\n".join(table.notes)] if table.notes else blocks)


def tabulate(entries: Sequence[Entry]) -> Table:
    """The cells of the table, one row for every entry."""
    languages = tuple(dict.fromkeys(name for e in entries for name in e.stage.languages))
    header = ["stage", "parameters", "active", "steps", "tokens", "FLOPs", "total FLOPs", "time"]
    # With a single language its loss is the mean: one pair of columns tells it.
    shown = (MEAN, *languages) if len(languages) > 1 else (MEAN,)
    for name in shown:
        suffix = "" if name == MEAN else f" {words.clip(name, 12)}"
        header += [f"start{suffix}", f"end{suffix}"]
    return Table(
        header=tuple(header),
        rows=tuple(_row(entry, shown) for entry in entries),
        notes=tuple(unfinished_note(entry) for entry in entries if not entry.stage.finished),
    )


def unfinished_note(entry: Entry) -> str:
    """One line on a run that has not come to its end."""
    stage = entry.stage
    note = f"{entry.label} is unfinished: step {stage.steps} of {stage.planned_steps}"
    if MEAN not in stage.validation_end and entry.last_loss == entry.last_loss:
        note += f", latest validation loss {words.loss(entry.last_loss)}"
    return note


def _row(entry: Entry, shown: Sequence[str]) -> tuple[str, ...]:
    stage = entry.stage
    steps = f"{stage.steps}" if stage.finished else f"{stage.steps}/{stage.planned_steps}"
    cells = [
        entry.label,
        words.count(stage.parameters),
        words.count(stage.active_parameters),
        steps,
        words.count(stage.tokens),
        words.power(stage.flops),
        words.power(entry.total_flops),
        words.duration(stage.seconds),
    ]
    for name in shown:
        cells += [words.loss(stage.validation_start.get(name))]
        cells += [words.loss(stage.validation_end.get(name))]
    return tuple(cells)


def _widths(table: Table) -> list[int]:
    return [max(map(len, column)) for column in zip(table.header, *table.rows, strict=True)]


def _blocks(table: Table) -> list[list[int]]:
    widths = _widths(table)
    blocks, room = [[0]], MAX_WIDTH - widths[0]
    for column in range(1, len(widths)):
        if room < widths[column] + len(_GAP):
            blocks.append([0])
            room = MAX_WIDTH - widths[0]
        blocks[-1].append(column)
        room -= widths[column] + len(_GAP)
    return blocks


def _aligned(table: Table, columns: Sequence[int]) -> str:
    widths = _widths(table)

    def line(cells: Sequence[str]) -> str:
        first, *rest = columns
        numbers = [cells[column].rjust(widths[column]) for column in rest]
        return _GAP.join([cells[first].ljust(widths[first]), *numbers]).rstrip()

    rule = _GAP.join("-" * widths[column] for column in columns)
    return "\n".join([line(table.header), rule, *map(line, table.rows)])
