"""Normal numbers that are the same to the last bit eagerly, under `jit`, sharded and on disk.

`jax.random.normal` is a polynomial that a compiler may fuse one way in one program and another
way in the next. Here random bits, which are integers, choose from a table of quantiles: no
arithmetic is left to differ.
"""

import functools
import statistics
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Levels of the table: 16 random bits an element, tails to 4.2 standard deviations.
_LEVELS = 2**16


@functools.cache
def _quantiles() -> np.ndarray:
    """The middles of `_LEVELS` slices of equal probability, float32."""
    normal = statistics.NormalDist()
    upper = [normal.inv_cdf((0.5 + level) / _LEVELS) for level in range(_LEVELS // 2, _LEVELS)]
    return np.array([-x for x in reversed(upper)] + upper, np.float32)


def leaf_key(key: jax.Array, path: str) -> jax.Array:
    """The key of one leaf: its values depend neither on order nor on number of the others."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def normal(key: jax.Array, shape: tuple[int, ...], layers: np.ndarray | None) -> jax.Array:
    """Standard normal float32 numbers.

    Args:
        key: of the leaf.
        shape: of the result.
        layers: numbers of the layers along dimension 0, each drawn by itself, so that layer 5 is
            the same alone as among all; None for a leaf without layers.
    """

    def bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.bits(key, shape, jnp.uint16)

    if layers is None:
        drawn = bits(key, shape)
    else:
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.asarray(layers))
        drawn = jax.vmap(functools.partial(bits, shape=shape[1:]))(keys)
    return jnp.take(jnp.asarray(_quantiles()), drawn.astype(jnp.int32), axis=0)


def chosen(
    key: jax.Array, shape: tuple[int, ...], layers: np.ndarray | None, fraction: float
) -> jax.Array:
    """Bool: each element by itself true with probability `fraction`; arguments as in `normal`."""
    return normal(key, shape, layers) < np.float32(statistics.NormalDist().inv_cdf(fraction))


def exactly(x: Any) -> Any:
    """`x`, rounded before anything is added to it.

    A compiler fuses a product into the sum that follows, without the rounding between, and an
    `optimization_barrier` is gone by then. So the product goes through an integer operation that
    changes nothing but a NaN's bits, which the compiler cannot rule out.
    """
    if isinstance(x, np.ndarray):
        return x
    integer = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(x, integer) | jnp.isnan(x).astype(integer)
    return jax.lax.bitcast_convert_type(bits, x.dtype)


def tree_sum(x: Any, dim: int, xp: Any) -> Any:
    """The sum over `dim`, which is kept at 1, in one fixed order: halves upon halves."""
    x = xp.moveaxis(x, dim, -1)
    while (n := x.shape[-1]) > 1:
        half = (n + 1) // 2
        rest = xp.zeros((*x.shape[:-1], 2 * half - n), x.dtype)
        x = x[..., :half] + xp.concatenate([x[..., half:], rest], axis=-1)
    return xp.moveaxis(x, -1, dim)
