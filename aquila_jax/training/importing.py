"""A model from elsewhere as the first checkpoint of a MODEL_DIR, for runs to begin with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aquila_jax import files
from aquila_jax.config import ModelConfig
from aquila_jax.data.pretrained_tokenizer import TOKENIZER_DIR, open_tokenizer
from aquila_jax.data.tokenizer_files import tokenizer_files, write_tokenizer
from aquila_jax.errors import UserError
from aquila_jax.training.checkpoints import Checkpoints
from aquila_jax.training.ledger import Ledger


def save_as_parent(
    params: Mapping[str, Any],
    config: ModelConfig,
    model_dir: str | Path,
    tokenizer_path: str | Path | None = None,
) -> None:
    """Make a MODEL_DIR that `TrainRun.init_from` can name; it appears whole or not at all.

    It holds parameters and no optimizer state. Its ledger has no stages: what the model has cost
    is not known.

    Args:
        params: nested float32 parameters of `config`.
        config: the architecture.
        model_dir: the directory to make; it must not exist.
        tokenizer_path: where the model's tokenizer is, as `open_tokenizer` takes it; None where it
            is not known what ids mean.

    Raises:
        UserError: it exists or cannot be written, or there is no such tokenizer.
    """
    directory = files.NewDirectory(model_dir)
    vocabulary, contents = None, {}
    if tokenizer_path is not None:
        vocabulary = open_tokenizer(tokenizer_path).digest
        contents = tokenizer_files(tokenizer_path)
    meta = {
        "config": config.to_dict(),
        "ledger": Ledger(()).to_dict(),
        "data": {"vocabulary": vocabulary, "order": None},
    }
    try:
        with Checkpoints(directory.create()) as checkpoints:
            checkpoints.save_params(params, meta)
        write_tokenizer(directory.partial / TOKENIZER_DIR, contents)
        directory.publish()
    except OSError as error:
        raise UserError(f"cannot write {directory.path}: {error.strerror}") from error
    finally:
        directory.discard()
