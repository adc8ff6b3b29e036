"""Connections in threads of one process: the roll, exchanges, and who is both."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from aquila_jax.errors import HostsLostError, UserError
from aquila_jax.hosts import Cluster, Group
from aquila_jax.hosts.channel import connect, own_port
from tests.multihost.processes import free_port


def _groups(count):
    port = free_port()
    clusters = [Cluster("test", f"127.0.0.1:{port}", count, index) for index in range(count)]
    with ThreadPoolExecutor(count) as pool:
        channels = list(pool.map(lambda cluster: connect(cluster, 20), clusters))
    return [Group(index, count, channel) for index, channel in enumerate(channels)]


def _all(groups, function):
    with ThreadPoolExecutor(len(groups)) as pool:
        return list(pool.map(function, groups))


def _leave(groups):
    for group in reversed(groups):
        group.leave(0)


def test_every_process_gets_what_every_other_gave_in_order():
    groups = _groups(4)
    for number in range(3):
        given = _all(groups, lambda group, n=number: group.gather("squares", [n, group.index**2]))
        assert given == [[[number, 0], [number, 1], [number, 4], [number, 9]]] * 4
    assert _all(groups, lambda group: group.first("one", lambda: group.index + 7)) == [7] * 4
    _leave(groups)


def test_calls_of_two_threads_do_not_mix():
    groups = _groups(2)
    results = {}

    def other(group):
        results[group.index] = [group.gather("background", group.index + i) for i in range(50)]

    threads = [threading.Thread(target=other, args=(group,)) for group in groups]
    for thread in threads:
        thread.start()
    front = _all(groups, lambda group: [group.gather("front", i) for i in range(50)])
    for thread in threads:
        thread.join()
    assert front == [[[i, i] for i in range(50)]] * 2
    assert results[0] == results[1] == [[i, i + 1] for i in range(50)]
    _leave(groups)


def test_an_error_of_one_is_an_error_of_all():
    groups = _groups(3)

    def fail(group):
        def work():
            if group.index == 1:
                raise OSError(28, "No space left on device")
            return group.index

        with pytest.raises(OSError, match="No space left on device") as caught:
            group.together("work", work)
        return str(caught.value)

    said = _all(groups, fail)
    assert said[0] == said[2] == "process 1: No space left on device"
    _leave(groups)


def test_two_processes_of_one_number_are_refused():
    port = free_port()
    clusters = [Cluster("test", f"127.0.0.1:{port}", 3, index) for index in (0, 1, 1)]

    def attempt(cluster):
        with pytest.raises(UserError, match=r"are both to be process 1|is gone") as caught:
            connect(cluster, 20)
        return str(caught.value)

    with ThreadPoolExecutor(3) as pool:
        said = list(pool.map(attempt, clusters))
    assert "are both to be process 1" in said[0]


def test_whoever_knocks_and_says_nothing_does_not_keep_the_others_from_joining():
    port = free_port()
    clusters = [Cluster("test", f"127.0.0.1:{port}", 2, index) for index in range(2)]
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(connect, clusters[0], 20)
        while True:
            try:
                stranger = socket.create_connection(own_port(clusters[0]))
                break
            except OSError:
                pass
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        other = pool.submit(connect, clusters[1], 20)
        groups = [Group(i, 2, done.result()) for i, done in enumerate((first, other))]
    stranger.close()
    assert _all(groups, lambda group: group.gather("x", 1)) == [[1, 1]] * 2
    _leave(groups)


def test_an_absent_process_is_named():
    cluster = Cluster("test", f"127.0.0.1:{free_port()}", 3, 0)
    with pytest.raises(HostsLostError, match="process 1, 2 of 3 did not join within 1 s") as caught:
        connect(cluster, 1)
    assert caught.value.exit_code == 75


def test_a_group_of_one_is_its_own_answer():
    group = Group()
    assert group.gather("x", 3) == [3]
    assert group.first("y", lambda: 4) == 4
    assert group.is_first
    group.leave(0)
