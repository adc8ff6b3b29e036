import json

import numpy as np
import pytest

from aquila_jax.errors import UserError
from aquila_jax.reports.metrics import columns, read_rows


def row(step: int, loss: float | None, split: str = "train", **more: object) -> str:
    return json.dumps({"split": split, "step": step, "loss": loss, "flops": step * 10.0, **more})


def read(path, *lines: str):
    path.write_text("\n".join(lines))
    return read_rows(path)


def test_later_line_wins_and_steps_are_in_order(tmp_path):
    rows = read(tmp_path / "m", row(1, 5.0), row(2, 4.0), row(3, 3.0), row(2, 4.5), row(3, 3.5))
    train = columns(rows, "train")
    np.testing.assert_array_equal(train.column("step"), [1, 2, 3])
    np.testing.assert_array_equal(train.column("loss"), [5.0, 4.5, 3.5])


def test_splits_are_apart(tmp_path):
    rows = read(tmp_path / "m", row(1, 5.0), row(1, 6.0, "validation", loss_en=5.5))
    assert columns(rows, "train").column("loss")[0] == 5.0
    assert columns(rows, "validation").column("loss_en")[0] == 5.5


@pytest.mark.parametrize("cut", ['{"split": "tr', "{", "\0\0"])
def test_cut_last_line_is_ignored(tmp_path, cut):
    assert len(read(tmp_path / "m", row(1, 5.0), cut)) == 1


def test_a_row_glued_to_a_cut_line_costs_that_line_alone(tmp_path):
    rows = read(tmp_path / "m", row(1, 5.0), '{"split": "tr' + row(1, 5.0), row(2, 4.0))
    assert [r["step"] for r in rows] == [1, 2]


def test_missing_and_odd_numbers_are_nan(tmp_path):
    odd = row(2, None, note="text", flag=True)
    train = columns(read(tmp_path / "m", row(1, 5.0, grad_norm=1.0), odd), "train")
    np.testing.assert_array_equal(train.column("loss"), [5.0, np.nan])
    np.testing.assert_array_equal(train.column("grad_norm"), [1.0, np.nan])
    assert not train.has("note")
    assert not train.has("never_logged")


def test_no_rows(tmp_path):
    train = columns(read(tmp_path / "m", ""), "train")
    assert len(train) == 0
    assert not train.has("loss")


@pytest.mark.parametrize("line", ["oops", '{"loss": 3}', "[1]", '{"split": "train", "step": "3"}'])
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    with pytest.raises(UserError, match=r"m, line 2 .*delete that line"):
        read(tmp_path / "m", row(1, 5.0), line, row(2, 4.0))
