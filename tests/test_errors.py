"""Mistakes, and how a process ends by them."""

import re

import numpy as np
import pytest

from aquila_jax import cli
from aquila_jax.errors import HostsLostError, UserError, check_number, few, first_line


def test_exit_codes_are_those_the_command_line_promises():
    promised = set(
        map(int, re.findall(r"\b(\d+) (?:done|two|a mistake|another)", cli.__doc__ or ""))
    )
    assert promised == {0, 1, UserError.exit_code, HostsLostError.exit_code}


@pytest.mark.parametrize("error", [UserError("no model 'x'"), HostsLostError("process 1 is gone")])
def test_the_command_line_prints_the_line_alone_and_ends_with_its_code(error, monkeypatch, capsys):
    def refuse(*_):
        raise error

    monkeypatch.setattr(cli.report, "_report", refuse)
    assert cli.main(["report", "x", "--out", "y"]) == error.exit_code
    assert capsys.readouterr() == ("", f"error: {error}\n")


def test_a_defect_keeps_its_traceback(monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(cli.report, "_report", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["report", "x", "--out", "y"])


@pytest.mark.parametrize("value", [0, 1, 0.5, np.float32(0.25), np.int64(1)])
def test_numbers_in_range_pass(value):
    check_number("share", value, least=0, most=1)


@pytest.mark.parametrize(
    "value", [-1, 1.5, 10**400, float("nan"), float("inf"), "0.5", None, True, [1]]
)
def test_what_is_no_number_in_range_is_named_with_the_range(value):
    with pytest.raises(UserError, match=r"share must be a number, at least 0, at most 1, not"):
        check_number("share", value, least=0, most=1)


@pytest.mark.parametrize("value", [0, 8, 2.0, "3"])
def test_whole_numbers_are_told_from_others(value):
    with pytest.raises(UserError, match=r"size must be a whole number, at least 1, below 8, not"):
        check_number("size", value, least=1, below=8, is_whole=True)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\n  one\ntwo"), "one"),
        (ValueError("x" * 1000), "x" * 300),
        (ValueError(), "ValueError"),
        (KeyError("name"), "'name'"),
    ],
)
def test_what_other_libraries_say_fits_into_a_line(error, line):
    assert first_line(error) == line


def test_long_lists_are_told_by_their_first_names():
    assert few([]) == ""
    assert few(["a", "b"], most=2) == "a, b"
    assert few(["a", "b", "c", "d"], most=2) == "a, b and 2 more"
