"""seqio tasks and mixtures over the sources. Imports TensorFlow: imported when text is read.

A task's examples are pieces: a document's tokens and its end, cut into runs of at most a sequence
length. Nothing is trimmed, so every token of every document is seen once an epoch.

Names carry a digest of the settings (`sotu_en_1f2e3d4c`), as seqio's registries are global and
refuse a second task of the same name: equal settings share a task, others never clash.
"""

import functools
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from aquila_jax.data import sources
from aquila_jax.data.pretrained_tokenizer import open_tokenizer
from aquila_jax.data.tensorflow_setup import seqio, tf
from aquila_jax.data.vocabulary import load_vocabulary

FEATURE = "targets"
SPLITS = ("train", "validation")


class MemorySource(seqio.DataSource):
    """Examples that are all in memory, in an order of their own.

    Not seqio's FunctionDataSource: that one warns at every shuffled read, since a function's order
    cannot be shuffled in general. This order can.

    Args:
        read: gives all examples of a split, as tensors by feature.
    """

    def __init__(self, read: Callable[[str], Mapping[str, Any]]):
        super().__init__(splits=SPLITS)
        self._read = read

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """False: there is one shard."""
        return False

    def list_shards(self, split: str) -> Sequence[str]:
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
        """Returns the examples of `split`.

        Shuffled, they come in another order every epoch: the buffer of pieces that seqio
        shuffles afterwards need not hold all of them for a sequence to meet every other.

        Raises:
            UserError: they cannot be read.
        """
        dataset = tf.data.Dataset.from_tensor_slices(cast("Any", self._read(split)))
        return dataset.shuffle(max(1, len(dataset)), seed=seed) if shuffle else dataset


def tokenize(dataset: "tf.data.Dataset", output_features: Mapping[str, Any]) -> "tf.data.Dataset":
    """Replaces each text by its int32 ids.

    By sentencepiece itself rather than by TensorFlow's copy of it (`seqio.preprocessors.tokenize`):
    three times as fast, and without a log line for every tokenizer.
    """
    vocabulary = output_features[FEATURE].vocabulary

    def encode(text: bytes) -> np.ndarray:
        return np.asarray(vocabulary.encode(text.decode()), np.int32)

    def tokenize_example(example: Mapping[str, Any]) -> dict[str, Any]:
        ids = tf.numpy_function(encode, [example[FEATURE]], tf.int32)
        return {FEATURE: tf.ensure_shape(ids, [None])}

    return dataset.map(tokenize_example)


def split_documents(
    dataset: "tf.data.Dataset", sequence_length: Mapping[str, int]
) -> "tf.data.Dataset":
    """Cuts each document into pieces of `sequence_length` tokens; the last is what is left."""
    length = sequence_length[FEATURE]

    def pieces(example: Mapping[str, Any]) -> "tf.data.Dataset":
        ids = example[FEATURE]
        starts = tf.data.Dataset.range(0, tf.size(ids, out_type=tf.int64), length)
        return starts.map(lambda start: {FEATURE: ids[start : start + length]})

    return dataset.flat_map(pieces)


def register_task(
    name: str,
    text_dir: str,
    tokenizer_path: str,
    shuffle_buffer: int,
    known: Mapping[str, sources.AnySource] = sources.SOURCES,
) -> Any:
    """Returns the `seqio.Task` of one source, registered once for the same settings.

    Args:
        name: a key of `known`.
        text_dir: where the text packages lie.
        tokenizer_path: as for `open_tokenizer`.
        shuffle_buffer: pieces that shuffled reading holds in memory.
        known: the sources by name.

    Raises:
        UserError: as `load_vocabulary`.
    """

    def documents(split: str) -> dict[str, list[str]]:
        found = sources.read_split(name, text_dir, split, known)
        return {FEATURE: [document.text for document in found]}

    vocabulary = load_vocabulary(tokenizer_path)
    digest = open_tokenizer(tokenizer_path).digest
    # Absolute: a task outlives a change of the working directory.
    text_dir, tokenizer_path = os.path.abspath(text_dir), os.path.abspath(tokenizer_path)
    settings = (text_dir, tokenizer_path, digest, shuffle_buffer, known[name])
    return once(
        seqio.TaskRegistry,
        digest_name(name, settings),
        functools.partial(
            seqio.TaskRegistry.add,
            source=cast("Any", MemorySource(documents)),
            output_features={FEATURE: seqio.Feature(vocabulary, add_eos=True)},
            preprocessors=[tokenize, seqio.preprocessors.append_eos, split_documents],
            shuffle_buffer_size=shuffle_buffer,
        ),
    )


def register_mixture(
    rates: Mapping[str, float],
    text_dir: str,
    tokenizer_path: str,
    shuffle_buffer: int,
    known: Mapping[str, sources.AnySource] = sources.SOURCES,
) -> Any:
    """Returns the `seqio.Mixture` of the sources, `rates` being their relative shares of pieces.

    Raises:
        UserError: as `load_vocabulary`.
    """
    tasks = [
        (register_task(name, text_dir, tokenizer_path, shuffle_buffer, known).name, rate)
        for name, rate in sorted(rates.items())
        if rate > 0
    ]
    name = digest_name("mixture", tasks)
    return once(
        seqio.MixtureRegistry, name, functools.partial(seqio.MixtureRegistry.add, tasks=tasks)
    )


def digest_name(base: str, settings: object) -> str:
    """A name for seqio's registries: equal for equal settings, another for others."""
    return f"{base}_{hashlib.sha256(repr(settings).encode()).hexdigest()[:12]}"


def once(registry: Any, name: str, add: Callable[[str], Any]) -> Any:
    """What a registry has under a name, added if there is none."""
    return registry.get(name) if name in registry.names() else add(name)
