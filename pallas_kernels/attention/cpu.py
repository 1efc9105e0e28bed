"""Attention of few queries over a cache on CPU: native code through `jax.ffi`.

The definition is `reference.py`, also for a cache of floats, whose scales are 1. Sums
of exact codes are float32, the layer of a stack is read where it lies, and slots before
the first and behind the last that any query sees are not read.
Threads share the work by rows and key heads.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .. import native
from .reference import KINDS, KV

WIDTH = 16
"""Heads are multiples of it."""
FLOATS = ("float32", "bfloat16", "float16")
UNBOUNDED = 2**30


def obstacle(head_dim: int, kind: str, dtype: str, scale_dtype: str) -> str | None:
    """Why native code cannot attend, or None.

    Args:
      head_dim: width of a head.
      kind: what the cache holds: one of `reference.KINDS` or a float dtype.
      dtype: of queries.
      scale_dtype: of the cache's scales; any float dtype for a cache of floats.
    """
    state = native.status()
    if not state.loaded:
        return f"native CPU kernels are absent: {state.reason}"
    if kind not in (*KINDS, *FLOATS):
        return f"the cache holds {kind}"
    for name, got in (("queries", dtype), ("scales", scale_dtype)):
        if got not in FLOATS:
            return f"{got} {name}, not one of {FLOATS}"
    if head_dim % WIDTH or not head_dim:
        return f"heads of {head_dim}, not a multiple of {WIDTH}"
    return None


def attention(
    q: Float[Array, "batch heads time head_dim"],
    cache: KV | tuple[Array, Array],
    queries: Int[Array, "batch time"],
    positions: Int[Array, "batch length"],
    *,
    layer: Int[Array, ""] | None = None,
    scale: Any = 1.0,
    window: Any = None,
    softcap: float | None = None,
) -> Float[Array, "batch heads time head_dim"]:
    """`softmax(cap(scale q k^T) + mask) v` for arguments without `obstacle`.

    Args:
      q: queries, rotated as the cache's keys are.
      cache: a quantized cache, or float keys and values `[*layers, batch, kv_heads,
        length, head_dim]` of one dtype.
      queries: positions of queries; -1 sees nothing.
      positions: positions of slots; -1 is never seen.
      layer: which layer of a stacked cache.
      scale: factor of the scores.
      window: positions seen, None for all.
      softcap: bound of the scores, or None.

    Returns:
      The weighted values in the dtype of `q`; 0 for a query that sees nothing.
    """
    none = jnp.zeros((0,), jnp.float32)
    keys, second = cache
    quantized = isinstance(cache, KV)
    call = jax.ffi.ffi_call(
        "qjax_attention",
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        vmap_method="sequential",
    )
    return call(
        q,
        keys,
        none if quantized else second,
        second if quantized else none,
        jnp.asarray(queries, jnp.int32),
        jnp.asarray(positions, jnp.int32),
        jnp.asarray(UNBOUNDED if window is None else window, jnp.int32),
        jnp.asarray(scale, jnp.float32),
        jnp.asarray(0 if layer is None else layer, jnp.int32),
        softcap=np.float32(softcap or 0.0),
    )
