"""Connections in threads of one process: the roll, exchanges, and who is both."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from aquila_jax.errors import HostsLostError, UserError
from aquila_jax.hosts import Cluster, Group, channel
from aquila_jax.hosts.channel import connect, own_port
from tests.multihost.processes import free_port

from .threads import leave, on_all


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


@pytest.mark.parametrize(
    "said",
    [b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b""],
    ids=["a web page", "a list", "nothing"],
)
def test_whoever_knocks_by_mistake_does_not_keep_the_others_from_joining(said, monkeypatch):
    monkeypatch.setattr(channel, "_LINGER_SECONDS", 0.5)
    began, port = time.monotonic(), free_port()
    clusters = [Cluster("test", f"127.0.0.1:{port}", 2, index) for index in range(2)]
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(connect, clusters[0], 20)
        while True:
            try:
                stranger = socket.create_connection(own_port(clusters[0]))
                break
            except OSError:
                pass
        stranger.sendall(said)
        other = pool.submit(connect, clusters[1], 20)
        groups = [Group(i, 2, done.result()) for i, done in enumerate((first, other))]
    stranger.close()
    assert time.monotonic() - began < channel.SILENCE_SECONDS / 2
    assert on_all(groups, lambda group: group.gather("x", 1)) == [[1, 1]] * 2
    leave(groups)


def test_an_absent_process_is_named():
    cluster = Cluster("test", f"127.0.0.1:{free_port()}", 3, 0)
    with pytest.raises(HostsLostError, match="process 1, 2 of 3 did not join within 1 s") as caught:
        connect(cluster, 1)
    assert caught.value.exit_code == 75
