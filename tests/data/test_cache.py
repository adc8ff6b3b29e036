import dataclasses
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from aquila_jax import cli
from aquila_jax.data import TextData, TokenCache, prepare_cache, write_cache
from aquila_jax.data.cache import INDEX_FILE
from aquila_jax.data.sources import SOURCES, read_split
from aquila_jax.data.vocabulary import EOS_ID
from aquila_jax.errors import UserError

LENGTH = 8


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """A cache whose rows are told apart: row r of source s holds 8 ids from 8 * r (+ 4000)."""
    path = tmp_path_factory.mktemp("cache") / "numbered"
    rows = np.arange(101 * LENGTH).reshape(-1, LENGTH)
    write_cache(
        path,
        {
            ("train", "a"): rows[:67],
            ("train", "b"): rows[67:] + 4000,
            ("validation", "xx"): rows[:5] + 8000,
        },
        sequence_length=LENGTH,
        vocab_size=10_000,
        vocabulary="v",
    )
    return TokenCache(str(path), batch_size=8)


def _take(cache, count, start=0, rows=None):
    return list(itertools.islice(cache.train_batches(start, rows=rows), count))


def _targets(batches):
    return np.concatenate([batch["targets"] for batch in batches])


def _same(ours, theirs):
    return len(ours) == len(theirs) and all(
        np.array_equal(a[key], b[key]) for a, b in zip(ours, theirs, strict=True) for key in b
    )


@pytest.mark.parametrize("num_hosts", [1, 2, 4])
def test_an_epoch_is_every_token_once_over_hosts_and_across_restarts(numbered, num_hosts):
    assert numbered.epoch_rows == 101
    # Two epochs of 101 rows in batches of 8, read by hosts that begin anew every few batches.
    starts = [*range(0, 26, 3), 26]
    batches = []
    for start, end in itertools.pairwise(starts):
        shards = [
            _take(numbered, end - start, start, range(host, 8, num_hosts))
            for host in range(num_hosts)
        ]
        assert all(len(b["targets"]) == 8 // num_hosts for shard in shards for b in shard)
        batches += [
            np.stack([b["targets"] for b in parts], axis=1).reshape(8, LENGTH)
            for parts in zip(*shards, strict=True)
        ]
    rows = np.concatenate(batches)
    for epoch in (rows[:101], rows[101:202]):
        tokens = np.sort(epoch.ravel())
        expected = np.arange(101 * LENGTH)
        expected[67 * LENGTH :] += 4000
        np.testing.assert_array_equal(tokens, expected)
    assert not np.array_equal(rows[:101], rows[101:202])
    np.testing.assert_array_equal(rows, _targets(_take(numbered, 26)))


def test_the_shuffle_is_global(numbered):
    first = _targets(_take(numbered, 12))[:, 0] // LENGTH
    # Of rows in order, neighbours would differ by one; of a global shuffle, by about a third.
    assert np.median(np.abs(np.diff(first))) > 20


def test_going_on_reads_nothing_of_what_is_skipped(numbered):
    far = 10**9
    batches = _take(numbered, 2, far)
    assert _same(batches[1:], _take(numbered, 1, far + 1))


def test_seed_and_batch_size_are_part_of_the_order_and_the_place_is_not(numbered, tmp_path):
    identity = numbered.identity()
    other = dataclasses.replace(numbered, seed=1)
    assert not _same(_take(numbered, 3), _take(other, 3))
    assert other.identity()["order"] != identity["order"]
    assert dataclasses.replace(numbered, batch_size=4).identity()["order"] != identity["order"]
    moved = tmp_path / "moved"
    moved.symlink_to(numbered.path)
    assert TokenCache(str(moved), batch_size=8).identity() == identity


def test_rates_decide_how_many_rows_come_from_each_source(numbered):
    mixed = dataclasses.replace(numbered, mixture_rates=(("a", 1.0), ("b", 3.0)))
    from_b = _targets(_take(mixed, 25))[:, 0] >= 4000
    assert np.mean(from_b) == pytest.approx(0.75, abs=0.02)
    assert _same(_take(mixed, 2, 7), _take(mixed, 9)[7:])
    alone = dataclasses.replace(numbered, mixture_rates={"a": 1.0, "b": 0.0})
    assert _targets(_take(alone, 20)).max() < 4000


def test_validation_holds_no_row_twice_and_is_the_same_for_every_seed(numbered):
    (batch,) = numbered.validation_batches(1)["xx"]
    kept = batch["targets"][batch["segment_ids"][:, 0] > 0]
    np.testing.assert_array_equal(np.sort(kept.ravel()), 8000 + np.arange(5 * LENGTH))
    assert not batch["loss_weights"][5:].any()
    other = dataclasses.replace(numbered, seed=3).validation_batches(1)["xx"]
    assert _same(other, [batch])
    with pytest.raises(UserError, match="2 validation batches of xx asked for"):
        numbered.validation_batches(2)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda c: c.train_batches(-1), "start is -1"),
        (lambda c: c.train_batches(rows=[7, 8]), "rows .7, 8. are not all of batches of 8"),
        (lambda c: c.validation_batches(0), "num_batches is 0"),
        (lambda c: dataclasses.replace(c, batch_size=0), "batch_size must be a whole number"),
        (lambda c: dataclasses.replace(c, mixture_rates={"c": 1.0}), "names c: .* holds a, b"),
        (lambda c: dataclasses.replace(c, mixture_rates={"a": -1.0}), "make none negative"),
        (lambda c: dataclasses.replace(c, path="nowhere"), "aquila data prepare --to nowhere"),
    ],
)
def test_what_does_not_fit_is_refused(numbered, ask, message):
    with pytest.raises(UserError, match=message):
        ask(numbered)


def _small(path):
    write_cache(
        path,
        {("train", "a"): [[1, 2, 3]]},
        sequence_length=4,
        vocab_size=8,
        vocabulary="v",
    )
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda index: index["parts"][0]["files"][0].update(bytes=1),
            "not the 1 that were written",
        ),
        (lambda index: index["parts"][0]["files"][0].update(name="../x"), "no file of a cache"),
        (lambda index: index["parts"][0].update(split=".."), "no file of a cache"),
        (lambda index: index["parts"][0].update(name="/etc"), "no file of a cache"),
        (lambda index: index.update(format=9), "has format 9, not 1"),
        (lambda index: index.pop("parts"), "is damaged"),
    ],
)
def test_an_index_that_was_changed_is_refused(tmp_path, change, message):
    path = _small(tmp_path / "cache") / INDEX_FILE
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=message):
        TokenCache(str(tmp_path / "cache"))


def test_a_cache_is_whole_or_absent(tmp_path):
    def documents():
        yield [1]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_cache(
            tmp_path / "cache",
            {("train", "a"): documents()},
            sequence_length=4,
            vocab_size=8,
            vocabulary="v",
        )
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="cache exists"):
        _small(_small(tmp_path / "cache"))


def test_large_vocabularies_keep_their_ids(tmp_path):
    ids = [70_000, 151_850, 1]
    write_cache(
        tmp_path / "cache",
        {("train", "a"): [ids]},
        sequence_length=3,
        vocab_size=151_851,
        vocabulary="v",
    )
    (batch,) = _take(TokenCache(str(tmp_path / "cache"), batch_size=1), 1)
    assert batch["targets"].tolist() == [ids]


def test_a_prepared_text_holds_all_of_it_without_tensorflow(text_data: TextData, tmp_path):
    prepare_cache(text_data, tmp_path / "cache")
    cache = TokenCache(str(tmp_path / "cache"), batch_size=1)
    assert (cache.vocab_size, cache.sequence_length) == (400, 32)
    assert cache.identity()["vocabulary"] == text_data.identity()["vocabulary"]
    assert list(cache.validation_batches(1)) == ["en", "zh"]
    tokens = _targets(_take(cache, cache.epoch_rows))
    assert np.sum(tokens == EOS_ID) == sum(
        1 for name in SOURCES for _ in read_split(name, text_data.text_dir, "train")
    )
    found = sorted(tokens[tokens != 0].tolist())
    assert found == sorted(
        token
        for name in SOURCES
        for document in read_split(name, text_data.text_dir, "train")
        for token in [*text_data.encode(document.text), EOS_ID]
    )


def test_reading_a_cache_imports_neither_tensorflow_nor_sentencepiece(numbered):
    program = (
        "import sys; from aquila_jax.data import TokenCache\n"
        f"cache = TokenCache({numbered.path!r}, batch_size=8)\n"
        "next(cache.train_batches()); cache.validation_batches(1)\n"
        "assert not {'tensorflow', 'seqio', 'sentencepiece'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_command_prepares_a_cache(text_data: TextData, tmp_path, capsys):
    flags = {
        "to": tmp_path / "cache",
        "text_dir": text_data.text_dir,
        "tokenizer_path": text_data.tokenizer_path,
        "vocab_size": 400,
        "sequence_length": 16,
    }
    command = ["data", "prepare", *(f"--{name}={value}" for name, value in flags.items())]
    assert cli.main(command) == 0
    assert f"rows of 16 tokens; {tmp_path / 'cache'}" in capsys.readouterr().out
    assert cli.main(command) == 2
    assert "exists" in capsys.readouterr().err
