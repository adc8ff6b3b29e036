"""Log-likelihoods of texts after texts, in batches of equal length."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from aquila_jax.config import ModelConfig
from aquila_jax.data.pretrained_tokenizer import Tokenizer, beginning_id, check_vocab_size
from aquila_jax.errors import UserError
from aquila_jax.nn.transformer import Transformer
from aquila_jax.sharding import Layout

# What lengths are rounded up to.
_MULTIPLE = 64


class Score(NamedTuple):
    """What a model gives to a continuation.

    Attributes:
        log_likelihood: nats, summed over its tokens.
        is_greedy: whether every token of it is the likeliest.
        num_tokens: how many they are.
    """

    log_likelihood: float
    is_greedy: bool
    num_tokens: int


class Scorer:
    """A model made ready to score.

    Args:
        params: nested parameters of `config`.
        config: the architecture.
        tokenizer: of the model.
        dtype: of activations.
        batch_size: rows scored together.
        max_length: tokens a row holds; None is the model's context.
        layout: where parameters and rows go on a mesh; None is one device.

    Raises:
        UserError: the tokenizer has ids that the model does not know, a number is too small, or
            parameters or rows do not divide over the mesh.
    """

    def __init__(
        self,
        params: Any,
        config: ModelConfig,
        tokenizer: Tokenizer,
        *,
        dtype: DTypeLike = jnp.float32,
        batch_size: int = 8,
        max_length: int | None = None,
        layout: Layout | None = None,
    ) -> None:
        check_vocab_size(tokenizer, config.vocab_size)
        self.max_length = config.context_length if max_length is None else max_length
        if not 2 <= self.max_length <= config.context_length:
            raise UserError(
                f"max_length must lie between 2 and the context of {config.context_length}, not "
                f"{self.max_length}"
            )
        if batch_size < 1:
            raise UserError(f"batch_size must be 1 or more, not {batch_size}")
        self.tokenizer = tokenizer
        self._params = placed_on(layout, params, config, batch_size=batch_size)
        self._batch_size, self._layout = batch_size, layout
        self._model = Transformer(config, dtype=dtype, layout=layout)

    @property
    def start_id(self) -> int:
        """What is before a text that has nothing before it."""
        return beginning_id(self.tokenizer)

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
        """The log-likelihood of each continuation after its context.

        Rows that are too long lose the beginning of their context.

        Args:
            pairs: ids of context and continuation. An empty context is a document's beginning.

        Raises:
            UserError: a continuation is empty, or longer than a row holds.
        """
        rows = [self._row(context, continuation) for context, continuation in pairs]
        scores: list[Score | None] = [None] * len(rows)
        with progress("scoring", len(rows)) as bar:
            for numbers in self._batches([len(row) for row, _ in rows]):
                found = self._score_batch([rows[i] for i in numbers])
                for number, score in zip(numbers, found, strict=True):
                    scores[number] = score
                bar.update(len(numbers))
        return [score for score in scores if score is not None]

    def score_texts(self, pairs: Sequence[tuple[str, str]]) -> list[Score]:
        """`score` of texts.

        Spaces at a context's end go to the continuation, and the two are cut into tokens together,
        so that a word keeps the space before it.
        """
        return self.score([self.encode_pair(context, text) for context, text in pairs])

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both, cut where the context's own ids end."""
        if not context:
            return [self.start_id], self.tokenizer.encode(continuation)
        num_spaces = len(context) - len(context.rstrip())
        if num_spaces:
            continuation = context[-num_spaces:] + continuation
            context = context[:-num_spaces]
        both = self.tokenizer.encode(context + continuation)
        length = len(self.tokenizer.encode(context))
        return both[:length] or [self.start_id], both[length:]

    def _row(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[list[int], int]:
        """The ids to read, and how many of the last are scored."""
        if not continuation:
            raise UserError("a continuation without tokens has no log-likelihood")
        if len(continuation) > self.max_length:
            raise UserError(
                f"a continuation of {len(continuation)} tokens is longer than a row of "
                f"{self.max_length}: score it in windows"
            )
        ids = [*(context or [self.start_id]), *continuation]
        return ids[-(self.max_length + 1) :], len(continuation)

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Rows of like length together, the longest first: memory runs out at once or never."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        for start in range(0, len(order), self._batch_size):
            yield order[start : start + self._batch_size]

    def _score_batch(self, rows: list[tuple[list[int], int]]) -> list[Score]:
        longest = max(len(ids) for ids, _ in rows) - 1
        width = min(padded_length(longest), self.max_length)
        shape = (self._batch_size, width)
        tokens_BT, targets_BT = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        weights_BT = np.zeros(shape, np.float32)
        for number, (ids, num_scored) in enumerate(rows):
            length = len(ids) - 1
            tokens_BT[number, :length] = ids[:-1]
            targets_BT[number, :length] = ids[1:]
            weights_BT[number, length - num_scored : length] = 1
        given = (tokens_BT, targets_BT, weights_BT)
        if self._layout is not None:
            given = jax.device_put(given, self._layout.batch())
        sums_B, greedy_B = _scored(self._model, self._params, *given)
        sums_B, greedy_B = np.asarray(sums_B), np.asarray(greedy_B)
        return [
            Score(float(sums_B[number]), bool(greedy_B[number]), num_scored)
            for number, (_, num_scored) in enumerate(rows)
        ]


def padded_length(length: int) -> int:
    """The length of a row, a prompt or a cache in a batch: rounded up, so that few are compiled."""
    return -(-length // _MULTIPLE) * _MULTIPLE


def progress(name: str, total: int) -> Any:
    """A bar on standard error after a second, where someone watches; nothing elsewhere."""
    from tqdm import tqdm

    return tqdm(total=total, desc=name, unit="text", delay=1, leave=False, disable=None)


def placed_on(layout: Layout | None, params: Any, config: ModelConfig, *, batch_size: int) -> Any:
    """Parameters on a mesh; as they are where there is none.

    Raises:
        UserError: they, or the rows of a batch, do not divide over it.
    """
    if layout is None:
        return params
    if batch_size % layout.batch_shards:
        raise UserError(
            f"batch_size {batch_size} does not divide over the {layout.batch_shards} devices of "
            "the mesh's batch axes"
        )
    return jax.device_put(params, layout.params(config))


@functools.partial(jax.jit, static_argnums=0)
def _scored(
    model: Transformer, params: Any, tokens_BT: Any, targets_BT: Any, weights_BT: Any
) -> tuple[jax.Array, jax.Array]:
    """Summed log-likelihoods, and whether all scored targets are the likeliest: `[B]` both."""
    # Padding comes after what is scored, which by causality never sees it.
    losses_BT, is_best_BT = cast(
        tuple[jax.Array, jax.Array],
        model.apply({"params": params}, tokens_BT, targets_BT=targets_BT, with_best=True),
    )
    sums_B = -jnp.sum(jnp.where(weights_BT > 0, losses_BT, 0), axis=-1)
    return sums_B, jnp.all(is_best_BT | (weights_BT == 0), axis=-1)
