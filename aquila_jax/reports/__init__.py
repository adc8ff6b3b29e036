"""Reports on training runs: a table, the paper's picture, and a page to look at.

paths = write_report(["runs/dense", "runs/scale_up", "runs/scale_out", "runs/control"], "out")
print(paths.table)
"""

from aquila_jax.reports.figure import loss_figure
from aquila_jax.reports.lineup import is_control
from aquila_jax.reports.page import FLOPS_NOTE, write_page
from aquila_jax.reports.records import Certificate, Leaf, Rows, Run, Stage, read_run
from aquila_jax.reports.table import stage_table
from aquila_jax.reports.write import ReportPaths, write_report

__all__ = [
    "FLOPS_NOTE",
    "Certificate",
    "Leaf",
    "ReportPaths",
    "Rows",
    "Run",
    "Stage",
    "is_control",
    "loss_figure",
    "read_run",
    "stage_table",
    "write_page",
    "write_report",
]
