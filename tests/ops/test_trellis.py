"""Products with trellis-coded weights: blocks, gradients, stacks, experts, lookups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.formats import Trellis
from qjax.ops import embed, explain, grouped_matmul, matmul
from qjax.tensor import dequantize
from qjax.trellis import Incoherent, TrellisTensor, pack_signs
from qjax.wrappers import Transposed, layer_of

ROWS, COLS = 96, 48


def weight(rng, bits, lead=(), right=True):
    """Random codes, signs of inputs in bits, float16 scales of outputs."""
    words = rng.integers(0, 2**16, (*lead, ROWS // 16, COLS * bits)).astype(np.uint16)
    scale = jnp.asarray(rng.uniform(0.5, 1, (*lead, 1, 1)), jnp.float32)
    base = TrellisTensor(jnp.asarray(words), scale, Trellis(bits), (ROWS, COLS))
    left = pack_signs(jnp.asarray(rng.choice([-1.0, 1.0], (*lead, ROWS))))
    factors = jnp.asarray(rng.normal(size=(*lead, COLS)), jnp.float16)
    return Incoherent(base, left, factors if right else None)


def floats(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def close(got, want):
    want = np.asarray(want)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


@jax.jit
def both_ways(x, dy, q):
    """A product and its gradient, by blocks and through the dense weight."""
    y, pull = jax.vjp(matmul, x, q)
    dense, pull_dense = jax.vjp(lambda x, q: x @ q.dequantize(), x, q)
    return (y, pull(dy)), (dense, pull_dense(dy))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("rows", "bits"), [(1, 2), (5, 3)])
def test_products_and_gradients_by_blocks(rows, bits, turned, small_blocks, rng):
    q = Transposed(weight(rng, bits)) if turned else weight(rng, bits)
    x, dy = floats(rng, rows, q.shape[0]), floats(rng, rows, q.shape[1])
    got, want = both_ways(x, dy, q)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        if a.dtype != jax.dtypes.float0:
            exact = a.dtype == jnp.float32
            a, b = np.float32(a), np.float32(b)
            tolerance = (1e-5 if exact else 2e-3) * np.abs(b).max()
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=tolerance)


def test_stacks(rng):
    q = weight(rng, 2, (3,))
    w, x = np.asarray(jax.jit(dequantize)(q)), floats(rng, 3, 2, ROWS)
    want = np.einsum("lmk,lkn->lmn", np.asarray(x), w)

    @jax.jit
    def products(x, q):
        layers = jnp.arange(3, dtype=jnp.int32)
        one = lambda i: (i + 1, matmul(x[i], layer_of(q, i)))  # noqa: E731
        return jax.vmap(matmul)(x, q), jax.lax.scan(lambda c, i: one(i), 0, layers)[1]

    for got in products(x, q):
        close(got, want)
    sizes = jnp.asarray([2, 1, 3], jnp.int32)
    rows = floats(rng, 6, ROWS)
    y = jax.jit(grouped_matmul)(rows, sizes, q)
    expert = np.repeat(np.arange(3), sizes)
    close(y, np.einsum("mk,mkn->mn", np.asarray(rows), w[expert]))


def test_rows_of_tables(rng):
    q = weight(rng, 2, right=False)
    ids = jnp.asarray([3, 47, 16, 3], jnp.int32)
    find = jax.jit(embed)
    close(
        find(ids, Transposed(q)), np.asarray(jax.jit(dequantize)(q)).T[np.asarray(ids)]
    )
    w = np.asarray(jax.jit(dequantize)(q.base))
    close(find(ids, q.base), w[np.asarray(ids)])


def test_explain(rng):
    said = explain((1, ROWS), weight(rng, 2))
    assert said.startswith("xla: ")
    assert "trellis-2bit inside Incoherent" in said
    assert "walk" in said


def test_no_dense_weight():
    """As in test_memory.py: a tenth of the bfloat16 weight is the limit."""
    rows, cols = 4096, 14336
    base = TrellisTensor(
        jax.ShapeDtypeStruct((rows // 16, cols * 2), jnp.uint16),
        jax.ShapeDtypeStruct((1, 1), jnp.float32),
        Trellis(2),
        (rows, cols),
    )
    sides = [jax.ShapeDtypeStruct((n // 8,), jnp.uint8) for n in (rows, cols)]
    q = Incoherent(base, *sides)
    x, dy = (jax.ShapeDtypeStruct((16, n), jnp.float32) for n in (rows, cols))

    def gradient(x, dy, w):
        return jax.vjp(lambda x: matmul(x, w), x)[1](dy)[0]

    for function, args in ((matmul, (x, q)), (gradient, (x, dy, q))):
        compiled = jax.jit(function).lower(*args).compile()
        used = compiled.memory_analysis().temp_size_in_bytes
        assert used < 0.1 * 2 * rows * cols
