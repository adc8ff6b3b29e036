import json

from aquila_jax.training.ledger import Ledger, Stage
from aquila_jax.training.metrics import MetricsWriter

from .synthetic import TINY


def _ledger(steps: int) -> Ledger:
    parent = Stage("1", "scratch", "", TINY, 10, 10, tokens=1000, flops=2e6, seconds=3.0)
    return Ledger((parent, Stage("2", "scale_up", "fpi", TINY, 9, steps, tokens=10 * steps)))


def test_rows_count_the_whole_lineage_and_reach_tensorboard(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.write("train", _ledger(2), {"loss": 1.5})
    writer.close()
    (row,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert row == {
        "split": "train", "step": 2, "tokens": 1020, "flops": 2e6, "seconds": 3.0, "loss": 1.5
    }  # fmt: skip
    assert any(path.stat().st_size > 0 for path in (tmp_path / "tensorboard").iterdir())


def test_going_on_from_a_checkpoint_drops_rows_of_lost_updates_and_half_lines(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    for step in (1, 2, 3):
        writer.write("train", _ledger(step), {"loss": 1.0})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"split": "train", "st')
    writer = MetricsWriter(tmp_path, 2)
    writer.write("train", _ledger(3), {"loss": 0.5})
    writer.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 1.0), (3, 0.5)]
