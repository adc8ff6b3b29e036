"""Whatever a run can read has everything that a run asks of its data."""

import inspect

import pytest

from aquila_jax.data import ChatData, TextData, TokenCache
from aquila_jax.training.batches import Data

from .synthetic import Counting

MEMBERS = [name for name in vars(Data) if not name.startswith("_")]


@pytest.mark.parametrize("kind", [ChatData, TextData, TokenCache, Counting])
def test_it_has_every_member_with_the_same_arguments(kind):
    fields = set(kind.__dataclass_fields__)
    for name in MEMBERS:
        asked = getattr(Data, name)
        if isinstance(asked, property):
            assert name in fields or isinstance(getattr(kind, name), property), name
            continue
        wanted, given = (inspect.signature(f).parameters for f in (asked, getattr(kind, name)))
        assert list(given)[: len(wanted)] == list(wanted), name
        # What a run does not know of must have a default.
        assert all(p.default is not p.empty for p in list(given.values())[len(wanted) :]), name
