"""Checkpoints of a run, by Orbax: all that training depends on, in one directory, whole or absent.

A checkpoint is written under a hidden name while training goes on, then described in a manifest
of every file, then renamed to its step. So a directory named by a number was complete, and the
manifest tells whether it still is.
"""

import contextlib
import errno
import os
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from aquila_jax.errors import UserError, first_line
from aquila_jax.files import sync_directory
from aquila_jax.hosts import current
from aquila_jax.training.keeping import Keep, Saved
from aquila_jax.training.manifest import (
    Damaged,
    make_durable,
    read_facts,
    verify,
    write_manifest,
)
from aquila_jax.training.step import TrainState

CHECKPOINT_DIR = "checkpoints"
# Of a `TrainState`; the step is the checkpoint's name.
_STATE_ITEMS = ("params", "opt_state", "guard")
# What a directory is called before it is a checkpoint, and once it no longer is one.
_SAVING, _DROPPING, _DAMAGED = ".saving-", ".dropping-", "damaged-"

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

    Each holds `params`, `opt_state`, `guard` and `meta` (JSON: configuration, ledger, settings,
    the data's identity), so that a growth can read the parameters alone. A context manager:
    leaving it waits for the save under way.

    Of several processes each writes, verifies and reads its share, so that all must make the same
    calls; names are given and taken by the first one.
    """

    def __init__(
        self, model_dir: Path, keep: Keep | None = None, *, read_only: bool = False
    ) -> None:
        self._directory = model_dir.absolute() / CHECKPOINT_DIR
        self._keep = keep or Keep()
        self._saving: threading.Thread | None = None
        self._error: BaseException | None = None
        self._failed_step = 0
        self._hosts = current()
        if not read_only:
            self._hosts.first("checkpoints", self._make_directory)

    @property
    def steps(self) -> list[int]:
        """Those there are, in order."""
        names = (path.name for path in self._directory.iterdir())
        return sorted(int(name) for name in names if name.isdecimal())

    @property
    def latest_step(self) -> int | None:
        """The newest checkpoint; None where there is none."""
        return max(self.steps, default=None)

    def path(self, step: int) -> Path:
        """The directory of a checkpoint."""
        return self._directory / str(step)

    def verify_newest(self) -> int | None:
        """The newest checkpoint, read whole and found as it was written; None for none.

        Raises:
            Damaged: it is not.
        """
        newest = self._hosts.first("newest", lambda: self.latest_step)
        if newest is not None:
            found = self._hosts.gather("verify", self._damage(newest))
            if damage := next(filter(None, found), ""):
                raise Damaged(damage)
        return newest

    def set_aside_damaged(self) -> None:
        """Rename newest checkpoints that are damaged, until one is whole; a line tells of each."""
        while True:
            try:
                self.verify_newest()
            except Damaged as damage:
                words = str(damage)
                self._hosts.first("aside", lambda words=words: self._set_aside(words))
            else:
                return

    def _set_aside(self, damage: str) -> None:
        newest = self.path(self.latest_step or 0)
        number = 0
        while (aside := newest.with_name(f"{_DAMAGED}{newest.name}-{number}")).exists():
            number += 1
        newest.rename(aside)
        before = self.latest_step
        rest = "none is left" if before is None else f"going on from step {before}"
        print(
            f"warning: checkpoint {newest} is damaged ({damage}); it is set aside as "
            f"{aside.name}, and {rest}",
            file=sys.stderr,
        )

    def _damage(self, step: int) -> str:
        """What is wrong with this process's part of a checkpoint."""
        try:
            verify(self.path(step), (self._hosts.index, self._hosts.count))
        except Damaged as damage:
            return str(damage)
        return ""

    def save(
        self,
        state: TrainState,
        meta: Mapping[str, Any],
        *,
        validation_loss: float | None = None,
        is_stage_end: bool = False,
        on_saved: Callable[[], None] | None = None,
    ) -> None:
        """Begin to write a checkpoint of the state's step; training may go on at once.

        First waits for the one before. What then becomes of it, `wait` tells.

        Args:
            state: copied before this returns.
            meta: what describes it, as JSON.
            validation_loss: of this step, for `Keep.best`.
            is_stage_end: whether it is to be kept for ever.
            on_saved: called from another thread once the checkpoint is complete.
        """
        self.join()
        step = int(state.step)
        if self._hosts.first("is-there", lambda: self.latest_step == step):
            return
        items = {name: getattr(state, name) for name in _STATE_ITEMS}
        facts = Saved(step, validation_loss, is_stage_end)._asdict()
        self._save(step, items, meta, facts, on_saved)

    def save_params(self, params: Any, meta: Mapping[str, Any]) -> None:
        """Write a checkpoint for step 0 that has parameters and no optimizer state.

        Raises:
            UserError: it could not be written.
        """
        self._save(0, {"params": params}, meta, Saved(0)._asdict(), None)
        self.wait()

    def failure(self) -> str | None:
        """Once for each save that has failed by now: what the disk refused, and what is left.

        Raises:
            Exception: it was not the disk's fault.
        """
        error, self._error = self._error, None
        if error is None:
            return None
        if not _is_of_the_disk(error):
            raise error
        latest = self.latest_step
        kept = f"step {latest} is kept" if latest is not None else "there is none"
        return (
            f"could not save a checkpoint of step {self._failed_step} under {self._directory} "
            f"({_disk_words(error)}); last good one: {kept}"
        )

    def wait(self) -> None:
        """The save under way, if any, is complete.

        Raises:
            UserError: it could not be written; the ones before are untouched.
        """
        self.join()
        if failure := self.failure():
            raise UserError(
                f"{failure}; make room or mend the directory, then run the same command again"
            )

    def has_optimizer_state(self, step: int) -> bool:
        """Whether the checkpoint of `step` is of a run, not of a converted model."""
        return (self.path(step) / "opt_state").exists()

    def read_meta(self, step: int) -> dict[str, Any]:
        """What describes the checkpoint of `step`.

        Raises:
            UserError: it cannot be read.
        """
        return self._restore(step, meta=ocp.args.JsonRestore())["meta"]

    def restore_state(self, step: int, abstract: TrainState) -> TrainState:
        """The whole state, on the shardings of `abstract`.

        Raises:
            UserError: it cannot be read, or has other leaves.
        """
        wanted = {name: getattr(abstract, name) for name in _STATE_ITEMS}
        self._refuse_other_leaves(step, wanted)
        items = self._restore(
            step, **{name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()}
        )
        # A jitted copy puts the scalar where the step expects it.
        place = jax.jit(lambda: jnp.asarray(step, jnp.int32), out_shardings=abstract.step.sharding)
        return TrainState(place(), **{name: items[name] for name in _STATE_ITEMS})

    def restore_params(self, step: int, abstract_params: Any) -> Any:
        """The parameters alone, on the shardings of `abstract_params`.

        Raises:
            UserError: they cannot be read, or are others.
        """
        self._refuse_other_leaves(step, {"params": abstract_params})
        return self._restore(step, params=ocp.args.StandardRestore(abstract_params))["params"]

    def _save(
        self,
        step: int,
        items: Mapping[str, Any],
        meta: Mapping[str, Any],
        facts: Mapping[str, Any],
        on_saved: Callable[[], None] | None,
    ) -> None:
        self.join()
        leaves = {name: _describe_leaves(tree) for name, tree in items.items()}
        arguments: dict[str, Any] = {
            name: ocp.args.StandardSave(tree) for name, tree in items.items()
        }
        arguments["meta"] = ocp.args.JsonSave({**meta, "leaves": leaves})
        partial = self._directory / f"{_SAVING}{step}"
        checkpointer, failed = None, None
        try:
            self._hosts.first("clear", self._remove_unfinished)
            checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
            checkpointer.save(partial, args=ocp.args.Composite(**arguments))
        except Exception as error:
            failed = error

        def finish() -> dict[str, Any]:
            if checkpointer is not None:
                checkpointer.close()
            if failed is not None:
                raise failed
            return make_durable(partial, (self._hosts.index, self._hosts.count))

        def publish() -> None:
            try:
                parts = self._hosts.together("written", finish)
                files = dict(sorted(item for part in parts for item in part.items()))
                self._hosts.first("named", lambda: self._publish(step, facts, files))
                if on_saved is not None and self._hosts.is_first:
                    with contextlib.suppress(OSError):  # the checkpoint itself is there
                        on_saved()
            except BaseException as error:
                self._failed_step, self._error = step, error

        self._saving = threading.Thread(target=publish, name="aquila-save")
        self._saving.start()

    def _publish(self, step: int, facts: Mapping[str, Any], files: Mapping[str, Any]) -> None:
        """Make of what is written a checkpoint, by its manifest and its name."""
        partial = self._directory / f"{_SAVING}{step}"
        write_manifest(partial, facts, files)
        os.rename(partial, self.path(step))
        sync_directory(self._directory)
        self._drop()

    def join(self) -> None:
        """Wait for the save under way, if any, whatever becomes of it."""
        if self._saving is not None:
            self._saving.join()
            self._saving = None

    def _drop(self) -> None:
        """Remove what nothing keeps; half-removed, it no longer has a checkpoint's name."""
        saved = []
        for step in self.steps:
            try:
                saved.append(Saved.from_facts(read_facts(self.path(step))))
            except Damaged:
                continue  # whoever wants to read it will hear of it
        for step in self._keep.dropped(saved):
            dropping = self._directory / f"{_DROPPING}{step}"
            os.rename(self.path(step), dropping)
            shutil.rmtree(dropping, ignore_errors=True)

    def _make_directory(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        self._remove_unfinished()

    def _remove_unfinished(self) -> None:
        for path in self._directory.iterdir():
            if path.name.startswith((_SAVING, _DROPPING)):
                shutil.rmtree(path, ignore_errors=True)

    def _refuse_other_leaves(self, step: int, wanted: Mapping[str, Any]) -> None:
        saved = self.read_meta(step)["leaves"]
        there, here = (
            {
                f"{item}/{path}": kind
                for item in wanted
                for path, kind in leaves.get(item, {}).items()
            }
            for leaves in (saved, {item: _describe_leaves(tree) for item, tree in wanted.items()})
        )
        problems = [f"{path} is missing" for path in sorted(here.keys() - there.keys())]
        problems += [f"{path} is unknown" for path in sorted(there.keys() - here.keys())]
        problems += [
            f"{path} is {there[path]} there and {here[path]} here"
            for path in sorted(here.keys() & there.keys())
            if here[path] != there[path]
        ]
        if problems:
            raise UserError(
                f"checkpoint {self.path(step)} has other leaves: {', '.join(problems)}; to take "
                "what fits, begin a new MODEL_DIR with TrainRun.init_from and assignment_map"
            )

    def _restore(self, step: int, **items: Any) -> Any:
        try:
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
                return checkpointer.restore(self.path(step), args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax and TensorStore raise many kinds
            others = [other for other in self.steps if other != step]
            rest = f"go on from step {others[-1]}" if others else "start again"
            raise UserError(
                f"checkpoint {self.path(step)} cannot be read ({first_line(error)}): "
                f"move it out of {self._directory.name}/ to {rest}"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.join()


def open_existing(model_dir: Path) -> Checkpoints:
    """The checkpoints of a finished or running MODEL_DIR, for reading; the newest is verified.

    Raises:
        UserError: there is no checkpoint, or the newest is damaged.
    """
    if not (model_dir / CHECKPOINT_DIR).is_dir():
        raise UserError(f"{model_dir} holds no checkpoints: train it first, or name another one")
    checkpoints = Checkpoints(model_dir, read_only=True)
    try:
        newest = checkpoints.verify_newest()
    except Damaged as damage:
        newest = checkpoints.path(checkpoints.latest_step or 0)
        raise UserError(
            f"checkpoint {newest} is damaged ({damage}): move it out of {CHECKPOINT_DIR}/ to use "
            "the one before, or train on, which sets it aside"
        ) from damage
    if newest is None:
        raise UserError(f"{model_dir} holds no complete checkpoint: train it first")
    return checkpoints


def _describe_leaves(tree: Any) -> dict[str, str]:
    """Shape and dtype of every leaf, by its path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _is_of_the_disk(error: BaseException) -> bool:
    return isinstance(error, OSError) or any(words in str(error) for words in _DISK_PROBLEMS)


def _disk_words(error: BaseException) -> str:
    """What the file system refused, in the system's words where the error has them.

    TensorStore puts them behind a path that may be longer than a line.
    """
    named = (words for words in _DISK_PROBLEMS if words in str(error))
    return next(named, first_line(error))
