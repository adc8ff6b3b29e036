"""Runs one program under limits. A script of its own: nothing of this package is imported.

    python -I limited.py SECONDS MEGABYTES < (a line with a secret, then the program)

The secret is written to standard output when the program has ended by itself, so that a program
that leaves early is not taken for one that came through.
"""

import contextlib
import ctypes
import os
import resource
import sys

_NEW_NETWORK_AND_USER = 0x40000000 | 0x10000000
_MOST_FILE_BYTES = 1 << 20
_MOST_OPEN_FILES = 64


def limit(seconds: int, megabytes: int) -> None:
    """Limits CPU time, memory, files and processes, and takes the network away where it can be."""
    with contextlib.suppress(OSError, AttributeError):
        # Namespaces are Linux's; a new user has no power over the limits below either.
        ctypes.CDLL(None).unshare(_NEW_NETWORK_AND_USER)
    for kind, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, megabytes << 20),
        (resource.RLIMIT_FSIZE, _MOST_FILE_BYTES),
        (resource.RLIMIT_NOFILE, _MOST_OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(ValueError, OSError):  # a lower limit is in force already
            resource.setrlimit(kind, (most, most))


def main() -> None:
    """Reads, limits, runs."""
    secret, _, program = sys.stdin.read().partition("\n")
    answer = os.dup(1)
    silence = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(silence, descriptor)
    limit(int(sys.argv[1]), int(sys.argv[2]))
    exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    os.write(answer, secret.encode())


if __name__ == "__main__":
    main()
