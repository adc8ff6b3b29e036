"""Text that follows prompts: whole prompts are read at once, then token by token with a cache."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from aquila_jax.config import ModelConfig
from aquila_jax.data.pretrained_tokenizer import Tokenizer, beginning_id, check_vocab_size
from aquila_jax.errors import UserError
from aquila_jax.evaluation.sampling import Sampling, choose
from aquila_jax.evaluation.scoring import padded_length, placed_on, progress
from aquila_jax.evaluation.stopping import TextStream, check_stops
from aquila_jax.nn.cache import Cache, extend, prefill, unroll
from aquila_jax.nn.transformer import Transformer
from aquila_jax.sharding import Layout

GREEDY = Sampling()


class Completion(NamedTuple):
    """What followed one prompt.

    Attributes:
        text: as decoded, without a stop string or the token that ends a document.
        ids: the generated tokens, up to the one in which the text ended.
        reason: why it ended: "eos", "stop" or "length".
    """

    text: str
    ids: tuple[int, ...]
    reason: str


class Generator:
    """A model made ready to generate: parameters by layer, steps compiled once for each shape.

    Args:
        params: nested parameters of `config`.
        config: the architecture.
        tokenizer: of the model.
        dtype: of activations.
        batch_size: rows generated together.
        steps_per_call: tokens between two looks at what was generated; more is faster, and up to
            so many are computed in vain after a text's end.
        layout: where parameters and rows go on a mesh; None is one device.

    Raises:
        UserError: the tokenizer has ids that the model does not know, or parameters or rows do
            not divide over the mesh.
    """

    def __init__(
        self,
        params: Any,
        config: ModelConfig,
        tokenizer: Tokenizer,
        *,
        dtype: DTypeLike = jnp.float32,
        batch_size: int = 8,
        steps_per_call: int = 8,
        layout: Layout | None = None,
    ) -> None:
        check_vocab_size(tokenizer, config.vocab_size)
        for name, value in (("batch_size", batch_size), ("steps_per_call", steps_per_call)):
            if value < 1:
                raise UserError(f"{name} must be 1 or more, not {value}")
        self._model = Transformer(config, dtype=dtype, layout=layout, unrolled=True)
        self._params = unroll(placed_on(layout, params, config, batch_size=batch_size), config)
        self._layout = layout
        self._tokenizer = tokenizer
        self._batch_size, self._steps_per_call = batch_size, steps_per_call

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling = GREEDY,
        stops: Sequence[str] = (),
        stop_at_eos: bool = True,
    ) -> list[Completion]:
        """What follows each prompt.

        Args:
            prompts: texts, or token ids. An empty one is a document's beginning.
            max_new_tokens: at most so many; fewer where the context ends before.
            sampling: how tokens are chosen.
            stops: strings that end a text.
            stop_at_eos: whether the token that ends a document ends the text.

        Returns:
            One completion for each prompt, in their order.

        Raises:
            UserError: a prompt fills the context, an id is unknown, or an argument is out of range.
        """
        encoded = [self.encode(prompt) for prompt in prompts]
        streams = [
            self._stream_of(ids, max_new_tokens, check_stops(stops), stop_at_eos) for ids in encoded
        ]
        by_length = sorted(range(len(encoded)), key=lambda row: -len(encoded[row]))
        with progress("generating", len(by_length)) as bar:
            for start in range(0, len(by_length), self._batch_size):
                rows = by_length[start : start + self._batch_size]
                for _ in self._run(rows, encoded, streams, max_new_tokens, sampling):
                    pass
                bar.update(len(rows))
        return [Completion(stream.text, tuple(stream.ids), stream.reason) for stream in streams]

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling = GREEDY,
        stops: Sequence[str] = (),
        stop_at_eos: bool = True,
    ) -> Iterator[str]:
        """The text that follows one prompt, piece by piece; arguments as of `generate`."""
        ids = self.encode(prompt)
        stream = self._stream_of(ids, max_new_tokens, check_stops(stops), stop_at_eos)
        for _ in self._run([0], [ids], [stream], max_new_tokens, sampling):
            if news := stream.news():
                yield news

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """A prompt's ids.

        Raises:
            UserError: it leaves no room in the context, or has ids that the model does not know.
        """
        ids = self._tokenizer.encode(prompt) if isinstance(prompt, str) else [*map(int, prompt)]
        ids = ids or [beginning_id(self._tokenizer)]
        config = self._model.config
        if len(ids) >= config.context_length:
            raise UserError(
                f"a prompt of {len(ids)} tokens leaves no room in a context of "
                f"{config.context_length}: shorten it"
            )
        if unknown := [i for i in ids if not 0 <= i < config.vocab_size]:
            raise UserError(f"token {unknown[0]} is outside the vocabulary {config.vocab_size}")
        return ids

    def _stream_of(
        self, ids: list[int], max_new_tokens: int, stops: Sequence[str], stop_at_eos: bool
    ) -> TextStream:
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be 1 or more, not {max_new_tokens}")
        return TextStream(
            self._tokenizer,
            ids,
            stops=stops,
            max_new_tokens=min(max_new_tokens, self._model.config.context_length - len(ids)),
            stop_at_eos=stop_at_eos,
        )

    def _run(
        self,
        rows: list[int],
        prompts: list[list[int]],
        streams: list[TextStream],
        max_new_tokens: int,
        sampling: Sampling,
    ) -> Iterator[None]:
        """Generate for some prompts together; yields when their streams have something new."""
        # On a mesh rows must divide, so a batch is filled up with copies of its first.
        missing = 0 if self._layout is None else self._batch_size - len(rows)
        computed = [*rows, *rows[:1] * missing]
        tokens_BT, is_token_BT = _padded([prompts[row] for row in computed], self._tokenizer.pad_id)
        if self._layout is not None:
            tokens_BT, is_token_BT = jax.device_put((tokens_BT, is_token_BT), self._layout.batch())
        steps = self._steps_per_call
        needed = tokens_BT.shape[1] + max_new_tokens + steps
        logits_BV, cache = _read(
            self._model, padded_length(needed), self._params, tokens_BT, is_token_BT
        )
        rows_B = jnp.asarray(computed)
        next_B = choose(logits_BV, sampling, rows_B, jnp.asarray(0))
        step = 1
        generated_Bn = next_B[:, None]
        while True:
            for row, ids in zip(rows, np.asarray(generated_Bn).tolist(), strict=False):
                for token in ids:
                    streams[row].push(token)
            yield
            if all(streams[row].reason for row in rows):
                return
            generated_Bn, cache = _go_on(
                self._model,
                sampling,
                steps,
                self._params,
                generated_Bn[:, -1],
                cache,
                rows_B,
                jnp.asarray(step),
            )
            step += steps


def _padded(prompts: list[list[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts that end together, and where they are: int32 and bool `[B, T]`."""
    width = padded_length(max(map(len, prompts)))
    tokens_BT = np.full((len(prompts), width), pad_id, np.int32)
    is_token_BT = np.zeros(tokens_BT.shape, bool)
    for row, ids in enumerate(prompts):
        tokens_BT[row, width - len(ids) :] = ids
        is_token_BT[row, width - len(ids) :] = True
    return tokens_BT, is_token_BT


@functools.partial(jax.jit, static_argnums=(0, 1))
def _read(
    model: Transformer, capacity: int, params: Any, tokens_BT: jax.Array, is_token_BT: jax.Array
) -> tuple[jax.Array, Cache]:
    logits_BTV, cache = prefill(model, params, tokens_BT, is_token_BT, capacity=capacity)
    return logits_BTV[:, -1], cache


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def _go_on(
    model: Transformer,
    sampling: Sampling,
    num_steps: int,
    params: Any,
    last_B: jax.Array,
    cache: Cache,
    rows_B: jax.Array,
    first_step: jax.Array,
) -> tuple[jax.Array, Cache]:
    """The next tokens int32 `[B, num_steps]`, and the cache with all but the last of them."""

    def one_step(i: jax.Array, state: tuple[jax.Array, jax.Array, Cache]) -> Any:
        last_B, generated_Bn, cache = state
        logits_BTV, cache = extend(model, params, last_B[:, None], cache)
        last_B = choose(logits_BTV[:, -1], sampling, rows_B, first_step + i)
        return last_B, generated_Bn.at[:, i].set(last_B), cache

    generated_Bn = jnp.zeros((last_B.shape[0], num_steps), jnp.int32)
    _, generated_Bn, cache = jax.lax.fori_loop(
        0, num_steps, one_step, (last_B, generated_Bn, cache)
    )
    return generated_Bn, cache
