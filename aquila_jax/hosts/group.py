"""What the processes of a run know of each other: their number, and what they agree on."""

import json
import os
import socket
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

from aquila_jax.errors import HostsLostError, UserError


class Channel(Protocol):
    """How values go from every process to every other."""

    def exchange(self, name: str, value: Any) -> list[Any]:
        """`value` of every process, in their order, once all have called with this name."""
        ...

    def leave(self, code: int, words: str) -> None:
        """Say that this process ends, and why."""
        ...


class Group:
    """The processes of a run, one of which this is.

    What all of them call, all of them must call, in the same order for each name: a call returns
    once every process has made it. A process that is lost ends the others meanwhile, so no call
    waits for ever.

    Attributes:
        index: which process this is, from 0.
        count: how many there are.
    """

    def __init__(self, index: int = 0, count: int = 1, channel: Channel | None = None) -> None:
        self.index, self.count, self._channel = index, count, channel
        self._calls: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes what is written once."""
        return self.index == 0

    def gather(self, name: str, value: Any) -> list[Any]:
        """What every process gave, JSON each, in the order of the processes.

        May be called from several threads, each with a name of its own.
        """
        if self._channel is None:
            return [value]
        with self._lock:
            self._calls[name] += 1
            number = self._calls[name]
        return self._channel.exchange(f"{name}#{number}", value)

    def barrier(self, name: str) -> None:
        """Every process has come here."""
        self.gather(name, None)

    def together(self, name: str, function: Callable[[], Any]) -> list[Any]:
        """What `function` gives each process, JSON; where it fails for one, it does for all.

        Raises:
            Exception: its own; or, of another process, the same words as a `UserError`, `OSError`
                or `RuntimeError`.
        """
        value, error = None, None
        try:
            value = function()
        except Exception as raised:
            error = raised
        answers = self.gather(name, {"value": value, "error": error and _described(error)})
        if error is not None:
            raise error
        for index, answer in enumerate(answers):
            if answer["error"]:
                raise _error_of(index, answer["error"])
        return [answer["value"] for answer in answers]

    def first(self, name: str, function: Callable[[], Any]) -> Any:
        """What `function` gives the first process, JSON, for all; the others wait for it.

        Raises:
            Exception: as `together`.
        """
        return self.together(name, function if self.is_first else _nothing)[0]

    def leave(self, code: int, words: str = "") -> None:
        """Tell the others that this process ends: by 0 as agreed, by anything else they end too."""
        if self._channel is not None:
            self._channel.leave(code, words)


def _nothing() -> None:
    """What the others do while the first works."""


def _described(error: Exception) -> dict[str, Any]:
    kinds = ((UserError, "user"), (OSError, "system"))
    kind = next((name for base, name in kinds if isinstance(error, base)), "defect")
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return {"kind": kind, "words": words}


def _error_of(index: int, described: dict[str, Any]) -> Exception:
    words = f"process {index}: {described['words']}"
    if described["kind"] == "user":
        return UserError(words)
    return OSError(words) if described["kind"] == "system" else RuntimeError(words)


_ALONE = Group()
_current = _ALONE


def current() -> Group:
    """The group that this process has joined; of one, where there is no other."""
    return _current


def set_current(group: Group | None) -> None:
    """Make a group what `current` gives; None for this process alone."""
    global _current
    _current = group or _ALONE


def own_name(index: int, count: int) -> str:
    """A process as the others' messages call it."""
    return f"process {index} of {count} (host {socket.gethostname()}, pid {os.getpid()})"


def encoded(message: dict[str, Any]) -> bytes:
    """A message as it is sent: JSON on a line."""
    return json.dumps(message).encode() + b"\n"


def lost(who: str) -> HostsLostError:
    """What is said of a process that is no longer there."""
    return HostsLostError(
        f"{who}: stopped; start the same command again on every host to go on from the newest "
        "checkpoint"
    )
