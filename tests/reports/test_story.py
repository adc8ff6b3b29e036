import math

import pytest

from aquila_jax.reports import read_run
from aquila_jax.reports.lineup import lineup
from aquila_jax.reports.story import compare, sentences, title

from .synthetic import MOE, four_runs, losses, stage, write_run


def entries(root, **changes):
    return lineup([read_run(directory) for directory in four_runs(root, **changes)])


def test_growing_won(tmp_path):
    found = entries(tmp_path, grown=3.62, control=3.79)
    assert title(found) == "Growing won: 3.620 against 3.790 from scratch"
    assert sentences(found)[0] == (
        "Started the mixture of experts (3 scale-out) at 3.803 (the dense model ended at 3.800) "
        "and finished at 3.620; from scratch with the same compute: 3.790."
    )
    # The first validation of the last stage at 3.79 or below is its second, a tenth in.
    assert compare(found)[0].saving == pytest.approx(6.4e13 / (3.3e13 + 0.31e13))
    assert any(text.startswith("The grown lineage passed") for text in sentences(found))


def test_scratch_won(tmp_path):
    found = entries(tmp_path, grown=3.62, control=3.41)
    assert title(found) == "From scratch won: 3.410 against 3.620 grown"
    assert any(text.startswith("The run from scratch passed") for text in sentences(found))


def test_tie(tmp_path):
    assert title(entries(tmp_path, grown=3.6, control=3.6)).startswith("A tie")


def test_a_diverged_run_lost(tmp_path):
    found = entries(tmp_path, grown=3.6, control=math.nan)
    assert title(found) == "Growing won: 3.600 against NaN from scratch"
    assert compare(found)[0].saving is None


@pytest.mark.parametrize(
    ("flops", "end", "start"),
    [
        (3.2e13, 3.79, "Growing ended lower, with 2.00 times the compute"),
        (12.8e13, 3.41, "From scratch ended lower, with 2.00 times the compute"),
        (6.5e13, 3.79, "Growing won"),
    ],
)
def test_unequal_compute_is_told(tmp_path, flops, end, start):
    runs = [read_run(directory) for directory in four_runs(tmp_path / "a")[:3]]
    scratch = stage("moe", model=MOE, flops=flops, validation_end=losses(end))
    runs.append(read_run(write_run(tmp_path / "b", [scratch])))
    assert title(lineup(runs)).startswith(start)


def test_nobody_wins_before_the_end(tmp_path):
    runs = [read_run(directory) for directory in four_runs(tmp_path / "a")[:3]]
    scratch = stage("moe", model=MOE, steps=100, flops=1e13, validation_end=None)
    runs.append(read_run(write_run(tmp_path / "b", [scratch])))
    found = lineup(runs)
    assert title(found).startswith("Not decided yet: 3.620 grown")
    assert "unfinished" in sentences(found)[0]
    assert any("control moe is unfinished: step 100 of 500" in text for text in sentences(found))


def test_without_a_control(tmp_path):
    dirs = four_runs(tmp_path)
    assert title(lineup([read_run(d) for d in dirs[:3]])) == "Finished at 3.620 after 3 stages"
    assert title(lineup([read_run(dirs[0])])) == "Finished at 4.000 after one stage"
    assert sentences(lineup([read_run(dirs[0])])) == [
        "The dense model (1 dense) started at 9.000 from scratch and finished at 4.000."
    ]
