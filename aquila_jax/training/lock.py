"""One MODEL_DIR, one run: a lock file that a dead process cannot keep.

The file is locked through the operating system, which lets go when its holder ends, however it
ends. That covers one host, and the network file systems that pass such locks on. For the others
the holder writes a new beat into the file every few seconds: a process on another host takes the
lock over once it has seen no beat for a minute.
"""

import contextlib
import functools
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aquila_jax.errors import UserError
from aquila_jax.files import open_locked, read_holder

LOCK_FILE = "run.lock"
_BEAT_SECONDS = 10.0
_STARTED = time.strftime("%Y-%m-%d %H:%M:%S %Z")
# Of watching a lock of another host before it counts as a dead one's.
_SILENCE_SECONDS = 60.0


@contextlib.contextmanager
def lock(model_dir: Path) -> Iterator[None]:
    """Hold MODEL_DIR against every other run.

    Raises:
        UserError: another run holds it, named by its host, process and start.
        OSError: the lock file cannot be written.
    """
    path = model_dir / LOCK_FILE
    # Where the file system does not know of locks, the holder's beats are watched.
    descriptor, _ = open_locked(path, functools.partial(_refusal, model_dir))
    try:
        previous = read_holder(descriptor)
        if previous.get("host", socket.gethostname()) != socket.gethostname():
            _watch(path, descriptor, previous)
        if previous:
            print(
                f"warning: {model_dir} was left locked by {_name(previous)}, which is gone; "
                "going on in its place",
                file=sys.stderr,
            )
        _write(descriptor)
        try:
            with _beating(descriptor):
                yield
        finally:
            # Before the lock is let go: whoever opened the file meanwhile sees that it is no
            # longer the one of that name.
            with contextlib.suppress(OSError):
                path.unlink()
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _beating(descriptor: int) -> Iterator[None]:
    """A new beat every few seconds, from another thread."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(_BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a full disk does not end the run
                _write(descriptor)

    thread = threading.Thread(target=beat, name="aquila-lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _refusal(model_dir: Path, holder: dict[str, Any]) -> str:
    return (
        f"{model_dir} is in use by {_name(holder)}: wait for it to end or stop it, or choose "
        "another MODEL_DIR"
    )


def _watch(path: Path, descriptor: int, seen: dict[str, Any]) -> None:
    """Wait until the lock of another host has been silent for long enough.

    Raises:
        UserError: it is alive.
    """
    print(
        f"waiting up to {_SILENCE_SECONDS:.0f} s to see whether {_name(seen)} still runs in "
        f"{path.parent}",
        file=sys.stderr,
    )
    end = time.monotonic() + _SILENCE_SECONDS
    while time.monotonic() < end:
        time.sleep(min(_BEAT_SECONDS / 2, _SILENCE_SECONDS / 10))
        if read_holder(descriptor).get("beat") != seen.get("beat"):
            raise UserError(_refusal(path.parent, seen))


def _write(descriptor: int) -> None:
    """Who holds the lock, and a beat that is new."""
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": _STARTED}
    content = json.dumps({**holder, "beat": uuid.uuid4().hex}).encode()
    os.pwrite(descriptor, content, 0)
    os.ftruncate(descriptor, len(content))


def _name(holder: dict[str, Any]) -> str:
    if not holder:
        return "another run"
    return "process {pid} on {host} (started {started})".format_map(
        {"pid": "?", "host": "?", "started": "?", **holder}
    )
