"""The model that a run begins with: of another run, or pretrained elsewhere."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aquila_jax import axes
from aquila_jax.config import ModelConfig
from aquila_jax.data.pretrained_tokenizer import open_tokenizer
from aquila_jax.errors import UserError
from aquila_jax.interop import Directory, load_gguf, load_hf
from aquila_jax.interop.converting import is_gguf
from aquila_jax.interop.families import CONFIG_FILE
from aquila_jax.nn import Transformer
from aquila_jax.sharding import Layout, shardings_of
from aquila_jax.training.assignment import Assignment
from aquila_jax.training.checkpoints import CHECKPOINT_DIR, Checkpoints, open_existing
from aquila_jax.training.ledger import Ledger


@dataclasses.dataclass(frozen=True)
class Parent:
    """A model to begin with, opened.

    Attributes:
        where: what it is, for messages.
        config: its architecture.
        ledger: what it has cost; without stages where that is not known.
        vocabulary: the digest of its tokenizer; None where that is not known.
        restore: float32 parameters on the shardings of abstract ones.
        step: of its checkpoint.
        checkpoints: that it is one of; None where it has no optimizer state.
    """

    where: str
    config: ModelConfig
    ledger: Ledger
    vocabulary: str | None
    restore: Callable[[Any], Any]
    step: int = 0
    checkpoints: Checkpoints | None = None


def is_there(path: Path) -> bool:
    """Whether `open_parent` has something to open."""
    return (path / CHECKPOINT_DIR).is_dir() or _is_pretrained(path)


@contextlib.contextmanager
def open_parent(path: Path) -> Iterator[Parent]:
    """The newest checkpoint of a MODEL_DIR, or a Hugging Face directory or GGUF file.

    Raises:
        UserError: there is none of them, or it is damaged or not supported.
    """
    if not (path / CHECKPOINT_DIR).is_dir() and _is_pretrained(path):
        yield _pretrained(path)
        return
    with open_existing(path) as checkpoints:
        step = checkpoints.latest_step or 0
        meta = checkpoints.read_meta(step)
        yield Parent(
            f"step {step} of {path}",
            ModelConfig.from_dict(meta["config"]),
            Ledger.from_dict(meta["ledger"]),
            meta["data"]["vocabulary"],
            functools.partial(checkpoints.restore_params, step),
            step,
            checkpoints if checkpoints.has_optimizer_state(step) else None,
        )


def model_of(path: str) -> ModelConfig:
    """The architecture of what a run begins with, for a run that only trains it on.

    Args:
        path: a MODEL_DIR, a Hugging Face directory or a GGUF file.

    Raises:
        UserError: there is none of them, or it is damaged or not supported.
    """
    with open_parent(Path(path)) as parent:
        return parent.config


def _is_pretrained(path: Path) -> bool:
    return (path / CONFIG_FILE).is_file() or (path.exists() and is_gguf(path))


def _pretrained(path: Path) -> Parent:
    """A pretrained model; of a Hugging Face directory only the headers are read yet."""
    if is_gguf(path):
        params, config = load_gguf(path)
        restore = functools.partial(_spread, params)
    else:
        config, restore = Directory(path).config, functools.partial(_load_directory, path)
    return Parent(f"the pretrained {path}", config, Ledger(()), _vocabulary(path), restore)


def _vocabulary(path: Path) -> str | None:
    """The digest of the tokenizer that a pretrained model came with; None without one."""
    try:
        return open_tokenizer(path).digest
    except UserError:
        return None


def _spread(params: Any, abstract: Any) -> Any:
    def put(leaf: Any, sharding: Any) -> jax.Array:
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(put, params, shardings_of(abstract))


def _load_directory(path: Path, abstract: Any) -> Any:
    return load_hf(path, dtype="float32", shardings=shardings_of(abstract))[0]


def restore_assigned(
    parent: Parent,
    assignment: Assignment,
    wanted: ModelConfig,
    layout: Layout,
    abstract: Any,
    key: jax.Array,
) -> Any:
    """Parameters of `wanted`, read from `parent` as `assignment` says, the others fresh.

    Args:
        parent: what is read, whole.
        assignment: for `wanted` and the parent's configuration.
        wanted: the model to make.
        layout: where its leaves go.
        abstract: the parent's parameters, with their shardings.
        key: for the leaves that are initialised.
    """
    shardings = axes.flatten(layout.params(wanted))
    restored = axes.flatten(parent.restore(abstract))

    def init(key: jax.Array) -> dict[str, Any]:
        tokens = jnp.zeros((1, 8), jnp.int32)
        leaves = axes.flatten(Transformer(wanted).init(key, tokens)["params"])
        return {leaf: leaves[leaf] for leaf in assignment.fresh}

    placed = {leaf: shardings[leaf] for leaf in assignment.fresh}
    leaves = jax.jit(init, out_shardings=placed)(key)
    for leaf, source in assignment.sources.items():
        if source is not None:
            # A copy: two leaves may have one source, and a step gives the memory of all away.
            leaves[leaf] = jax.device_put(restored[source], shardings[leaf], may_alias=False)
    return axes.unflatten({leaf: leaves[leaf] for leaf in assignment.sources})


def refuse_moments(parent: Parent, policy: str) -> None:
    """Moments can be grown only where there are some.

    Raises:
        UserError: there are none, and `policy` wants them.
    """
    if policy != "reset" and parent.checkpoints is None:
        raise UserError(
            f"optimizer_state {policy!r} grows the parent's moments, and {parent.where} has none: "
            "set TrainRun.optimizer_state to 'reset'"
        )
