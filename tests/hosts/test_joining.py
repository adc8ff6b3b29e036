"""Joining nobody, and settings that do not fit; several processes join in tests/multihost."""

import pytest

from aquila_jax.errors import UserError
from aquila_jax.hosts import current, joined


def test_a_process_alone_joins_nobody():
    with joined({}) as group:
        assert (group.index, group.count) == (0, 1)
        assert current().count == 1


def test_an_exception_leaves_a_process_alone_as_it_is():
    with pytest.raises(ZeroDivisionError), joined({}):
        raise ZeroDivisionError
    assert current().count == 1


@pytest.mark.parametrize("seconds", ["0", "-3", "soon", "1.5", ""])
def test_a_time_to_join_that_is_none_is_refused(seconds):
    with (
        pytest.raises(UserError, match=r"AQUILA_JOIN_SECONDS is .*: give whole seconds"),
        joined({"AQUILA_JOIN_SECONDS": seconds}),
    ):
        pass
