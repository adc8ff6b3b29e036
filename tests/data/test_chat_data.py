import collections
import dataclasses
import itertools
import json

import numpy as np
import pytest

from aquila_jax.data import ChatData
from aquila_jax.data.chat_data import pack_examples
from aquila_jax.data.conversations import Example
from aquila_jax.errors import UserError

T = 24


@pytest.fixture
def data(chatty, tmp_path):
    """200 prompts of some letters, whose answers are as many letters further."""
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(200):
        letters = rng.integers(0, 20, size=rng.integers(1, 9))
        words = ("".join(chr(ord("A") + i + shift) for i in letters) for shift in (0, 5))
        lines.append(json.dumps(dict(zip(("prompt", "answer"), words, strict=True))))
    (tmp_path / "file.jsonl").write_text("\n".join(lines))
    return ChatData(
        path=str(tmp_path / "file.jsonl"),
        tokenizer_path=str(chatty),
        vocab_size=32,
        sequence_length=T,
        batch_size=4,
        validation_fraction=0.2,
    )


def segments(batch):
    """Of every example in a batch: what is read, what is to be said, and what is learnt."""
    for row in range(len(batch["tokens"])):
        for number in range(1, batch["segment_ids"][row].max() + 1):
            here = batch["segment_ids"][row] == number
            assert batch["positions"][row][here].tolist() == [*range(here.sum())]
            yield tuple(
                tuple(batch[name][row][here].tolist())
                for name in ("tokens", "targets", "loss_weights")
            )


def test_rows_hold_whole_examples_and_only_answers_weigh(data):
    batch = next(data.train_batches())
    found = [*segments(batch)]
    assert len(found) > 8
    for tokens, targets, weights in found:
        assert tokens[1:] == targets[:-1]
        prompt = [i for i, weight in zip(targets, weights, strict=True) if not weight]
        answer = [i for i, weight in zip(targets, weights, strict=True) if weight]
        # An answer is its prompt five letters further, then the end.
        assert answer == [*(i + 5 for i in (tokens[0], *prompt)), 0]
    padding = batch["segment_ids"] == 0
    assert not batch["loss_weights"][padding].any()
    assert batch["tokens"].shape == (4, T)


def test_an_epoch_has_every_example_once_and_the_next_another_order(data):
    rows = itertools.chain.from_iterable(map(segments, data.train_batches()))
    held_out = {
        example
        for batches in data.validation_batches(3).values()
        for batch in batches
        for example in segments(batch)
    }
    first = [*itertools.islice(rows, 100)]
    assert max(collections.Counter(first).values()) < 4  # some of 200 are equal
    assert not held_out & set(first)
    assert first != [*itertools.islice(rows, 100)]


def test_batches_go_on_where_they_stopped(data):
    whole = [*itertools.islice(data.train_batches(), 40)]
    resumed = [*itertools.islice(data.train_batches(start=25), 15)]
    for one, other in zip(whole[25:], resumed, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
    other = next(dataclasses.replace(data, seed=1).train_batches())
    assert (other["tokens"] != whole[0]["tokens"]).any()
    assert data.identity() != dataclasses.replace(data, seed=1).identity()


def test_packing_keeps_all_and_fills_rows():
    rng = np.random.default_rng(1)
    examples = [Example([i] * n, [True] * n) for i, n in enumerate(rng.integers(2, 40, size=300))]
    rows = [*pack_examples(examples, 64)]
    assert sorted(example.ids[0] for row in rows for example in row) == [*range(300)]
    used = [sum(len(example.ids) - 1 for example in row) for row in rows]
    assert max(used) <= 64
    assert np.mean(used) > 0.9 * 64


def test_long_examples_lose_their_end_and_those_without_an_answer_are_left_out(data, tmp_path):
    long = {"prompt": "A", "answer": "B" * 90}
    lost = {"prompt": "A" * 90, "answer": "B"}
    (tmp_path / "long.jsonl").write_text("\n".join([json.dumps(long), json.dumps(lost)] * 30))
    cut = dataclasses.replace(data, path=str(tmp_path / "long.jsonl"), validation_fraction=0.999)
    with pytest.raises(UserError, match=r"no example of .* is left to train on"):
        next(cut.train_batches())
    (batch,) = cut.validation_batches(1)["answers"]
    assert batch["loss_weights"].sum() == 4 * T


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"vocab_size": 8}, "has 31 ids: set ChatData.vocab_size"),
        ({"path": "none.jsonl"}, "there is no file none.jsonl"),
        ({"validation_fraction": 0.0}, "between 0 and 1"),
        ({"sequence_length": 1}, "sequence_length must be .* at least 2, not 1"),
    ],
)
def test_what_does_not_fit_is_refused(data, changes, says):
    with pytest.raises(UserError, match=says):
        dataclasses.replace(data, **changes).prepare()
    with pytest.raises(UserError, match="900 validation batches asked for"):
        data.validation_batches(900)
    with pytest.raises(UserError, match="start is -1"):
        data.train_batches(-1)
