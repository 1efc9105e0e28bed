"""Attention of whole rows of tokens to themselves: training, scoring, first prompts.

On CPU float32 runs native code, which reads only the keys that are seen and stores no
scores for the gradient; everything else is what the caller would do without it.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

import qjax.pallas_kernels.device as device
from qjax.ops.blocks import same_variance
from qjax.pallas_kernels.alone import alone_or
from qjax.pallas_kernels.attention import cpu_self


def self_attention(
    other: Callable[..., Array],
    q: Float[Array, "batch time heads head_dim"],
    k: Float[Array, "batch kv_heads time head_dim"],
    v: Float[Array, "batch kv_heads time head_dim"],
    positions: Int[Array, "batch time"],
    segments: Int[Array, "batch time"] | None,
    scale: float | Float[Array, ""],
    window: Int[Array, ""] | None,
    softcap: float | None,
) -> Float[Array, "batch time heads head_dim"]:
    """Returns `softmax(cap(scale q k^T) + mask) v`.

    Args:
      other: computes `other(q, k, v, positions, segments, scale, window)` by operations
        that XLA knows.
      q: Queries.
      k: Keys.
      v: Values.
      positions: Of queries and keys; -1 is never seen, and the result of a query that
        sees nothing means nothing.
      segments: Samples, which see their own keys only; None for one.
      scale: Factor of the scores, which has no gradient.
      window: Positions seen, or None for all.
      softcap: Bound of the scores, or None.
    """
    arrays = (q, k, v, positions, segments, scale, window)
    alike = q.dtype == k.dtype == v.dtype
    known = device.platform() == "cpu" and alike and softcap is None
    if not known or cpu_self.obstacle(q.dtype.name):
        return other(*arrays)

    def choice(kernel, plain):
        def chosen(*arrays):
            cpu = functools.partial(alone_or, kernel, plain)
            return lax.platform_dependent(*arrays, cpu=cpu, default=plain)

        return chosen

    run = jax.custom_vjp(choice(_forward, other))

    def pull(dy, *arrays):
        floats, rest = arrays[:3], arrays[3:]
        return jax.vjp(lambda *floats: other(*floats, *rest), *floats)[1](dy)

    def backward(arrays, dy):
        found = choice(_backward, pull)(dy, *arrays)
        return (*found, *[None] * len(arrays[3:]))

    run.defvjp(lambda *arrays: (run(*arrays), arrays), backward)
    return run(*arrays)


def _whole(positions, segments):
    return jnp.zeros_like(positions) if segments is None else segments


def _forward(q, k, v, positions, segments, scale, window):
    segments = _whole(positions, segments)
    y = cpu_self.attention(q, k, v, positions, segments, scale, window)
    return same_variance((y, q, k, v, positions, segments))[0]


def _backward(dy, q, k, v, positions, segments, scale, window):
    segments = _whole(positions, segments)
    found = cpu_self.gradient(q, k, v, positions, segments, scale, window, dy)
    return same_variance((found, q, k, v, positions, segments, dy))[0]
