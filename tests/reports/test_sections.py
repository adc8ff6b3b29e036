"""Parts of the page, each by itself."""

import re

import pytest

from aquila_jax.reports import read_run, sections
from aquila_jax.reports.lineup import lineup

from .synthetic import four_runs, stage, write_run


@pytest.fixture(scope="module")
def entries(tmp_path_factory):
    root = tmp_path_factory.mktemp("sections")
    return lineup([read_run(directory) for directory in four_runs(root)])


def test_the_first_numbers_are_of_the_last_grown_model(entries):
    told = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", sections.tiles(entries)))
    assert told["final loss"] == "3.620"
    assert told["against from scratch"] == "-0.170"
    assert told["parameters"] == "15.6M"
    assert told["training FLOPs"] == "6.40e13"


def test_a_run_that_has_not_ended_is_told_so(tmp_path):
    unfinished = write_run(tmp_path / "run", [stage(steps=100)])
    told = sections.tiles(lineup([read_run(unfinished)]))
    assert "loss so far" in told
    assert "final loss" not in told
    assert "from scratch" not in told


def test_colours_are_explained_for_runs_that_are_drawn(entries, tmp_path):
    assert sections.legend(entries).count("<li>") == 4
    # Ancestors that are known from a ledger alone have no curves.
    alone = lineup([read_run(four_runs(tmp_path)[2])])
    assert len(alone) == 3
    assert sections.legend(alone).count("<li>") == 1


def test_the_main_chart_can_be_switched_without_a_script(entries):
    chart = sections.main_chart(entries)
    assert chart.count('type="radio"') == chart.count('class="panel"') == 3
    assert chart.count(" checked") == 1
    assert len(re.findall(r'<label for="(axis-\d)">', chart)) == 3


def test_languages_are_drawn_where_there_are_several(entries, tmp_path):
    assert sections.language_charts(entries).count("<figure>") == 2
    one = stage(validation_start={"en": 9.0, "mean": 9.0}, validation_end={"en": 4.0, "mean": 4.0})
    alone = read_run(write_run(tmp_path / "run", [one]))
    assert sections.language_charts(lineup([alone])) == ""


def test_what_was_not_logged_is_not_drawn(entries, tmp_path):
    assert "Router z loss" in sections.training_charts(entries)
    dense = lineup([read_run(write_run(tmp_path / "run", [stage()]))])
    assert "Gradient norm" in sections.training_charts(dense)
    assert "Router z loss" not in sections.training_charts(dense)


def test_runs_on_equal_machines_share_one_list(entries, tmp_path):
    assert sections.environments(entries).count("<h3>") == 1
    runs = [
        read_run(write_run(tmp_path / name, [stage(name)], environment={"jax": version}))
        for name, version in (("a", "1"), ("b", "2"))
    ]
    assert sections.environments(lineup(runs)).count("<h3>") == 2
