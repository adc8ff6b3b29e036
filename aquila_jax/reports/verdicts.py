"""What each model gained or lost on tasks, from the file that `aquila compare --out` writes."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from aquila_jax.errors import UserError
from aquila_jax.reports.svg import esc

_HEADER = ("task", "before", "after", "difference", "95% interval", "verdict")


class TaskVerdict(NamedTuple):
    """One task: both means, the interval of the difference, and what it comes to."""

    task: str
    before: float
    after: float
    low: float
    high: float
    verdict: str

    @property
    def cells(self) -> tuple[str, ...]:
        """As a row under the header, for people."""
        return (
            self.task,
            f"{self.before:.4f}",
            f"{self.after:.4f}",
            f"{self.after - self.before:+.4f}",
            f"[{self.low:+.4f}, {self.high:+.4f}]",
            self.verdict,
        )


class Comparison(NamedTuple):
    """One model against the one before it."""

    before: str
    after: str
    tasks: tuple[TaskVerdict, ...]

    @property
    def text(self) -> str:
        """For the terminal: a heading and columns divided by tabs."""
        rows = ["\t".join(row) for row in (_HEADER, *(found.cells for found in self.tasks))]
        return "\n".join((f"# {self.before} -> {self.after}", *rows))


def to_json(comparisons: Sequence[Comparison]) -> list[Mapping[str, object]]:
    """What `read_comparisons` reads."""
    return [
        {**found._asdict(), "tasks": [task._asdict() for task in found.tasks]}
        for found in comparisons
    ]


def read_comparisons(path: str | Path) -> list[Comparison]:
    """The comparisons of a file.

    Raises:
        UserError: there is none, or it is not what `aquila compare --out` writes.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        return [
            Comparison(
                found["before"],
                found["after"],
                tuple(
                    TaskVerdict(
                        str(task["task"]),
                        *(float(task[name]) for name in ("before", "after", "low", "high")),
                        verdict=str(task["verdict"]),
                    )
                    for task in found["tasks"]
                ),
            )
            for found in values
        ]
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not what `aquila compare --out` writes ({error!r}): make it anew"
        ) from error


def tables(comparisons: Sequence[Comparison]) -> str:
    """A table for each pair of models, as HTML."""
    head = "".join(f'<th scope="col">{esc(name)}</th>' for name in _HEADER)
    parts = []
    for found in comparisons:
        rows = "".join(
            f'<tr><th scope="row">{esc(name)}</th>'
            + "".join(f"<td>{esc(cell)}</td>" for cell in cells)
            + "</tr>"
            for name, *cells in (task.cells for task in found.tasks)
        )
        parts.append(
            f"<h3>{esc(f'{found.before} to {found.after}')}</h3>"
            f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
            f"<tbody>{rows}</tbody></table></div>"
        )
    return "".join(parts)
