"""A disk that fills up and one that turns read-only: real file systems, where they may be made."""

import contextlib
import json
import re
import shutil
import subprocess

import pytest

from aquila_jax import UserError
from aquila_jax.training import train
from aquila_jax.training.checkpoints import open_existing

from .synthetic import TINY, Counting, tiny_run


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


def test_a_disk_that_is_full_for_a_while_is_said_once_and_training_goes_on(small_disk, capsys):
    filler = small_disk / "filler"

    class FullForAWhile(Counting):
        """Fills the disk when batch 4 is fetched, and makes room again before batch 10."""

        def train_batches(self, start=0, *, rows=None):
            for number, batch in enumerate(super().train_batches(start, rows=rows), start):
                if number == 4:
                    _fill(filler)
                if number == 10:
                    filler.unlink()
                yield batch

    run = tiny_run(small_disk / "run", data=FullForAWhile(), steps=14, checkpoint_every=2)
    ledger = train(run)
    assert ledger.current.steps == 14
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("train: warning")]
    # Which save meets the full disk first depends on how fast the one of step 4 was.
    (line,) = lines
    assert re.search(r"could not save a checkpoint of step [46] .*No space left on device", line)
    assert re.search("step [24] is kept; training goes on, the next save tries again", line)
    assert "saving works again" in said
    assert open_existing(run.path).steps == [12, 14]
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").open()]
    # What the disk refused was written once it took it.
    assert [row["step"] for row in rows if row["split"] == "train"] == list(range(1, 15))
