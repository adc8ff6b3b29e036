"""Packed batches of prompts with answers and of conversations, for supervised fine-tuning."""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from aquila_jax.data.chat import open_chat_template
from aquila_jax.data.conversations import Example, falls_in_validation, read_examples
from aquila_jax.data.pipeline import VALIDATION_SEED, Batch, take_rows
from aquila_jax.data.pretrained_tokenizer import Tokenizer, open_tokenizer
from aquila_jax.data.sources import VALIDATION_FRACTION
from aquila_jax.errors import UserError, check_number

# Rows that are filled at the same time: more of them leave fewer gaps.
_OPEN_ROWS = 32


@dataclasses.dataclass(frozen=True)
class ChatData:
    """Examples of a JSONL file; for `TrainRun.data`. Only answers have loss weights.

    A row holds whole examples; one that is longer than a row loses its end, and is left out where
    no answer is left. No token stands before an example: it is read as it is when it is asked.
    Every epoch has an order and a packing of its own, a function of the seed.

    Attributes:
        path: the file; see `aquila_jax.data.conversations.read_examples`.
        tokenizer_path: the model's tokenizer, with its chat template beside it.
        vocab_size: ids of the tokenizer lie below this.
        sequence_length: T, tokens a row.
        batch_size: B, rows a batch.
        seed: of the order.
        name: what validation losses are called.
        validation_fraction: of examples that are held out, by a digest of their ids.
    """

    path: str
    tokenizer_path: str
    vocab_size: int
    sequence_length: int = 1024
    batch_size: int = 8
    seed: int = 0
    name: str = "answers"
    validation_fraction: float = VALIDATION_FRACTION

    def __post_init__(self) -> None:
        for name, least in {"vocab_size": 2, "sequence_length": 2, "batch_size": 1}.items():
            check_number(name, getattr(self, name), least=least, is_whole=True)
        if not 0 < self.validation_fraction < 1:
            raise UserError(
                f"validation_fraction must lie between 0 and 1, not {self.validation_fraction}"
            )

    def prepare(self) -> None:
        """Reads everything once.

        Raises:
            UserError: file, tokenizer or chat template are absent or damaged, or the tokenizer
                has more ids than `vocab_size`.
        """
        if self._tokenizer.num_ids > self.vocab_size:
            raise UserError(
                f"tokenizer {self.tokenizer_path} has {self._tokenizer.num_ids} ids: set "
                "ChatData.vocab_size to as many"
            )
        for split in (False, True):
            self._examples(is_held_out=split)

    def identity(self) -> dict[str, str]:
        """Digests of `vocabulary`, what ids mean, and of `order`, which batch comes when."""
        settings = (self.sequence_length, self.batch_size, self.seed, self.validation_fraction)
        digest = hashlib.sha256(Path(self.path).read_bytes())
        digest.update(repr(settings).encode())
        return {"vocabulary": self._tokenizer.digest, "order": digest.hexdigest()[:16]}

    def train_batches(
        self, start: int = 0, *, rows: Sequence[int] | None = None
    ) -> Iterator[Batch]:
        """Yields batches as `TextData.train_batches`, without end, batch number `start` first.

        `tokens` are what is read, from an example's first token, and `targets` what follows each;
        `loss_weights` are 1 where that is part of an answer.

        Raises:
            UserError: `start` is negative, or as `prepare`.
        """
        if start < 0:
            raise UserError(f"start is {start}: batches are counted from 0")
        examples = self._examples(is_held_out=False)

        def packed() -> Iterator[list[Example]]:
            for epoch in itertools.count():
                order = np.random.default_rng((self.seed, epoch)).permutation(len(examples))
                yield from pack_examples((examples[i] for i in order), self.sequence_length)

        first = itertools.islice(packed(), start * self.batch_size, None)
        whole = map(self._batch, iter(lambda: [*itertools.islice(first, self.batch_size)], []))
        return take_rows(whole, rows)

    def validation_batches(self, num_batches: int) -> dict[str, list[Batch]]:
        """The first `num_batches` batches of held-out examples; the last may end in padding.

        Raises:
            UserError: there are fewer, or as `prepare`.
        """
        examples = self._examples(is_held_out=True)
        order = np.random.default_rng(VALIDATION_SEED).permutation(len(examples))
        rows = [*pack_examples((examples[i] for i in order), self.sequence_length)]
        available = -(-len(rows) // self.batch_size)
        if not 1 <= num_batches <= available:
            raise UserError(
                f"{num_batches} validation batches asked for; the held-out examples of {self.path} "
                f"fill {available} of {self.batch_size} x {self.sequence_length} tokens: set "
                "TrainRun.eval_batches, or a larger ChatData.validation_fraction"
            )
        starts = range(0, num_batches * self.batch_size, self.batch_size)
        return {self.name: [self._batch(rows[i : i + self.batch_size]) for i in starts]}

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        return open_tokenizer(self.tokenizer_path)

    @functools.cached_property
    def _all(self) -> list[Example]:
        open_template = functools.cache(lambda: open_chat_template(self.tokenizer_path))
        return read_examples(self.path, self._tokenizer, open_template)

    def _examples(self, *, is_held_out: bool) -> list[Example]:
        """Of one split, cut to the length of a row and what predicts its first token."""
        end = self.sequence_length + 1
        found = [
            Example(example.ids[:end], example.is_answer[:end])
            for example in self._all
            if falls_in_validation(example, self.validation_fraction) == is_held_out
            and any(example.is_answer[1:end])
        ]
        if not found:
            split = "held out" if is_held_out else "left to train on"
            raise UserError(
                f"no example of {self.path} is {split}: give more of them, another "
                "ChatData.validation_fraction or a larger ChatData.sequence_length"
            )
        return found

    def _batch(self, rows: Sequence[Sequence[Example]]) -> Batch:
        shape = (self.batch_size, self.sequence_length)
        names = ("tokens", "targets", "segment_ids", "positions")
        batch: Batch = {name: np.zeros(shape, np.int32) for name in names}
        batch["loss_weights"] = np.zeros(shape, np.float32)
        for row, examples in enumerate(rows):
            end = 0
            for number, (ids, is_answer) in enumerate(examples, start=1):
                place = row, slice(end, end + len(ids) - 1)
                batch["tokens"][place], batch["targets"][place] = ids[:-1], ids[1:]
                batch["loss_weights"][place] = is_answer[1:]
                batch["segment_ids"][place] = number
                batch["positions"][place] = np.arange(len(ids) - 1)
                end += len(ids) - 1
        return batch


def pack_examples(examples: Iterable[Example], length: int) -> Iterator[list[Example]]:
    """Rows of whole examples, none of which predicts more than `length` tokens together.

    An example goes into the fullest open row that takes it.
    """
    rows: list[tuple[int, list[Example]]] = []
    for example in examples:
        needed = len(example.ids) - 1
        fitting = [row for row in rows if row[0] >= needed]
        chosen = min(fitting, key=lambda row: row[0], default=None)
        if chosen is not None:
            rows.remove(chosen)
        room, inside = chosen or (length, [])
        rows.append((room - needed, [*inside, example]))
        if len(rows) > _OPEN_ROWS:
            fullest = min(range(len(rows)), key=lambda i: rows[i][0])
            yield rows.pop(fullest)[1]
    yield from (inside for _, inside in rows)
