"""Checkpoints of a run, by Orbax: parameters, optimizer state, and what describes them."""

import errno
import os
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from aquila_jax.errors import UserError
from aquila_jax.training.step import TrainState

CHECKPOINT_DIR = "checkpoints"

# TensorStore reports what the file system refuses as a ValueError with the system's words in it.
_DISK_PROBLEMS = tuple(
    os.strerror(number)
    for number in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.EIO,
        errno.EFBIG,
    )
)


class Checkpoints:
    """The checkpoints under one MODEL_DIR.

    Each holds `params`, `opt_state` and `meta` (JSON: configuration, ledger, the data's identity),
    so that a growth can read the parameters alone. Orbax writes under a temporary name and
    renames, so a directory named by its step is complete. A context manager: leaving it releases
    Orbax's threads.
    """

    def __init__(self, model_dir: Path, *, keep: int = 2, read_only: bool = False) -> None:
        self._directory = model_dir.absolute() / CHECKPOINT_DIR
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            enable_async_checkpointing=False,
            read_only=read_only,
        )
        self._manager = ocp.CheckpointManager(
            self._directory, options=options, item_names=("params", "opt_state", "meta")
        )

    @property
    def latest_step(self) -> int | None:
        """The newest complete checkpoint; None where there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Write a checkpoint for the state's step, then drop those beyond `keep`.

        Raises:
            UserError: it could not be written; the ones before are untouched.
        """
        step = int(state.step)
        if self.latest_step == step:
            return
        self._save(
            step,
            params=ocp.args.StandardSave(state.params),
            opt_state=ocp.args.StandardSave(state.opt_state),
            meta=ocp.args.JsonSave(meta),
        )

    def save_params(self, params: Any, meta: dict[str, Any]) -> None:
        """Write a checkpoint for step 0 that has parameters and no optimizer state.

        Raises:
            UserError: it could not be written.
        """
        arguments = {"params": ocp.args.StandardSave(params), "meta": ocp.args.JsonSave(meta)}
        self._save(0, **arguments)

    def has_optimizer_state(self, step: int) -> bool:
        """Whether the checkpoint of `step` is of a run, not of a converted model."""
        return (self._directory / str(step) / "opt_state").exists()

    def _save(self, step: int, **items: Any) -> None:
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        except (OSError, ValueError, RuntimeError) as error:
            if not _is_of_the_disk(error):
                raise
            kept = f"step {self.latest_step} is kept" if self.latest_step is not None else "none"
            raise UserError(
                f"could not save a checkpoint of step {step} under {self._directory} "
                f"({_first_line(error)}); last good one: {kept}; make room or mend the "
                "directory, then run the same command again"
            ) from error

    def read_meta(self, step: int) -> dict[str, Any]:
        """What describes the checkpoint of `step`.

        Raises:
            UserError: it cannot be read.
        """
        return self._restore(step, meta=ocp.args.JsonRestore())["meta"]

    def restore_state(self, step: int, abstract: TrainState) -> TrainState:
        """The whole state, on the shardings of `abstract`.

        Raises:
            UserError: it cannot be read.
        """
        items = self._restore(
            step,
            params=ocp.args.StandardRestore(abstract.params),
            opt_state=ocp.args.StandardRestore(abstract.opt_state),
        )
        # A jitted copy puts the scalar where the step expects it.
        place = jax.jit(lambda: jnp.asarray(step, jnp.int32), out_shardings=abstract.step.sharding)
        return TrainState(place(), items["params"], items["opt_state"])

    def restore_params(self, step: int, abstract_params: Any) -> Any:
        """The parameters alone, on the shardings of `abstract_params`.

        Raises:
            UserError: they cannot be read.
        """
        return self._restore(step, params=ocp.args.StandardRestore(abstract_params))["params"]

    def _restore(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
            others = sorted(set(self._manager.all_steps()) - {step})
            rest = f"go on from step {others[-1]}" if others else "start again"
            raise UserError(
                f"checkpoint {self._directory / str(step)} cannot be read ({_first_line(error)}): "
                f"move it out of {self._directory.name}/ to {rest}"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._manager.close()


def open_existing(model_dir: Path) -> Checkpoints:
    """The checkpoints of a finished or running MODEL_DIR, for reading.

    Raises:
        UserError: there is no checkpoint.
    """
    if not (model_dir / CHECKPOINT_DIR).is_dir():
        raise UserError(f"{model_dir} holds no checkpoints: train it first, or name another one")
    checkpoints = Checkpoints(model_dir, read_only=True)
    if checkpoints.latest_step is None:
        checkpoints.__exit__()
        raise UserError(f"{model_dir} holds no complete checkpoint: train it first")
    return checkpoints


def _is_of_the_disk(error: BaseException) -> bool:
    return isinstance(error, OSError) or any(words in str(error) for words in _DISK_PROBLEMS)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
