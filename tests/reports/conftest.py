"""One page that several files look at."""

import pytest

from aquila_jax.reports import read_run, write_page

from .synthetic import four_runs


@pytest.fixture(scope="session")
def page(tmp_path_factory):
    root = tmp_path_factory.mktemp("page")
    runs = [read_run(directory) for directory in four_runs(root)]
    return write_page(runs, root / "report.html", flops_note="Counted so.")
