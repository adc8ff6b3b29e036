"""A run's newest checkpoint, read leaf by leaf: for growth from disk to disk."""

import threading
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

from aquila_jax import axes
from aquila_jax.config import ModelConfig
from aquila_jax.data.pretrained_tokenizer import TOKENIZER_DIR
from aquila_jax.errors import UserError, first_line
from aquila_jax.training.checkpoints import CHECKPOINT_DIR, open_existing


class SavedLeaves:
    """The parameters of a MODEL_DIR, with one or two leaves in memory at a time.

    Attributes:
        config: the architecture.
        whole_leaves: that a leaf is read with all its layers.
        companions: the directory of its tokenizer; None without one.

    Raises:
        UserError: there is no checkpoint, or it cannot be read.
    """

    whole_leaves = True

    def __init__(self, model_dir: str | Path) -> None:
        with open_existing(Path(model_dir)) as checkpoints:
            step = checkpoints.latest_step or 0
            meta = checkpoints.read_meta(step)
        self.config = ModelConfig.from_dict(meta["config"])
        self._directory = Path(model_dir).absolute() / CHECKPOINT_DIR / str(step) / "params"
        tokenizer = Path(model_dir).absolute() / TOKENIZER_DIR
        self.companions = tokenizer if tokenizer.is_dir() else None
        self._parameters = axes.parameters(self.config)
        self._checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        self._held: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()

    def dtype(self, path: str) -> np.dtype:
        """The dtype of a leaf."""
        return self._leaf(path).dtype

    def read(self, path: str, layer: int | None = None, expert: int | None = None) -> np.ndarray:
        """One layer of a leaf, or one expert of one layer."""
        index = tuple(i for i in (layer, expert) if i is not None)
        return self._leaf(path)[index]

    def release(self, path: str, layer: int | None = None, expert: int | None = None) -> None:
        """Nothing: a leaf is let go when two others have been read."""

    def _leaf(self, path: str) -> np.ndarray:
        with self._lock:
            if path not in self._held:
                if len(self._held) > 1:
                    self._held.pop(next(iter(self._held)))
                self._held[path] = self._restore(path)
            return self._held[path]

    def _restore(self, path: str) -> np.ndarray:
        arguments = ocp.args.PyTreeRestore(
            item=axes.unflatten({path: 0}),
            restore_args=axes.unflatten({path: ocp.RestoreArgs(restore_type=np.ndarray)}),
            partial_restore=True,
        )
        try:
            leaf = axes.flatten(self._checkpointer.restore(self._directory, args=arguments))[path]
        except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
            raise UserError(
                f"{path} of {self._directory} cannot be read ({first_line(error)})"
            ) from error
        if leaf.shape != self._parameters[path].shape(self.config):
            raise UserError(
                f"{path} of {self._directory} has shape {leaf.shape}, not "
                f"{self._parameters[path].shape(self.config)}"
            )
        return leaf
