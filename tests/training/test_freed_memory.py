"""Pages that a process asks the kernel for, step after step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from aquila_jax.training import freed_memory
from aquila_jax.training.freed_memory import keep_freed_memory

# 64 MB of temporaries: what matrix products read, stands.
STEPS = """
import json, resource, sys
from aquila_jax.training.freed_memory import keep_freed_memory
done = keep_freed_memory() if sys.argv[1] == "keep" else False
import jax, jax.numpy as jnp
step = jax.jit(lambda x: jnp.cos(jnp.outer(x, x)) @ x[:, None])
x = jnp.arange(4096.0)
faults = []
for _ in range(40):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps([done, sorted(faults[20:])[10]]))
"""


def pages(how: str) -> tuple[bool, int]:
    """Whether memory is kept, and the median of page faults of a step, once the heap has grown."""
    done = subprocess.run(
        [sys.executable, "-c", STEPS, how],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")
def test_a_step_on_a_cpu_asks_for_no_page_that_the_one_before_had():
    size = 64e6 / os.sysconf("SC_PAGESIZE")
    kept, faults = pages("keep")
    assert kept
    assert faults < size / 20
    if "[always]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        assert pages("give back")[1] > size / 2


@pytest.mark.parametrize(
    ("platforms", "libc", "kept"),
    [("cpu", "glibc", True), ("cuda,cpu", "glibc", False), ("cpu", "", False)],
)
def test_it_is_left_alone_on_accelerators_and_without_glibc(monkeypatch, platforms, libc, kept):
    asked = []
    monkeypatch.setattr(freed_memory.platform, "libc_ver", lambda: (libc, ""))
    monkeypatch.setattr(freed_memory.ctypes, "CDLL", lambda _: Library(asked))
    monkeypatch.setattr(freed_memory, "jax", Settings(platforms))
    assert keep_freed_memory() is kept
    assert bool(asked) is kept


@pytest.mark.parametrize(("installed", "kept"), [((), True), (("libtpu",), False)])
def test_without_a_choice_it_is_a_cpu_where_no_accelerators_library_is(
    monkeypatch, installed, kept
):
    monkeypatch.setattr(freed_memory.importlib.util, "find_spec", lambda name: name in installed)
    monkeypatch.setattr(freed_memory.ctypes, "CDLL", lambda _: Library([]))
    monkeypatch.setattr(freed_memory.platform, "libc_ver", lambda: ("glibc", ""))
    monkeypatch.setattr(freed_memory, "jax", Settings(None))
    assert keep_freed_memory() is kept


class Library:
    """A C library that notes what is asked of it."""

    def __init__(self, asked):
        self.mallopt = lambda option, value: asked.append((option, value)) or 1


class Settings:
    """JAX with a choice of platforms."""

    def __init__(self, platforms):
        self.config = type("Config", (), {"jax_platforms": platforms})
