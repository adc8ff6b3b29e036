"""A mixture as one of qwen2_moe: beside a shared expert that adds nothing.

Stock `transformers` has no mixture with biases of query, key and value but qwen2_moe, whose every
token also visits a shared expert. One of width 1 and of zeros leaves the function as it is, and
stays at zero in training: what is multiplied by it and what it is multiplied by are both zero.
"""

import dataclasses
from pathlib import Path

import numpy as np

from aquila_jax import axes
from aquila_jax.config import ModelConfig
from aquila_jax.errors import UserError
from aquila_jax.interop.families import FAMILIES, family_of
from aquila_jax.interop.growing import Source

_FAMILY = "qwen2_moe"
_WIDTH = 1


def as_family(config: ModelConfig, family: str | None) -> ModelConfig:
    """The architecture that is written as a model of `family`: `config`, or with an idle expert.

    Args:
        config: of the model.
        family: of Hugging Face; None is the smallest that can say `config`.

    Raises:
        UserError: there is no such family, or it cannot hold the model exactly.
    """
    smallest = family_of(config)
    if family in (None, smallest):
        return config
    if family not in FAMILIES:
        raise UserError(f"no family {family!r}; there are {', '.join(FAMILIES)}")
    if family == _FAMILY and config.is_moe and not config.qk_norm and not config.shared_mlp_dim:
        return dataclasses.replace(config, shared_mlp_dim=_WIDTH, shared_expert_gate=True)
    raise UserError(
        f"the model is written as {smallest}, and not as {family}: of the families larger than a "
        f"model only {_FAMILY} is written, of mixtures without norms of heads and shared expert"
    )


def idle_leaves(config: ModelConfig, written: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the leaves of zeros that `written` has beyond `config`, by path."""
    own = axes.parameters(config)
    return {
        path: parameter.shape(written)
        for path, parameter in axes.parameters(written).items()
        if path not in own
    }


class WithIdleExpert:
    """A model on disk, read as if it had an idle shared expert; a `Source`.

    Attributes:
        config: the architecture, with the expert.
        whole_leaves: as of the model.
        companions: as of the model.

    Args:
        source: the model.
        config: what `as_family` gives.
    """

    def __init__(self, source: Source, config: ModelConfig) -> None:
        self.config = config
        self.whole_leaves: bool = source.whole_leaves
        self.companions: Path | None = source.companions
        self._source = source
        self._idle = idle_leaves(source.config, config)

    def dtype(self, path: str) -> np.dtype:
        """The dtype of a leaf; of zeros the embedding's."""
        return self._source.dtype("token_embedder/embedding" if path in self._idle else path)

    def read(self, path: str, layer: int | None = None, expert: int | None = None) -> np.ndarray:
        """One layer of a leaf, or one expert of one layer."""
        if path in self._idle:
            shape = self._idle[path]
            return np.zeros(shape if layer is None else shape[1:], self.dtype(path))
        return self._source.read(path, layer, expert)

    def release(self, path: str, layer: int | None = None, expert: int | None = None) -> None:
        """Let go of what was read."""
        if path not in self._idle:
            self._source.release(path, layer, expert)
