from collections import Counter
from pathlib import Path

import pytest

from aquila_jax.data import TextData, tasks
from aquila_jax.data.sources import SOURCES, read_split
from aquila_jax.data.vocabulary import EOS_ID

T = 32


def register(data: TextData, name: str = "sotu_en", **changes):
    settings = {
        "text_dir": data.text_dir,
        "tokenizer_path": data.tokenizer_path,
        "shuffle_buffer": 64,
        **changes,
    }
    return tasks.register_task(name, **settings)


def pieces(provider, split: str = "train", **settings) -> list[tuple[int, ...]]:
    dataset = provider.get_dataset({"targets": T}, split=split, **settings)
    return [tuple(example["targets"].tolist()) for example in dataset.as_numpy_iterator()]


def documents(data: TextData, name: str, split: str) -> list[list[int]]:
    texts = [d.text for d in read_split(name, data.text_dir, split)]
    return [[*data.encode(text), EOS_ID] for text in texts]


@pytest.mark.parametrize("split", tasks.SPLITS)
@pytest.mark.parametrize("name", SOURCES)
def test_every_token_once_an_epoch(text_data: TextData, name: str, split: str):
    task = register(text_data, name)
    in_order = pieces(task, split, shuffle=False)
    assert [i for piece in in_order for i in piece] == [
        i for document in documents(text_data, name, split) for i in document
    ]
    shuffled = pieces(task, split, shuffle=True, seed=3)
    assert shuffled != in_order
    assert Counter(shuffled) == Counter(in_order)
    twice = pieces(task, split, shuffle=True, seed=3, num_epochs=2)
    assert Counter(twice) == Counter(in_order * 2)


def test_only_the_last_piece_of_a_document_is_short_and_ends_it(text_data: TextData):
    for piece in pieces(register(text_data), shuffle=False):
        assert EOS_ID not in piece[:-1]
        assert len(piece) == T or piece[-1] == EOS_ID
        assert 1 <= len(piece) <= T


def test_equal_settings_share_a_task_and_others_do_not(text_data: TextData, tmp_path: Path):
    task = register(text_data)
    assert register(text_data) is task
    assert register(text_data, text_dir=f"{text_data.text_dir}/.") is task
    others = [
        register(text_data, shuffle_buffer=65),
        register(text_data, text_dir=str(tmp_path)),
        register(text_data, name="china_law_zh"),
    ]
    assert len({task.name, *(other.name for other in others)}) == 4


def mixture_shares(data: TextData, rates: dict[str, float], count: int) -> float:
    """The part of `count` pieces that is English."""
    mixture = tasks.register_mixture(rates, data.text_dir, data.tokenizer_path, 64)
    english = set(pieces(register(data), shuffle=False))
    dataset = mixture.get_dataset({"targets": T}, "train", seed=0, num_epochs=None).take(count)
    drawn = [tuple(e["targets"].tolist()) for e in dataset.as_numpy_iterator()]
    return sum(piece in english for piece in drawn) / count


@pytest.mark.parametrize(
    ("rates", "share"),
    [
        ({"sotu_en": 1.0, "china_law_zh": 1.0}, 0.5),
        ({"sotu_en": 3.0, "china_law_zh": 1.0}, 0.75),
        ({"sotu_en": 0.0, "china_law_zh": 1.0}, 0.0),
        ({"sotu_en": 2.0}, 1.0),
    ],
)
def test_a_mixture_draws_pieces_at_its_rates(text_data: TextData, rates, share: float):
    assert mixture_shares(text_data, rates, 1000) == pytest.approx(share, abs=0.05)


def test_mixtures_of_equal_rates_are_one(text_data: TextData):
    where = (text_data.text_dir, text_data.tokenizer_path, 64)
    one = tasks.register_mixture({"sotu_en": 1.0, "china_law_zh": 2.0}, *where)
    same = tasks.register_mixture({"china_law_zh": 2.0, "sotu_en": 1.0}, *where)
    other = tasks.register_mixture({"sotu_en": 2.0, "china_law_zh": 1.0}, *where)
    assert one is same
    assert one is not other
