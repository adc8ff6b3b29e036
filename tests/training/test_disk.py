"""A disk that fills up and one that turns read-only: real file systems, where they may be made."""

import contextlib
import shutil
import subprocess

import pytest

from aquila_jax import UserError
from aquila_jax.training import train
from aquila_jax.training.checkpoints import open_existing

from .synthetic import TINY, tiny_run


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB."""
    if shutil.which("mount") is None:
        pytest.skip("there is no mount command")
    directory = tmp_path / "disk"
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", directory],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield directory
    subprocess.run(["umount", directory], check=True)


def _fill(path):
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_a_disk_that_fills_up_gives_one_line_and_loses_nothing(small_disk):
    run = tiny_run(small_disk / "run")
    train(run)
    # What is left is too little for another checkpoint.
    _fill(small_disk / "filler")
    with pytest.raises(UserError, match=r"(could not save|cannot write to)"):
        train(tiny_run(small_disk / "run", steps=12))
    (small_disk / "filler").unlink()
    checkpoints = open_existing(run.path)
    assert checkpoints.latest_step == 6
    ledger = train(tiny_run(small_disk / "run", steps=12))
    assert ledger.current.steps == 12
    assert ledger.current.model == TINY


def test_a_disk_that_turns_read_only_gives_one_line_and_loses_nothing(small_disk):
    run = tiny_run(small_disk / "run")
    train(run)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(UserError, match=r"cannot write to MODEL_DIR .*Read-only file system"):
        train(tiny_run(small_disk / "run", steps=12))
    assert open_existing(run.path).latest_step == 6
