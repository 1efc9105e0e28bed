"""K-means of vectors, a bounded number of distances at a time."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

DISTANCES = 1 << 22
"""Distances to vectors held at a time: 16 MB."""
SAMPLES = 64
"""Vectors per centre that k-means looks at."""


def nearest_vector(
    x: Float[Array, "n g"], book: Float[Array, "levels g"]
) -> Int[Array, " n"]:
    """Index of the nearest vector."""
    norms = jnp.sum(jnp.square(book), axis=-1)

    def one(v):
        near = norms - 2.0 * jnp.matmul(book, v, precision="highest")
        return jnp.argmin(near).astype(jnp.int32)

    width = min(max(DISTANCES // book.shape[0], 1), x.shape[0])
    return jax.lax.map(one, x, batch_size=width)


def kmeans(
    x: Float[Array, "n g"], weight: Float[Array, " n"], levels: int, iterations: int
) -> Float[Array, "levels g"]:
    """Centres of a sample of vectors by Lloyd's iterations, deterministic."""
    order = jax.random.permutation(jax.random.key(0), x.shape[0])
    order = order[: levels * SAMPLES]
    x, weight = x[order], weight[order] + 1e-12
    start = x[jnp.arange(levels) % x.shape[0]]

    def step(_, book):
        code = nearest_vector(x, book)
        mass = jax.ops.segment_sum(weight, code, levels)[:, None]
        total = jax.ops.segment_sum(x * weight[:, None], code, levels)
        return jnp.where(mass > 0, total / jnp.where(mass > 0, mass, 1.0), book)

    return jax.lax.fori_loop(0, iterations, step, start)
