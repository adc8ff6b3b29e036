"""Reads what a run left in its MODEL_DIR, and checks it once so that the rest may trust it.

MODEL_DIR/ledger.json        the lineage: one entry per stage, this run's own stage last
MODEL_DIR/metrics.jsonl      one line per logged step of this run
MODEL_DIR/certificate.json   what the growth did to every leaf (runs that began by a growth)
MODEL_DIR/environment.json   versions and machine (optional)
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aquila_jax.errors import UserError
from aquila_jax.reports.metrics import Rows, columns, read_rows

MEAN = "mean"
_ORIGINS = ("scratch", "restored", "scale_up", "scale_out")
_RESTORE = "restore it from a copy, or train the run again with `aquila train`"


@dataclass(frozen=True)
class Stage:
    """One entry of a lineage.

    Attributes:
        name: What the user called the stage.
        origin: `scratch`, `restored`, `scale_up` or `scale_out`.
        method: The growth method; empty for a stage that did not begin by a growth.
        model: The architecture's fields.
        parameters: Number of parameters; `active_parameters` are those one token passes through.
        steps: Optimizer steps done, of `planned_steps`.
        tokens: Tokens of this stage alone, as are `flops` and `seconds`.
        validation_start: Loss in nats a token, by language and as `mean`, before the first step.
        validation_end: The same after the last step; empty while the run is unfinished.
    """

    name: str
    origin: str
    method: str
    model: Mapping[str, Any]
    parameters: int
    active_parameters: int
    steps: int
    planned_steps: int
    tokens: float
    flops: float
    seconds: float
    validation_start: Mapping[str, float] = field(default_factory=dict)
    validation_end: Mapping[str, float] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether every planned step is done and the last validation is in the ledger."""
        return self.steps >= self.planned_steps and MEAN in self.validation_end

    @property
    def experts(self) -> int:
        """Experts of a layer; 0 for a dense model."""
        number = self.model.get("num_experts")
        return number if isinstance(number, int) else 0

    @property
    def languages(self) -> tuple[str, ...]:
        """Languages that were validated, in the ledger's order."""
        names = dict.fromkeys((*self.validation_start, *self.validation_end))
        return tuple(name for name in names if name != MEAN)


@dataclass(frozen=True)
class Leaf:
    """Where one array of a grown model came from: `copied`, `mapped` or `fresh`."""

    path: str
    origin: str
    source: str
    shape: tuple[int, ...]
    how: str


@dataclass(frozen=True)
class Certificate:
    """What a growth did; `exact` means the grown model computes the same function."""

    method: str
    depth: str
    exact: bool
    source: Mapping[str, Any]
    target: Mapping[str, Any]
    leaves: tuple[Leaf, ...]
    measured: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One MODEL_DIR: its lineage (oldest stage first, its own last) and its own curves."""

    directory: Path
    stages: tuple[Stage, ...]
    train: Rows
    validation: Rows
    certificate: Certificate | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def stage(self) -> Stage:
        """The run's own stage."""
        return self.stages[-1]

    @property
    def total_flops(self) -> float:
        """Training FLOPs of the whole lineage."""
        return sum(stage.flops for stage in self.stages)


def read_run(model_dir: str | Path) -> Run:
    """Reads one run.

    Args:
        model_dir: A directory that `aquila train` wrote.

    Returns:
        The run, its rows without repeated steps (of a resumed run the later line counts).

    Raises:
        UserError: A file is missing or cannot be understood; the message names it.
    """
    directory = Path(model_dir)
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory: give the MODEL_DIR of a trained run")
    for name in ("ledger.json", "metrics.jsonl"):
        if not (directory / name).is_file():
            raise UserError(f"{directory} has no {name}: train it first with `aquila train`")
    rows = read_rows(directory / "metrics.jsonl")
    certificate = directory / "certificate.json"
    environment = directory / "environment.json"
    return Run(
        directory=directory,
        stages=_read_ledger(directory / "ledger.json"),
        train=columns(rows, "train"),
        validation=columns(rows, "validation"),
        certificate=_read_certificate(certificate) if certificate.is_file() else None,
        environment=_read_object(environment) if environment.is_file() else {},
    )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): {_RESTORE}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}, not an object: {_RESTORE}")
    return value


def _read_ledger(path: Path) -> tuple[Stage, ...]:
    entries = _read_object(path).get("stages")
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} lists no stages: {_RESTORE}")
    return tuple(_stage(entry, f"{path}, stage {k}") for k, entry in enumerate(entries, 1))


def _stage(entry: Any, where: str) -> Stage:
    try:
        stage = Stage(
            name=str(entry["name"]),
            origin=str(entry["origin"]),
            method=str(entry.get("method") or ""),
            model=dict(entry["model"]),
            parameters=int(entry["parameters"]),
            active_parameters=int(entry["active_parameters"]),
            steps=int(entry["steps"]),
            planned_steps=int(entry.get("planned_steps") or entry["steps"]),
            tokens=float(entry["tokens"]),
            flops=float(entry["flops"]),
            seconds=float(entry["seconds"]),
            validation_start=_losses(entry.get("validation_start")),
            validation_end=_losses(entry.get("validation_end")),
        )
    except KeyError as error:
        raise UserError(f"{where} has no {error}: {_RESTORE}") from error
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{where} is garbled ({error}): {_RESTORE}") from error
    if stage.origin not in _ORIGINS:
        known = ", ".join(_ORIGINS)
        raise UserError(f"{where} has origin {stage.origin!r}, not one of {known}: {_RESTORE}")
    return stage


def _losses(raw: Any) -> dict[str, float]:
    losses = {str(key): float(value) for key, value in (raw or {}).items() if value is not None}
    if losses and MEAN not in losses:
        losses[MEAN] = math.fsum(losses.values()) / len(losses)
    return losses


def _read_certificate(path: Path) -> Certificate:
    raw = _read_object(path)
    try:
        leaves = tuple(
            Leaf(
                path=str(leaf["path"]),
                origin=str(leaf["origin"]),
                source=str(leaf.get("source") or ""),
                shape=tuple(int(size) for size in leaf.get("shape") or ()),
                how=str(leaf.get("how") or ""),
            )
            for leaf in raw["leaves"]
        )
        return Certificate(
            method=str(raw["method"]),
            depth=str(raw.get("depth") or ""),
            exact=bool(raw.get("exact")),
            source=dict(raw.get("source") or {}),
            target=dict(raw.get("target") or {}),
            leaves=leaves,
            measured={str(k): float(v) for k, v in (raw.get("measured") or {}).items()},
        )
    except KeyError as error:
        raise UserError(f"{path} has no {error}: {_RESTORE}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is garbled ({error}): {_RESTORE}") from error
