"""Products with trellis-coded weights: blocks, gradients, stacks, experts, lookups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.formats import Trellis
from qjax.ops import embed, explain, grouped_matmul, matmul
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


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("rows", [1, 5])
def test_products_and_gradients_by_blocks(rows, bits, small_blocks, rng):
    q = weight(rng, bits)
    w = np.asarray(q.dequantize())
    for turned, dense, k in ((q, w, ROWS), (Transposed(q), w.T, COLS)):
        x = floats(rng, rows, k)
        dy = floats(rng, rows, dense.shape[1])
        y, pull = jax.vjp(matmul, x, turned)
        close(y, x @ dense)
        dx, dq = pull(dy)
        close(dx, dy @ dense.T)
        want = jax.vjp(lambda q, x=x: x @ q.dequantize(), turned)[1](dy)[0]
        for a, b in zip(jax.tree.leaves(dq), jax.tree.leaves(want), strict=True):
            assert a.dtype == b.dtype
            if a.dtype != jax.dtypes.float0:
                np.testing.assert_allclose(
                    np.float32(a), np.float32(b), rtol=2e-3, atol=2e-3
                )


def test_stacks(rng):
    q = weight(rng, 2, (3,))
    w, x = np.asarray(q.dequantize()), floats(rng, 3, 2, ROWS)
    want = np.einsum("lmk,lkn->lmn", np.asarray(x), w)
    close(jax.vmap(matmul)(x, q), want)
    for layer in range(3):
        one = layer_of(q, jnp.int32(layer))
        close(jax.jit(matmul)(x[layer], one), want[layer])
    sizes = jnp.asarray([2, 1, 3], jnp.int32)
    rows = floats(rng, 6, ROWS)
    expert = np.repeat(np.arange(3), sizes)
    y = grouped_matmul(rows, sizes, q)
    close(y, np.einsum("mk,mkn->mn", np.asarray(rows), w[expert]))


def test_rows_of_tables(rng):
    q = weight(rng, 2, right=False)
    ids = jnp.asarray([3, 47, 16, 3], jnp.int32)
    close(embed(ids, Transposed(q)), np.asarray(q.dequantize()).T[np.asarray(ids)])
    plain = q.base
    close(embed(ids, plain), np.asarray(plain.dequantize())[np.asarray(ids)])


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
