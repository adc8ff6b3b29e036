"""`aquila report`: table, figure and page of one or more runs."""

import argparse
from pathlib import Path
from typing import Any

from aquila_jax.cli.command import add_command, refuse_bindings


def add_to(commands: Any) -> None:
    """Declare the command."""
    command = add_command(
        commands,
        "report",
        _report,
        "table, figure and page of one or more runs",
        example="aquila report runs/7b runs/16b runs/8x16b --out runs",
    )
    command.add_argument("model_dirs", nargs="+", metavar="MODEL_DIR", help="runs, oldest first")
    command.add_argument(
        "--out", required=True, metavar="DIR", help="gets report.png and report.html"
    )
    command.add_argument(
        "--comparison", metavar="FILE", help="of aquila compare --out; shown on the page"
    )


def _report(arguments: argparse.Namespace, bindings: list[str]) -> int:
    from aquila_jax.reports import write_report

    refuse_bindings("report", bindings)
    paths = write_report(
        [Path(path) for path in arguments.model_dirs],
        Path(arguments.out),
        comparison=arguments.comparison,
    )
    print(paths.table)
    print(f"\nfigure: {paths.png}\nreport: {paths.html}")
    return 0
