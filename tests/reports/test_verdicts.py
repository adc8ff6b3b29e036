import json

import pytest

from aquila_jax.errors import UserError
from aquila_jax.reports import write_report
from aquila_jax.reports.verdicts import (
    Comparison,
    TaskVerdict,
    read_comparisons,
    tables,
    to_json,
)

from .synthetic import stage, write_run
from .test_page import read

FOUND = [
    Comparison(
        "7b",
        "16b <i>",
        (
            TaskVerdict("ARC-e", 0.5608, 0.522, -0.06, -0.01, "worse"),
            TaskVerdict("MMLU", 0.46, 0.57, 0.09, 0.13, "better"),
        ),
    )
]


def test_what_is_written_is_read(tmp_path):
    file = tmp_path / "compared.json"
    file.write_text(json.dumps(to_json(FOUND)))
    assert read_comparisons(file) == FOUND


def test_a_row_says_the_difference_and_its_interval():
    assert FOUND[0].tasks[0].cells == (
        *("ARC-e", "0.5608", "0.5220", "-0.0388", "[-0.0600, -0.0100]", "worse"),
    )
    assert FOUND[0].text.splitlines()[0] == "# 7b -> 16b <i>"
    assert "<i>" not in tables(FOUND)


def test_the_page_shows_verdicts_where_models_were_compared(tmp_path):
    run = write_run(tmp_path / "run", [stage()])
    without = write_report([run], tmp_path / "without")
    assert "gained and lost" not in without.html.read_text()
    (tmp_path / "compared.json").write_text(json.dumps(to_json(FOUND)))
    given = write_report([run], tmp_path / "out", comparison=tmp_path / "compared.json")
    page = read(given.html)
    assert page.open == []
    assert {"7b to 16b <i>", "ARC-e", "-0.0388", "worse", "better"} <= set(page.text)


@pytest.mark.parametrize("content", ["{", "3", '[{"before": "a"}]', '[{"tasks": [1]}]'])
def test_other_files_are_refused_before_anything_is_written(tmp_path, content):
    run = write_run(tmp_path / "run", [stage()])
    (tmp_path / "compared.json").write_text(content)
    with pytest.raises(UserError, match="not what `aquila compare --out` writes"):
        write_report([run], tmp_path / "out", comparison=tmp_path / "compared.json")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="cannot be read"):
        read_comparisons(tmp_path / "none.json")
