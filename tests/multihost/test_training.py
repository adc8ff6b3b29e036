"""Several real processes train as one does, and outlive the loss of any of them."""

import json
import re
import shutil
import signal
import time

import numpy as np
import pytest

from aquila_jax.training.leaves import SavedLeaves
from tests.reliability.chaos import read_rows
from tests.reliability.worker import write_data

from .processes import run_together, together

# Stated in docs/reliability.md: of a process that is killed the others hear at once.
SECONDS_TO_STOP = 10.0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("multihost")


def _directory(place, name):
    directory = place / name
    directory.mkdir()
    write_data(directory)
    return directory


@pytest.fixture(scope="module")
def alone(place):
    directory = _directory(place, "alone")
    for stage in ("dense", "moe"):
        run_together(directory, 1, stage)
    return directory


@pytest.fixture(scope="module")
def four(place):
    """All of the dense stage, and the grown one up to a checkpoint in its middle."""
    directory = _directory(place, "four")
    said = run_together(directory, 4, "dense")
    assert "process 0 of 4, found by environment variables, coordinator 127.0.0.1:" in said
    assert "1 of 4 devices" in said
    with together(directory, 4, "moe") as processes:
        while not (directory / "moe" / "checkpoints" / "4").is_dir():
            assert [process.popen.poll() for process in processes] == [None] * 4
            time.sleep(0.02)
        processes[2].popen.send_signal(signal.SIGTERM)
        assert [process.end() for process in processes] == [128 + signal.SIGTERM] * 4
    return directory


def _losses(directory, stage):
    rows = read_rows(directory / stage)
    return [(row["split"], row["step"], row["tokens"], row["flops"]) for row in rows], [
        row["loss"] for row in rows
    ]


def _assert_equal_but_for_rounding(directory, other, stage):
    (counts, losses), (others, other_losses) = _losses(directory, stage), _losses(other, stage)
    assert counts[: len(others)] == others[: len(counts)]
    count = min(len(losses), len(other_losses))
    np.testing.assert_allclose(losses[:count], other_losses[:count], rtol=1e-5)


def test_four_processes_train_grow_and_count_as_one_does(alone, four):
    _assert_equal_but_for_rounding(four, alone, "dense")
    assert len(_losses(four, "moe")[1]) >= 5
    _assert_equal_but_for_rounding(four, alone, "moe")
    theirs, ours = (
        json.loads((directory / "moe" / "certificate.json").read_text())
        for directory in (alone, four)
    )
    assert ours["exact"]
    assert ours["leaves"] == theirs["leaves"]
    # The parents differ by rounding; what each grew is a copy of its parent.
    assert ours["measured"]["max_logit_difference"] < 1e-5


@pytest.mark.parametrize("count", [2, 1])
def test_what_four_saved_fewer_go_on_from(alone, four, count):
    directory = four.with_name(f"from-four-on-{count}")
    shutil.copytree(four, directory)
    # It names its parent, which is not read again.
    said = run_together(directory, count, "moe")
    assert "resumed from step" in said
    _assert_equal_but_for_rounding(directory, alone, "moe")
    assert [row[1] for row in _losses(directory, "moe")[0] if row[0] == "train"] == [*range(1, 13)]


def _until_step(directory, step, processes):
    while not any(row["step"] >= step for row in read_rows(directory / "dense")):
        assert [process.popen.poll() for process in processes] == [None] * len(processes)
        time.sleep(0.01)


@pytest.mark.slow
def test_stopped_and_killed_two_processes_end_as_if_they_had_never_been(place):
    undisturbed, directory = _directory(place, "undisturbed"), _directory(place, "disturbed")
    run_together(undisturbed, 2, "dense", "--steps", "60")
    command = ("dense", "--steps", "60")
    with together(directory, 2, *command) as processes:
        _until_step(directory, 3, processes)
        # The second process alone is asked; both stop after the same step, which is saved.
        processes[1].popen.send_signal(signal.SIGTERM)
        assert [process.end() for process in processes] == [128 + signal.SIGTERM] * 2
        stopped = max(row["step"] for row in read_rows(directory / "dense"))
        assert (directory / "dense" / "checkpoints" / str(stopped)).is_dir()
    for victim in (1, 0):
        with together(directory, 2, *command) as processes:
            made = max(row["step"] for row in read_rows(directory / "dense"))
            _until_step(directory, made + 6, processes)
            killed = processes[victim].popen
            killed.kill()
            began = time.monotonic()
            survivor = processes[1 - victim]
            assert survivor.end() == 75
            assert time.monotonic() - began < SECONDS_TO_STOP
            words = f"error: process {victim} of 2 .host .*, pid {killed.pid}. is gone: stopped"
            assert re.search(words, survivor.said)
    said = run_together(directory, 2, *command)
    assert "resumed from step" in said
    ours, theirs = _losses(directory, "dense"), _losses(undisturbed, "dense")
    assert ours == theirs
    left, right = (SavedLeaves(parent / "dense") for parent in (directory, undisturbed))
    for path in left._parameters:
        np.testing.assert_array_equal(left.read(path), right.read(path))
