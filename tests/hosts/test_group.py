"""What the processes of a run say to each other."""

import threading

import pytest

from aquila_jax.hosts import Group

from .threads import join, leave, on_all


def test_every_process_gets_what_every_other_gave_in_order():
    groups = join(4)
    for number in range(3):
        given = on_all(groups, lambda group, n=number: group.gather("squares", [n, group.index**2]))
        assert given == [[[number, 0], [number, 1], [number, 4], [number, 9]]] * 4
    assert on_all(groups, lambda group: group.first("one", lambda: group.index + 7)) == [7] * 4
    leave(groups)


def test_calls_of_two_threads_do_not_mix():
    groups = join(2)
    results = {}

    def other(group):
        results[group.index] = [group.gather("background", group.index + i) for i in range(50)]

    threads = [threading.Thread(target=other, args=(group,)) for group in groups]
    for thread in threads:
        thread.start()
    front = on_all(groups, lambda group: [group.gather("front", i) for i in range(50)])
    for thread in threads:
        thread.join()
    assert front == [[[i, i] for i in range(50)]] * 2
    assert results[0] == results[1] == [[i, i + 1] for i in range(50)]
    leave(groups)


def test_an_error_of_one_is_an_error_of_all():
    groups = join(3)

    def fail(group):
        def work():
            if group.index == 1:
                raise OSError(28, "No space left on device")
            return group.index

        with pytest.raises(OSError, match="No space left on device") as caught:
            group.together("work", work)
        return str(caught.value)

    said = on_all(groups, fail)
    assert said[0] == said[2] == "process 1: No space left on device"
    leave(groups)


def test_a_group_of_one_is_its_own_answer():
    group = Group()
    assert group.gather("x", 3) == [3]
    assert group.first("y", lambda: 4) == 4
    assert group.is_first
    group.leave(0)
