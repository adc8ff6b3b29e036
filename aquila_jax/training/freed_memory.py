"""What a step frees on a CPU: kept for the next one, rather than given back to the system."""

import ctypes
import importlib.util
import platform

import jax

# Options of glibc's `mallopt`, by malloc.h, and what they are set to: one heap, nothing beside it,
# and as much of it kept as can be said.
_OPTIONS = {"M_ARENA_MAX": (-8, 1), "M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, 2**31 - 1)}


def keep_freed_memory() -> bool:
    """Have this process keep what it frees, where JAX computes on a CPU and glibc allocates.

    XLA asks for all of a program's temporaries at once. glibc takes blocks of such a size from the
    kernel and gives them back when they are freed, so that every step of a small model spends a
    tenth of its time on pages that it had before. The process then stays as large as it once was.

    To be called before JAX starts its threads, each of which would have a heap of its own.

    Returns:
        Whether it was done.
    """
    if platform.libc_ver()[0] != "glibc" or not _is_on_cpu():
        return False
    set_option = ctypes.CDLL(None).mallopt
    return all(set_option(option, value) for option, value in _OPTIONS.values())


def _is_on_cpu() -> bool:
    """Whether JAX will compute on a CPU, told without starting it."""
    platforms = getattr(jax.config, "jax_platforms", None)
    if platforms:
        return platforms.split(",")[0] == "cpu"
    plugins = (importlib.util.find_spec(name) for name in ("libtpu", "jax_plugins"))
    return not any(plugins)
