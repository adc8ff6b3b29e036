import pytest

from aquila_jax.planning.memory import _refused

_GIB = 2**30


def test_a_refusal_says_how_much_was_wanted():
    message = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 33.75G of 15.75G hbm. Exceeded hbm capacity by 18.00G.\n"
        "Total hbm usage >= 34.02G:"
    )
    memory = _refused(message, {"parameters": 10.0 * _GIB, "optimizer": 20.0 * _GIB})
    assert memory.total == pytest.approx(34.02 * _GIB)
    assert memory.temporaries == pytest.approx(4.02 * _GIB)


def test_a_refusal_of_temporaries_alone_adds_the_arguments():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (2.00T) exceeds available HBM (95.74G)."
    )
    memory = _refused(message, {"parameters": 10.0 * _GIB})
    assert memory.total == pytest.approx(2058 * _GIB)


def test_a_refusal_without_a_size_is_not_swallowed():
    with pytest.raises(ValueError, match="without its size: RESOURCE_EXHAUSTED: something"):
        _refused("RESOURCE_EXHAUSTED: something", {})
