import logging
import struct

import pytest

from aquila_jax.errors import UserError
from aquila_jax.reports import loss_figure, read_run

from .synthetic import four_runs, stage, write_run


def size(path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


@pytest.mark.parametrize("log", [True, False])
def test_draws_a_png(tmp_path, log, caplog, recwarn):
    runs = [read_run(directory) for directory in four_runs(tmp_path)]
    with caplog.at_level(logging.WARNING):
        path = loss_figure(runs, tmp_path / "report.png", log=log)
    assert size(path) == (1920, 1120)
    assert not caplog.records
    assert not recwarn.list


@pytest.mark.parametrize("name", ["$x_{", "_hidden", "中文", "a\nb", "<script>"])
def test_any_name_can_be_drawn(tmp_path, name, recwarn):
    run = read_run(write_run(tmp_path / "run", [stage(name)]))
    assert size(loss_figure([run], tmp_path / "report.png")) == (1920, 1120)
    assert not recwarn.list


def test_nothing_to_draw_is_told(tmp_path):
    run = read_run(write_run(tmp_path / "empty", [stage()], []))
    with pytest.raises(UserError, match=r"no loss was logged in .*empty"):
        loss_figure([run], tmp_path / "report.png")
