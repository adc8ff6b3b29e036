"""Joining nobody, and settings that do not fit; several processes join in tests/multihost."""

import jax
import pytest

from aquila_jax.errors import UserError
from aquila_jax.hosts import current, joined
from aquila_jax.hosts.joining import may_be_anothers


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


def test_a_collective_that_breaks_may_be_anothers_and_a_mistake_or_full_memory_is_not():
    gone = "Gloo all-reduce failed: Read error [127.0.0.1]:12709: Connection reset by peer"
    assert may_be_anothers(ValueError(f"UNKNOWN: {gone}"))
    assert may_be_anothers(jax.errors.JaxRuntimeError("INTERNAL: a chip does not answer"))
    assert not may_be_anothers(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"))
    assert not may_be_anothers(ValueError("shapes (2,) and (3,) do not match"))
    assert not may_be_anothers(UserError("seed is 3, not 0"))
