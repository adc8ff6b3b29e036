"""A pretrained model's tokenizer, whose id 0 is a word, from text to batches."""

import dataclasses
import json

import numpy as np
import pytest
import tokenizers

from aquila_jax import UserError
from aquila_jax.data import TextData, TokenCache, load_vocabulary, prepare_cache
from aquila_jax.data.pretrained_tokenizer import open_tokenizer
from aquila_jax.data.seqio_vocabulary import PretrainedVocabulary
from aquila_jax.data.sources import read_split

from .small_text import write_laws, write_speeches

BEGIN, END = "<|begin|>", "<|end|>"
TEXTS = ["", "the laws", "第1号法、国家", "def f(x):\n    return x  # 🦅", f"{BEGIN}a{END}!"]
SOURCES = {"en": "sotu_en", "zh": "china_law_zh"}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A directory in the form of Llama 3's: bytes first, of which "!" is 0, special tokens last."""
    path = tmp_path_factory.mktemp("pretrained")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    ids = {letter: i for i, letter in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ids, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([BEGIN, END])
    tokenizer.save(str(path / "tokenizer.json"))
    said = {"bos_token": BEGIN, "eos_token": END}
    (path / "tokenizer_config.json").write_text(json.dumps(said))
    return path


@pytest.fixture(scope="module")
def data(path, text_data: TextData):
    return dataclasses.replace(text_data, tokenizer_path=str(path), vocab_size=258)


def test_the_vocabulary_has_the_tokenizers_ids(path):
    vocabulary, tokenizer = load_vocabulary(path), open_tokenizer(path)
    assert isinstance(vocabulary, PretrainedVocabulary)
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id) == (256, 257, 257)
    assert (vocabulary.unk_id, vocabulary.vocab_size) == (None, 258)
    assert tokenizer.encode("!") == [0]
    assert vocabulary == load_vocabulary(path / "tokenizer.json")
    assert hash(vocabulary) == hash(load_vocabulary(path / "tokenizer.json"))
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert list(vocabulary.encode(text)) == ids
        assert vocabulary.encode_tf(text).numpy().tolist() == ids
    ids = [*tokenizer.encode("a!"), 257, 5]
    assert vocabulary.decode(ids) == f"a!{END}"
    assert (
        vocabulary.decode_tf(np.array([ids, ids])).numpy().tolist()
        == [f"a!{END}{END}".encode()] * 2
    )


def documents_of(batches):
    """The targets of every piece, and what pieces begin with."""
    pieces, starts = [], set()
    for batch in batches:
        for row in range(len(batch["targets"])):
            segments = batch["segment_ids"][row]
            np.testing.assert_array_equal(batch["loss_weights"][row], segments > 0)
            for number in range(1, segments.max() + 1):
                inside = segments == number
                targets, tokens = batch["targets"][row, inside], batch["tokens"][row, inside]
                np.testing.assert_array_equal(tokens[1:], targets[:-1])
                starts.add(int(tokens[0]))
                pieces.append(targets.tolist())
    return pieces, starts


def expected_pieces(data: TextData, language: str, split="validation"):
    tokenizer = open_tokenizer(data.tokenizer_path)
    for document in read_split(SOURCES[language], data.text_dir, split):
        ids = [*tokenizer.encode(document.text), tokenizer.eos_id]
        length = data.sequence_length
        yield from (ids[i : i + length] for i in range(0, len(ids), length))


@pytest.fixture(scope="module")
def with_zeros(data, tmp_path_factory):
    """The same with a text that says "!", which is id 0."""
    text_dir = tmp_path_factory.mktemp("text")
    write_speeches(text_dir, {f"{1800 + i}-Nobody-1": f"!!{i} is, !\n!" for i in range(60)})
    write_laws(text_dir, [(f"{i:04x}", f"第{i}号法", [f"!{i}!"]) for i in range(60)])
    return dataclasses.replace(data, text_dir=str(text_dir))


def test_every_token_is_trained_on_and_pieces_begin_with_the_models_own_token(with_zeros):
    data = with_zeros
    for language in SOURCES:
        expected = sorted(expected_pieces(data, language))
        assert any(0 in piece for piece in expected)
        (batch,) = data.validation_batches(1)[language]
        pieces, starts = documents_of([batch])
        assert sorted(pieces) == expected
        assert starts == {256}
    assert documents_of([next(data.train_batches())])[1] == {256}


def test_a_cache_holds_the_same(with_zeros, tmp_path):
    prepare_cache(with_zeros, tmp_path / "cache")
    cache = TokenCache(str(tmp_path / "cache"), batch_size=with_zeros.batch_size)
    assert cache.identity()["vocabulary"] == with_zeros.identity()["vocabulary"]
    (batch,) = cache.validation_batches(1)["en"]
    pieces, starts = documents_of([batch])
    assert sorted(pieces) == sorted(expected_pieces(with_zeros, "en"))
    assert starts == {256}


def test_text_comes_back(data):
    for text in TEXTS[:-1]:
        assert data.decode([*data.encode(text), 257, 3]) == text


def test_a_pretrained_tokenizer_is_never_trained(data, tmp_path):
    for name in ("absent", "absent.json"):
        absent = dataclasses.replace(data, tokenizer_path=str(tmp_path / name))
        with pytest.raises(UserError, match=f"no tokenizer at .*{name}"):
            absent.prepare()
    assert list(tmp_path.iterdir()) == []
