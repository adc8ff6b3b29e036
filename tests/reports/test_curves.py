import numpy as np
import pytest

from aquila_jax.reports import read_run
from aquila_jax.reports.axes import FLOPS, LOG_FLOPS, TOKENS
from aquila_jax.reports.curves import callouts, limits, loss_lines, smooth
from aquila_jax.reports.lineup import lineup

from .synthetic import WIDE, four_runs, losses, stage, write_run

ONE = stage()


@pytest.fixture
def lines(tmp_path):
    return loss_lines(lineup([read_run(d) for d in four_runs(tmp_path)]), LOG_FLOPS)


def test_one_link_for_every_growth_is_vertical(lines):
    links = [line for line in lines if line.kind == "link"]
    assert [line.label for line in links] == ["2 scale-up", "3 scale-out"]
    for line in links:
        assert line.x[0] == pytest.approx(line.x[1])
    np.testing.assert_allclose(links[0].y, [4.0, 4.92])


def test_every_stage_stays_in_sight(lines):
    shown = limits(lines, LOG_FLOPS)
    assert shown is not None
    for line in lines:
        assert shown.shows(line).any()
    assert shown.right - shown.left < 2.2


def test_a_tiny_first_stage_is_not_cropped_away(tmp_path):
    one = stage(flops=1e9)
    two = stage("up", "scale_up", flops=1e14)
    runs = [read_run(write_run(tmp_path / str(k), s)) for k, s in enumerate([[one], [one, two]])]
    shown = limits(loss_lines(lineup(runs), LOG_FLOPS), LOG_FLOPS)
    assert shown is not None
    assert shown.left < 9


@pytest.mark.parametrize(("start", "jumps"), [(4.92, False), (8.7, True)])
def test_a_jump_that_would_flatten_the_ends_leaves_the_frame(tmp_path, start, jumps):
    two = stage("up", "scale_up", WIDE, validation_start=losses(start), validation_end=losses(3.8))
    runs = [read_run(write_run(tmp_path / str(k), s)) for k, s in enumerate([[ONE], [ONE, two]])]
    lines = loss_lines(lineup(runs), LOG_FLOPS)
    shown = limits(lines, LOG_FLOPS)
    assert shown is not None
    assert (shown.high < start) == jumps
    told = [callout.text for callout in callouts(lines, shown)]
    assert told == ["4.000", "3.800", *(["↑ 8.700"] if jumps else [])]


def test_what_is_not_finite_is_left_out(tmp_path):
    rows = [
        {"split": "validation", "step": k, "flops": 10.0 * k, "tokens": k, "loss": loss}
        for k, loss in enumerate([5.0, float("nan"), 4.0])
    ]
    entries = lineup([read_run(write_run(tmp_path / "run", [stage()], rows))])
    (log,), (linear,) = loss_lines(entries, LOG_FLOPS), loss_lines(entries, TOKENS)
    np.testing.assert_array_equal(log.y, [4.0])
    np.testing.assert_array_equal(linear.y, [5.0, 4.0])


def test_the_run_up_does_not_set_the_scale_of_a_linear_axis(tmp_path):
    entries = lineup([read_run(directory) for directory in four_runs(tmp_path)])
    shown = limits(loss_lines(entries, FLOPS), FLOPS)
    assert shown is not None
    assert shown.left < 0 < 6.4e13 < shown.right
    assert 4.92 < shown.high < 8


@pytest.mark.parametrize("axis", [FLOPS, LOG_FLOPS])
@pytest.mark.parametrize("flops", [0.0, 1e13])
def test_a_single_point_has_limits(tmp_path, axis, flops):
    row = {"split": "validation", "step": 0, "flops": flops, "loss": 9.0}
    lines = loss_lines(lineup([read_run(write_run(tmp_path / "run", [ONE], [row]))]), axis)
    shown = limits(lines, axis)
    assert (shown is None) == (flops == 0 and axis is LOG_FLOPS)
    if shown is not None:
        assert shown.shows(lines[0]).all()


def test_no_lines_have_no_limits():
    assert limits([], LOG_FLOPS) is None


def test_smoothing_keeps_a_straight_line_and_its_ends():
    straight = np.linspace(3.0, 1.0, 50)
    np.testing.assert_allclose(smooth(straight, 5), straight)
