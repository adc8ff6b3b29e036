"""What the processes of a run must agree on: what they run, where they write, when they stop."""

import functools
import hashlib
import importlib.metadata
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aquila_jax.errors import UserError, few
from aquila_jax.files import write_text
from aquila_jax.hosts import Group
from aquila_jax.sharding import Layout

# Whose versions a result depends on.
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# How many differences a line names.
_MOST_LISTED = 5


def versions() -> dict[str, str]:
    """Of Python and of every package that a result depends on."""
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


@functools.cache
def code_digest() -> str:
    """A digest of this library's own source, as it is on this host."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package).as_posix()}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def check_alike(hosts: Group, name: str, facts: dict[str, Any]) -> None:
    """Every process runs the same.

    Args:
        hosts: the processes.
        name: of this comparison.
        facts: what must be the same, JSON.

    Raises:
        UserError: naming the processes that differ from the first, and in what; on all of them.
    """
    if hosts.count == 1:
        return
    first = hosts.first(name, lambda: facts)
    differing = sorted(key for key in {**first, **facts} if first.get(key, None) != facts.get(key))
    shown = [f"{key} is {facts.get(key)!r}, not {first.get(key)!r}" for key in differing]
    answers = hosts.gather(f"{name} differs", few(shown, _MOST_LISTED))
    found = [f"on process {index} {words}" for index, words in enumerate(answers) if words]
    if found:
        raise UserError(
            f"not every host runs what process 0 does: {'; '.join(found)}; install the same code "
            "and give the same command on all of them"
        )


def share_directory(hosts: Group, path: Path) -> None:
    """Create MODEL_DIR, prove that every process can write to it and that it is the same one.

    Raises:
        OSError: it cannot be written.
        UserError: another process does not see what the first has written.
    """
    seen = path / ".seen"

    def make() -> None:
        path.mkdir(parents=True, exist_ok=True)
        write_text(path / f".writable-{hosts.index}", "")
        (path / f".writable-{hosts.index}").unlink()

    def look() -> None:
        if not seen.exists():
            raise UserError(
                f"{path} is not the MODEL_DIR that process 0 writes to: name a directory that all "
                "hosts share (NFS, Filestore, Lustre, Cloud Storage FUSE)"
            )

    hosts.together("directory", make)
    if hosts.count > 1:
        hosts.first("seen", lambda: write_text(seen, ""))
        try:
            hosts.together("look", look)
        finally:
            if hosts.is_first:
                seen.unlink(missing_ok=True)


def stop_vote(hosts: Group, layout: Layout, asked: Sequence[int]) -> Callable[[], int]:
    """A function to be called after each step: the signal to stop by, or 0; alike on all hosts.

    Alone, a process stops after the step in which a signal came. Of several, each puts what it was
    asked into a sum over all devices behind the step, and reads that of the step before, which is
    there or about to be: so all stop after the same step, one after the signal, and nothing waits.

    Args:
        hosts: the processes.
        layout: of the run.
        asked: signals that this process has heard.
    """
    if hosts.count == 1:
        return lambda: asked[0] if asked else 0
    sharding = layout.each_device()
    largest = jax.jit(jnp.max, out_shardings=layout.replicated())
    cast: list[jax.Array] = []

    def vote() -> int:
        own = np.full(jax.local_device_count(), asked[0] if asked else 0, np.int32)
        shape = (jax.device_count(),)
        cast.append(largest(jax.make_array_from_process_local_data(sharding, own, shape)))
        return int(cast.pop(0)) if len(cast) > 1 else 0

    return vote
