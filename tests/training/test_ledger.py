import json

import pytest

from aquila_jax import UserError
from aquila_jax.training.ledger import Ledger, Stage, steps_for_flops

from .synthetic import MIXTURE, TINY


def _two_stages() -> Ledger:
    first = Stage("1", "scratch", "", TINY, 10, 10, 1000, 2e6, 3.0, {"mean": 3.0}, {"mean": 2.0})
    second = Stage("2", "scale_out", "sparse_upcycling", MIXTURE, 5, 5, 500, 4e6, 1.0)
    return Ledger((first,)).begin(second)


def test_totals_are_sums_over_the_lineage():
    assert _two_stages().totals == {"tokens": 1500, "flops": 6e6, "seconds": 4.0}


def test_update_changes_the_current_stage_only():
    ledger = _two_stages()
    changed = ledger.update(steps=6, tokens=600)
    assert changed.current.tokens == 600
    assert changed.stages[0] == ledger.stages[0]
    assert ledger.current.tokens == 500


def test_a_ledger_survives_its_file(tmp_path):
    ledger = _two_stages()
    ledger.write(tmp_path)
    values = json.loads((tmp_path / "ledger.json").read_text())
    assert Ledger.from_dict(values) == ledger
    assert values["stages"][1]["active_parameters"] < values["stages"][1]["parameters"]


def test_steps_for_flops_rounds_to_the_nearest_step_and_makes_one_at_least():
    assert [steps_for_flops(budget, 10.0) for budget in (1.0, 24.0, 26.0)] == [1, 2, 3]
    with pytest.raises(UserError, match="0 FLOPs"):
        steps_for_flops(0.0, 10.0)
