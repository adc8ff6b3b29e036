"""A token cache: text tokenized and packed once, then read by random access.

Rows lie in ArrayRecord files, which Grain reads by number. Which row comes when is a function of
the settings, so training goes on at any batch without reading those before it, and each of several
hosts reads its own rows alone. No TensorFlow.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from aquila_jax.data import sources
from aquila_jax.data.packing import decode_rows, encode_row, pack
from aquila_jax.data.pipeline import VALIDATION_SEED, Batch, TextData
from aquila_jax.data.pretrained_tokenizer import TOKENIZER_DIR, start_id
from aquila_jax.data.tokenizer_files import tokenizer_files, write_tokenizer
from aquila_jax.errors import UserError, check_number
from aquila_jax.files import NewDirectory, write_json

if TYPE_CHECKING:
    import grain

INDEX_FILE = "cache.json"
_FORMAT = 1
# Of one ArrayRecord file: a host reads several at once.
_ROWS_PER_FILE = 1 << 16
# Batches that are read ahead.
_AHEAD = 4
# More batches than any run takes.
_ENDLESS = 1 << 40

Split = tuple[str, str]


def prepare_cache(data: TextData, path: str | Path) -> None:
    """Tokenize and pack all text of `data`, once; `TokenCache(path)` reads it.

    Args:
        data: the text, its tokenizer (trained where it is absent) and the rows' length. A source
            without a rate has no training rows.
        path: the directory to make; it appears whole or not at all.

    Raises:
        UserError: it exists, text is missing, or the disk refuses.
    """
    NewDirectory(path)  # before anything is made: nothing is in its place
    data.prepare()
    tokenizer = data.tokenizer
    wanted: dict[Split, str] = {
        ("train", name): name for name in data.known if data.rates.get(name, 0) > 0
    }
    for part, name in sources.validation_parts(data.known).items():
        wanted["validation", part] = name

    def documents(split: str, name: str) -> Iterator[list[int]]:
        read = sources.read_split(name, data.text_dir, split, data.known)
        # Silent where nobody watches.
        for document in tqdm(read, desc=f"{name}, {split}", unit=" documents", disable=None):
            yield [*tokenizer.encode(document.text), tokenizer.eos_id]

    write_cache(
        path,
        {part: documents(part[0], name) for part, name in wanted.items()},
        sequence_length=data.sequence_length,
        vocab_size=data.vocab_size,
        vocabulary=tokenizer.digest,
        start_id=start_id(tokenizer),
        tokenizer=tokenizer_files(data.tokenizer_path),
    )


def write_cache(
    path: str | Path,
    parts: Mapping[Split, Iterable[Sequence[int]]],
    *,
    sequence_length: int,
    vocab_size: int,
    vocabulary: str,
    start_id: int = 0,
    tokenizer: Mapping[str, bytes] | None = None,
) -> None:
    """Pack documents and write them as a token cache.

    Args:
        path: the directory to make; it appears whole or not at all.
        parts: token ids of every document, its end included, by `("train", source)` and
            `("validation", language)`.
        sequence_length: T, tokens of a row.
        vocab_size: ids lie below this.
        vocabulary: digest of the tokenizer.
        start_id: stands before every piece of a document.
        tokenizer: its files, kept in the cache for models that are trained on it.

    Raises:
        UserError: the directory exists, or the disk refuses.
    """
    directory = NewDirectory(path)
    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    encode = functools.partial(encode_row, length=sequence_length, dtype=dtype)
    try:
        partial = directory.create()
        written = [
            {
                "split": split,
                "name": name,
                **_write_part(partial / split / name, pack(documents, sequence_length), encode),
            }
            for (split, name), documents in parts.items()
        ]
        index = {
            "format": _FORMAT,
            "sequence_length": sequence_length,
            "vocab_size": vocab_size,
            "vocabulary": vocabulary,
            "start_id": start_id,
            "dtype": dtype.str,
            "parts": written,
        }
        write_tokenizer(partial / TOKENIZER_DIR, tokenizer or {})
        write_json(partial / INDEX_FILE, index)
        directory.publish()
    except OSError as error:
        raise UserError(f"cannot write {directory.path}: {error.strerror or error}") from error
    finally:
        directory.discard()


def _write_part(
    folder: Path, rows: Iterable[list[np.ndarray]], encode: Callable[[list[np.ndarray]], bytes]
) -> dict[str, Any]:
    """Write the rows of one part; how many there are, their tokens, and the files' digests."""
    from array_record.python.array_record_module import ArrayRecordWriter

    folder.mkdir(parents=True)
    files, num_rows, num_tokens = [], 0, 0
    rows = iter(rows)
    while some := list(itertools.islice(rows, _ROWS_PER_FILE)):
        path = folder / f"{len(files):05}.array_record"
        # A group is what is read and unpacked at once: a row, so that any row costs the same.
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for row in some:
            writer.write(encode(row))
        writer.close()
        with path.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files.append({"name": path.name, "bytes": path.stat().st_size, "sha256": digest})
        num_rows += len(some)
        num_tokens += sum(len(run) for row in some for run in row)
    return {"rows": num_rows, "tokens": num_tokens, "files": files}


@dataclasses.dataclass(frozen=True)
class TokenCache:
    """Batches of a directory that `aquila data prepare` made; for `TrainRun.data`.

    Attributes:
        path: the directory.
        batch_size: B, rows of a batch, over all hosts.
        mixture_rates: (source, rate) pairs or a mapping: relative numbers of rows to draw from
            each source. Empty: an epoch is every row of every source, once.
        seed: of the training order.

    Raises:
        UserError: there is no such directory, a file is missing or has another size, or the
            settings do not fit it.
    """

    path: str = "data/cache"
    batch_size: int = 32
    mixture_rates: Mapping[str, float] | tuple[tuple[str, float], ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("batch_size", self.batch_size, least=1, is_whole=True)
        check_number("seed", self.seed, least=0, most=2**32 - 1, is_whole=True)
        index = self._index
        names = {part["name"] for part in index["parts"] if part["split"] == "train"}
        rates = dict(self.mixture_rates)
        if unknown := sorted(rates.keys() - names):
            raise UserError(
                f"mixture_rates names {', '.join(unknown)}: {self.path} holds "
                f"{', '.join(sorted(names))}"
            )
        if rates and (min(rates.values()) < 0 or not sum(rates.values()) > 0):
            raise UserError(f"mixture_rates are {rates}: make none negative and one positive")

    @functools.cached_property
    def _index(self) -> dict[str, Any]:
        path = Path(self.path) / INDEX_FILE
        try:
            index = json.loads(path.read_bytes())
            if index["format"] != _FORMAT:
                raise UserError(f"{path} has format {index['format']}, not {_FORMAT}")
            np.dtype(index["dtype"])
            for part in index["parts"]:
                for file in part["files"]:
                    record = self._record_file(part, file["name"])
                    if record.stat().st_size != file["bytes"]:
                        raise UserError(
                            f"{record} has {record.stat().st_size} bytes, not the {file['bytes']} "
                            "that were written: make the cache anew by `aquila data prepare`"
                        )
        except OSError as error:
            raise UserError(
                f"{error.filename} cannot be read ({error.strerror}): make the cache by "
                f"`aquila data prepare --to {self.path}`, or set TokenCache.path"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}): make the cache anew") from error
        return index

    def _record_file(self, part: Mapping[str, Any], name: str) -> Path:
        """A file of the cache; names that lead out of it are refused."""
        pieces = (part["split"], part["name"], name)
        if any(piece in ("", ".", "..") or Path(piece).name != piece for piece in pieces):
            raise ValueError(f"{'/'.join(pieces)} is no file of a cache")
        return Path(self.path, *pieces)

    @property
    def sequence_length(self) -> int:
        """T, tokens of a row."""
        return self._index["sequence_length"]

    @property
    def vocab_size(self) -> int:
        """Token ids lie below this."""
        return self._index["vocab_size"]

    @property
    def epoch_rows(self) -> int:
        """Rows that training has, over all sources."""
        return sum(part["rows"] for part in self._index["parts"] if part["split"] == "train")

    @property
    def tokenizer_path(self) -> str:
        """Where the tokenizer is that the cache was made with; "" where it keeps none."""
        kept = Path(self.path, TOKENIZER_DIR)
        return str(kept) if kept.is_dir() else ""

    def prepare(self) -> None:
        """Nothing: the cache was made once."""

    def identity(self) -> dict[str, str]:
        """Digests of `vocabulary`, what ids mean, and of `order`, which batch comes when."""
        order = (
            [part for part in self._index["parts"] if part["split"] == "train"],
            sorted(dict(self.mixture_rates).items()),
            *(self.sequence_length, self.batch_size, self.seed),
        )
        digest = hashlib.sha256(json.dumps(order, sort_keys=True).encode()).hexdigest()
        return {"vocabulary": self._index["vocabulary"], "order": digest[:16]}

    def train_batches(
        self, start: int = 0, *, rows: Sequence[int] | None = None
    ) -> Iterator[Batch]:
        """Yields training batches without end, batch number `start` first.

        The rows of an epoch come in an order of their own, each once; batches go on across epochs.
        Reading from any `start` costs the same.

        Args:
            start: the first batch.
            rows: which rows of every batch to read, all by default; the others are not read.

        Returns:
            Batches as in `TextData.train_batches`, `[rows, T]`.

        Raises:
            UserError: `start` or `rows` do not fit.
        """
        if start < 0:
            raise UserError(f"start is {start}: batches are counted from 0")
        taken = range(self.batch_size) if rows is None else list(rows)
        if any(row not in range(self.batch_size) for row in taken):
            raise UserError(f"rows {taken} are not all of batches of {self.batch_size} rows")
        import grain

        all_rows = self._train_rows()

        def batch(number: int) -> Batch:
            first = number * self.batch_size
            return self._decode(all_rows[first + row] for row in taken)

        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=_AHEAD)
        return iter(grain.MapDataset.range(start, _ENDLESS).map(batch).to_iter_dataset(options))

    def validation_batches(self, num_batches: int) -> dict[str, list[Batch]]:
        """Returns `num_batches` batches of held-out rows of each language, drawn from all of them.

        They depend on the cache and on B alone. The last batch may end in rows of padding.

        Raises:
            UserError: `num_batches` is not positive, or there is less held-out text.
        """
        if num_batches < 1:
            raise UserError(f"num_batches is {num_batches}: ask for at least 1 validation batch")
        parts = [part for part in self._index["parts"] if part["split"] == "validation"]
        return {part["name"]: self._validation_batches(part, num_batches) for part in parts}

    def _validation_batches(self, part: Mapping[str, Any], num_batches: int) -> list[Batch]:
        available = -(-part["rows"] // self.batch_size)
        if available < num_batches:
            raise UserError(
                f"{num_batches} validation batches of {part['name']} asked for, but its held-out "
                f"text fills {available} of {self.batch_size} x {self.sequence_length} tokens: ask "
                "for fewer, or set a smaller TokenCache.batch_size"
            )
        rows = self._source(part).shuffle(VALIDATION_SEED)
        count = min(num_batches * self.batch_size, part["rows"])
        taken = self._decode(rows[i] for i in range(count))
        padding = ((0, num_batches * self.batch_size - count), (0, 0))
        padded = {name: np.pad(array, padding) for name, array in taken.items()}
        return [
            {name: array[i : i + self.batch_size] for name, array in padded.items()}
            for i in range(0, num_batches * self.batch_size, self.batch_size)
        ]

    def _train_rows(self) -> "grain.MapDataset":
        import grain

        parts = [part for part in self._index["parts"] if part["split"] == "train"]
        rates = dict(self.mixture_rates)
        if not rates:
            everything = grain.MapDataset.concatenate([self._source(part) for part in parts])
            return everything.seed(self.seed).shuffle().repeat()
        drawn = [part for part in parts if rates.get(part["name"], 0) > 0]
        return grain.MapDataset.mix(
            [self._source(part).seed(self.seed).shuffle().repeat() for part in drawn],
            [rates[part["name"]] for part in drawn],
        )

    def _source(self, part: Mapping[str, Any]) -> "grain.MapDataset":
        import grain

        paths = [str(self._record_file(part, file["name"])) for file in part["files"]]
        # Its index is annotated more widely than MapDataset's.
        records: Any = grain.sources.ArrayRecordDataSource(paths)
        return grain.MapDataset.source(records)

    def _decode(self, rows: Iterable[Any]) -> Batch:
        index = self._index
        return decode_rows(
            list(rows),
            self.sequence_length,
            np.dtype(index["dtype"]),
            start_id=index.get("start_id", 0),
        )
