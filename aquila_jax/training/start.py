"""How a run begins: t5x's restart order, with growth applied exactly once."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from aquila_jax.config import ModelConfig
from aquila_jax.errors import UserError
from aquila_jax.files import write_json
from aquila_jax.growth import Certificate, apply_plan
from aquila_jax.training.checkpoints import Checkpoints, open_existing
from aquila_jax.training.ledger import Ledger, Stage
from aquila_jax.training.run import Compiled, Data, TrainRun, abstract_params
from aquila_jax.training.step import TrainState, new_state

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
    params = jax.jit(init, out_shardings=_shardings(compiled.abstract.params))(
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
    check_vocabulary(run.data, meta, run.model_dir)
    state = checkpoints.restore_state(step, compiled.abstract)
    reason = f"resumed from step {step} in {run.model_dir}"
    ledger = Ledger.from_dict(meta["ledger"])
    if ledger.current.planned_steps != steps:
        reason += (
            f"\nsteps were {ledger.current.planned_steps} and are {steps} now: the learning rate "
            f"goes on by the schedule of {steps}"
        )
    if meta["data"]["order"] != run.data.identity()["order"]:
        reason += "\nthe data's settings have changed: batches from here on are other ones"
    return Start(state, ledger.update(planned_steps=steps), reason, is_new=False)


def check_vocabulary(data: Data, meta: Mapping[str, Any], model_dir: str) -> None:
    """The checkpoint that `meta` describes was trained on the same token ids.

    Raises:
        UserError: its tokenizer was another one.
    """
    saved, given = meta["data"]["vocabulary"], data.identity()["vocabulary"]
    if saved != given:
        raise UserError(
            f"{model_dir} was trained with another tokenizer (digest {saved}, now {given}): its "
            "embeddings mean other tokens; use the tokenizer it was trained with"
        )


def _from_parent(run: TrainRun, compiled: Compiled, steps: int) -> Start:
    with open_existing(Path(run.init_from)) as parent:
        parent_step = parent.latest_step or 0
        meta = parent.read_meta(parent_step)
        source = ModelConfig.from_dict(meta["config"])
        run.check_parent(source)
        check_vocabulary(run.data, meta, run.init_from)
        params = parent.restore_params(parent_step, abstract_params(source, compiled.layout))
    reason = f"from step {parent_step} of {run.init_from}"
    origin, method = "restored", ""
    if run.growth is not None:
        plan, certificate = run.growth.plan(source, run.model)
        grow = functools.partial(apply_plan, plan, target=run.model)
        params = jax.jit(grow, out_shardings=_shardings(compiled.abstract.params))(
            params, key=jax.random.key(run.seed)
        )
        _write_certificate(run.path, certificate)
        origin, method = run.growth.kind, certificate.method
        kept = "exact" if certificate.exact else "not exact"
        reason += f", grown by {method} ({kept})"
    ledger = Ledger.from_dict(meta["ledger"]).begin(
        Stage(run.name, origin, method, run.model, steps)
    )
    return Start(_state(compiled, params), ledger, reason, is_new=True)


def _initial_params(compiled: Compiled, tokens: Any, key: jax.Array) -> Any:
    return compiled.model.init(key, jnp.zeros(tokens.shape, tokens.dtype))["params"]


def _state(compiled: Compiled, params: Any) -> TrainState:
    create = functools.partial(new_state, optimizer=compiled.optimizer)
    return jax.jit(create, out_shardings=_shardings(compiled.abstract))(params)


def _shardings(abstract: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def _write_certificate(model_dir: Path, certificate: Certificate) -> None:
    write_json(model_dir / CERTIFICATE_FILE, certificate.to_dict())
