"""Groups whose processes are threads of this one."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from aquila_jax.hosts import Cluster, Group
from aquila_jax.hosts.channel import connect
from tests.multihost.processes import free_port


def join(count: int) -> list[Group]:
    port = free_port()
    clusters = [Cluster("test", f"127.0.0.1:{port}", count, index) for index in range(count)]
    with ThreadPoolExecutor(count) as pool:
        channels = list(pool.map(lambda cluster: connect(cluster, 20), clusters))
    return [Group(index, count, channel) for index, channel in enumerate(channels)]


def on_all(groups: Sequence[Group], function: Callable[[Group], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(groups)) as pool:
        return list(pool.map(function, groups))


def leave(groups: Sequence[Group]) -> None:
    for group in reversed(groups):
        group.leave(0)
