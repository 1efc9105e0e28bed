"""Sums, quotients and choices with the roundings of plain C.

XLA adds in an order of its own, fuses products with sums, and turns division around.
llama.cpp's choices hang on the last bits of sums, so here every product is rounded
before it is added, sums run from the first element to the last, quotients are true
quotients, and of equal candidates the first wins.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qjax.formats.base import divided, rounded


def total(term: Callable[..., Any], *parts: Float[Array, "n ..."]) -> Any:
    """Sums of `term(*elements)` over axis 0, each term rounded, left to right.

    `jnp.sum` adds in an order of its own, and products fuse with additions.

    Args:
      term: gives an array or a tree of arrays for the elements of one index.
      parts: arrays with the elements on axis 0.
    """

    def add(sums, elements):
        terms = term(*elements)
        return jax.tree.map(lambda s, t: s + rounded(t), sums, terms), None

    first = jax.eval_shape(lambda: term(*(part[0] for part in parts)))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), first)
    return jax.lax.scan(add, zeros, parts)[0]


def best_of(better: Callable[..., Any], candidates: Any) -> Any:
    """The candidate (axis 0 of every leaf) that no later one is `better` than.

    Args:
      better: `better(new, best)`, a mask.
      candidates: tree of arrays `[c, *groups]`.
    """

    def step(best, new):
        mask = better(new, best)
        return jax.tree.map(lambda n, b: jnp.where(mask, n, b), new, best), None

    first, rest = (
        jax.tree.map(lambda a, s=s: a[s], candidates) for s in (0, slice(1, None))
    )
    return jax.lax.scan(step, first, rest)[0]


def inverse(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`1 / x`, where `x` is itself a quotient that XLA would turn over; 0 for 0."""
    zero = x == 0
    return jnp.where(zero, 0.0, 1.0 / jnp.where(zero, 1.0, rounded(x)))


def ratio(top: Float[Array, "..."], bottom: Float[Array, "..."]) -> Array:
    """`top / bottom`, 0 where `bottom` is not positive."""
    sound = bottom > 0
    return jnp.where(sound, divided(top, jnp.where(sound, bottom, 1.0)), 0.0)


def extreme(x: Float[Array, " n *groups"]) -> Float[Array, "*groups"]:
    """The element of largest magnitude with its sign, the first of equals."""
    return best_of(lambda new, best: jnp.abs(new) > jnp.abs(best), x)


def quotients(values: np.ndarray, divisor: Array) -> Float[Array, " c *groups"]:
    """Constants divided by an array; as a broadcast XLA would use its reciprocal."""
    return jax.lax.map(lambda value: value / divisor, jnp.asarray(values, jnp.float32))


def power_of_two(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The largest power of two not above the magnitude of normal numbers."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0x7F800000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
