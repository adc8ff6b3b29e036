import json
import os
import stat

import pytest

from aquila_jax.files import write_json, write_text


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
