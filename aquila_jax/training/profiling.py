"""Traces of single steps, and what devices held when they had no room left."""

from pathlib import Path
from typing import Any

import jax

from aquila_jax.errors import UserError, first_line

PROFILE_DIR = "profile"


def check_profile_steps(steps: tuple[int, ...]) -> None:
    """They are nothing, or a first and a last step.

    Raises:
        UserError: they are not.
    """
    if not steps:
        return
    if len(steps) != 2 or not 1 <= steps[0] <= steps[1]:
        raise UserError(
            f"profile_steps is {steps!r}: give the first and the last step of the trace, as in "
            "(11, 13), or () for none"
        )


class Profiler:
    """Traces a range of steps into MODEL_DIR/profile, for xprof and TensorBoard."""

    def __init__(self, model_dir: Path, steps: tuple[int, ...]) -> None:
        self._directory = model_dir / PROFILE_DIR
        self._first, self._last = steps or (0, 0)
        self._is_on = False

    def before(self, step: int, wait_for: Any) -> None:
        """Begin where this is the first step, once everything before it is done."""
        if step == self._first:
            jax.block_until_ready(wait_for)
            jax.profiler.start_trace(str(self._directory))
            self._is_on = True

    def after(self, step: int, wait_for: Any) -> str:
        """End where this was the last step; what to say of it, or ""."""
        if not self._is_on or step < self._last:
            return ""
        jax.block_until_ready(wait_for)
        self.close()
        return f"steps {self._first} to {step} are traced in {self._directory}"

    def close(self) -> None:
        """End a trace that is still going on."""
        if self._is_on:
            self._is_on = False
            jax.profiler.stop_trace()


def out_of_memory(error: Exception, model_dir: Path, index: int) -> UserError:
    """What to say of a device that had no room, beside a profile of what it held."""
    path = model_dir / f"memory-{index}.prof"
    try:
        jax.profiler.save_device_memory_profile(str(path))
        held = f"what devices held is in {path} (read it by pprof)"
    except Exception as second:  # the first error is the one that counts
        held = f"no memory profile could be written ({second})"
    return UserError(
        f"a device ran out of memory ({first_line(error)}); {held}; choose more fsdp in MeshShape, "
        "a smaller batch_size, or TrainRun.remat"
    )


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device had no room."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
