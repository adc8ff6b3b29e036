"""Joining the other processes of a run, and leaving them, whatever happens."""

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping

import jax

from aquila_jax.errors import UserError
from aquila_jax.hosts.channel import SILENCE_SECONDS, connect
from aquila_jax.hosts.cluster import find
from aquila_jax.hosts.group import Group, set_current
from aquila_jax.hosts.maintenance import heed_maintenance

_TIMEOUT_VARIABLE = "AQUILA_JOIN_SECONDS"
_TIMEOUT_SECONDS = 300


@contextlib.contextmanager
def joined(environ: Mapping[str, str] = os.environ) -> Iterator[Group]:
    """All processes of the run together, for as long as the block takes; alone where it is alone.

    To be entered before JAX has looked at any device. An exception ends this process, and with it
    all others, with its exit code; one with an attribute `is_agreed` is every process's own.

    Raises:
        HostsLostError: some process does not join in time.
        UserError: what the environment says does not fit.
    """
    timeout = _timeout(environ)
    cluster = find(environ, timeout=timeout)
    if cluster is None:
        with heed_maintenance(environ):
            yield Group()
        return
    channel = connect(cluster, timeout)
    group = Group(cluster.index, cluster.count, channel)
    # Its handler would keep SIGTERM from a run's own, which also hears of SIGINT.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        cluster.coordinator,
        cluster.count,
        cluster.index,
        local_device_ids=cluster.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=timeout,
    )
    print(f"{cluster}, {len(jax.local_devices())} of {jax.device_count()} devices", file=sys.stderr)
    set_current(group)
    try:
        with heed_maintenance(environ):
            yield group
    except BaseException as error:
        if not getattr(error, "is_agreed", False):
            _leave_at_once(group, error)
        _leave(group)
        raise
    else:
        _leave(group)
    finally:
        set_current(None)


def _timeout(environ: Mapping[str, str]) -> int:
    given = environ.get(_TIMEOUT_VARIABLE, str(_TIMEOUT_SECONDS))
    if not given.isdecimal() or int(given) < 1:
        raise UserError(f"{_TIMEOUT_VARIABLE} is {given!r}: give whole seconds, at least 1")
    return int(given)


def _leave(group: Group) -> None:
    """As agreed: all processes come here."""
    group.barrier("leave")
    group.leave(0)
    jax.distributed.shutdown()


def may_be_anothers(error: BaseException) -> bool:
    """Whether a computation failed as one does where another process is lost; that is to be said.

    Collectives on CPUs say it by a ValueError where they are dispatched (jax 0.10).
    """
    words = str(error)
    is_computed = isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in words
    return is_computed and "RESOURCE_EXHAUSTED" not in words


def _leave_at_once(group: Group, error: BaseException) -> None:
    """Say why and end; JAX's own way out would wait for the others."""
    if may_be_anothers(error):
        # Whoever hears of the lost process meanwhile says so and ends this one.
        time.sleep(SILENCE_SECONDS)
    if isinstance(error, UserError):
        code, words = error.exit_code, str(error)
        print(f"error: {words}", file=sys.stderr)
    else:
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
        words = f"{type(error).__name__}: {error}".splitlines()[0]
        traceback.print_exception(error)
    group.leave(code, words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
