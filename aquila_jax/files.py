"""Files and directories that are either whole or absent."""

import contextlib
import fcntl
import json
import os
import shutil
import socket
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from aquila_jax.errors import UserError


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` under a temporary name, make it durable, and rename it to `path`.

    A crash at any point leaves the old file or the new one. The temporary name is this call's
    own: several processes may write the same file, and the last one wins.

    Raises:
        OSError: the file system refuses; the old file is as it was.
    """
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable, where the file system knows of that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of `text` in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` of `value` as indented JSON."""
    write_bytes(path, json_bytes(value))


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The values of a JSONL file, each after its place, "FILE, line 3", for messages.

    Lines end with line feeds alone: what else ends a line elsewhere may stand in a JSON string.

    Raises:
        UserError: the file is not UTF-8, or a line is not JSON: the message gives its place.
        OSError: it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error})") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            try:
                value = json.loads(line)
            except ValueError as error:
                raise UserError(f"{place}: {error}") from error
            yield place, value


def json_bytes(value: Any) -> bytes:
    """`value` as indented JSON in UTF-8."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


class NewDirectory:
    """A directory that others see whole or not at all, and what a dead process left of one.

    It is made under a hidden name beside its own. A lock beside it, which the operating system
    lets go of when a process ends, however it ends, tells what is being made from what nobody
    will finish: the latter is removed, and said so on standard error, when the next process makes
    a directory of that name. What another host left is only named: its locks may not be seen here.

    Examples:
        >>> import tempfile
        >>> parent = tempfile.TemporaryDirectory()
        >>> directory = NewDirectory(f"{parent.name}/model")
        >>> try:
        ...     write_text(directory.create() / "file", "text")
        ...     directory.publish()
        ... finally:
        ...     directory.discard()
        >>> (directory.path / "file").read_text()
        'text'
        >>> parent.cleanup()

    Attributes:
        path: where it will be.
        partial: where it is made.

    Args:
        path: where it will be; it must not exist.

    Raises:
        UserError: it exists.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(os.path.abspath(path))
        self._prefix = f".{self.path.name}.partial"
        self.partial = self.path.parent / f"{self._prefix}-{uuid.uuid4().hex}"
        self._lock_file = self.path.parent / f"{self._prefix}.lock"
        self._lock = -1
        self._refuse_existing()

    def create(self) -> Path:
        """Make the hidden directory, and its parents, and return it.

        Raises:
            UserError: another process is making a directory of that name.
            OSError: the file system refuses.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_locked = self._take_lock()
        left_by = read_holder(self._lock)
        # Before anything is written: the disk may be full of it.
        for dead in sorted(self.path.parent.iterdir()):
            if dead.name.startswith(f"{self._prefix}-") and is_locked:
                self._clean(dead, left_by)
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, json_bytes({"host": socket.gethostname(), "pid": os.getpid()}), 0)
        self.partial.mkdir()
        return self.partial

    def publish(self) -> None:
        """Give the directory its name, durably.

        Raises:
            UserError: that name has been taken meanwhile.
            OSError: the file system refuses.
        """
        sync_directory(self.partial)
        self._refuse_existing()
        os.rename(self.partial, self.path)
        sync_directory(self.path.parent)

    def discard(self) -> None:
        """Remove what was not published, and let go of the name."""
        shutil.rmtree(self.partial, ignore_errors=True)
        if self._lock >= 0:
            # Before it is let go of: whoever opened the file meanwhile sees that it is gone.
            with contextlib.suppress(OSError):
                self._lock_file.unlink()
            os.close(self._lock)
            self._lock = -1

    def _take_lock(self) -> bool:
        """Hold the lock file; whether the file system knows of locks."""

        def refusal(holder: dict[str, Any]) -> str:
            return (
                f"{self.path} is being written by process {holder.get('pid', '?')}: wait for it "
                "to end or stop it, or write to another directory"
            )

        self._lock, is_locked = open_locked(self._lock_file, refusal)
        return is_locked

    def _clean(self, dead: Path, left_by: dict[str, Any]) -> None:
        host, pid = left_by.get("host", socket.gethostname()), left_by.get("pid", "?")
        if host != socket.gethostname():
            print(
                f"warning: {dead} was left by process {pid} on {host}: remove it if that has ended",
                file=sys.stderr,
            )
            return
        shutil.rmtree(dead, ignore_errors=True)
        print(f"warning: removed {dead}, which a process that is gone left", file=sys.stderr)

    def _refuse_existing(self) -> None:
        if os.path.lexists(self.path):
            raise UserError(f"{self.path} exists; remove it, or write to another directory")


def open_locked(path: Path, refusal: Callable[[dict[str, Any]], str]) -> tuple[int, bool]:
    """Open a lock file, made where it is missing, and lock it.

    Args:
        path: the file; whoever unlinks it still holds it, so that a name is never locked twice.
        refusal: the error's line, of what the holder wrote.

    Returns:
        The descriptor, which whoever takes it closes; and whether the file system knows of locks.

    Raises:
        UserError: another process holds it.
        OSError: it cannot be opened.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        is_locked = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = read_holder(descriptor)
            os.close(descriptor)
            raise UserError(refusal(holder)) from error
        except OSError:
            is_locked = False
        # Another may have unlinked the file between the two calls.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor, is_locked
        os.close(descriptor)


def read_holder(descriptor: int) -> dict[str, Any]:
    """What a lock file says; nothing where a crash cut it short."""
    try:
        content = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
