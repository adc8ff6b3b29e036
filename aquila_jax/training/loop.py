"""The training loop: begin, step, measure, save, and stop cleanly when asked."""

import contextlib
import functools
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aquila_jax.data.pretrained_tokenizer import open_tokenizer
from aquila_jax.errors import UserError
from aquila_jax.evaluation.perplexity import (
    bits_per_byte,
    bytes_per_token,
    make_eval_step,
    validation_losses,
)
from aquila_jax.hosts import current
from aquila_jax.nn.moe.health import expert_similarity
from aquila_jax.training import settings
from aquila_jax.training.agreement import (
    check_alike,
    code_digest,
    share_directory,
    stop_vote,
    versions,
)
from aquila_jax.training.checkpoints import Checkpoints
from aquila_jax.training.describe import describe
from aquila_jax.training.guard import REASONS, all_finite
from aquila_jax.training.ledger import Ledger
from aquila_jax.training.lock import lock
from aquila_jax.training.metrics import (
    SKIPPED_FILE,
    MetricsWriter,
    Progress,
    SkippedBatches,
    Unwritten,
)
from aquila_jax.training.profiling import Profiler, is_out_of_memory, out_of_memory
from aquila_jax.training.replicas import check_replicas
from aquila_jax.training.run import Compiled, TrainRun, build, place_batch, with_saved_step
from aquila_jax.training.signals import stop_on_signal
from aquila_jax.training.start import Start, begin, read_ledger
from aquila_jax.training.times import Times

# Numbers that a metric by layer may have in a row.
_MOST_BY_LAYER = 1024


class Interrupted(Exception):
    """The run was asked to stop, and has saved everything.

    Attributes:
        signum: the signal that asked.
    """

    # All processes of a run stop after the same step.
    is_agreed = True

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


def train(run: TrainRun, *, operative_config: str = "") -> Ledger:
    """Train `run` to its last step, from wherever MODEL_DIR stands.

    Args:
        run: the settings.
        operative_config: text kept as MODEL_DIR/config.gin.

    Returns:
        The ledger at the end.

    Raises:
        UserError: settings, data or directories do not fit; nothing on disk is lost.
        Interrupted: SIGINT or SIGTERM came; the last step is saved.
    """
    began = time.monotonic()
    steps = run.resolve_steps()
    with _held(run), Checkpoints(run.path, run.keep) as checkpoints:
        checkpoints.set_aside_damaged()
        ledger = read_ledger(checkpoints)
        if ledger is not None and _is_finished(run, ledger, steps):
            if current().is_first:
                # A crash between the last checkpoint and its ledger file leaves the file behind.
                ledger.write(run.path)
                print(f"{run.name}: {run.model_dir} has made all {steps} steps", file=sys.stderr)
            return ledger
        compiled = with_saved_step(run, build(run, steps))
        _prepare(run)
        with _named_disk_errors(run.path), _named_lack_of_memory(run.path):
            start = begin(run, compiled, checkpoints, steps)
            describe(run, compiled, operative_config)
            with stop_on_signal(run.name) as asked:
                session = _Session(run, compiled, checkpoints, steps, start)
                session.times.add("start", time.monotonic() - began)
                with contextlib.closing(session):
                    ledger = session.run_to_end(asked)
    if session.stopped_by:
        raise Interrupted(
            session.stopped_by,
            f"{run.name}: stopped and saved at step {ledger.current.steps} of {steps}; run the "
            "same command again to go on",
        )
    return ledger


def grow(run: TrainRun, *, operative_config: str = "") -> Ledger:
    """Make the first checkpoint of `run`, grown from its parent, and train nothing.

    `train` with the same settings goes on from it.

    Raises:
        UserError: there is nothing to grow, or MODEL_DIR already has a checkpoint.
    """
    if run.growth is None:
        raise UserError("growth is None: set TrainRun.growth to @ScaleUp() or @ScaleOut()")
    steps = run.resolve_steps()
    with _held(run), Checkpoints(run.path, run.keep) as checkpoints:
        if checkpoints.latest_step is not None:
            raise UserError(
                f"{run.model_dir} already holds step {checkpoints.latest_step}: growth happens "
                "once; choose another MODEL_DIR"
            )
        compiled = build(run, steps)
        _prepare(run)
        with _named_disk_errors(run.path), _named_lack_of_memory(run.path):
            start = begin(run, compiled, checkpoints, steps)
            describe(run, compiled, operative_config)
            checkpoints.save(start.state, _meta(run, start.ledger))
            checkpoints.wait()
            if current().is_first:
                start.ledger.write(run.path)
                print(f"{run.name}: {start.reason}, saved in {run.model_dir}", file=sys.stderr)
    return start.ledger


class _Session:
    """The moving parts of one call of `train`."""

    def __init__(
        self,
        run: TrainRun,
        compiled: Compiled,
        checkpoints: Checkpoints,
        steps: int,
        start: Start,
    ) -> None:
        self.run, self.compiled, self.checkpoints = run, compiled, checkpoints
        self.steps, self.state, self.ledger = steps, start.state, start.ledger
        self.is_new = start.is_new
        # A run that was killed before its first checkpoint leaves rows of step 0 behind.
        last = -1 if start.is_new else int(start.state.step)
        self.hosts = current()
        self.metrics, self.skips = Unwritten(), Unwritten()
        if self.hosts.is_first:
            self.metrics = MetricsWriter(run.path, last)
            self.skips = SkippedBatches(run.path, last, run.data.identity()["order"])
        self.times = Times(start.ledger.current.spent)
        self._count_lost()
        self.profiler = Profiler(run.path, run.profile_steps)
        # The signal that all processes have stopped by.
        self.stopped_by = 0
        # Metrics of steps whose verdicts were not looked at yet, on the devices.
        self.unread: list[tuple[int, dict[str, Any]]] = []
        # The step of the last validation, and its loss.
        self.validated = (-1, 0.0)
        # The newest checkpoint when saving began to fail; None while it does not.
        self.kept_at_failure: int | None = None
        self.progress = Progress(
            run.name, steps, int(start.state.step), is_shown=self.hosts.is_first
        )
        for line in start.reason.splitlines():
            self.progress.say(line)
        self.eval_step = make_eval_step(compiled.model)
        self.similarity = jax.jit(expert_similarity)
        self.schedule = run.optimizer.schedule.build(steps)
        self.validation: Mapping[str, list[Any]] = {}
        # By language, where the tokenizer is known.
        self.bytes_per_token: Mapping[str, float] = {}
        # When tokens per second were last counted from, and the stage's tokens by then.
        self.logged = (time.monotonic(), start.ledger.current.tokens)
        # Seconds already in the ledger are taken off, so that a resumed run counts on.
        self.clock_start = time.monotonic() - start.ledger.current.seconds

    def _count_lost(self) -> None:
        """The time of steps that were made and not saved, as far as their rows tell."""
        dropped = self.metrics.dropped
        if dropped and not self.is_new:
            before = self.times.seconds()["lost"]
            self.times.add("lost", dropped["seconds"] - self.ledger.totals["seconds"])
            self.times.add("lost", dropped.get("seconds_lost", before) - before)

    def run_to_end(self, asked: Sequence[int]) -> Ledger:
        """Every step that is left, or, once `asked` holds a signal, the one under way; saves."""
        validation = self.run.data.validation_batches(self.run.eval_batches)
        if self.run.data.tokenizer_path:
            tokenizer = open_tokenizer(self.run.data.tokenizer_path)
            self.bytes_per_token = bytes_per_token(tokenizer, validation)
        self.validation = {
            language: [self._place(batch) for batch in batches]
            for language, batches in validation.items()
        }
        if self.ledger.current.validation_start is None and not self.ledger.current.steps:
            self._validate()
        if self.is_new:
            self._save(is_awaited=True)
        self.stopped_by = max(self.hosts.gather("asked", asked[0] if asked else 0))
        if self.stopped_by:
            return self.ledger
        first = int(self.state.step)
        batches = self._batches(first)
        vote = stop_vote(self.hosts, self.compiled.layout, asked)
        self.logged = (time.monotonic(), self.ledger.current.tokens)
        for step in range(first + 1, self.steps + 1):
            with self.times.of("data"):
                batch = self._place(next(batches))
            self.profiler.before(step, self.state.step)
            with self.times.of("compile" if step == first + 1 else "step"):
                self._train_one(step, batch)
                if step == first + 1:
                    jax.block_until_ready(self.state.step)
            if words := self.profiler.after(step, self.state.step):
                self.progress.say(words)
            if step % self.run.eval_every == 0 or step == self.steps:
                self._validate()
            with self.times.of("step"):
                self.stopped_by = vote()  # read once: where the loop ends has been saved
            every = self.run.check_replicas_every
            if every and step % every == 0:
                check_replicas(self.hosts, self.state.params, step)
            is_last = step == self.steps or bool(self.stopped_by)
            if step % self.run.checkpoint_every == 0 or is_last:
                self._save(is_awaited=is_last)
            if self.stopped_by:
                return self.ledger
        loss = (self.ledger.current.validation_end or {})["mean"]
        self.progress.say(f"finished: validation loss {loss:.4f}, kept in {self.run.model_dir}")
        self.progress.say(str(self.times))
        return self.ledger

    def _batches(self, first: int) -> Iterator[dict[str, np.ndarray]]:
        """Batches from number `first` on; of several processes, each reads its own rows."""
        if self.hosts.count == 1:
            return self.run.data.train_batches(start=first)
        rows = self.compiled.layout.own_rows(self.run.data.batch_size)
        return self.run.data.train_batches(start=first, rows=rows)

    def _place(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        return place_batch(batch, self.compiled.layout, self.run.data.batch_size)

    def _train_one(self, step: int, batch: dict[str, jax.Array]) -> None:
        self.state, metrics = self.compiled.train_step(self.state, batch)
        self.unread.append((step, metrics))
        flops = self.ledger.current.flops + self.run.flops_per_step
        self.ledger = self.ledger.update(steps=step, flops=flops)
        if step % self.run.log_every and step not in (1, self.steps):
            self.progress.update(step, None, 0.0)
            return
        # Fetching a value waits for the step, so only rows that are kept pay for it.
        values = self._read_metrics()
        self._read_clock()
        now, total = time.monotonic(), self.ledger.current.tokens
        values["tokens_per_second"] = (total - self.logged[1]) / (now - self.logged[0])
        self.logged = (now, total)
        values["goodput"] = self.times.goodput
        values |= {f"seconds_{kind}": spent for kind, spent in self.times.seconds().items()}
        # The update just made was of this number in the schedule.
        number = step - 1 - int(values["skipped_updates"])
        values["learning_rate"] = float(np.asarray(self.schedule(max(number, 0))))
        self.metrics.write("train", self.ledger, values)
        self.progress.update(step, values["loss"], values["tokens_per_second"])
        self._tell_failed_save()

    def _read_metrics(self) -> dict[str, Any]:
        """The newest step's metrics, once every step since the last call has been looked at.

        Raises:
            UserError: too many updates in a row were skipped.
        """
        values: dict[str, Any] = {}
        for step, metrics in jax.device_get(self.unread):
            values = {name: _plain(value) for name, value in metrics.items()}
            reason = REASONS.get(int(values.pop("verdict")), "")
            in_a_row = int(values.pop("skipped_in_a_row"))
            tokens = self.ledger.current.tokens + int(values.pop("tokens"))
            self.ledger = self.ledger.update(tokens=tokens)
            if not reason:
                continue
            self.ledger = self.ledger.update(skipped=int(values["skipped_updates"]))
            self.skips.write(step, reason, values)
            self.progress.say(f"step {step}: update skipped, {reason}")
            if in_a_row >= self.run.guard.stop_after:
                raise UserError(
                    f"{in_a_row} updates in a row were skipped, the last at step {step} "
                    f"({reason}); {self.last_good()}; the batches are listed in "
                    f"{self.run.path / SKIPPED_FILE}: change the data, the learning rate or "
                    "TrainRun.guard, then run the command again"
                )
        self.unread = []
        return values

    def last_good(self) -> str:
        """Which checkpoint is kept, in words."""
        self.checkpoints.join()
        latest = self.checkpoints.latest_step
        return "no checkpoint was made yet" if latest is None else f"step {latest} is kept"

    def _tell_failed_save(self) -> None:
        """Say that a save failed: when it does first, and again only after one that did not."""
        failure = self.checkpoints.failure()
        if self.kept_at_failure is None:
            if failure:
                self.progress.say(
                    f"warning: {failure}; training goes on, the next save tries again"
                )
                self.kept_at_failure = self.checkpoints.latest_step or 0
        elif (latest := self.checkpoints.latest_step or 0) > self.kept_at_failure:
            self.progress.say(f"saving works again: step {latest} is kept")
            self.kept_at_failure = None

    def _read_clock(self) -> None:
        """Brings the ledger's seconds up to date; call it when the devices have been waited for."""
        self.ledger = self.ledger.update(
            seconds=time.monotonic() - self.clock_start, spent=self.times.seconds()
        )

    @contextlib.contextmanager
    def _aside(self, kind: str) -> Iterator[None]:
        """What happens inside is not training: tokens per second leave its time out."""
        with self.times.of("step"):
            jax.block_until_ready(self.state.step)
        began = time.monotonic()
        with self.times.of(kind):
            yield
        since, tokens = self.logged
        self.logged = (since + time.monotonic() - began, tokens)

    def _validate(self) -> None:
        with self._aside("validation"):
            losses = validation_losses(self.eval_step, self.state.params, self.validation)
        which = "validation_start" if self.ledger.current.steps == 0 else "validation_end"
        self.ledger = self.ledger.update(**{which: losses})
        self.validated = (self.ledger.current.steps, losses["mean"])
        self._read_clock()
        row: dict[str, Any] = {
            f"loss_{name}": loss for name, loss in losses.items() if name != "mean"
        }
        for name, size in self.bytes_per_token.items():
            row[f"bits_per_byte_{name}"] = bits_per_byte(losses[name], size)
        if self.run.model.is_moe:
            similarity_L = _plain(jax.device_get(self.similarity(self.state.params)))
            row["expert_similarity"] = sum(similarity_L) / len(similarity_L)
            row["expert_similarity_by_layer"] = similarity_L
        self.metrics.write("validation", self.ledger, {"loss": losses["mean"], **row})
        by_language = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        self.progress.say(f"step {self.ledger.current.steps}: validation loss {by_language}")

    def _save(self, *, is_awaited: bool = False) -> None:
        """Begin to save; or, of the first and the last save, see it done.

        Raises:
            UserError: the state is not finite; or, of an awaited save, the disk refused.
        """
        with self._aside("checkpoint"):
            self._read_metrics()
            if not all_finite((self.state.params, self.state.opt_state)):
                raise UserError(
                    f"parameters or optimizer state are not finite at step {self.state.step}: "
                    f"not saved; {self.last_good()}; run the command again to go on from there"
                )
            self._read_clock()
            self.metrics.sync()
            ledger = self.ledger
            stage = ledger.current
            step, loss = self.validated
            self.checkpoints.save(
                self.state,
                _meta(self.run, ledger),
                validation_loss=loss if step == stage.steps else None,
                is_stage_end=stage.steps == self.steps,
                on_saved=functools.partial(ledger.write, self.run.path),
            )
            if is_awaited:
                self.checkpoints.wait()
                if self.hosts.is_first:
                    ledger.write(self.run.path)
            self._tell_failed_save()

    def close(self) -> None:
        """Close files and the bar."""
        self.profiler.close()
        self.progress.close()
        self.metrics.close()
        self.skips.close()


def _plain(value: np.ndarray) -> Any:
    """A number, or numbers by layer; of so many that rows would swell nothing is told."""
    if value.ndim == 0:
        return float(value)
    return [] if value.size > _MOST_BY_LAYER else np.round(value.astype(float), 6).tolist()


def _is_finished(run: TrainRun, ledger: Ledger, steps: int) -> bool:
    """Whether MODEL_DIR has made exactly the steps that are asked for.

    Raises:
        UserError: it has made more, or holds another model.
    """
    run.check_own(ledger.current.model)
    if ledger.current.steps > steps:
        raise UserError(
            f"{run.model_dir} has made {ledger.current.steps} steps, more than the {steps} asked "
            f"for: set steps to at least {ledger.current.steps}, or choose another MODEL_DIR"
        )
    return ledger.current.steps == steps


def _meta(run: TrainRun, ledger: Ledger) -> dict[str, Any]:
    return {
        "config": run.model.to_dict(),
        "ledger": ledger.to_dict(),
        "settings": settings.flatten(run),
        "data": dict(run.data.identity()),
    }


@contextlib.contextmanager
def _held(run: TrainRun) -> Iterator[None]:
    """MODEL_DIR exists and is this run's, on all hosts, which all run the same.

    Raises:
        UserError: it cannot be written, another run holds it, or hosts differ.
    """
    hosts = current()
    facts = {"code": code_digest(), **versions(), **settings.flatten(run)}
    check_alike(hosts, "settings", facts)
    with _named_disk_errors(run.path), contextlib.ExitStack() as stack:
        share_directory(hosts, run.path)
        hosts.first("lock", lambda: stack.enter_context(lock(run.path)))
        yield


def _prepare(run: TrainRun) -> None:
    """The data, first where the first process makes what is made once.

    Raises:
        UserError: something is missing, or hosts would read other data.
    """
    hosts = current()
    hosts.first("data", run.data.prepare)
    if not hosts.is_first:
        run.data.prepare()
    identity = {f"data ({kind})": digest for kind, digest in run.data.identity().items()}
    check_alike(hosts, "data", identity)


@contextlib.contextmanager
def _named_lack_of_memory(path: Path) -> Iterator[None]:
    """Devices without room become a `UserError`, beside a profile of what they held."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(error, path, current().index) from error


@contextlib.contextmanager
def _named_disk_errors(path: Path) -> Iterator[None]:
    """What the file system refuses under MODEL_DIR becomes a `UserError` that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write to MODEL_DIR {path}: {error.strerror or error}; make room or choose "
            "another one, then run the same command again (its checkpoints are whole)"
        ) from error
