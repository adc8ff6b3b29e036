"""A sum over rounds, of which it is known only at run time how many there are."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def sum_of_rounds(
    one_round: Callable[[Any, Any, Any], jax.Array], rounds: jax.Array, arrays: Any, places: Any
) -> jax.Array:
    """The sum of `one_round(r, arrays, places)` over r = 0 .. `rounds` - 1.

    Differentiable by `arrays`, which a loop of unknown length is not by itself: the backward pass
    goes through the rounds once more and computes each anew, so that no more than one stands in
    memory, however many there are.

    Args:
        one_round: a function of its arguments alone, since a program that is being differentiated
            cannot be reached around them. It gives an array of any shape, the same in every round.
        rounds: int32 scalar; the same on all devices that talk to each other in a round.
        arrays: a tree of floating point arrays.
        places: a tree of integer ones.
    """
    return _sum(one_round, rounds, arrays, places)


def _value(
    one_round: Callable[[Any, Any, Any], jax.Array], rounds: jax.Array, arrays: Any, places: Any
) -> jax.Array:
    def add(number: jax.Array, total: jax.Array) -> jax.Array:
        return total + one_round(number, arrays, places)

    like = jax.eval_shape(one_round, jnp.int32(0), arrays, places)
    return lax.fori_loop(0, rounds, add, jnp.zeros(like.shape, like.dtype))


def _forward(
    one_round: Callable[[Any, Any, Any], jax.Array], rounds: jax.Array, arrays: Any, places: Any
) -> tuple[jax.Array, Any]:
    return _value(one_round, rounds, arrays, places), (rounds, arrays, places)


def _backward(
    one_round: Callable[[Any, Any, Any], jax.Array], residuals: Any, gradient: jax.Array
) -> tuple[None, Any, None]:
    rounds, arrays, places = residuals

    def add(number: jax.Array, total: Any) -> Any:
        _, pull = jax.vjp(lambda arrays: one_round(number, arrays, places), arrays)
        return jax.tree.map(jnp.add, total, pull(gradient)[0])

    return None, lax.fori_loop(0, rounds, add, jax.tree.map(jnp.zeros_like, arrays)), None


_sum = jax.custom_vjp(_value, nondiff_argnums=(0,))
_sum.defvjp(_forward, _backward)
