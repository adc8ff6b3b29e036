"""Two models on the same text: token ids, logits and losses side by side.

Conversions, exports and other implementations are checked by it, so a model is anything that has
ids for a text and logits for ids. One is in memory at a time; its logits are kept.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float

from aquila_jax.config import ModelConfig
from aquila_jax.data.pretrained_tokenizer import Tokenizer
from aquila_jax.errors import UserError
from aquila_jax.nn.transformer import Transformer

# Rows of logits that are compared at once, in float64.
_ROWS = 64


class Readable(Protocol):
    """A model and its tokenizer, by whatever library.

    Attributes:
        context_length: tokens it reads at most.
    """

    context_length: int

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with none added at its ends."""
        ...

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """`[T, V]` float32 of T ids, which are one sequence."""
        ...


class Reading(NamedTuple):
    """What a model made of a text.

    Attributes:
        own_ids: of the whole text, by its own tokenizer.
        ids: what was read.
        windows: logits `[T, V]` of each run of ids that was read as one sequence.
    """

    own_ids: list[int]
    ids: list[int]
    windows: list[np.ndarray]


class Verification(NamedTuple):
    """How far two models lie apart.

    Attributes:
        num_ids: ids that the first tokenizer makes of the whole text.
        first_difference: where the two tokenizers' ids part; None where they are equal.
        num_tokens: ids that both models read.
        max_abs: the largest difference of two logits.
        mean_abs: the mean difference.
        largest: the largest logit of the first model, in absolute value.
        kl: nats per token from the first model's distribution to the second's, the mean.
        max_kl: the largest of any token.
        losses: nats per token of both.
    """

    num_ids: int
    first_difference: int | None
    num_tokens: int
    max_abs: float
    mean_abs: float
    largest: float
    kl: float
    max_kl: float
    losses: tuple[float, float]

    @property
    def relative(self) -> float:
        """The largest difference in units of the largest logit."""
        return self.max_abs / self.largest if self.largest else self.max_abs

    @property
    def loss_difference(self) -> float:
        """Between the two losses, absolute."""
        return abs(self.losses[1] - self.losses[0])


class Ours:
    """A model of this library; a `Readable`.

    Args:
        params: nested parameters of `config`.
        config: the architecture.
        tokenizer: of the model.
        dtype: of activations.
    """

    def __init__(
        self, params: Any, config: ModelConfig, tokenizer: Tokenizer, *, dtype: DTypeLike
    ) -> None:
        self.context_length = config.context_length
        self._vocab_size = config.vocab_size
        self._params, self._tokenizer = params, tokenizer
        self._apply = jax.jit(Transformer(config, dtype=dtype).apply)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with none added at its ends."""
        return self._tokenizer.encode(text)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """`[T, V]` float32, by products in full precision where activations have it.

        Raises:
            UserError: an id lies beyond the model's.
        """
        check_ids(ids, self._vocab_size)
        with jax.default_matmul_precision("highest"):
            logits_BTV = self._apply({"params": self._params}, jnp.asarray([ids], jnp.int32))
        return np.asarray(logits_BTV[0], np.float32)


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """That a model knows all ids.

    Raises:
        UserError: it does not.
    """
    if max(ids, default=0) >= vocab_size:
        raise UserError(
            f"the text has the id {max(ids)}, and the model {vocab_size} ids: the tokenizer is of "
            "another model"
        )


def read(
    model: Readable, text: str, *, window: int, max_tokens: int, ids: list[int] | None = None
) -> Reading:
    """A model's ids and logits of a text.

    Args:
        model: the model.
        text: the text.
        window: ids that are read as one sequence.
        max_tokens: ids that are read in all.
        ids: what to read instead of the text's own ids.

    Raises:
        UserError: the text has fewer than two ids, the model's context is shorter than the
            window, or an id is beyond the model's.
    """
    if not 2 <= window <= model.context_length:
        raise UserError(
            f"a window must lie between 2 and the context of {model.context_length}, not {window}"
        )
    own_ids = model.encode(text)
    ids = own_ids[:max_tokens] if ids is None else ids
    if len(ids) < 2:
        raise UserError(f"{len(ids)} tokens are too few to compare: give a longer text")
    parts = [ids[start : start + window] for start in range(0, len(ids), window)]
    return Reading(own_ids, ids, [model.logits(part) for part in parts])


def compare(first: Reading, second: Reading) -> Verification:
    """How far the second model lies from the first.

    Args:
        first: what one model made of a text.
        second: what another one made of the same text, of the same ids in the same windows.

    Raises:
        UserError: the models have different numbers of ids.
    """
    sizes = [reading.windows[0].shape[-1] for reading in (first, second)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"the models have {sizes[0]} and {sizes[1]} ids: their logits cannot be compared"
        )
    rows = [
        _row_sums(*both) for both in zip(_rows(first), _rows(second), _targets(first), strict=True)
    ]
    totals: dict[str, float] = {
        name: functools.reduce(
            max if name.startswith("max") else operator.add, (row[name] for row in rows)
        )
        for name in rows[0]
    }
    count = len(first.ids)
    losses = tuple(totals[f"nats_{i}"] / totals["scored"] for i in (0, 1))
    return Verification(
        num_ids=len(first.own_ids),
        first_difference=_first_difference(first.own_ids, second.own_ids),
        num_tokens=count,
        max_abs=totals["max_abs"],
        mean_abs=totals["sum_abs"] / (count * sizes[0]),
        largest=totals["max_logit"],
        kl=totals["kl"] / count,
        max_kl=totals["max_kl"],
        losses=(losses[0], losses[1]),
    )


def _rows(reading: Reading) -> list[np.ndarray]:
    """Logits in blocks of few rows."""
    return [
        window[start : start + _ROWS]
        for window in reading.windows
        for start in range(0, len(window), _ROWS)
    ]


def _targets(reading: Reading) -> list[list[int]]:
    """What the rows of each block are to predict; a window's last row predicts nothing."""
    targets, start = [], 0
    for window in reading.windows:
        own = reading.ids[start + 1 : start + len(window)]
        targets += [own[i : i + _ROWS] for i in range(0, len(window), _ROWS)]
        start += len(window)
    return targets


def _row_sums(
    first_TV: Float[np.ndarray, "T V"], second_TV: Float[np.ndarray, "T V"], targets: Sequence[int]
) -> dict[str, float]:
    """What is added up, or of what the largest is taken, over the rows of a text."""
    both = [first_TV.astype(np.float64), second_TV.astype(np.float64)]
    difference_TV = np.abs(both[1] - both[0])
    logs = [logits_TV - _logsumexp(logits_TV) for logits_TV in both]
    kl_T = np.sum(np.exp(logs[0]) * (logs[0] - logs[1]), axis=-1)
    chosen = (np.arange(len(targets)), np.asarray(targets, np.int64))
    return {
        # NaN is the largest difference there is, and `max` would pass over it.
        "max_abs": float(np.nan_to_num(difference_TV.max(), nan=np.inf)),
        "sum_abs": float(difference_TV.sum()),
        "max_logit": float(np.abs(both[0]).max()),
        "kl": float(kl_T.sum()),
        "max_kl": float(np.nan_to_num(kl_T.max(), nan=np.inf)),
        "scored": float(len(targets)),
        **{f"nats_{i}": -float(log_TV[chosen].sum()) for i, log_TV in enumerate(logs)},
    }


def _logsumexp(logits_TV: np.ndarray) -> np.ndarray:
    largest_T1 = logits_TV.max(axis=-1, keepdims=True)
    return largest_T1 + np.log(np.exp(logits_TV - largest_T1).sum(axis=-1, keepdims=True))


def _first_difference(first: Sequence[int], second: Sequence[int]) -> int | None:
    if list(first) == list(second):
        return None
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
