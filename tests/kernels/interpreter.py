"""Kernels carried out by JAX's TPU interpreter, every one of them looked at for races.

Memory that nobody wrote holds NaN.
"""

import dataclasses
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from jax.experimental.pallas import tpu as pltpu

_SETTINGS: dict[str, Any] = {"detect_races": True, "uninitialized_memory": "nan"}
# Newer JAX (0.12) would raise in the kernel, where nobody can say of which it was.
if "on_race" in {field.name for field in dataclasses.fields(pltpu.InterpretParams)}:
    _SETTINGS["on_race"] = "warn"
PARAMETERS = pltpu.InterpretParams(**_SETTINGS)


class Watch:
    """What the interpreter found, kernel by kernel, in the order they were carried out."""

    def __init__(self) -> None:
        self._states: list[Any] = []

    @property
    def kernels(self) -> int:
        """How many were carried out so far; one on several devices counts once."""
        return len(self._states)

    @property
    def races(self) -> list[int]:
        """Numbers of those in which there was a race."""
        return [number for number, state in enumerate(self._states) if state.races_found]


@contextmanager
def interpreted(*, racy: bool = False) -> Iterator[Watch]:
    """Kernels that are traced inside are interpreted. Wait for results before you leave.

    Args:
        racy: whether races are only noted; else they are an error on leaving.
    """
    # JAX shows the state of the last kernel alone, and makes one for each.
    module: Any = importlib.import_module("jax._src.pallas.mosaic.interpret.interpret_pallas_call")
    make, watch = module.RaceDetectionState, Watch()

    def noted(**settings: Any) -> Any:
        state = make(**settings)
        watch._states.append(state)
        return state

    with (
        mock.patch.object(module, "RaceDetectionState", noted),
        pltpu.force_tpu_interpret_mode(PARAMETERS),
    ):
        yield watch
    if watch.races and not racy:
        raise AssertionError(f"of {watch.kernels} kernels {watch.races} (from 0) have races")
