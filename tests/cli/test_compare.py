"""`aquila compare`: verdicts, and what goes into a report."""

import pytest

from aquila_jax.reports.verdicts import read_comparisons


def test_compare_gives_a_verdict_for_each_task(table, models):
    rows = table("compare", "one", "two", "one", "--text", "text.txt", "--limit", "2")
    assert [row[0] for row in rows if row[0].startswith("#")] == ["# one -> two", "# two -> one"]
    first, back = (row for row in rows if row[0] == "text, bits per byte")
    assert {first[5], back[5]} == {"better", "worse"}
    assert float(first[3]) == pytest.approx(-float(back[3]))


def test_a_comparison_goes_into_the_report(models, table):
    asked = ("--text", "text.txt", "--limit", "2", "--out", "compared.json")
    rows = table("compare", "one", "two", *asked)
    (found,) = read_comparisons("compared.json")
    assert (found.before, found.after) == ("one", "two")
    assert [[*task.cells] for task in found.tasks] == rows[2:]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["one", "--text", "text.txt"], "two models"),
        (["one", "absent", "--text", "text.txt"], "there is no model at 'absent'"),
        (["one", "two", "--text", "text.txt", "--out", "one"], "one is a directory: name a file"),
        (["one", "two", "--text", "text.txt", "--out", "no/x.json"], "there is no directory no to"),
        (
            ["one", "two", "--text", "text.txt", "--out", "/proc/x.json"],
            "cannot write /proc/x.json",
        ),
    ],
)
def test_mistakes_are_one_line(arguments, says, models, refused):
    assert says in refused("compare", *arguments)
