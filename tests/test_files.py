import json
import os
import stat

import pytest

from aquila_jax import UserError
from aquila_jax.files import NewDirectory, json_lines, write_json, write_text


def fail(*_args, **_kwargs):
    raise OSError("disk full")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_whole_and_no_other(tmp_path, monkeypatch, call):
    path = tmp_path / "ledger.json"
    path.write_text("old")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "new")
    assert os.listdir(tmp_path) == ["ledger.json"]
    assert path.read_text() == "old"


def test_text_that_cannot_be_encoded_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "ledger.json"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "x" * 100_000 + "\ud800")
    assert os.listdir(tmp_path) == ["ledger.json"]
    assert path.read_text() == "old"


def test_the_new_text_is_durable_before_it_takes_the_name(tmp_path, monkeypatch):
    path = tmp_path / "ledger.json"
    path.write_text("old")
    seen = []
    real = os.fsync

    def fsync(descriptor):
        found = os.fstat(descriptor)
        if stat.S_ISREG(found.st_mode):
            seen.append((path.read_text(), found.st_size))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(path, "newer")
    assert seen == [("old", len("newer"))]
    assert path.read_text() == "newer"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_permissions_respect_the_umask_and_leave_it(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "file", "text")
    finally:
        after = os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode
    assert after == umask


def test_json_survives_and_stays_readable(tmp_path):
    path = tmp_path / "value.json"
    value = {"language": "中文", "losses": [1.5, 2.5]}
    write_json(path, value)
    assert json.loads(path.read_text(encoding="utf-8")) == value
    assert "中文" in path.read_text(encoding="utf-8")
    assert path.read_text(encoding="utf-8").endswith("\n")


def test_a_new_directory_is_seen_when_it_is_whole_and_only_then(tmp_path):
    directory = NewDirectory(tmp_path / "new" / "model")
    (directory.create() / "file").write_text("text")
    assert not directory.path.exists()
    directory.publish()
    directory.discard()
    assert os.listdir(tmp_path / "new") == ["model"]
    assert (directory.path / "file").read_text() == "text"
    with pytest.raises(UserError, match="model exists; remove it"):
        NewDirectory(directory.path)


def test_what_a_living_process_makes_is_left_alone_and_what_a_dead_one_left_is_not(
    tmp_path, capsys
):
    living = NewDirectory(tmp_path / "model")
    (living.create() / "file").touch()
    neighbour = NewDirectory(tmp_path / "model.partial")
    neighbour.create()
    other = NewDirectory(tmp_path / "model")
    with pytest.raises(UserError, match=f"is being written by process {os.getpid()}: wait"):
        other.create()
    other.discard()
    assert (living.partial / "file").exists()
    # As if the process had been killed: the operating system lets go of the lock.
    os.close(living._lock)
    other.create()
    assert not living.partial.exists()
    assert neighbour.partial.exists()
    assert f"warning: removed {living.partial}" in capsys.readouterr().err
    other.discard()
    neighbour.discard()
    assert os.listdir(tmp_path) == []


def test_what_another_host_left_is_named_and_kept(tmp_path, capsys, monkeypatch):
    left = NewDirectory(tmp_path / "model")
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    left.create()
    monkeypatch.undo()
    os.close(left._lock)
    directory = NewDirectory(tmp_path / "model")
    directory.create()
    directory.publish()
    directory.discard()
    assert left.partial.exists()
    assert f"{left.partial} was left by process {os.getpid()} on elsewhere" in (
        capsys.readouterr().err
    )


def test_without_locks_nothing_is_taken_for_dead(tmp_path, monkeypatch):
    def unsupported(*_args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    first, second = NewDirectory(tmp_path / "model"), NewDirectory(tmp_path / "model")
    first.create()
    second.create()
    assert first.partial.exists()
    assert second.partial.exists()


def test_lines_of_json_end_with_line_feeds_alone(tmp_path):
    path = tmp_path / "rows.jsonl"
    # What Python's own lines end with, and JSON's strings may hold.
    odd = "a\u2028b\x85c\u2029d"
    path.write_bytes(f'\n{{"text": "{odd}"}}\r\n \n[1]'.encode())
    assert list(json_lines(path)) == [(f"{path}, line 2", {"text": odd}), (f"{path}, line 4", [1])]


@pytest.mark.parametrize(
    ("content", "says"), [(b"[1]\n{\n", "rows.jsonl, line 2: "), (b'["\xff"]', "is not UTF-8")]
)
def test_a_line_that_is_no_json_is_named(tmp_path, content, says):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=says) as refused:
        list(json_lines(path))
    assert "\n" not in str(refused.value)
