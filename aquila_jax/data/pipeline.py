"""Packed, shuffled, resumable batches of text."""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from aquila_jax.data.pretrained_tokenizer import Tokenizer, open_tokenizer, start_id
from aquila_jax.data.sources import (
    SOURCES,
    AnySource,
    TextFiles,
    read_split,
    validation_parts,
)
from aquila_jax.data.vocabulary import train_sentencepiece
from aquila_jax.errors import UserError, check_number

if TYPE_CHECKING:
    import tensorflow as tf

Batch = dict[str, np.ndarray]

# seqio's names on the left, ours on the right.
FEATURE_NAMES = {
    "decoder_input_tokens": "tokens",
    "decoder_target_tokens": "targets",
    "decoder_loss_weights": "loss_weights",
    "decoder_segment_ids": "segment_ids",
    "decoder_positions": "positions",
}

# One thread packs several hundred thousand tokens a second; the other cores are for training.
NUM_THREADS = 1

# Of tokenizers that `prepare` trains; whatever is called otherwise comes with a pretrained model.
TRAINED_SUFFIX = ".model"

# The order of held-out pieces is the same for every training seed: their losses compare.
VALIDATION_SEED = 0


@dataclasses.dataclass(frozen=True)
class TextData:
    """Text, tokenized and packed as it is read: a person's own, or the demonstration's.

    Attributes:
        text_dir: folder that the demonstration's two text packages are unpacked in, and that
            relative patterns of `sources` begin at.
        tokenizer_path: sentencepiece model, which `prepare` trains where it is absent; or the
            tokenizer of a pretrained model: its directory, `tokenizer.json` or GGUF file.
        vocab_size: number of ids of the tokenizer.
        sequence_length: T, tokens a row.
        batch_size: B, rows a batch.
        mixture_rates: (source, rate) pairs or a mapping: relative numbers of pieces to draw from
            each source in training. A source left out, or of rate 0, is not trained on. None:
            equally many from each.
        sources: (name, `TextFiles`) pairs or a mapping: text to train and to validate on. All
            documents of a source are held in memory; a `TokenCache` is for what is larger. None
            of them: English speeches and Chinese laws, the demonstration's text.
        seed: of the training order.
        shuffle_buffer: pieces (of at most T tokens) of each source that are shuffled together;
            as many are tokenized before the first batch.
    """

    text_dir: str = "data/text"
    tokenizer_path: str = "data/tokenizer.model"
    vocab_size: int = 8192
    sequence_length: int = 256
    batch_size: int = 32
    mixture_rates: Mapping[str, float] | tuple[tuple[str, float], ...] | None = None
    sources: Mapping[str, TextFiles] | tuple[tuple[str, TextFiles], ...] = ()
    seed: int = 0
    shuffle_buffer: int = 2048

    def __post_init__(self):
        least_of = {"vocab_size": 2, "sequence_length": 2, "batch_size": 1, "shuffle_buffer": 1}
        for name, least in least_of.items():
            check_number(name, getattr(self, name), least=least, is_whole=True)
        rates = self.rates
        unknown = sorted(set(rates) - set(self.known))
        if unknown:
            raise UserError(
                f"mixture_rates names {', '.join(unknown)}: the sources are {', '.join(self.known)}"
            )
        if min(rates.values(), default=0.0) < 0 or not sum(rates.values()) > 0:
            raise UserError(f"mixture_rates are {rates}: make none negative and one positive")

    @property
    def known(self) -> Mapping[str, AnySource]:
        """The sources by name."""
        return dict(self.sources) or SOURCES

    @property
    def rates(self) -> dict[str, float]:
        """The relative numbers of pieces by source."""
        if self.mixture_rates is None:
            return dict.fromkeys(self.known, 1.0)
        return dict(self.mixture_rates)

    @property
    def tokenizer(self) -> Tokenizer:
        """What turns text into ids.

        Raises:
            UserError: there is none yet, or it is damaged.
        """
        return open_tokenizer(self.tokenizer_path)

    def prepare(self) -> None:
        """Trains the tokenizer on the training split, unless `tokenizer_path` exists.

        Takes about five seconds for the demonstration's text; does not import TensorFlow.

        Raises:
            UserError: a text is missing; the tokenizer there has another number of ids; the text
                cannot give `vocab_size` pieces; or a pretrained model's tokenizer is absent.
        """
        path = Path(self.tokenizer_path)
        is_trained = path.suffix == TRAINED_SUFFIX and not path.exists()
        texts: dict[str, list[str]] = {}
        for name, source in self.known.items():
            documents = read_split(name, self.text_dir, "train", self.known)
            # Where there is a tokenizer, one document tells that the text is there.
            read = documents if is_trained else itertools.islice(documents, 1)
            texts.setdefault(source.language, []).extend(document.text for document in read)
        if is_trained:
            train_sentencepiece(texts, self.tokenizer_path, self.vocab_size)
        self._check_vocab_size()

    def identity(self) -> dict[str, str]:
        """Digests of what a checkpoint depends on: `vocabulary`, the ids' meaning, and `order`.

        Equal `order` means equal batches, number by number; where the text lies does not matter.

        Raises:
            UserError: there is no tokenizer yet.
        """
        order = (
            sorted(self.rates.items()),
            *(self.sequence_length, self.batch_size, self.seed, self.shuffle_buffer),
        )
        return {
            "vocabulary": self.tokenizer.digest,
            "order": hashlib.sha256(repr(order).encode()).hexdigest()[:16],
        }

    def train_batches(
        self, start: int = 0, *, rows: Sequence[int] | None = None
    ) -> Iterator[Batch]:
        """Yields training batches without end, batch number `start` first.

        The order is a function of the settings alone: `train_batches(start=k)` goes on exactly
        where an interrupted `train_batches()` stood after k batches. It reads past them, at
        several hundred thousand tokens a second.

        A batch is a dict of arrays `[B, T]`: `tokens` int32, the decoder's inputs, of which each
        segment's first is the tokenizer's `start_id`; `targets` int32, what to predict;
        `loss_weights` float32, 0 on padding; `segment_ids` int32, 1, 2, .. for the pieces in a row
        and 0 for padding; `positions` int32, counted from 0 in each segment.

        Args:
            start: the first batch.
            rows: which rows of every batch, all by default; a process of several packs whole
                batches, and keeps its own rows.

        Raises:
            UserError: `start` is negative; the text or the tokenizer is missing; or the tokenizer
                has another number of ids than `vocab_size`. At the call, not at the first batch.
        """
        if start < 0:
            raise UserError(f"start is {start}: batches are counted from 0")
        self._check_vocab_size()
        from aquila_jax.data import tasks

        mixture = tasks.register_mixture(
            self.rates, self.text_dir, self.tokenizer_path, self.shuffle_buffer, self.known
        )
        pieces = mixture.get_dataset(
            {tasks.FEATURE: self.sequence_length}, "train", seed=self.seed, num_epochs=None
        )
        batches = self._pack(pieces).batch(self.batch_size, drop_remainder=True)
        return take_rows(map(_rename, _arrays(batches.skip(start).prefetch(2))), rows)

    def validation_batches(self, num_batches: int) -> dict[str, list[Batch]]:
        """Returns the first `num_batches` batches of held-out text of each language.

        They depend on the text, the tokenizer, T and B alone, are drawn from all held-out
        documents, and hold no piece twice. The last batch there is may end in rows of padding.

        Returns:
            For each language code (`en`, `zh`), batches as in `train_batches`; sources of the
            same language go by their names.

        Raises:
            UserError: as `train_batches`; or there is less held-out text.
        """
        if num_batches < 1:
            raise UserError(f"num_batches is {num_batches}: ask for at least 1 validation batch")
        self._check_vocab_size()
        return {
            part: self._validation_batches(name, num_batches)
            for part, name in validation_parts(self.known).items()
        }

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without the end of the document."""
        return self.tokenizer.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids` up to the first end of a document."""
        ids = [int(i) for i in ids]
        eos_id = self.tokenizer.eos_id
        end = ids.index(eos_id) if eos_id in ids else len(ids)
        return self.tokenizer.decode(ids[:end])

    def _check_vocab_size(self) -> None:
        found = self.tokenizer.num_ids
        if found != self.vocab_size:
            raise UserError(
                f"tokenizer {self.tokenizer_path} has {found} ids, not {self.vocab_size}: set "
                f"TextData.vocab_size to {found}, or TextData.tokenizer_path to a new file"
            )

    def _validation_batches(self, name: str, num_batches: int) -> list[Batch]:
        from aquila_jax.data import tasks

        task = tasks.register_task(
            name, self.text_dir, self.tokenizer_path, self.shuffle_buffer, self.known
        )
        lengths = {tasks.FEATURE: self.sequence_length}
        pieces = task.get_dataset(lengths, "validation", shuffle=False)
        # One buffer for all: the order must not depend on the setting for training.
        pieces = pieces.shuffle(1_000_000, seed=VALIDATION_SEED)
        rows = list(_arrays(self._pack(pieces).take(num_batches * self.batch_size)))
        available = -(-len(rows) // self.batch_size)
        if available < num_batches:
            raise UserError(
                f"{num_batches} validation batches of {name} asked for, but its held-out text "
                f"fills {available} of {self.batch_size} x {self.sequence_length} tokens: ask for "
                "fewer, or set a smaller TextData.batch_size"
            )
        padding = {key: np.zeros_like(value) for key, value in rows[0].items()}
        rows += [padding] * (num_batches * self.batch_size - len(rows))
        batches = _rename({key: np.stack([row[key] for row in rows]) for key in padding})
        return [
            {key: value[i : i + self.batch_size] for key, value in batches.items()}
            for i in range(0, len(rows), self.batch_size)
        ]

    def _pack(self, pieces: "tf.data.Dataset") -> "tf.data.Dataset":
        """Returns rows of T tokens, each filled with as many whole pieces in turn as fit."""
        from aquila_jax.data.seqio_vocabulary import LanguageModelConverter
        from aquila_jax.data.tasks import FEATURE
        from aquila_jax.data.tensorflow_setup import tf

        options = tf.data.Options()
        options.deterministic = True
        options.threading.private_threadpool_size = NUM_THREADS
        options.threading.max_intra_op_parallelism = 1
        convert = LanguageModelConverter(start_id=start_id(self.tokenizer), pack=True)
        return convert(pieces, {FEATURE: self.sequence_length}).with_options(options)


def take_rows(batches: Iterator[Batch], rows: Sequence[int] | None) -> Iterator[Batch]:
    """Of every batch the given rows, in their order; all of them for None."""
    if rows is None:
        return batches
    taken = list(rows)
    return ({name: array[taken] for name, array in batch.items()} for batch in batches)


def _arrays(dataset: "tf.data.Dataset") -> Iterator[dict[str, np.ndarray]]:
    return cast("Iterator[dict[str, np.ndarray]]", dataset.as_numpy_iterator())


def _rename(features: Mapping[str, np.ndarray]) -> Batch:
    batch = {ours: features[theirs] for theirs, ours in FEATURE_NAMES.items()}
    batch["loss_weights"] = batch["loss_weights"].astype(np.float32)
    return batch
