"""A model from elsewhere as the first checkpoint of a MODEL_DIR, for runs to begin with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aquila_jax import files
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
    directory = files.NewDirectory(model_dir)
    meta = {
        "config": config.to_dict(),
        "ledger": Ledger(()).to_dict(),
        "data": {"vocabulary": None, "order": None},
    }
    try:
        with Checkpoints(directory.create()) as checkpoints:
            checkpoints.save_params(params, meta)
        directory.publish()
    except OSError as error:
        raise UserError(f"cannot write {directory.path}: {error.strerror}") from error
    finally:
        directory.discard()
