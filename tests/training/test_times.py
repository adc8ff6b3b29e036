import json
import time

import pytest

from aquila_jax.training import train
from aquila_jax.training.times import KINDS, Times

from .synthetic import tiny_run


def test_goodput_is_the_share_of_steps_in_all_time():
    times = Times({"step": 30.0, "compile": 10.0})
    times.add("lost", 20.0)
    assert times.goodput == pytest.approx(0.5)
    with times.of("data"):
        time.sleep(0.02)
    assert 0.02 <= times.seconds()["data"] < 1
    assert str(times).startswith("goodput ")


def test_nothing_spent_is_no_goodput():
    assert Times().goodput == 0.0


def _rows(run):
    return [json.loads(line) for line in (run.path / "metrics.jsonl").open()]


def test_rows_and_ledger_tell_where_the_time_went_and_a_restart_what_was_lost(tmp_path):
    run = tiny_run(tmp_path, steps=12, checkpoint_every=5)
    train(run)
    rows = _rows(run)
    for row in (row for row in rows if row["split"] == "train"):
        spent = [row[f"seconds_{kind}"] for kind in KINDS]
        assert row["goodput"] == pytest.approx(row["seconds_step"] / sum(spent))
        assert row["seconds_lost"] == 0
    # As if killed after step 12, before its checkpoint: what steps 11 and 12 took is lost.
    (tmp_path / "checkpoints" / "12").rename(tmp_path / "12")
    ledger = train(run)
    spent = ledger.current.spent
    assert spent is not None
    kept = json.loads((tmp_path / "checkpoints" / "10" / "meta" / "metadata").read_text())
    at_ten = kept["ledger"]["stages"][0]["seconds"]
    assert spent["lost"] == pytest.approx(rows[-1]["seconds"] - at_ten, abs=1e-6)
    assert [row["step"] for row in _rows(run) if row["split"] == "train"] == list(range(1, 13))
