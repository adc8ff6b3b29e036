import dataclasses

import pytest

from aquila_jax import UserError
from aquila_jax.training.settings import compare, flatten, is_covered

from .synthetic import Counting, tiny_run


def test_every_setting_has_a_dotted_name(tmp_path):
    settings = flatten(tiny_run(tmp_path, allow_changes=("data",)))
    assert settings["optimizer"] == "AdamW"
    assert settings["optimizer.schedule"] == "Cosine"
    assert settings["optimizer.schedule.peak"] == 1e-2
    assert settings["data.seed"] == 0
    assert settings["allow_changes"] == ["data"]
    assert settings["init_from_model"] is None


def test_data_of_another_kind_is_known_by_its_name(tmp_path):
    class Other:
        batch_size, sequence_length, vocab_size = 8, 16, 32
        train_batches = Counting.train_batches

    assert flatten(tiny_run(tmp_path, data=Other()))["data"] == "Other"


@pytest.mark.parametrize(
    ("name", "allowed", "expected"),
    [
        ("data.seed", ["data.seed"], True),
        ("data.seed", ["data"], True),
        ("data.seed", ["dat"], False),
        ("data", ["data.seed"], False),
        ("data.seed", [], False),
    ],
)
def test_a_name_stands_for_everything_below_it(name, allowed, expected):
    assert is_covered(name, allowed) == expected


def test_what_leaves_the_order_alone_is_listed_and_where_a_run_lies_is_not(tmp_path):
    before = flatten(tiny_run(tmp_path / "a", eval_every=3))
    after = flatten(tiny_run(tmp_path / "b", eval_every=4, steps=9, allow_changes=("data",)))
    lines = compare(before, after, is_order_changed=False, allowed=())
    assert lines == ["eval_every was 3 and is 4 now"]


def test_an_order_that_changes_without_a_setting_is_refused_too(tmp_path):
    settings = flatten(tiny_run(tmp_path))
    with pytest.raises(UserError, match=r"what data reads has changed.*\('data',\)"):
        compare(settings, settings, is_order_changed=True, allowed=("model",))
    assert compare(settings, settings, is_order_changed=True, allowed=("data",)) == []


def test_all_that_is_refused_is_named_at_once(tmp_path):
    before = flatten(tiny_run(tmp_path))
    after = flatten(tiny_run(tmp_path, data=dataclasses.replace(Counting(), seed=1, batch_size=4)))
    with pytest.raises(UserError, match=r"\('data.batch_size', 'data.seed'\)"):
        compare(before, after, is_order_changed=True, allowed=())
