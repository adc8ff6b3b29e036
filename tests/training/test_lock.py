import json
import os
import signal
import subprocess
import sys

import pytest

from aquila_jax import UserError
from aquila_jax.training import lock as locking
from aquila_jax.training.lock import LOCK_FILE, lock

HOLDER = """
import sys, time
from pathlib import Path
from aquila_jax.training.lock import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_run_is_refused_and_told_of_the_first(tmp_path, holder):
    message = rf"{tmp_path} is in use by process {holder.pid} on .* \(started 2"
    with pytest.raises(UserError, match=message), lock(tmp_path):
        pass
    assert holder.poll() is None


def test_the_lock_of_a_killed_process_is_taken_over_with_a_line(tmp_path, holder, capsys):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / LOCK_FILE).exists()
    with lock(tmp_path):
        said = capsys.readouterr().err
        assert f"left locked by process {holder.pid}" in said
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_a_lock_leaves_nothing_behind_whatever_happens_inside(tmp_path, capsys):
    with pytest.raises(ZeroDivisionError), lock(tmp_path):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with lock(tmp_path):
        pass
    assert capsys.readouterr().err == ""


def test_two_directories_are_two_locks(tmp_path):
    (tmp_path / "a").mkdir()
    with lock(tmp_path), lock(tmp_path / "a"):
        pass


def _of_another_host(path, beat):
    holder = {"host": "elsewhere", "pid": 1, "started": "2020", "beat": beat}
    (path / LOCK_FILE).write_text(json.dumps(holder))


def test_a_silent_lock_of_another_host_is_taken_over(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(locking, "_SILENCE_SECONDS", 0.2)
    _of_another_host(tmp_path, "1")
    with lock(tmp_path):
        assert "waiting up to" in capsys.readouterr().err


def test_a_beating_lock_of_another_host_is_respected(tmp_path, monkeypatch):
    monkeypatch.setattr(locking, "_SILENCE_SECONDS", 2.0)
    _of_another_host(tmp_path, "1")
    real = locking.read_holder

    def read_after_a_beat(descriptor):
        found = real(descriptor)
        _of_another_host(tmp_path, "2")
        return found

    monkeypatch.setattr(locking, "read_holder", read_after_a_beat)
    with pytest.raises(UserError, match="in use by process 1 on elsewhere"), lock(tmp_path):
        pass
    assert (tmp_path / LOCK_FILE).exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_lock_file_that_says_nothing_is_taken_over(tmp_path, content):
    (tmp_path / LOCK_FILE).write_text(content)
    with lock(tmp_path):
        pass
