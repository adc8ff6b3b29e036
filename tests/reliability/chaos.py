"""Stages in processes of their own, killed at random moments, and what has become of them."""

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from aquila_jax.training.leaves import SavedLeaves

from .worker import CHECKPOINT_EVERY, STAGES, STEPS

ROOT = Path(__file__).parents[2]
# Little is computed, so the compiler is told to hurry.
_XLA_FLAGS = (
    "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true"
)
# Seconds in which any worker has reached whatever is waited for, or something is wrong.
_PATIENCE = 600.0
_LOOK_SECONDS = 0.001
# A start takes about this long here; kills meant for it fall anywhere in that time.
_START_SECONDS = 3.0


@dataclasses.dataclass
class Toll:
    """What was done to a lineage.

    Attributes:
        killed: how many processes, by what they were doing: "starting", "growing", "saving" or
            "training".
        by_stage: how many, by stage.
        seconds: of every start, until its first step.
        said: everything that all processes printed.
    """

    killed: Counter[str] = dataclasses.field(default_factory=Counter)
    by_stage: Counter[str] = dataclasses.field(default_factory=Counter)
    seconds: list[float] = dataclasses.field(default_factory=list)
    said: str = ""

    @property
    def total(self) -> int:
        """Processes killed."""
        return sum(self.killed.values())


class Worker:
    """One process that trains one stage of the lineage in `directory`."""

    def __init__(self, directory: Path, stage: str, **environment: str) -> None:
        self.model_dir = directory / stage
        self._output = directory / f"{stage}.out"
        self._said_before = self._output.stat().st_size if self._output.exists() else 0
        environment = {
            **os.environ,
            **environment,
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": _XLA_FLAGS,
            "NPROC": "16",  # see tests/conftest.py
            "JAX_COMPILATION_CACHE_DIR": str(directory.parent / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        command = [sys.executable, "-m", "tests.reliability.worker", str(directory), stage]
        with self._output.open("ab") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
            )
        self.rows_before = self.rows()

    @property
    def said(self) -> str:
        """What this process has printed so far."""
        return self._output.read_bytes()[self._said_before :].decode()

    def rows(self) -> int:
        """The newest step whose metrics are written."""
        steps = [row["step"] for row in read_rows(self.model_dir) if row["split"] == "train"]
        return max(steps, default=0)

    def is_saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return any((self.model_dir / "checkpoints").glob(".saving-*"))

    def until(self, condition: Any) -> bool:
        """Look until something is so; False if the process ended before."""
        end = time.monotonic() + _PATIENCE
        while time.monotonic() < end:
            if condition():
                return True
            if self.process.poll() is not None:
                return False
            time.sleep(_LOOK_SECONDS)
        raise TimeoutError(f"{self.model_dir} does not go on:\n{self.said}")

    def end(self) -> int:
        """The exit code, once there is one."""
        return self.process.wait(_PATIENCE)


@contextlib.contextmanager
def working(directory: Path, stage: str, **environment: str) -> Iterator[Worker]:
    """A worker that does not outlive the block."""
    worker = Worker(directory, stage, **environment)
    try:
        yield worker
    finally:
        worker.process.kill()
        worker.process.wait()


def read_rows(model_dir: Path) -> list[dict[str, Any]]:
    """The metrics so far; a line that is just being written is left out."""
    rows = []
    with contextlib.suppress(FileNotFoundError):
        for line in (model_dir / "metrics.jsonl").read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return rows


def run_undisturbed(directory: Path) -> None:
    """All stages, each by one process."""
    for stage in STAGES:
        with working(directory, stage) as worker:
            if worker.end():
                raise AssertionError(worker.said)


def run_killed(directory: Path, kills_per_stage: int, rng: random.Random) -> Toll:
    """All stages, each by processes that are killed `kills_per_stage` times, and one that ends."""
    toll = Toll()
    for stage in STAGES:
        for number in range(kills_per_stage):
            steps_left = STEPS - CHECKPOINT_EVERY - len(_steps(directory / stage))
            with working(directory, stage) as worker:
                # The first start of a grown stage is killed around its growth.
                _wait_for_a_moment(
                    worker, rng, number == 0, steps_left // (kills_per_stage - number)
                )
                doing = _doing(worker)
                worker.process.send_signal(signal.SIGKILL)
                if worker.end() != -signal.SIGKILL:
                    raise AssertionError(f"{stage} ended before it was killed:\n{worker.said}")
                toll.killed[doing] += 1
                toll.by_stage[stage] += 1
                toll.said += worker.said
        with working(directory, stage) as worker:
            began = time.monotonic()
            worker.until(lambda worker=worker: worker.rows() > worker.rows_before)
            toll.seconds.append(time.monotonic() - began)
            if worker.end():
                raise AssertionError(worker.said)
            toll.said += worker.said
    return toll


def _steps(model_dir: Path) -> list[int]:
    return [row["step"] for row in read_rows(model_dir) if row["split"] == "train"]


def _wait_for_a_moment(worker: Worker, rng: random.Random, is_first: bool, steps: int) -> None:
    """Sleep until the process is to be killed, `steps` new steps from here at most."""
    kind = rng.choice(("start", "step", "save", "save"))
    if is_first:
        worker.until(lambda: (worker.model_dir / "checkpoints").is_dir())
        time.sleep(rng.uniform(0, 0.5 * _START_SECONDS))
    elif kind == "start":
        time.sleep(rng.uniform(0, _START_SECONDS))
    else:
        first = worker.rows()
        wanted = rng.randint(1, max(1, min(steps, 4 * CHECKPOINT_EVERY)))
        worker.until(lambda: worker.rows() >= first + wanted or _restarted(worker, first, wanted))
        if kind == "save":
            worker.until(worker.is_saving)
        time.sleep(rng.uniform(0, 0.05))


def _restarted(worker: Worker, first: int, wanted: int) -> bool:
    """Whether `wanted` steps were made since rows beyond the checkpoint were dropped."""
    now = worker.rows()
    worker.rows_before = min(worker.rows_before, now)
    return worker.rows_before < first and now >= worker.rows_before + wanted


def _doing(worker: Worker) -> str:
    if worker.is_saving():
        return "saving"
    checkpoints = worker.model_dir / "checkpoints"
    has_begun = checkpoints.is_dir() and any(
        path.name.isdecimal() for path in checkpoints.iterdir()
    )
    if not has_begun:
        return "growing" if checkpoints.is_dir() else "starting"
    return (
        "training" if ("from step" in worker.said or "from scratch" in worker.said) else "starting"
    )


def differences(directory: Path, other: Path) -> list[str]:
    """In what two lineages differ, bit for bit: losses, ledgers, parameters."""
    found = []
    for stage in STAGES:
        ours, theirs = directory / stage, other / stage
        sequences = [
            [
                (row["split"], row["step"], row["loss"], row["tokens"], row["flops"])
                for row in read_rows(model_dir)
            ]
            for model_dir in (ours, theirs)
        ]
        if sequences[0] != sequences[1]:
            found.append(f"{stage}: losses")
        if _steps(ours) != list(range(1, STEPS + 1)):
            found.append(f"{stage}: steps are not each made once")
        ledgers = [
            json.loads((model_dir / "ledger.json").read_text()) for model_dir in (ours, theirs)
        ]
        for ledger in ledgers:
            for part in ledger["stages"]:
                part.pop("seconds")
                part.pop("spent")
        if ledgers[0] != ledgers[1]:
            found.append(f"{stage}: ledgers")
        left, right = SavedLeaves(ours), SavedLeaves(theirs)
        found += [
            f"{stage}: {path}"
            for path in left._parameters
            if not np.array_equal(left.read(path), right.read(path))
        ]
    return found
