import time

import pytest

from aquila_jax.errors import UserError
from aquila_jax.reports import write_report

from .synthetic import four_runs, stage, write_run


def test_writes_everything_and_nothing_else(tmp_path):
    dirs = four_runs(tmp_path / "runs")
    began = time.perf_counter()
    paths = write_report(dirs, tmp_path / "deep" / "out")
    assert time.perf_counter() - began < 20  # 2 s alone; the machine may be busy.
    names = sorted(path.name for path in (tmp_path / "deep" / "out").iterdir())
    assert names == ["report.html", "report.png"]
    assert paths.html.stat().st_size > 10_000
    assert paths.png.stat().st_size > 10_000
    assert "3 scale-out" in paths.table


def test_a_failure_leaves_the_former_report(tmp_path):
    first = write_run(tmp_path / "run", [stage()])
    paths = write_report([first], tmp_path / "out")
    before = paths.png.read_bytes()
    empty = write_run(tmp_path / "empty", [stage()], [])
    with pytest.raises(UserError, match="no loss was logged"):
        write_report([empty], tmp_path / "out")
    assert paths.png.read_bytes() == before
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match=r"cannot write a report into .*out"):
        write_report([write_run(tmp_path / "run", [stage()])], tmp_path / "out")


def test_mistakes_come_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match="at least one"):
        write_report([], tmp_path / "out")
    assert not (tmp_path / "out").exists()
