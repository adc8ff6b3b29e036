"""Prompts with answers and conversations as a seqio task. Imports TensorFlow.

`ChatData` trains on the same file without seqio; a task is for mixtures, for t5x, and for whatever
else reads seqio: `aquila eval --seqio` gives the loss of its answers.
"""

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np

from aquila_jax.data.chat import open_chat_template
from aquila_jax.data.conversations import Example, falls_in_validation, read_examples
from aquila_jax.data.pretrained_tokenizer import open_tokenizer
from aquila_jax.data.sources import VALIDATION_FRACTION
from aquila_jax.data.tasks import MemorySource, digest_name, once
from aquila_jax.data.tensorflow_setup import seqio, tf
from aquila_jax.data.vocabulary import load_vocabulary

_FEATURES = ("inputs", "targets")


def register_chat_task(
    name: str,
    path: str | Path,
    tokenizer_path: str | Path,
    validation_fraction: float = VALIDATION_FRACTION,
) -> Any:
    """Register a JSONL file of prompts or conversations, and return the `seqio.Task`.

    Every answer is an example of its own: `targets` are its ids with their end, `inputs` all that
    is before it in its conversation. Nothing is appended or trimmed. With seqio's
    `PrefixLMFeatureConverter` or `DecoderFeatureConverter(loss_on_targets_only=True)` only answers
    are learnt, packed or not. seqio takes id 0 for padding: where that is the token that ends an
    answer, its converters do not learn it, and `ChatData` does.

    Args:
        name: what the task's name begins with; a digest of file and settings follows, as in all of
            this library's tasks.
        path: as for `aquila_jax.data.conversations.read_examples`.
        tokenizer_path: the model's tokenizer, with its chat template beside it.
        validation_fraction: of lines that are held out, by a digest of their ids: the same ones as
            `ChatData` holds out.

    Raises:
        UserError: file, tokenizer or template are absent or damaged, or a line is no example.

    References:
        https://github.com/google/seqio
    """
    tokenizer = open_tokenizer(tokenizer_path)
    open_template = functools.cache(lambda: open_chat_template(tokenizer_path))
    examples = read_examples(path, tokenizer, open_template)

    def answers(split: str) -> dict[str, Any]:
        rows = [
            row
            for example in examples
            if falls_in_validation(example, validation_fraction) == (split == "validation")
            for row in _answers(example)
        ]
        return {
            name: tf.ragged.constant([row[name] for row in rows], dtype=tf.int32, ragged_rank=1)
            for name in _FEATURES
        }

    vocabulary = load_vocabulary(tokenizer_path)
    feature = seqio.Feature(vocabulary, add_eos=False, required=True)
    content = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return once(
        seqio.TaskRegistry,
        digest_name(name, (content, tokenizer.digest, validation_fraction)),
        functools.partial(
            seqio.TaskRegistry.add,
            source=cast("Any", MemorySource(answers)),
            output_features=dict.fromkeys(_FEATURES, feature),
            preprocessors=[],
        ),
    )


def _answers(example: Example) -> Iterator[dict[str, list[int]]]:
    edges = np.flatnonzero(np.diff([0, *example.is_answer, 0])).tolist()
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        yield {"inputs": example.ids[:start], "targets": example.ids[start:end]}
