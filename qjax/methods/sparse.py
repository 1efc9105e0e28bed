"""Choosing the few weights that are stored apart from the others, sparse.

Numbers of outliers are static, so that everything runs under `jit`. Indices take two
bytes each where the matrix allows it: an outlier costs 48 bits.

Reference: Kim et al., SqueezeLLM, arXiv 2306.07629, section 4.2.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from qjax.tensor import QuantizedTensor
from qjax.wrappers import WithOutliers

SAMPLE = 1 << 20
"""Weights that quartiles are estimated from, evenly spaced."""


def beyond_quartiles(w: Float[Array, "in out"]) -> Float[Array, "in out"]:
    """How far each weight lies below the lower or above the upper quartile."""
    flat = w.reshape(-1)
    low, high = jnp.percentile(
        flat[:: max(flat.size // SAMPLE, 1)], jnp.array([25.0, 75.0], jnp.float32)
    )
    return jnp.maximum(low - w, w - high)


def largest(score: Float[Array, "in out"], count: int) -> Bool[Array, "in out"]:
    """Marks the `count` largest entries; of equal ones the first."""
    if count == 0:
        return jnp.zeros(score.shape, bool)
    _, index = jax.lax.top_k(score.reshape(-1), count)
    marked = jnp.zeros((score.size,), bool).at[index].set(True)
    return marked.reshape(score.shape)


def with_outliers(
    base: QuantizedTensor,
    miss: Float[Array, "in out"],
    fixed: Bool[Array, "in out"],
    count: int,
) -> WithOutliers:
    """`base` with corrections at the marked places.

    Args:
      base: a quantized matrix.
      miss: the weight minus the base.
      fixed: the marked places.
      count: how many there are.

    Returns:
      The wrapper: float16 values, indices ascending.
    """
    rows, cols = base.shape
    place = jnp.flatnonzero(fixed, size=count).astype(jnp.int32)
    values = miss.reshape(-1)[place].astype(jnp.float16)
    small = max(rows, cols) <= 2**16
    dtype = jnp.uint16 if small else jnp.int32
    at = place // cols, place % cols
    return WithOutliers(base, values, at[0].astype(dtype), at[1].astype(dtype))
