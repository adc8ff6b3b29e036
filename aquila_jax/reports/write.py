"""Writes the whole report at once."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from aquila_jax.errors import UserError
from aquila_jax.reports.figure import loss_figure
from aquila_jax.reports.lineup import lineup
from aquila_jax.reports.page import write_page
from aquila_jax.reports.records import read_run
from aquila_jax.reports.table import stage_table
from aquila_jax.reports.verdicts import read_comparisons


@dataclass(frozen=True)
class ReportPaths:
    """Where the report is, and its table as text for the terminal."""

    png: Path
    html: Path
    table: str


def write_report(
    model_dirs: Sequence[str | Path], out_dir: str | Path, *, comparison: str | Path | None = None
) -> ReportPaths:
    """Reads runs and writes `report.png` and `report.html` into `out_dir`.

    Args:
        model_dirs: MODEL_DIRs: the stages of a lineage and its controls, in any order.
        out_dir: The directory to write into; made if need be. A reader of a former report there
            sees the old file or the new one, never half of either.
        comparison: A file of `aquila compare --out`, whose verdicts the page then shows.

    Returns:
        The paths and the table.

    Raises:
        UserError: A run cannot be read, none or the same was given, or `out_dir` cannot be
            written.
    """
    runs = [read_run(directory) for directory in model_dirs]
    lineup(runs)
    comparisons = [] if comparison is None else read_comparisons(comparison)
    out = Path(out_dir)
    png, page = out / "report.png", out / "report.html"
    try:
        out.mkdir(parents=True, exist_ok=True)
        _replace(png, lambda path: loss_figure(runs, path))
        _replace(page, lambda path: write_page(runs, path, comparisons=comparisons))
    except OSError as error:
        raise UserError(f"cannot write a report into {out} ({error}): give another one") from error
    return ReportPaths(png, page, stage_table(runs))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
