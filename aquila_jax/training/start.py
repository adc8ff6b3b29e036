"""How a run begins: t5x's restart order, with growth applied exactly once."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aquila_jax import axes, hosts
from aquila_jax.config import ModelConfig
from aquila_jax.errors import UserError
from aquila_jax.evaluation import certify
from aquila_jax.files import write_json
from aquila_jax.growth import Certificate, GrowthResult, apply_plan
from aquila_jax.growth.compose import Plan
from aquila_jax.growth.optimizer_state import grow_moments
from aquila_jax.sharding import shardings_of
from aquila_jax.training import settings
from aquila_jax.training.batches import Data
from aquila_jax.training.checkpoints import Checkpoints
from aquila_jax.training.ledger import Ledger, Stage
from aquila_jax.training.parent import (
    Parent,
    open_parent,
    refuse_moments,
    restore_assigned,
)
from aquila_jax.training.run import (
    ANY_STEPS,
    Compiled,
    TrainRun,
    abstract_params,
    differences,
    placed,
)
from aquila_jax.training.step import TrainState, new_state, state_shardings

CERTIFICATE_FILE = "certificate.json"


class Start(NamedTuple):
    """Where a run begins.

    Attributes:
        state: the state to train on from.
        ledger: of the lineage, this run's stage last.
        reason: one line for the log, and one for whatever changed since the last time.
        is_new: whether nothing has been saved yet.
    """

    state: TrainState
    ledger: Ledger
    reason: str
    is_new: bool


def begin(run: TrainRun, compiled: Compiled, checkpoints: Checkpoints, steps: int) -> Start:
    """The newest checkpoint of MODEL_DIR, else the parent's with its growth, else scratch.

    Raises:
        UserError: MODEL_DIR or the parent holds another model than the run's.
    """
    if checkpoints.latest_step is not None:
        return _resume(run, compiled, checkpoints, steps)
    if run.init_from:
        return _from_parent(run, compiled, steps)
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    init = functools.partial(_initial_params, compiled, tokens)
    params = jax.jit(init, out_shardings=shardings_of(compiled.abstract.params))(
        jax.random.key(run.seed)
    )
    stage = Stage(run.name, "scratch", "", run.model, steps)
    return Start(_state(compiled, params), Ledger((stage,)), "from scratch", is_new=True)


def read_ledger(checkpoints: Checkpoints) -> Ledger | None:
    """The ledger of the newest checkpoint; None where there is none."""
    if checkpoints.latest_step is None:
        return None
    return Ledger.from_dict(checkpoints.read_meta(checkpoints.latest_step)["ledger"])


def _resume(run: TrainRun, compiled: Compiled, checkpoints: Checkpoints, steps: int) -> Start:
    step = checkpoints.latest_step or 0
    meta = checkpoints.read_meta(step)
    run.check_own(ModelConfig.from_dict(meta["config"]))
    check_vocabulary(run.data, meta["data"]["vocabulary"], run.model_dir)
    changes = settings.compare(
        meta["settings"],
        settings.flatten(run),
        is_order_changed=meta["data"]["order"] != run.data.identity()["order"],
        allowed=run.allow_changes,
    )
    ledger = Ledger.from_dict(meta["ledger"])
    if ledger.current.planned_steps != steps:
        changes.append(
            f"steps were {ledger.current.planned_steps} and are {steps} now: the learning rate "
            f"goes on by the schedule of {steps}"
        )
    state = checkpoints.restore_state(step, compiled.abstract)
    reason = "\n".join([f"resumed from step {step} in {run.model_dir}", *changes])
    return Start(state, ledger.update(planned_steps=steps), reason, is_new=False)


def check_vocabulary(data: Data, saved: str | None, where: str) -> str:
    """A checkpoint was trained on the same token ids.

    Args:
        data: what is to be read now.
        saved: the digest of the checkpoint's tokenizer; None where it is not known.
        where: the checkpoint, for messages.

    Returns:
        "", or the words that this could not be checked.

    Raises:
        UserError: its tokenizer was another one.
    """
    given = data.identity()["vocabulary"]
    if saved is None:
        return (
            f"the tokenizer of {where} is not known, so it was not checked that ids mean the same"
        )
    if saved != given:
        raise UserError(
            f"{where} was trained with another tokenizer (digest {saved}, now {given}): its "
            "embeddings mean other tokens; use the tokenizer it was trained with"
        )
    return ""


def _from_parent(run: TrainRun, compiled: Compiled, steps: int) -> Start:
    with open_parent(Path(run.init_from)) as parent:
        assignment = run.check_parent(parent.config)
        source = parent.config if assignment is None else run.wanted_of(parent.config)
        unchecked = check_vocabulary(run.data, parent.vocabulary, run.init_from)
        abstract = abstract_params(parent.config, compiled.layout)
        adam = None
        if assignment is not None:
            key = jax.random.key(run.seed)
            params = restore_assigned(parent, assignment, source, compiled.layout, abstract, key)
        elif run.optimizer_state == "reset" or run.growth is None:
            params = parent.restore(abstract)
        else:
            params, adam = _with_moments(run, compiled, parent, abstract)
    reason = f"from {parent.where}"
    if assignment is not None:
        reason += (
            f" ({'; '.join(filter(None, [differences(parent.config, source), str(assignment)]))})"
        )
    origin, method = "restored", ""
    if run.growth is not None:
        plan, certificate = run.growth.plan(source, run.model)
        layout = compiled.layout.unless_single()
        grow = functools.partial(apply_plan, plan, target=run.model, layout=layout)
        grown = jax.jit(grow, out_shardings=shardings_of(compiled.abstract.params))(
            params, key=jax.random.key(run.seed)
        )
        before, after = (params, source), GrowthResult(grown, run.model, certificate)
        certificate = certify(before, after, _probe(run.data), dtype=jnp.dtype(run.dtype))
        if hosts.current().is_first:
            write_json(run.path / CERTIFICATE_FILE, certificate.to_dict())
        params = grown
        if adam is not None:
            adam = _grow_adam(run, compiled, plan, certificate, adam)
        origin, method = run.growth.kind, certificate.method
        kept = "exact" if certificate.exact else "not exact"
        reason += f", grown by {method} ({kept})"
    ledger = parent.ledger.begin(Stage(run.name, origin, method, run.model, steps))
    state = _state(compiled, params)
    if adam is not None:
        state = state._replace(opt_state=_replace_adam(state.opt_state, adam))
        reason += f", moments by {run.optimizer_state}"
    if unchecked:
        reason += f"; {unchecked}"
    return Start(state, ledger, reason, is_new=True)


def _with_moments(
    run: TrainRun, compiled: Compiled, parent: Parent, abstract: Any
) -> tuple[Any, optax.ScaleByAdamState]:
    """The parent's parameters and Adam's state, read as this run's optimizer would hold them."""
    refuse_moments(parent, run.optimizer_state)
    assert parent.checkpoints is not None
    # A schedule's state is its count, whatever its length.
    optimizer = run.optimizer.build(ANY_STEPS, axes.parameters(parent.config))
    shapes = jax.eval_shape(functools.partial(new_state, optimizer=optimizer), abstract)
    shardings = state_shardings(shapes, compiled.layout, parent.config)
    state = parent.checkpoints.restore_state(parent.step, placed(shapes, shardings))
    (adam,) = _adam_states(state.opt_state)
    return state.params, adam


def _grow_adam(
    run: TrainRun, compiled: Compiled, plan: Plan, certificate: Certificate, adam: Any
) -> optax.ScaleByAdamState:
    """Adam's state of the grown model, on its shardings."""
    shardings = shardings_of(compiled.abstract.params)
    mu, nu = (
        jax.jit(
            functools.partial(
                grow_moments, plan, certificate, power=power, policy=run.optimizer_state
            ),
            out_shardings=shardings,
        )(moments)
        for power, moments in ((1, adam.mu), (2, adam.nu))
    )
    return adam._replace(mu=mu, nu=nu)


def _is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


def _adam_states(opt_state: Any) -> list[optax.ScaleByAdamState]:
    return [node for node in jax.tree.leaves(opt_state, is_leaf=_is_adam) if _is_adam(node)]


def _replace_adam(opt_state: Any, adam: optax.ScaleByAdamState) -> Any:
    return jax.tree.map(lambda n: adam if _is_adam(n) else n, opt_state, is_leaf=_is_adam)


def _initial_params(compiled: Compiled, tokens: Any, key: jax.Array) -> Any:
    return compiled.model.init(key, jnp.zeros(tokens.shape, tokens.dtype))["params"]


def _state(compiled: Compiled, params: Any) -> TrainState:
    create = functools.partial(new_state, optimizer=compiled.optimizer)
    return jax.jit(create, out_shardings=shardings_of(compiled.abstract))(params)


def _probe(data: Data) -> np.ndarray:
    """A row of held-out text of every language, int32 `[languages, T]`."""
    batches = data.validation_batches(1).values()
    return np.stack([batch["targets"][0] for (batch,) in batches])
