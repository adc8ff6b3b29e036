"""Curves for TensorBoard, for which a disk that refuses is a gap and no more."""

import contextlib
import importlib
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Seconds between flushes: what a crash may cost of the curves. `metrics.jsonl` has it all.
_FLUSH_EVERY = 30.0


class EventFiles:
    """Event files in one directory.

    Written by the caller's own thread: tensorboardX's `SummaryWriter` has a thread behind a short
    queue, which ends with the first write that the disk refuses, and whoever fills the queue then
    waits for ever. A file in which a write failed may end in half an event, so the next write
    begins another.

    Args:
        directory: made where it is absent.
        step: curves go on after it; what earlier files have beyond it is hidden.
    """

    def __init__(self, directory: Path, step: int) -> None:
        self._directory = directory
        self._first_step = step + 1
        self._opened = 0
        self._file: Any = None
        self._flushed = time.monotonic()
        # So that a lineage which writes nothing more is purged as well.
        self.write((), step)

    def write(self, curves: Iterable[tuple[str, float]], step: int) -> None:
        """A point of every curve, by name; left out where the disk refuses."""
        from tensorboardX.summary import scalar

        try:
            file = self._file or self._open()
            for name, value in curves:
                event = _proto().Event(
                    wall_time=time.time(), step=step, summary=scalar(name, value)
                )
                file.write_event(event)
            if time.monotonic() - self._flushed > _FLUSH_EVERY:
                file.flush()
                self._flushed = time.monotonic()
        except OSError:
            self.close()

    def close(self) -> None:
        """Flush and close, as far as the disk will."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _open(self) -> Any:
        from tensorboardX.event_file_writer import EventsWriter

        self._directory.mkdir(parents=True, exist_ok=True)
        # Names differ by the second, and by this.
        self._file = EventsWriter(str(self._directory / "events"), f".{self._opened}")
        if not self._opened:
            start = _proto().SessionLog(status=_proto().SessionLog.START)
            self._file.write_event(_proto().Event(step=self._first_step, session_log=start))
        self._opened += 1
        return self._file


def _proto() -> Any:
    """Messages of TensorBoard's files, made at run time: no type checker knows them."""
    return importlib.import_module("tensorboardX.proto.event_pb2")
