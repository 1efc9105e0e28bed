"""Statistics of a weight's inputs after a change of variables.

A method that scales, rotates or drops inputs before another method runs hands it the
statistics that it would have seen: with `x' = x A` and `w' = A^-1 w` the product is
the same, and the second moments become `A^T H A`. What follows from the sums alone is
exact; what does not (absolute sums and peaks of rotated inputs) is estimated, and said
to be.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qjax.methods.statistics import Statistics
from qjax.wrappers import hadamard


def scale_inputs(
    statistics: Statistics | None, t: Float[Array, " in"]
) -> Statistics | None:
    """Statistics of `x t`, the inputs of `w / t[:, None]`; exact for all fields.

    Args:
      statistics: of `x`, or None.
      t: positive factors.
    """
    if statistics is None:
        return None
    s, both = statistics, t[:, None] * t[None, :]
    return Statistics(
        s.count,
        s.total * t,
        s.size * t,
        s.square * t * t,
        s.peak * t,
        None if s.hessian is None else s.hessian * both,
        None if s.cross is None else s.cross * both,
        None if s.gradient is None else s.gradient * jnp.square(t)[:, None],
    )


def rotate_inputs(
    statistics: Statistics | None, signs: Float[Array, " in"]
) -> Statistics | None:
    """Statistics of `(x signs) H`, the inputs of `H diag(signs) w`.

    `total`, `hessian` and `cross` are exact, and so is `square` when there is a
    Hessian. Otherwise `square` and `gradient` are their means over a block of `H`
    (their expectation over signs). `size` and `peak` are those of normal variables with
    these squares: `sqrt(2 / pi)` and `sqrt(2 log n)` standard deviations, the latter
    never above what the peaks of the block allow.

    Args:
      statistics: of `x`, or None.
      signs: +1 and -1.
    """
    if statistics is None:
        return None
    s = statistics
    n = signs.shape[0]
    block = n & -n

    def turned(matrix):
        if matrix is None:
            return None
        half = hadamard(matrix * signs[:, None] * signs[None, :])
        return hadamard(half.T).T

    def spread(values):
        mean = jnp.mean(values.reshape(n // block, block, -1), axis=1, keepdims=True)
        return jnp.broadcast_to(mean, (n // block, block, mean.shape[-1]))

    hessian = turned(s.hessian)
    square = spread(s.square).reshape(n)
    if hessian is not None:
        square = jnp.maximum(jnp.diagonal(hessian), 0.0)
    count = jnp.maximum(s.count, 1.0)
    deviation = jnp.sqrt(square / count)
    most = spread(s.peak).reshape(n) * jnp.float32(block**0.5)
    peak = deviation * jnp.sqrt(2.0 * jnp.log(jnp.maximum(count, 2.0)))
    gradient = s.gradient
    return Statistics(
        s.count,
        hadamard(s.total * signs),
        deviation * count * jnp.float32((2 / jnp.pi) ** 0.5),
        square,
        jnp.minimum(peak, most),
        hessian,
        turned(s.cross),
        None if gradient is None else spread(gradient).reshape(gradient.shape),
    )


def drop_inputs(
    statistics: Statistics | None, index: Int[Array, " n"]
) -> Statistics | None:
    """Statistics of inputs of which those at `index` are set to 0; exact.

    Args:
      statistics: of `x`, or None.
      index: features; one that is out of range drops nothing.
    """
    if statistics is None:
        return None
    s = statistics
    keep = jnp.ones_like(s.square).at[index].set(0.0, mode="drop")
    return dataclasses.replace(scale_inputs(s, keep) or s, count=s.count)
