import pytest

from aquila_jax.errors import UserError
from aquila_jax.reports import is_control, read_run
from aquila_jax.reports.lineup import lineup, tips

from .synthetic import MOE, WIDE, four_runs, losses, stage, write_run


def test_control_is_recognised_wherever_it_stands(tmp_path):
    runs = [read_run(directory) for directory in four_runs(tmp_path)]
    assert [is_control(run, runs) for run in runs] == [False, False, False, True]
    labels = ["1 dense", "2 scale-up", "3 scale-out", "control moe"]
    assert [entry.label for entry in lineup(runs)] == labels
    assert [entry.label for entry in lineup(runs[::-1])] == labels


def test_scratch_run_of_another_model_is_no_control(tmp_path):
    one, two, _, _ = four_runs(tmp_path / "a")
    other = write_run(tmp_path / "b", [stage("big", model={**MOE, "num_layers": 9})])
    runs = [read_run(directory) for directory in (one, two, other)]
    assert not is_control(runs[2], runs)


def test_first_stage_is_no_control_of_a_growth_that_keeps_the_shape(tmp_path):
    one, two = stage(), stage("again", "scale_up")
    runs = [read_run(write_run(tmp_path / str(k), s)) for k, s in enumerate([[one], [one, two]])]
    assert not is_control(runs[0], runs)


def test_ancestors_come_from_the_ledger(tmp_path):
    entries = lineup([read_run(four_runs(tmp_path)[2])])
    assert [entry.label for entry in entries] == ["1 dense", "2 scale-up", "3 scale-out"]
    assert [entry.run is None for entry in entries] == [True, True, False]
    assert [entry.style for entry in entries] == ["s0", "s0", "s0"]


def test_branches_are_told_apart(tmp_path):
    one = stage()
    branches = [("aki", 3.7), ("fpi", 3.8), ("fpi", 3.9)]
    runs, two = [read_run(write_run(tmp_path / "root", [one]))], {}
    for k, (method, end) in enumerate(branches):
        two = stage("up", "scale_up", WIDE, method=method, validation_end=losses(end))
        runs.append(read_run(write_run(tmp_path / f"run{k}", [one, two])))
    entries = lineup(runs)
    labels = [entry.label for entry in entries]
    assert labels == ["1 dense", "2 up [aki]", "2 up [fpi] [run1]", "2 up [fpi] [run2]"]
    assert [entry.label for entry in tips(entries)] == labels[1:]
    three = [one, two, stage("out", "scale_out", MOE)]
    deeper = lineup([*runs, read_run(write_run(tmp_path / "three", three))])
    assert tips(deeper)[0].label == "3 out"
    assert len({entry.style for entry in entries}) == 4


def test_nothing_or_the_same_twice_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match="at least one MODEL_DIR"):
        lineup([])
    run = read_run(write_run(tmp_path / "run", [stage()]))
    with pytest.raises(UserError, match="given twice"):
        lineup([run, run])
