"""What a training run is: its settings, and the checks that need no parameters."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aquila_jax import accounting, axes, hosts
from aquila_jax.config import ModelConfig
from aquila_jax.errors import UserError, check_number
from aquila_jax.growth import ScaleOut, ScaleUp
from aquila_jax.growth.optimizer_state import check_policy
from aquila_jax.nn import Dispatch, Transformer
from aquila_jax.nn.moe import DEFAULT_DISPATCH
from aquila_jax.nn.transformer import REMAT_POLICIES
from aquila_jax.sharding import Layout, MeshShape
from aquila_jax.training.assignment import Assignment, assign, check_map
from aquila_jax.training.batches import Data
from aquila_jax.training.checkpoints import CHECKPOINT_DIR, open_existing
from aquila_jax.training.guard import Guard
from aquila_jax.training.keeping import Keep
from aquila_jax.training.ledger import Ledger, steps_for_flops
from aquila_jax.training.optimizer import AdamW
from aquila_jax.training.parent import is_there, open_parent, refuse_moments
from aquila_jax.training.profiling import check_profile_steps
from aquila_jax.training.saved_step import load_step
from aquila_jax.training.settings import is_covered
from aquila_jax.training.step import (
    RouterLosses,
    TrainState,
    make_train_step,
    new_state,
    state_shardings,
)

# Where a run does not say its steps yet: the length of a schedule is a constant of the program, and
# changes no shape.
ANY_STEPS = 10**6

# Activations in float16 would need a scaled loss.
_DTYPES = ("bfloat16", "float32")
_NOT_NEGATIVE = ("keep_every", "keep_best", "check_replicas_every")
_AT_LEAST_ONE = (
    "eval_every", "eval_batches", "checkpoint_every", "keep_checkpoints", "log_every",
    "micro_batches",
)  # fmt: skip

# What gin would let anything stand for. Whatever has the members of `Data` is data.
_KINDS: Mapping[str, tuple[type, ...]] = {
    "model_dir": (str,),
    "model": (ModelConfig,),
    "optimizer": (AdamW,),
    "init_from": (str,),
    "init_from_model": (ModelConfig, type(None)),
    "growth": (ScaleUp, ScaleOut, type(None)),
    "mesh": (MeshShape,),
    "dispatch": (Dispatch,),
    "router_losses": (RouterLosses,),
    "guard": (Guard,),
    "allow_changes": (tuple, list),
    "profile_steps": (tuple, list),
}
# Kept as text, which is what checkpoints compare and messages say.
_PATHS = ("model_dir", "match_flops_of", "init_from", "compiled_step")


@dataclasses.dataclass(frozen=True)
class TrainRun:
    """One stage of training, whole: everything `train` needs to know.

    A path may be given as text or as a path object.

    Attributes:
        model_dir: where everything the run writes goes.
        model: the architecture that is trained.
        data: batches to train and to validate on.
        optimizer: AdamW and its schedule.
        steps: updates to make; 0 takes them from `match_flops_of`.
        match_flops_of: another MODEL_DIR whose lineage's FLOPs this run spends too.
        name: what reports call the stage.
        init_from: what gives the first parameters: a MODEL_DIR (its newest checkpoint), a Hugging
            Face directory or a GGUF file; "" for scratch.
        init_from_model: the architecture expected there; checked before it exists.
        growth: how parameters of `init_from` become those of `model`; None takes them as they are.
        assignment_map: for an `init_from` that is nearly the model: pairs of a regular expression
            on a leaf's whole path and the path of `init_from` to read it from, or None to
            initialise it; see `aquila_jax.training.assignment.assign`. With a growth, the model
            is `init_from_model`, where that is set.
        allow_missing: whether leaves that `init_from` lacks are initialised and leaves that
            nothing uses are left, without being named in `assignment_map`.
        optimizer_state: what a growth makes of the parent's moments: "reset", "map" or
            "keep_old_zero_new" (`aquila_jax.growth.optimizer_state`). The schedule starts anew
            over this run's steps either way; Adam's count of updates, which its bias correction
            reads, goes on where moments do.
        mesh: how devices are arranged.
        sharding_rules: changes to `aquila_jax.sharding.DEFAULT_RULES`.
        dtype: of activations and of weights in use; parameters stay float32.
        remat: what is stored for the backward pass; see `Transformer.remat`.
        micro_batches: parts of a batch whose gradients are summed one after the other, each with
            activations of its own; 1 takes the batch at once.
        dispatch: how a mixture's tokens reach their experts in training; nothing is dropped where
            losses are validated.
        router_losses: weights of a mixture's auxiliary losses.
        seed: of the initial parameters and the routers.
        eval_every: steps between validations; the first and last step are always validated.
        eval_batches: batches of every language in a validation.
        checkpoint_every: steps between checkpoints; the last step is always saved.
        keep_checkpoints: how many of the newest stay; the last step of a stage always does.
        keep_every: checkpoints whose step is a multiple of this stay too; 0 for none.
        keep_best: how many of the lowest validation loss stay too, among those at whose step
            there was a validation.
        guard: which updates are skipped, and when the run gives up.
        allow_changes: settings whose change since the last checkpoint is accepted although it
            changes the model or the order of the data, as in `("data.seed",)`; a name stands for
            everything below it.
        log_every: steps between rows of training metrics.
        compiled_step: a file that `aquila plan --save` made: the train step, compiled for these
            devices; "" compiles it here.
        profile_steps: the first and the last step of a trace for xprof, in MODEL_DIR/profile;
            () for none.
        check_replicas_every: steps between comparisons of all copies of the parameters, bit for
            bit; 0 for none.
    """

    model_dir: str
    model: ModelConfig
    data: Data
    optimizer: AdamW
    steps: int = 0
    match_flops_of: str = ""
    name: str = "train"
    init_from: str = ""
    init_from_model: ModelConfig | None = None
    growth: ScaleUp | ScaleOut | None = None
    assignment_map: tuple[tuple[str, str | None], ...] = ()
    allow_missing: bool = False
    optimizer_state: str = "reset"
    mesh: MeshShape = dataclasses.field(default_factory=MeshShape)
    sharding_rules: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    dtype: str = "bfloat16"
    remat: str = "none"
    micro_batches: int = 1
    dispatch: Dispatch = DEFAULT_DISPATCH
    router_losses: RouterLosses = dataclasses.field(default_factory=RouterLosses)
    seed: int = 0
    eval_every: int = 1000
    eval_batches: int = 8
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    keep_every: int = 0
    keep_best: int = 0
    guard: Guard = dataclasses.field(default_factory=Guard)
    allow_changes: tuple[str, ...] = ()
    log_every: int = 10
    compiled_step: str = ""
    profile_steps: tuple[int, ...] = ()
    check_replicas_every: int = 0

    def __post_init__(self) -> None:
        for name in _PATHS:
            if isinstance(path := getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(path))
        for name, kinds in _KINDS.items():
            if not isinstance(given := getattr(self, name), kinds):
                wanted = ("None" if kind is type(None) else kind.__name__ for kind in kinds)
                # Texts and tuples are written in a gin file as they are in Python.
                is_plain = kinds[0] in (str, tuple)
                hint = "" if is_plain else ": in a gin file, a reference such as @NAME()"
                words = f"{' or '.join(wanted)}, not {given!r}{hint}"
                raise UserError(f"TrainRun.{name} must be {words}")
        if not self.model_dir:
            raise UserError("model_dir is empty: name a directory, as in --gin.MODEL_DIR=\"'...'\"")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 0:
            raise UserError(f"steps must be a whole number, 0 or more, not {self.steps!r}")
        if bool(self.steps) == bool(self.match_flops_of):
            raise UserError(
                f"set exactly one of steps (now {self.steps}) and match_flops_of "
                f"(now {self.match_flops_of!r})"
            )
        if self.remat not in REMAT_POLICIES:
            raise UserError(f"no remat {self.remat!r}; there are {', '.join(REMAT_POLICIES)}")
        if self.dtype not in _DTYPES:
            raise UserError(f"no dtype {self.dtype!r}; there are {', '.join(_DTYPES)}")
        for names, least in ((_AT_LEAST_ONE, 1), (_NOT_NEGATIVE, 0)):
            for name in names:
                check_number(name, getattr(self, name), least=least, is_whole=True)
        check_number("seed", self.seed, least=0, most=2**32 - 1, is_whole=True)
        check_policy(self.optimizer_state)
        check_profile_steps(self.profile_steps)
        self._check_data()
        if self.growth is not None and not self.init_from:
            raise UserError(f"{self.growth} grows nothing: set init_from to the parent's MODEL_DIR")
        self._check_restore()

    def _check_restore(self) -> None:
        check_map(self.assignment_map)
        if self._is_assigned and not self.init_from:
            raise UserError("assignment_map and allow_missing read nothing: set init_from")
        if self._is_assigned and self.growth is not None and self.optimizer_state != "reset":
            raise UserError(
                f"optimizer_state {self.optimizer_state!r} grows moments leaf by leaf, which "
                "assignment_map and allow_missing do not map: set optimizer_state to 'reset'"
            )
        if self.init_from_model is None:
            return
        if self._is_assigned and self.growth is not None:
            self.growth.plan(self.init_from_model, self.model)
        else:
            self.check_parent(self.init_from_model)

    def _check_data(self) -> None:
        if not hasattr(self.data, "train_batches"):
            raise UserError(
                f"TrainRun.data must be TextData, TokenCache or the like, not {self.data!r}"
            )
        if self.data.vocab_size > self.model.vocab_size:
            raise UserError(
                f"the data's vocab_size {self.data.vocab_size} is larger than the model's "
                f"{self.model.vocab_size}: its tokens would have no embedding"
            )
        if self.data.sequence_length > self.model.context_length:
            raise UserError(
                f"the data's sequence_length {self.data.sequence_length} is longer than the "
                f"model's context_length {self.model.context_length}"
            )

    @property
    def path(self) -> Path:
        """MODEL_DIR as a path."""
        return Path(self.model_dir)

    @property
    def keep(self) -> Keep:
        """Which checkpoints stay."""
        return Keep(self.keep_checkpoints, self.keep_every, self.keep_best)

    @property
    def flops_per_step(self) -> float:
        """Model FLOPs of one update."""
        tokens = self.data.batch_size * self.data.sequence_length
        return tokens * accounting.training_flops_per_token(self.model, self.data.sequence_length)

    @property
    def _is_assigned(self) -> bool:
        return bool(self.assignment_map) or self.allow_missing

    def wanted_of(self, parent: ModelConfig) -> ModelConfig:
        """What `parent` is read as: the model, or, before a growth, the model that grows."""
        return self.model if self.growth is None else self.init_from_model or parent

    def check_parent(self, parent: ModelConfig) -> Assignment | None:
        """`parent` can become `model` by `assignment_map` and `growth`.

        Returns:
            Where leaves come from; None where every leaf is its own.

        Raises:
            UserError: it cannot.
        """
        wanted, assignment = parent, None
        if self._is_assigned:
            wanted = self.wanted_of(parent)
            assignment = assign(
                wanted, parent, self.assignment_map, allow_missing=self.allow_missing
            )
        if self.growth is not None:
            self.growth.plan(wanted, self.model)
        elif wanted != self.model:
            raise UserError(
                f"{self.init_from} holds another model: {differences(parent, self.model)}; set "
                "growth to scale it up or out, or assignment_map to say which leaf is which"
            )
        return assignment

    def check_own(self, saved: ModelConfig) -> None:
        """A checkpoint of MODEL_DIR holds `model`, or differs by what `allow_changes` names.

        Raises:
            UserError: it holds another one.
        """
        changed = [f"model.{name}" for name in changed_fields(saved, self.model)]
        refused = [name for name in changed if not is_covered(name, self.allow_changes)]
        if refused:
            raise UserError(
                f"{self.model_dir} holds another model: {differences(saved, self.model)}; choose "
                "another MODEL_DIR, or the settings it was made with (or, where no parameter's "
                f"shape changes, allow it by name: TrainRun.allow_changes = {tuple(refused)!r})"
            )

    def resolve_steps(self) -> int:
        """`steps`, or as many as spend the FLOPs of `match_flops_of`.

        Raises:
            UserError: that MODEL_DIR has no ledger yet.
        """
        if self.steps:
            return self.steps
        with open_existing(Path(self.match_flops_of)) as checkpoints:
            meta = checkpoints.read_meta(checkpoints.latest_step or 0)
        ledger = Ledger.from_dict(meta["ledger"])
        stage = ledger.current
        if stage.steps < stage.planned_steps:
            raise UserError(
                f"{self.match_flops_of} has made {stage.steps} of {stage.planned_steps} steps: "
                "finish it before matching its FLOPs"
            )
        return steps_for_flops(ledger.totals["flops"], self.flops_per_step)


def changed_fields(found: ModelConfig, wanted: ModelConfig) -> list[str]:
    """The names of the fields in which two configurations differ."""
    names = (field.name for field in dataclasses.fields(ModelConfig))
    return [name for name in names if getattr(found, name) != getattr(wanted, name)]


def differences(found: ModelConfig, wanted: ModelConfig) -> str:
    """The fields in which two configurations differ, with both values."""
    return ", ".join(
        f"{name} is {getattr(found, name)} there and {getattr(wanted, name)} here"
        for name in changed_fields(found, wanted)
    )


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a run computes with: its model, layout, optimizer and steps, nothing allocated.

    Attributes:
        model: the decoder.
        layout: mesh and rules.
        optimizer: the optax transformation.
        train_step: `(state, batch) -> (state, metrics)`, jitted.
        abstract: shapes, dtypes and shardings of the state.
    """

    model: Transformer
    layout: Layout
    optimizer: optax.GradientTransformation
    train_step: Any
    abstract: TrainState


def build(run: TrainRun, steps: int, devices: Sequence[Any] | None = None) -> Compiled:
    """The pieces of `run`, with every shape checked.

    Args:
        run: the settings.
        steps: updates, for the schedule.
        devices: to compute on; None for all that are here.

    Raises:
        UserError: mesh, sharding or batch do not fit the devices or the model.
    """
    model, layout = model_on_mesh(run, devices)
    optimizer = run.optimizer.build(steps, axes.parameters(run.model))
    shapes = jax.eval_shape(
        lambda params: new_state(params, optimizer), axes.abstract_params(run.model)
    )
    abstract = placed(shapes, state_shardings(shapes, layout, run.model))
    train_step = make_train_step(
        model, optimizer, run.router_losses, run.guard, micro_batches=run.micro_batches
    )
    return Compiled(model, layout, optimizer, train_step, abstract)


def with_saved_step(run: TrainRun, compiled: Compiled) -> Compiled:
    """`compiled` with the train step of `run.compiled_step`, where that is set.

    Raises:
        UserError: it is not this step, or not for these devices.
    """
    if not run.compiled_step:
        return compiled
    batch = abstract_batch(run, compiled.layout)
    lowered = compiled.train_step.lower(compiled.abstract, batch)
    devices = list(compiled.layout.mesh.devices.flat)
    step = load_step(Path(run.compiled_step), lowered, devices)
    return dataclasses.replace(compiled, train_step=step)


def model_on_mesh(
    run: TrainRun, devices: Sequence[Any] | None = None
) -> tuple[Transformer, Layout]:
    """The decoder of `run`, and where its parameters and batches go.

    Args:
        run: the settings.
        devices: to compute on; None for all that are here.

    Raises:
        UserError: mesh, sharding rules or batch do not fit the devices.
    """
    if jax.process_count() != hosts.current().count:
        raise UserError(
            f"this is one of {jax.process_count()} processes that do not know each other: join "
            "them by `with aquila_jax.hosts.joined():` around the run, and not by JAX alone"
        )
    layout = Layout.of(run.mesh.build(devices), run.sharding_rules)
    if run.data.batch_size % (layout.batch_shards * run.micro_batches):
        raise UserError(
            f"batch_size {run.data.batch_size} does not divide over the {layout.batch_shards} "
            f"devices of the mesh's batch axes, {run.micro_batches} micro_batches on each"
        )
    model = Transformer(
        run.model,
        dtype=jnp.dtype(run.dtype),
        remat=run.remat,
        layout=layout.unless_single(),
        dispatch=run.dispatch,
    )
    return model, layout


def placed(shapes: Any, shardings: Any) -> Any:
    """Abstract arrays, each with its sharding."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def abstract_params(config: ModelConfig, layout: Layout) -> Any:
    """Shapes, dtypes and shardings of the parameters of `config`.

    Raises:
        UserError: they do not fit the mesh.
    """
    return placed(axes.abstract_params(config), layout.params(config))


def abstract_batch(run: TrainRun, layout: Layout) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of a batch of `run`."""
    shape = (run.data.batch_size, run.data.sequence_length)
    return {
        name: jax.ShapeDtypeStruct(
            shape,
            jnp.float32 if name == "loss_weights" else jnp.int32,
            sharding=layout.batch(),
        )
        for name in ("tokens", "targets", "segment_ids", "positions", "loss_weights")
    }


def place_batch(
    batch: Mapping[str, np.ndarray], layout: Layout, batch_size: int
) -> dict[str, jax.Array]:
    """A batch on the devices, its rows in shards.

    Args:
        batch: arrays `[rows, T]`: all rows, or those of `Layout.own_rows` alone.
        layout: where they go.
        batch_size: B, rows of the whole batch.
    """
    sharding = layout.batch()
    return {
        name: jax.make_array_from_process_local_data(
            sharding, array, (batch_size, *array.shape[1:])
        )
        for name, array in batch.items()
    }


def check(run: TrainRun) -> list[str]:
    """Everything about `run` that can be checked without training; what could not be, as notes.

    Traces the train step on abstract values, so shapes are checked whole.

    Raises:
        UserError: something does not fit.
    """
    notes = []
    if run.init_from and not is_there(Path(run.init_from)):
        notes.append(f"init_from {run.init_from} does not exist yet: its model was not read")
    elif run.init_from:
        with open_parent(Path(run.init_from)) as parent:
            run.check_parent(parent.config)
            if run.growth is not None:
                refuse_moments(parent, run.optimizer_state)
    steps = run.steps
    if not steps and (Path(run.match_flops_of) / CHECKPOINT_DIR).is_dir():
        steps = run.resolve_steps()
    elif not steps:
        notes.append(f"match_flops_of {run.match_flops_of} does not exist yet: steps are unknown")
        steps = ANY_STEPS
    compiled = build(run, steps)
    if run.compiled_step and not Path(run.compiled_step).exists():
        notes.append(f"compiled_step {run.compiled_step} does not exist yet: it was not read")
    else:
        with_saved_step(run, compiled)
    jax.eval_shape(compiled.train_step, compiled.abstract, abstract_batch(run, compiled.layout))
    return notes
