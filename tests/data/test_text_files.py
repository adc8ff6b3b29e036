"""A person's own text: files of documents, held out, mixed, cached."""

import gzip
import json
import shutil

import numpy as np
import pytest

from aquila_jax.data import TextData, TextFiles, TokenCache, prepare_cache
from aquila_jax.data.sources import Document, read_split, validation_parts
from aquila_jax.errors import UserError

WORDS = ["the", "model", "grows", "and", "keeps", "what", "it", "knew", "before", "it", "grew"]


def _text(seed):
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(WORDS, size=rng.integers(5, 30)))


@pytest.fixture
def folder(tmp_path):
    """60 documents in JSONL, half of them compressed, and 60 files of plain text."""
    lines = [json.dumps({"text": _text(n), "id": n}) + "\n" for n in range(60)]
    (tmp_path / "web" / "more").mkdir(parents=True)
    (tmp_path / "web" / "a.jsonl").write_text("".join([*lines[:30], "\n"]), encoding="utf-8")
    with gzip.open(tmp_path / "web" / "more" / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(lines[30:])
    (tmp_path / "books").mkdir()
    for n in range(60):
        (tmp_path / "books" / f"{n}.txt").write_bytes(f"书 {n}\r\n{_text(n)}".encode())
    return tmp_path


WEB = TextFiles("web/**/*.jsonl*")
BOOKS = TextFiles("books/*.txt", language="zh")


def test_lines_and_files_are_documents_under_names_that_do_not_depend_on_the_folder(folder):
    documents = list(WEB.read(str(folder)))
    assert [d.text for d in documents] == [_text(n) for n in range(60)]
    assert [d.id for d in documents[28:31]] == ["a.jsonl:29", "a.jsonl:30", "more/b.jsonl.gz:1"]
    assert next(BOOKS.read(str(folder))) == Document("0.txt", f"书 0\r\n{_text(0)}")
    moved = folder / "some@where"
    shutil.copytree(folder / "web", moved / "web")
    assert list(TextFiles(str(moved / "web/**/*.jsonl*")).read("ignored")) == documents


def test_every_document_is_in_one_split(folder):
    known = {"web": WEB}
    splits = [
        {d.id for d in read_split("web", str(folder), s, known)} for s in ("train", "validation")
    ]
    assert not splits[0] & splits[1]
    assert len(splits[0] | splits[1]) == 60


def test_sources_of_one_language_are_told_apart():
    two = {"web": TextFiles("a"), "wiki": TextFiles("b"), "laws": TextFiles("c", "zh")}
    assert validation_parts(two) == {"web": "web", "wiki": "wiki", "zh": "laws"}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"text": "a"}\n{"text": ', "web.jsonl line 2: "),
        ('{"body": "a"}\n', "line 1: no text under 'text'; set TextFiles.text_key"),
        ('["text"]\n', "line 1: no text"),
        (b"\xff\xfe", "cannot read .*web.jsonl"),
    ],
)
def test_what_is_no_text_is_said_with_its_place(tmp_path, content, says):
    path = tmp_path / "web.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=says):
        list(TextFiles("*.jsonl").read(str(tmp_path)))


def test_no_file_and_no_held_out_document_are_said(tmp_path):
    with pytest.raises(UserError, match=r"no file matches .*nothing-\*"):
        list(TextFiles("nothing-*").read(str(tmp_path)))
    (tmp_path / "one.txt").write_text("one document")
    with pytest.raises(
        UserError,
        match=r"none of the \d+ documents of \w+ falls into the validation split: about 5%",
    ):
        list(read_split("one", str(tmp_path), "validation", {"one": TextFiles("one.txt")}))


def test_a_run_reads_it_directly_and_from_a_cache(folder):
    data = TextData(
        text_dir=str(folder),
        tokenizer_path=str(folder / "own.model"),
        vocab_size=300,
        sequence_length=16,
        batch_size=2,
        sources={"web": WEB, "books": BOOKS},
        mixture_rates={"web": 1.0},
        shuffle_buffer=16,
    )
    data.prepare()
    batch = next(data.train_batches())
    text = data.decode(batch["targets"][0])
    assert text
    assert set(text.split()) <= set(WORDS) | {w[i:] for w in WORDS for i in range(len(w))}
    assert data.validation_batches(1).keys() == {"en", "zh"}
    prepare_cache(data, folder / "cache")
    cache = TokenCache(path=str(folder / "cache"), batch_size=2)
    assert cache.validation_batches(1).keys() == {"en", "zh"}
    assert cache.identity()["vocabulary"] == data.identity()["vocabulary"]
    with pytest.raises(UserError, match="names sotu_en: the sources are web, books"):
        TextData(sources={"web": WEB, "books": BOOKS}, mixture_rates={"sotu_en": 1.0})
