"""Prompts with answers and conversations as a seqio task. Imports TensorFlow.

`ChatData` trains on the same file without seqio; a task is for mixtures, for t5x, and for whatever
else reads seqio: `aquila eval --seqio` gives the loss of its answers.
"""

import functools
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from aquila_jax.data.chat import open_chat_template
from aquila_jax.data.conversations import Example, read_examples
from aquila_jax.data.pretrained_tokenizer import open_tokenizer
from aquila_jax.data.sources import is_validation
from aquila_jax.data.tensorflow_setup import seqio, tf
from aquila_jax.data.vocabulary import load_vocabulary

_SPLITS = ("train", "validation")
_FEATURES = ("inputs", "targets")


def register_chat_task(
    name: str, path: str | Path, tokenizer_path: str | Path, validation_fraction: float = 0.05
) -> Any:
    """Register a JSONL file of prompts or conversations, and return the `seqio.Task`.

    Every answer is an example of its own: `targets` are its ids with their end, `inputs` all that
    is before it in its conversation. Nothing is appended or trimmed. With seqio's
    `PrefixLMFeatureConverter` or `DecoderFeatureConverter(loss_on_targets_only=True)` only answers
    are learnt, packed or not. seqio takes id 0 for padding: where that is the token that ends an
    answer, its converters do not learn it, and `ChatData` does.

    Args:
        name: of the task; registered again with the same file and tokenizer, it is the same.
        path: as for `aquila_jax.data.conversations.read_examples`.
        tokenizer_path: the model's tokenizer, with its chat template beside it.
        validation_fraction: of lines that are held out, by a digest of their ids: the same ones as
            `ChatData` holds out.

    Raises:
        UserError: file, tokenizer or template are absent or damaged, or a line is no example.
        ValueError: seqio knows another task of that name.

    References:
        https://github.com/google/seqio
    """
    tokenizer = open_tokenizer(tokenizer_path)
    open_template = functools.cache(lambda: open_chat_template(tokenizer_path))
    examples = read_examples(path, tokenizer, open_template)
    content = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    metadata = {"file": content, "tokenizer": tokenizer.digest, "held_out": validation_fraction}
    if name in seqio.TaskRegistry.names():
        known = seqio.TaskRegistry.get(name)
        if getattr(known.source, "metadata", None) == metadata:
            return known
    vocabulary = load_vocabulary(tokenizer_path)
    feature = seqio.Feature(vocabulary, add_eos=False, required=True)
    return seqio.TaskRegistry.add(
        name,
        source=cast("Any", _AnswerSource(examples, validation_fraction, metadata)),
        output_features=dict.fromkeys(_FEATURES, feature),
        preprocessors=[],
    )


class _AnswerSource(seqio.DataSource):
    """Every answer of every example, with what is before it."""

    def __init__(
        self, examples: list[Example], validation_fraction: float, metadata: Mapping[str, Any]
    ) -> None:
        super().__init__(splits=_SPLITS)
        self.metadata = metadata
        self._examples = {
            split: [
                example
                for example in examples
                if is_validation(repr(example.ids), validation_fraction) == (split == _SPLITS[1])
            ]
            for split in _SPLITS
        }

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """False: there is one shard."""
        return False

    def list_shards(self, split: str) -> list[str]:
        """The one shard, named as its split."""
        return [split]

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: Any = None,
        **unused: Any,
    ) -> "tf.data.Dataset":
        """`{"inputs": ids, "targets": ids}` of every answer of `split`, int32."""
        rows = [row for example in self._examples[split] for row in _answers(example)]

        def ragged(name: str) -> Any:
            return tf.ragged.constant([row[name] for row in rows], dtype=tf.int32, ragged_rank=1)

        parts: Any = {name: ragged(name) for name in _FEATURES}
        dataset = tf.data.Dataset.from_tensor_slices(parts)
        return dataset.shuffle(max(1, len(rows)), seed=seed) if shuffle else dataset


def _answers(example: Example) -> Iterator[dict[str, list[int]]]:
    edges = np.flatnonzero(np.diff([0, *example.is_answer, 0])).tolist()
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        yield {"inputs": example.ids[:start], "targets": example.ids[start:end]}
