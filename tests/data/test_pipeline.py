import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from aquila_jax.data import Batch, TextData, vocabulary
from aquila_jax.data.sources import SOURCES, read_split
from aquila_jax.data.vocabulary import EOS_ID, train_sentencepiece
from aquila_jax.errors import UserError


def take(data: TextData, count: int, start: int = 0) -> list[Batch]:
    return list(itertools.islice(data.train_batches(start), count))


def same(ours: list[Batch], theirs: list[Batch]) -> bool:
    return len(ours) == len(theirs) and all(
        np.array_equal(a[key], b[key])
        for a, b in zip(ours, theirs, strict=True)
        for key in {*a, *b}
    )


def segments(batches: list[Batch]) -> list[tuple[int, ...]]:
    """The targets of each packed piece, in order."""
    rows = [row for b in batches for row in zip(b["targets"], b["segment_ids"], strict=True)]
    return [
        tuple(targets[ids == segment].tolist())
        for targets, ids in rows
        for segment in range(1, ids.max(initial=0) + 1)
    ]


def test_no_tensorflow_until_text_is_read(text_data: TextData):
    program = (
        "import sys; from aquila_jax.data import TextData\n"
        f"data = {text_data!r}\n"
        "data.prepare(); assert data.decode(data.encode('law 法')) == 'law 法'\n"
        "assert not {'tensorflow', 'seqio', 'tensorflow_text'} & set(sys.modules)\n"
        "next(data.train_batches())\n"
        "tf = sys.modules['tensorflow']\n"
        "assert not tf.config.get_visible_devices('GPU')\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    # Quiet: what a training run prints is its own.
    assert result.stdout + result.stderr == ""


def test_identity_tells_the_ids_and_the_order_and_not_where_the_text_lies(
    text_data: TextData, tmp_path: Path
):
    identity = text_data.identity()
    copy = tmp_path / "copy.model"
    copy.write_bytes(Path(text_data.tokenizer_path).read_bytes())
    moved = dataclasses.replace(text_data, tokenizer_path=str(copy))
    assert moved.identity() == identity
    other = dataclasses.replace(text_data, seed=text_data.seed + 1).identity()
    assert other["vocabulary"] == identity["vocabulary"]
    assert other["order"] != identity["order"]
    english = {"en": [d.text for d in read_split("sotu_en", text_data.text_dir, "train")]}
    train_sentencepiece(english, copy, text_data.vocab_size)
    assert moved.identity()["vocabulary"] != identity["vocabulary"]


def test_batches_have_the_promised_shapes_and_types(text_data: TextData):
    dtypes = {
        "tokens": np.int32,
        "targets": np.int32,
        "loss_weights": np.float32,
        "segment_ids": np.int32,
        "positions": np.int32,
    }
    validation = text_data.validation_batches(1)
    assert list(validation) == ["en", "zh"]
    for batch in [*take(text_data, 3), *validation["en"], *validation["zh"]]:
        assert {key: value.dtype for key, value in batch.items()} == dtypes
        assert {value.shape for value in batch.values()} == {(4, 32)}
        assert 0 <= batch["tokens"].min() <= batch["tokens"].max() < text_data.vocab_size


def test_packing(text_data: TextData):
    several = 0
    for batch in take(text_data, 20):
        real = batch["segment_ids"] > 0
        assert np.array_equal(batch["loss_weights"], real.astype(np.float32))
        assert np.array_equal(batch["targets"] != 0, real)
        for key in ("tokens", "positions"):
            assert not batch[key][~real].any()
        for row in range(len(real)):
            ids = batch["segment_ids"][row]
            # 1, 2, .. in order, each in one run, then padding.
            assert np.array_equal(np.unique(ids[ids > 0]), np.arange(1, ids.max() + 1))
            assert np.all(np.diff(ids[ids > 0]) >= 0)
            assert not ids[np.count_nonzero(ids) :].any()
            several += ids.max() > 1
            for segment in range(1, ids.max() + 1):
                tokens, targets, positions = (
                    batch[key][row][ids == segment] for key in ("tokens", "targets", "positions")
                )
                assert tokens[0] == 0
                assert np.array_equal(tokens[1:], targets[:-1])
                assert np.array_equal(positions, np.arange(len(targets)))
                assert EOS_ID not in targets[:-1]
    assert several


def test_the_seed_decides_the_order(text_data: TextData):
    first = take(text_data, 5)
    assert same(first, take(text_data, 5))
    other = take(dataclasses.replace(text_data, seed=1), 5)
    assert not any(same([a], [b]) for a, b in zip(first, other, strict=True))


def test_resuming_is_never_having_stopped(text_data: TextData):
    uninterrupted = take(text_data, 300)
    # Several epochs: the order after a repeat must match too.
    assert len(segments(uninterrupted)) > 2 * len(set(segments(uninterrupted)))
    for start in (1, 297):
        assert same(take(text_data, 3, start), uninterrupted[start : start + 3])


def test_training_never_sees_held_out_text(text_data: TextData):
    trained = set(segments(take(text_data, 200)))
    held_out = set()
    for name in SOURCES:
        for document in read_split(name, text_data.text_dir, "validation"):
            ids = [*text_data.encode(document.text), EOS_ID]
            held_out |= {tuple(ids[i : i + 32]) for i in range(0, len(ids), 32)}
    # A piece of a token or two says nothing: the end of any document may be that.
    assert not {s for s in trained if len(s) > 2} & held_out


def test_one_source_alone_can_be_trained_on(text_data: TextData):
    english = dataclasses.replace(text_data, mixture_rates={"sotu_en": 1.0, "china_law_zh": 0})
    text = "".join(map(english.decode, segments(take(english, 10))))
    assert text.isascii()


def test_validation_is_the_same_for_every_way_of_training(text_data: TextData):
    fixed = text_data.validation_batches(2)
    other = dataclasses.replace(text_data, seed=5, shuffle_buffer=3, mixture_rates={"sotu_en": 1.0})
    again = other.validation_batches(2)
    assert list(again) == list(fixed)
    assert all(same(again[language], fixed[language]) for language in fixed)
    first = text_data.validation_batches(1)
    assert all(same(first[language], fixed[language][:1]) for language in fixed)


def test_all_held_out_text_can_be_asked_for_and_no_more(text_data: TextData):
    # One batch holds everything, and rows of padding.
    data = dataclasses.replace(text_data, batch_size=512)
    batches = data.validation_batches(1)
    for name, (language, _) in SOURCES.items():
        texts = [d.text for d in read_split(name, data.text_dir, "validation")]
        count = sum(len(data.encode(text)) + 1 for text in texts)
        assert batches[language][0]["loss_weights"].sum() == count
        assert not batches[language][0]["segment_ids"][-1].any()
        assert batches[language][0]["tokens"].shape == (512, 32)
    with pytest.raises(UserError, match=r"2 validation batches .* fills 1 of 512 x 32 tokens"):
        data.validation_batches(2)


def test_decode_stops_at_the_end_of_the_document(text_data: TextData):
    ids = text_data.encode("一 two\n")
    assert text_data.decode(np.array([*ids, EOS_ID, *ids], np.int32)) == "一 two\n"
    assert text_data.decode([]) == ""


def test_prepare_keeps_the_tokenizer_there_is(text_data: TextData):
    path = Path(text_data.tokenizer_path)
    before = path.stat().st_mtime_ns
    text_data.prepare()
    assert path.stat().st_mtime_ns == before
    with pytest.raises(UserError, match=rf"{path} has 400 ids, not 500: .*vocab_size to 400"):
        dataclasses.replace(text_data, vocab_size=500).prepare()


@pytest.mark.parametrize(
    "ask",
    [TextData.prepare, TextData.train_batches, lambda data: data.validation_batches(1)],
    ids=["prepare", "train_batches", "validation_batches"],
)
def test_missing_text_is_told_at_the_call(text_data: TextData, tmp_path: Path, ask):
    data = dataclasses.replace(text_data, text_dir=str(tmp_path))
    with pytest.raises(UserError, match=rf"{tmp_path}/.*: run `make data/text/installed`"):
        ask(data)


@pytest.mark.parametrize(
    "ask",
    [TextData.train_batches, lambda data: data.validation_batches(1), lambda d: d.encode("a")],
    ids=["train_batches", "validation_batches", "encode"],
)
def test_a_missing_tokenizer_is_told_at_the_call(text_data: TextData, tmp_path: Path, ask):
    data = dataclasses.replace(text_data, tokenizer_path=str(tmp_path / "none.model"))
    with pytest.raises(
        UserError, match=rf"no tokenizer at {tmp_path}/none\.model: .* call TextData"
    ):
        ask(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 1}, "sequence_length must be a whole number, at least 2, not 1"),
        ({"batch_size": 0}, "batch_size must be a whole number, at least 1, not 0"),
        ({"vocab_size": 0}, "vocab_size must be a whole number, at least 2, not 0"),
        ({"shuffle_buffer": 0}, "shuffle_buffer must be .* at least 1, not 0"),
        ({"mixture_rates": {"sotu": 1.0}}, "names sotu: the sources are sotu_en, china_law_zh"),
        ({"mixture_rates": {"sotu_en": -1.0, "china_law_zh": 2.0}}, "make none negative"),
        ({"mixture_rates": {"sotu_en": float("nan")}}, "one positive"),
        ({"mixture_rates": ()}, "one positive"),
    ],
)
def test_impossible_settings_are_refused(changes, message: str):
    with pytest.raises(UserError, match=message):
        TextData(**changes)


def test_impossible_requests_are_refused(text_data: TextData):
    with pytest.raises(UserError, match="start is -1"):
        text_data.train_batches(-1)
    with pytest.raises(UserError, match="num_batches is 0"):
        text_data.validation_batches(0)


def test_the_real_text(real_text_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # A small sample trains in a second.
    monkeypatch.setattr(vocabulary, "SAMPLE_BYTES", 100_000)
    data = TextData(real_text_dir, str(tmp_path / "new.model"), vocab_size=3000, shuffle_buffer=256)
    data.prepare()
    batches = take(data, 10)
    assert np.mean([b["loss_weights"] for b in batches]) > 0.9
    chinese = [not data.decode(s).isascii() for s in segments(batches)]
    assert 0.2 < np.mean(chinese) < 0.8
    assert {k: len(v) for k, v in data.validation_batches(10).items()} == {"en": 10, "zh": 10}
