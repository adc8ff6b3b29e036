"""A model's program has little memory, no network, and no way to pretend that it passed."""

import socket
from pathlib import Path

import pytest

from aquila_jax.evaluation.humaneval import passes

from .test_humaneval import DOUBLE


@pytest.mark.parametrize(
    ("completion", "is_right"),
    [
        ("    return 2 * x\n", True),
        ("    return 3 * x\n", False),
        ("    return 2 *\n", False),
        # Neither leaving early nor printing is passing.
        ("    import os\n    os._exit(0)\n", False),
        ("    raise SystemExit(0)\n", False),
        ("    print('passed')\n    return 5\n", False),
        ("    return 2 * len(bytearray(1 << 31)) and 4\n", False),
        ("    open('big', 'wb').write(bytes(1 << 22))\n    return 4\n", False),
        ("    import os\n    return 4 if 'HOME' not in os.environ else 0\n", True),
    ],
)
def test_completions_pass_or_fail_by_their_tests(completion, is_right):
    assert passes(DOUBLE, completion) == is_right


def test_there_is_no_network_where_the_system_can_take_it_away():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        connect = (
            f"    import os, socket\n    socket.create_connection(('127.0.0.1', {port}), 1)\n"
            "    return 4\n"
        )
        probe = "    import os\n    os.stat('/proc/self/ns/net')\n"
        own = f"    return 4 * (os.readlink('/proc/self/ns/net') != {namespace()!r})\n"
        if not passes(DOUBLE, probe + own):
            pytest.skip("this system gives no network namespace")
        assert not passes(DOUBLE, connect)


def namespace() -> str:
    return str(Path("/proc/self/ns/net").readlink())
