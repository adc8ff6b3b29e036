"""Stopping when asked: signals are heard at once, also while a compiled program runs."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def stop_on_signal(name: str) -> Iterator[list[int]]:
    """A list that the first SIGINT or SIGTERM is put into; the second ends the process at once.

    Python's handlers wait until the main thread is back from whatever it has called, which may be
    a compilation of minutes. So another thread is told of signals by the operating system. In a
    thread, where Python allows no handlers, the list stays empty.

    Args:
        name: of the run, for the line that answers the first signal.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    heard: Counter[str] = Counter()

    def hear(signum: int, by: str) -> None:
        heard[by] += 1
        if heard[by] > 1:
            os._exit(128 + signum)
        if not asked:
            asked.append(signum)
            _say(f"{name}: stopping after this step; once more leaves at once, without saving")

    def listen() -> None:
        while signums := receiver.recv(16):
            for signum in signums:
                if signum in _STOP_SIGNALS:
                    hear(signum, "thread")

    def handle(signum: int, _frame: Any) -> None:
        # An event loop in the main thread takes signals to itself; then only this hears of them.
        hear(signum, "handler")

    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    listener = threading.Thread(target=listen, name="aquila-signals", daemon=True)
    # None is a handler that was not set from Python, and could not be set again.
    previous = {signum: signal.getsignal(signum) or signal.SIG_DFL for signum in _STOP_SIGNALS}
    previous_fd = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    listener.start()
    try:
        for signum in previous:
            signal.signal(signum, handle)
        yield asked
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(previous_fd)
        sender.close()
        listener.join()
        receiver.close()


def _say(words: str) -> None:
    # Not print: the signal may have come in the middle of one.
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a notebook's has no number
        os.write(sys.stderr.fileno(), f"\n{words}\n".encode())
