import itertools
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from aquila_jax.data import TextData, sources, vocabulary
from aquila_jax.data.seqio_vocabulary import PretrainedVocabulary
from aquila_jax.data.vocabulary import load_vocabulary, train_sentencepiece
from aquila_jax.errors import UserError

AWKWARD = [
    "",
    " ",
    "   three before, two after  ",
    "a  b\t\tc\r\nd\n\n\ne\x00f",
    "\u3000\u3000全角空格\uff0c\u3000和\uff08括号\uff09。",
    "def f(x):\n    return {'k': x[0]}  # <pad></s><unk><0x41>\n",
    "👩‍👩‍👧‍👦 🇨🇳 e\u0301 ﷽ \ufeff\u200b\u2028",
    "\uff21\uff11 ½ ﬁ Ⅳ ①",
    "12345 3.14",
]
# Every character but surrogates, which are no text, and sentencepiece's own sign for a space.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"))


@pytest.fixture(scope="module")
def tokenizer(text_data: TextData):
    return sentencepiece.SentencePieceProcessor(model_file=text_data.tokenizer_path)


def test_the_special_ids_are_what_seqio_expects(text_data: TextData, tokenizer):
    assert [tokenizer.IdToPiece(i) for i in range(4)] == ["<pad>", "</s>", "<unk>", "\n"]
    assert tokenizer.GetPieceSize() == text_data.vocab_size
    loaded = load_vocabulary(text_data.tokenizer_path)
    assert (loaded.pad_id, loaded.eos_id, loaded.unk_id) == (0, 1, 2)
    assert loaded.vocab_size == text_data.vocab_size


@settings(deadline=None)
@given(text=TEXTS)
def test_any_text_comes_back_exactly(tokenizer, text: str):
    ids = tokenizer.EncodeAsIds(text)
    assert tokenizer.DecodeIds(ids) == text
    assert all(i > vocabulary.UNK_ID for i in ids)


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text_comes_back_exactly_by_every_way(text_data: TextData, tokenizer, text: str):
    loaded = load_vocabulary(text_data.tokenizer_path)
    ids = tokenizer.EncodeAsIds(text)
    assert list(loaded.encode(text)) == ids
    assert loaded.encode_tf(text).numpy().tolist() == ids
    assert loaded.decode(ids) == text
    assert text_data.encode(text) == ids
    assert text_data.decode(ids) == text


def test_the_one_character_that_does_not_come_back(tokenizer):
    # All of the basic plane, and of the sixteen others enough to meet every byte.
    codes = itertools.chain(range(0xD800), range(0xE000, 0x10000), range(0x10000, 0x110000, 37))
    every = [chr(code) for code in codes]
    lost = [c for c in every if tokenizer.DecodeIds(tokenizer.EncodeAsIds(f"a{c}b")) != f"a{c}b"]
    assert lost == ["\u2581"]


def test_training_twice_gives_the_same_file_and_leaves_no_other(text_dir: Path, tmp_path: Path):
    texts = {"en": [d.text for d in sources.read_split("sotu_en", str(text_dir), "train")]}
    for name in "ab":
        train_sentencepiece(texts, tmp_path / "new" / name, 350)
    assert (tmp_path / "new" / "a").read_bytes() == (tmp_path / "new" / "b").read_bytes()
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["a", "b"]


def test_languages_have_equal_shares(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vocabulary, "SAMPLE_BYTES", 1000)
    many, few = ["line of fifteen\n" * 1000], ["一二三四五\n" * 100]
    taken = [sum(len(line.encode()) for line in vocabulary._sample_lines(t)) for t in (many, few)]
    assert taken == [pytest.approx(1000, abs=15), pytest.approx(1000, abs=15)]


@pytest.mark.parametrize("vocab_size", [100, 100_000])
def test_an_impossible_size_is_the_users_to_mend(tmp_path: Path, vocab_size: int):
    with pytest.raises(UserError, match=rf"{vocab_size} pieces .*TextData\.vocab_size") as error:
        train_sentencepiece({"en": ["some words, but not many"]}, tmp_path / "model", vocab_size)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_missing_or_broken_model_is_told(tmp_path: Path):
    path = tmp_path / "model"
    with pytest.raises(UserError, match=r"no tokenizer at .*model: .* call TextData\.prepare"):
        load_vocabulary(path)
    path.write_bytes(b"not a model")
    with pytest.raises(UserError, match="no sentencepiece model"):
        load_vocabulary(path)


def test_a_model_with_other_special_ids_is_a_pretrained_one(
    tmp_path: Path, text_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    texts = {"en": [d.text for d in sources.read_split("sotu_en", str(text_dir), "train")]}
    with monkeypatch.context() as patch:
        patch.setattr(vocabulary, "UNK_ID", 3)
        train_sentencepiece(texts, tmp_path / "model", 350)
    assert isinstance(load_vocabulary(tmp_path / "model"), PretrainedVocabulary)


def test_a_model_that_changed_under_a_running_process_is_refused(text_dir: Path, tmp_path: Path):
    texts = {"en": [d.text for d in sources.read_split("sotu_en", str(text_dir), "train")]}
    train_sentencepiece(texts, tmp_path / "model", 350)
    load_vocabulary(tmp_path / "model")
    train_sentencepiece(texts, tmp_path / "model", 340)
    with pytest.raises(UserError, match="changed after this process loaded it"):
        load_vocabulary(tmp_path / "model")


def test_the_real_texts_come_back_exactly(
    real_text_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # A tenth of the usual sample: this is about the round trip, not about the pieces.
    monkeypatch.setattr(vocabulary, "SAMPLE_BYTES", 200_000)
    texts = {
        source.language: [d.text for d in source.read(real_text_dir)]
        for source in sources.SOURCES.values()
    }
    train_sentencepiece(texts, tmp_path / "model", 4096)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "model"))
    for text in texts["en"] + texts["zh"]:
        assert tokenizer.DecodeIds(tokenizer.EncodeAsIds(text)) == text
