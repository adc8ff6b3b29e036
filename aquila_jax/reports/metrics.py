"""The rows that a run logged, as columns."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from aquila_jax.errors import UserError


@dataclass(frozen=True)
class Rows:
    """The logged rows of one split, in order of steps, as columns of float64.

    A number that a row did not log is NaN. `tokens`, `flops` and `seconds` count from the
    beginning of the lineage; `step` counts from the beginning of the run.
    """

    columns: Mapping[str, Float[np.ndarray, " rows"]]

    def __len__(self) -> int:
        return len(self.columns["step"])

    def column(self, name: str) -> Float[np.ndarray, " rows"]:
        """Values of `name`, all NaN where it was never logged."""
        return self.columns.get(name, np.full(len(self), np.nan))

    def has(self, name: str) -> bool:
        """Whether any row has a finite `name`."""
        return bool(np.isfinite(self.column(name)).any())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The logged lines as they stand, without those that a crash cut short.

    Raises:
        UserError: The file cannot be read, or a line is not a row; the message names it.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): make it readable") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            # A crash cuts the last line; the resumed run may then have written on behind it.
            if number == len(lines) or line.startswith("{"):
                continue
            raise UserError(f"{path}, line {number} is not JSON: delete that line") from error
        if not isinstance(row, dict) or "split" not in row or not _is_number(row.get("step")):
            raise UserError(f"{path}, line {number} has no split and step: delete that line")
        rows.append(row)
    return rows


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def columns(rows: Iterable[dict[str, Any]], split: str) -> Rows:
    """The rows of one split; of a step that was logged twice the later row counts."""
    latest = {row["step"]: row for row in rows if row["split"] == split}
    ordered = [latest[step] for step in sorted(latest)]
    names = dict.fromkeys(key for row in ordered for key in row if _is_number(row[key]))
    table = {
        name: np.asarray(
            [row[name] if _is_number(row.get(name)) else math.nan for row in ordered], np.float64
        )
        for name in ("step", *names)
    }
    return Rows(table)
