"""What TensorBoard would read, taken apart by hand."""

import errno
import importlib
import struct
from typing import Any

from tensorboardX.event_file_writer import EventsWriter

from aquila_jax.training.tensorboard import EventFiles

PROTO: Any = importlib.import_module("tensorboardX.proto.event_pb2")


def events_of(path):
    """The events of one file: each is framed by its length and two checksums."""
    content, at = path.read_bytes(), 0
    while at < len(content):
        (length,) = struct.unpack_from("Q", content, at)
        assert at + 12 + length + 4 <= len(content), "half an event"
        yield PROTO.Event.FromString(content[at + 12 : at + 12 + length])
        at += 12 + length + 4


def points(directory):
    return [
        (value.tag, event.step, value.simple_value)
        for path in sorted(directory.iterdir())
        for event in events_of(path)
        for value in event.summary.value
    ]


def test_points_are_read_back_and_earlier_files_are_hidden_from_the_next_step_on(tmp_path):
    files = EventFiles(tmp_path, 4)
    files.write([("train/loss", 0.5), ("train/load/0", 2.0)], 5)
    files.close()
    assert points(tmp_path) == [("train/loss", 5, 0.5), ("train/load/0", 5, 2.0)]
    (path,) = tmp_path.iterdir()
    starts = [
        event for event in events_of(path) if event.session_log.status == PROTO.SessionLog.START
    ]
    assert [event.step for event in starts] == [5]


def test_a_disk_that_refuses_leaves_a_gap(tmp_path, monkeypatch):
    files = EventFiles(tmp_path, 0)
    files.write([("loss", 3.0)], 1)

    def refuse(self, event):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(EventsWriter, "write_event", refuse)
        for step in range(2, 40):
            files.write([("loss", 2.0)], step)
    files.write([("loss", 1.0)], 40)
    files.close()
    assert points(tmp_path) == [("loss", 1, 3.0), ("loss", 40, 1.0)]
