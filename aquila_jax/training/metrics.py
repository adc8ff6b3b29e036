"""Where numbers go while a run trains: JSON lines, TensorBoard and the terminal."""

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from aquila_jax.files import write_text
from aquila_jax.training.ledger import Ledger
from aquila_jax.training.tensorboard import EventFiles

METRICS_FILE = "metrics.jsonl"
SKIPPED_FILE = "skipped_batches.jsonl"


class Rows:
    """A file of JSON lines that each tell of a step; opened to go on after some step."""

    def __init__(self, path: Path, step: int) -> None:
        """Drop the rows beyond `step`, which belong to updates that were lost."""
        self.dropped: dict[str, Any] = {}
        if path.exists():
            write_text(path, "".join(self._rows_up_to(path, step)))
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one; what a full disk refuses is written with the next one."""
        self._unwritten += json.dumps(row).encode() + b"\n"
        self._write_on()

    def sync(self) -> None:
        """Make all rows durable, as far as the disk will."""
        self._write_on()
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write what is left, as far as the disk will."""
        self._write_on()
        self._file.close()

    def _rows_up_to(self, path: Path, step: int) -> Iterator[str]:
        """The whole lines whose step is not beyond `step`; the last of the others is noted."""
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # the line a crash cut short
            if row["step"] <= step:
                yield line
            else:
                self.dropped = row

    def _write_on(self) -> None:
        with contextlib.suppress(OSError):
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]


class Unwritten:
    """In the place of the files below, for processes that leave writing to the first one."""

    dropped: Mapping[str, Any] = {}

    def write(self, *_row: Any) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class SkippedBatches:
    """Tells in MODEL_DIR which batches' updates were skipped, so that they can be looked at."""

    def __init__(self, model_dir: Path, step: int, order: str) -> None:
        """Go on after `step`; `order` is the identity of the data's order."""
        self._path, self._step, self._order = model_dir / SKIPPED_FILE, step, order
        # Most runs never have such a file.
        self._rows = Rows(self._path, step) if self._path.exists() else None

    def write(self, step: int, reason: str, values: Mapping[str, float]) -> None:
        """Of one step: `data.train_batches(start=batch)` begins with its batch."""
        self._rows = self._rows or Rows(self._path, self._step)
        of_batch = {"batch": step - 1, "data_order": self._order}
        measured = {name: repr(values[name]) for name in ("loss", "grad_norm")}
        self._rows.write({"step": step, "reason": reason, **of_batch, **measured})

    def close(self) -> None:
        """Close the file, if there is one."""
        if self._rows is not None:
            self._rows.close()


class MetricsWriter:
    """Appends every row to `metrics.jsonl` and to TensorBoard event files in MODEL_DIR."""

    def __init__(self, model_dir: Path, step: int) -> None:
        """Open both to go on after `step`: rows beyond it belong to updates that were lost."""
        self._rows = Rows(model_dir / METRICS_FILE, step)
        # Of the updates that were lost, as the lineage counted its time then.
        self.dropped = self._rows.dropped
        self._tensorboard = EventFiles(model_dir / "tensorboard", step)

    def write(self, split: str, ledger: Ledger, values: Mapping[str, Any]) -> None:
        """One row; its tokens, FLOPs and seconds count the whole lineage.

        Values are numbers, or lists by layer of numbers or of lists.
        """
        step = ledger.current.steps
        self._rows.write({"split": split, "step": step, **ledger.totals, **values})
        # What is not finite is a gap in its curve; the row says which.
        self._tensorboard.write(
            [(f"{split}/{name}", value) for name, value in _curves(values) if math.isfinite(value)],
            step,
        )

    def sync(self) -> None:
        """Make all rows durable, as far as the disk will."""
        self._rows.sync()

    def close(self) -> None:
        """Flush and close both."""
        self._rows.close()
        self._tensorboard.close()


def _curves(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Numbers by name, those of a list by name and place; of lists of lists none."""
    for name, value in values.items():
        if not isinstance(value, list):
            yield name, value
        elif not any(isinstance(part, list) for part in value):
            yield from ((f"{name}/{place}", part) for place, part in enumerate(value))


class Progress:
    """A bar with loss, tokens per second and time left; plain lines where no one watches."""

    def __init__(
        self, name: str, steps: int, done: int, line_every: int = 50, *, is_shown: bool = True
    ) -> None:
        self._is_shown = is_shown
        self._name, self._steps, self._line_every = name, steps, line_every
        self._bar: Any = None
        if is_shown and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=steps,
                initial=done,
                desc=name,
                unit="step",
                dynamic_ncols=True,
                bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} "
                "[{elapsed}<{remaining}{postfix}]",
            )

    def update(self, step: int, loss: float | None, tokens_per_second: float) -> None:
        """After step number `step`; `loss` where it is known."""
        if self._bar is not None:
            if loss is not None:
                self._bar.set_postfix_str(
                    f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s", refresh=False
                )
            self._bar.update()
        elif loss is not None and (step % self._line_every == 0 or step == self._steps):
            self.say(
                f"step {step}/{self._steps}  loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s"
            )

    def say(self, text: str) -> None:
        """A line beside the bar."""
        if not self._is_shown:
            return
        line = f"{self._name}: {text}"
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the terminal tidy."""
        if self._bar is not None:
            self._bar.close()
