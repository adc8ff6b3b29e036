"""Where a run's time goes: what share of it makes steps."""

import contextlib
import time
from collections.abc import Iterator, Mapping

# start: from the command to the loop; compile: the first step of a process; data: waiting for a
# batch; step: the others; lost: steps whose result a restart threw away.
KINDS = ("start", "compile", "data", "step", "validation", "checkpoint", "lost")


class Times:
    """Seconds of every kind, over all processes that a stage has had so far."""

    def __init__(self, before: Mapping[str, float] | None = None) -> None:
        """Go on from what a checkpoint says was spent."""
        self._seconds = {kind: float((before or {}).get(kind, 0.0)) for kind in KINDS}

    @contextlib.contextmanager
    def of(self, kind: str) -> Iterator[None]:
        """What happens inside counts as `kind`."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.add(kind, time.monotonic() - began)

    def add(self, kind: str, seconds: float) -> None:
        """Count `seconds` more."""
        self._seconds[kind] += max(seconds, 0.0)

    def seconds(self) -> dict[str, float]:
        """Of every kind."""
        return dict(self._seconds)

    @property
    def goodput(self) -> float:
        """The share of all time in which steps were made whose result was kept."""
        total = sum(self._seconds.values())
        return self._seconds["step"] / total if total else 0.0

    def __str__(self) -> str:
        parts = ", ".join(f"{kind} {seconds:.1f}" for kind, seconds in self._seconds.items())
        return f"goodput {self.goodput:.1%} (seconds: {parts})"
