"""A model from elsewhere as the first checkpoint of a MODEL_DIR, for runs to begin with."""

import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aquila_jax.config import ModelConfig
from aquila_jax.errors import UserError
from aquila_jax.training.checkpoints import Checkpoints
from aquila_jax.training.ledger import Ledger


def save_as_parent(params: Mapping[str, Any], config: ModelConfig, model_dir: str | Path) -> None:
    """Make a MODEL_DIR that `TrainRun.init_from` can name; it appears whole or not at all.

    It holds parameters and no optimizer state. Its ledger has no stages, and no tokenizer is
    noted: what the model has cost and what its ids mean is not known.

    Args:
        params: nested float32 parameters of `config`.
        config: the architecture.
        model_dir: the directory to make; it must not exist.

    Raises:
        UserError: it exists or cannot be written.
    """
    path = Path(os.path.abspath(model_dir))
    if os.path.lexists(path):
        raise UserError(f"{path} exists; remove it, or write to another directory")
    partial = path.parent / f".{path.name}.partial-{uuid.uuid4().hex}"
    meta = {
        "config": config.to_dict(),
        "ledger": Ledger(()).to_dict(),
        "data": {"vocabulary": None, "order": None},
    }
    try:
        partial.mkdir(parents=True)
        with Checkpoints(partial) as checkpoints:
            checkpoints.save_params(params, meta)
        os.rename(partial, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
