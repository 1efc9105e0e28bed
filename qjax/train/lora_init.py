"""First values of adapters, and what becomes of the weight below them.

    kaiming:   A ~ U(-1, 1) / sqrt(in), B = 0
    gaussian:  A ~ N(0, 1) / r, B = 0
    pissa:     s A B = the r greatest singular parts of W; the weight becomes W - s A B
    loftq:     s A B = the r greatest singular parts of W - Q, Q the packed weight

PiSSA changes the weight below: a packed one is quantized again in its own format, from
the original W where that is at hand. LoftQ keeps it, or alternates: with `rounds > 0`
it is quantized anew from W - s A B each time.

Reference: Hu et al., arXiv 2106.09685 and PEFT's defaults (kaiming, gaussian); Meng et
al., arXiv 2404.02948 (PiSSA); Li et al., arXiv 2310.08659 (LoftQ, algorithm 1).
"""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qjax.errors import SpecError
from qjax.tensor import QuantizedTensor
from qjax.train.lora_sites import dense
from qjax.train.requantize import requantize


def key_of(key: Array, path: str) -> Array:
    """A key for one weight, the same whatever else is adapted."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()) & 0x7FFFFFFF)


def random_factors(
    init: str, key: Array, shape: tuple[int, ...], rank: int, pool: int
) -> tuple[Array, Array]:
    """Factors whose product is 0.

    Args:
      init: `"kaiming"` or `"gaussian"`.
      key: A PRNG key.
      shape: `[*lead, in, out]`.
      rank: Columns of A.
      pool: Inputs that share a row of A.
    """
    *lead, rows, cols = shape
    a_shape = (*lead, rows // pool, rank)
    if init == "gaussian":
        a = jax.random.normal(key, a_shape) / rank
    else:
        a = jax.random.uniform(key, a_shape, minval=-1.0) / np.sqrt(rows // pool)
    return a.astype(jnp.float32), jnp.zeros((*lead, rank, cols), jnp.float32)


def table_factors(key: Array, shape: tuple[int, ...], rank: int) -> tuple[Array, Array]:
    """Factors of a table of embeddings: A = 0 and B ~ N(0, 1), as in PEFT."""
    vocab, dim = shape
    return jnp.zeros((vocab, rank), jnp.float32), jax.random.normal(key, (rank, dim))


def greatest(
    w: Float[Array, "*lead in out"], rank: int, scale: float
) -> tuple[Array, Array]:
    """Factors of the best approximation of `w` of a rank: `scale A B`."""
    u, values, v = jnp.linalg.svd(w.astype(jnp.float32), full_matrices=False)
    root = jnp.sqrt(values[..., :rank] / scale)
    return u[..., :rank] * root[..., None, :], root[..., :, None] * v[..., :rank, :]


def pissa(
    leaf: Any, original: Any, rank: int, scale: float, path: str
) -> tuple[Array, Array, Any]:
    """PiSSA's factors, and the weight that stays below them.

    Args:
      leaf: The weight, dense or packed.
      original: What it was quantized from, or None to start from `leaf` itself.
      rank: Columns of A.
      scale: Factor of the product.
      path: What errors call the weight.

    Raises:
      UnsupportedError: A packed weight cannot be quantized again.
    """
    if len(leaf.shape) > 2:
        return _each(
            lambda one, full: pissa(one, full, rank, scale, path), leaf, original
        )
    w = dense(leaf if original is None else original)
    a, b = greatest(w, rank, scale)
    rest = w - scale * jnp.matmul(a, b, precision="highest")
    if isinstance(leaf, QuantizedTensor):
        return a, b, requantize(leaf, rest, path)
    return a, b, rest.astype(leaf.dtype)


def loftq(
    leaf: Any, original: Any, rank: int, scale: float, rounds: int, path: str
) -> tuple[Array, Array, Any]:
    """LoftQ's factors, and the packed weight below them.

    Args:
      leaf: The packed weight.
      original: What it was quantized from.
      rank: Columns of A.
      scale: Factor of the product.
      rounds: Times the weight is quantized anew; 0 keeps it.
      path: What errors call the weight.

    Raises:
      SpecError: The weight is not packed.
      UnsupportedError: It cannot be quantized again.
    """
    if not isinstance(leaf, QuantizedTensor):
        raise SpecError(
            f"{path}: LoftQ repairs the rounding of a packed weight, and this one is "
            "dense; quantize the model first, or use init='pissa'"
        )
    if len(leaf.shape) > 2:
        return _each(
            lambda w, full: loftq(w, full, rank, scale, rounds, path), leaf, original
        )
    w = dense(original)
    a, b = greatest(w - dense(leaf), rank, scale)
    for _ in range(rounds):
        rest = w - scale * jnp.matmul(a, b, precision="highest")
        leaf = requantize(leaf, rest, path)
        a, b = greatest(w - dense(leaf), rank, scale)
    return a, b, leaf


def _each(function: Any, *stacks: Any) -> Any:
    """The results of a function of matrices for every matrix of stacks, stacked."""
    parts = [
        function(*jax.tree.map(lambda x, i=i: x[i], stacks))
        for i in range(stacks[0].shape[0])
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
