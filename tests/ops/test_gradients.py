"""Gradients agree with automatic differentiation of `x @ dequantize(w)`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.methods import quantize
from qjax.ops import embed, matmul

from .conftest import FORMATS, MATRIX, WRAPPERS, random, weight, wrap

DIFFERENT = (
    "int3-g32-asym-bf16",
    "int4-g32",
    "int4-g24-asym-uint8",
    "int4-g28",
    "int4-tensor",
    "int4-out",
    "int4-nested",
    "int8-channel",
    "nf4-double",
    "nf4-flat",
    "fp8-block",
    "nvfp4",
    "bfloat16",
    "kmeans3",
    "kmeans4",
    "kmeans6",
    "kmeans2-g32",
    "additive2x8",
)


@pytest.fixture(autouse=True)
def _exact():
    """Products keep float32 activations."""
    with jax.default_matmul_precision("float32"):
        yield


def compare(got, want, tolerance=1e-4):
    """Equal trees of gradients; float8 gradients are too coarse to compare."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        if a.dtype == jax.dtypes.float0:
            assert a.shape == b.shape
            continue
        if jnp.dtype(a.dtype).itemsize == 1:
            continue
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        loose = 2e-2 if jnp.dtype(want_dtype(got)).itemsize == 2 else tolerance
        np.testing.assert_allclose(a, b, atol=loose * max(np.abs(b).max(), 1e-6))


def want_dtype(tree):
    floats = [x.dtype for x in jax.tree.leaves(tree) if x.dtype != jax.dtypes.float0]
    return min(floats, key=lambda d: jnp.dtype(d).itemsize)


def gradients(x, w, backend=None):
    def loss(x, w):
        y = matmul(x, w, backend=backend).astype(jnp.float32)
        return jnp.sum(jnp.sin(y))

    return jax.jit(jax.grad(loss, argnums=(0, 1), allow_int=True))(x, w)


@pytest.mark.parametrize("name", DIFFERENT)
def test_formats(name, small_blocks):
    q = weight(name)
    for rows in (1, 5) if name == "int4-g32" else (5,):
        x = random((rows, 96), 2)
        compare(gradients(x, q), gradients(x, q, "reference"))


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers(name, small_blocks):
    w = wrap(weight("int4-g32"))[name]
    x = random((5, w.shape[0]), 2)
    compare(gradients(x, w), gradients(x, w, "reference"))


def test_learned_codebook(small_blocks):
    import dataclasses

    table = jnp.sort(random((16,), 9))
    q = dataclasses.replace(weight("nf4"), codebook=table)
    x = random((1, 96), 2)
    got, want = gradients(x, q), gradients(x, q, "reference")
    compare(got, want)
    assert got[1].codebook.shape == (16,)


def test_half_precision_activations():
    q = weight("int4-g32")
    x = random((3, 96), 2, "bfloat16")
    dx, dq = gradients(x, q)
    assert dx.dtype == jnp.bfloat16
    assert dq.scale.dtype == jnp.float32
    exact = gradients(x.astype(jnp.float32), q, "reference")
    np.testing.assert_allclose(dx.astype(jnp.float32), exact[0], atol=0.3)


def test_under_vmap_scan_and_checkpoint():
    q = quantize(random((3, *MATRIX), 7), FORMATS["int4-g32"])
    x = random((3, 2, 96), 2)

    def batched(x, q):
        return jnp.sum(jnp.sin(jax.vmap(matmul)(x, q)))

    def scanned(x, q):
        step = jax.checkpoint(lambda carry, layer: (carry, matmul(*layer)))
        return jnp.sum(jnp.sin(jax.lax.scan(step, 0, (x, q))[1]))

    def dense(x, q):
        return jnp.sum(jnp.sin(jnp.einsum("emk,ekn->emn", x, q.dequantize())))

    want = jax.jit(jax.grad(dense, (0, 1), allow_int=True))(x, q)
    for function in (batched, scanned):
        got = jax.jit(jax.grad(function, (0, 1), allow_int=True))(x, q)
        compare(got, want)


def test_second_derivative():
    q = weight("int8-channel")
    x, v = random((2, 96), 2), random((2, 96), 3)

    def loss(x, backend=None):
        return jnp.sum(jnp.sin(matmul(x, q, backend=backend)))

    def product(backend):
        inner = jax.grad(lambda x: loss(x, backend))
        return jax.jit(jax.grad(lambda x: jnp.vdot(inner(x), v)))(x)

    compare(product(None), product("reference"))


def test_embed_gradient():
    table = quantize(random((50, 96), 1), FORMATS["int4-g32"], axis=-1)
    ids = jnp.array([[3, 3], [49, 0]])

    def loss(t, dense):
        rows = t.dequantize()[ids] if dense else embed(ids, t)
        return jnp.sum(jnp.sin(rows))

    grad = jax.grad(loss, allow_int=True)
    compare(grad(table, False), grad(table, True))
