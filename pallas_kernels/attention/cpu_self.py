"""Attention of tokens to themselves on CPU, and its gradient: native code.

    y = softmax(scale q k^T + mask) v

A query sees keys of its segment at positions from its own down to `window - 1` before
it; one that sees nothing gives 0. Scores are never stored: the gradient makes those of
a tile of queries anew. Only keys that some query of a tile sees are read. Threads share
the work by rows and key heads.

Reference: Dao, arXiv 2307.08691, section 3.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .. import native
from .cpu import UNBOUNDED


def obstacle(dtype: str) -> str | None:
    """Why native code cannot attend, or None.

    Args:
      dtype: of queries, keys and values.
    """
    state = native.status()
    if not state.loaded:
        return f"native CPU kernels are absent: {state.reason}"
    return None if dtype == "float32" else f"{dtype} is not float32"


def attention(
    q: Float[Array, "batch time heads head_dim"],
    k: Float[Array, "batch kv_heads time head_dim"],
    v: Float[Array, "batch kv_heads time head_dim"],
    positions: Int[Array, "batch time"],
    segments: Int[Array, "batch time"],
    scale: Any,
    window: Any,
) -> Float[Array, "batch time heads head_dim"]:
    """The equation above, for float32 operands without `obstacle`.

    Args:
      q: queries; head `h` reads key head `h // (heads // kv_heads)`.
      k: keys.
      v: values.
      positions: of queries and keys; a key at -1 is never seen.
      segments: sample of each token.
      scale: factor of the scores.
      window: positions seen, None for all.
    """
    result = jax.ShapeDtypeStruct(q.shape, q.dtype)
    call = jax.ffi.ffi_call("qjax_self_attention", result, vmap_method="sequential")
    return call(q, k, v, *_numbers(positions, segments, scale, window))


def gradient(
    q: Float[Array, "batch time heads head_dim"],
    k: Float[Array, "batch kv_heads time head_dim"],
    v: Float[Array, "batch kv_heads time head_dim"],
    positions: Int[Array, "batch time"],
    segments: Int[Array, "batch time"],
    scale: Any,
    window: Any,
    dy: Float[Array, "batch time heads head_dim"],
) -> tuple[Array, Array, Array]:
    """The gradient of `attention` to `q`, `k` and `v`.

    Args:
      q: as for `attention`, also the rest.
      k: keys.
      v: values.
      positions: of queries and keys.
      segments: sample of each token.
      scale: factor of the scores; it has no gradient here.
      window: positions seen.
      dy: the gradient to the result.
    """
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
    name = "qjax_self_attention_gradient"
    call = jax.ffi.ffi_call(name, results, vmap_method="sequential")
    dq, dk, dv = call(q, k, v, *_numbers(positions, segments, scale, window), dy)
    return dq, dk, dv


def _numbers(positions, segments, scale, window):
    window = UNBOUNDED if window is None else window
    return (
        jnp.asarray(positions, jnp.int32),
        jnp.asarray(segments, jnp.int32),
        jnp.asarray(window, jnp.int32),
        jnp.asarray(scale, jnp.float32),
    )
