"""Products with llama.cpp's blocks, packed and prepacked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.formats import Ggml
from qjax.formats.ggml import TYPES
from qjax.ggml import GgmlTensor, layout, put_together, take_apart
from qjax.ops import canonical, embed, explain, grouped_matmul, matmul, prepack, target
from qjax.ops.prepack import Prepacked
from qjax.wrappers import Transposed, layer_of
from tests.ggml_blocks import random_blocks

from .conftest import random

WEIGHTS = [name for name, kind in TYPES.items() if kind.parts is not None]
WHOLE = [name for name in WEIGHTS if layout(Ggml(name)) is None]
"""Types that are not taken apart: codes would grow."""
OUT = 24


def weight(name, lead=()):
    rows = max(2 * TYPES[name].elements, 128)
    return random_blocks(name, lead, (rows, OUT), seed=TYPES[name].id)


def close(got, want, tolerance=2e-5):
    scale = max(float(np.abs(want).max()), 1e-6)
    np.testing.assert_allclose(got, want, atol=tolerance * scale)


def test_which_types_are_taken_apart():
    grids = {name for name in WEIGHTS if name.startswith(("iq1", "iq2", "iq3"))}
    assert {*WHOLE} == grids | {"tq1_0"}


@pytest.mark.parametrize("name", WEIGHTS)
def test_products_gradients_and_rows(name, small_blocks):
    q = weight(name)
    rows = q.shape[0]
    one, few = random((1, rows), 2), random((5, rows), 3)
    back, ids = random((3, OUT), 4), jnp.array([[0, 23], [7, 7]])

    @jax.jit
    def run(q):
        dx = jax.grad(lambda x: jnp.sum(matmul(x, q) ** 2))(few)
        y = matmul(one, q), matmul(few, q), matmul(back, Transposed(q))
        return *y, dx, embed(ids, Transposed(q)), embed(ids, q)

    with jax.default_matmul_precision("float32"):
        got = run(q)
    dense = np.asarray(jax.jit(lambda q: q.dequantize())(q), np.float64)
    y = few @ dense
    want = one @ dense, y, back @ dense.T, 2 * y @ dense.T, dense.T[ids], dense[ids]
    for left, right in zip(got, want, strict=True):
        close(left, right)
    np.testing.assert_array_equal(got[-1], dense[ids])


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_way_back_from_prepacked_is_exact(name):
    q = weight(name, (2,))
    packed = prepack(q)
    assert isinstance(packed, Prepacked) == (name not in WHOLE)
    assert packed.shape == q.shape and packed.format == q.format
    again = canonical(packed)
    assert isinstance(again, GgmlTensor) and again.matrix == q.matrix
    np.testing.assert_array_equal(again.codes, q.codes)


@pytest.mark.parametrize("name", [name for name in WEIGHTS if name not in WHOLE])
def test_any_bytes_are_put_together_again(name):
    kind, rng = TYPES[name], np.random.default_rng(TYPES[name].id)
    data = rng.integers(0, 256, (2 * kind.bytes, 5), dtype=np.uint8)
    q = GgmlTensor(jnp.asarray(data), Ggml(name), (2 * kind.elements, 5))
    parts = take_apart(q)
    made = put_together(q.format, parts.codes, parts.rest, q.matrix)
    np.testing.assert_array_equal(made, data)
    size = parts.codes.nbytes + parts.rest.nbytes
    assert size <= data.nbytes + parts.codes.nbytes % 4  # nothing is held twice


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H200"])
@pytest.mark.parametrize("name", ["q4_0", "q6_k", "q2_k", "mxfp4"])
def test_prepacked_weights_give_the_same_products(name, kind):
    q = weight(name)
    packed = prepack(q, kind=kind)
    assert isinstance(packed, Prepacked)
    np.testing.assert_array_equal(canonical(packed).codes, q.codes)
    x = random((3, q.shape[0]), 2)
    dense = np.asarray(jax.jit(lambda q: q.dequantize())(q), np.float64)

    @jax.jit
    def run(x, packed):
        y, pull = jax.vjp(lambda x: matmul(x, packed), x)
        return y, pull(jnp.ones_like(y))[0]

    with jax.default_matmul_precision("float32"):
        y, dx = run(x, packed)
    close(y, x @ dense)
    close(dx, np.ones((3, OUT)) @ dense.T)


def test_a_minimum_without_a_scale_is_kept():
    q = random_blocks("q4_1", (), (64, 3))
    data = np.array(q.codes)
    data[:2] = data[20:22] = 0  # scales
    q = GgmlTensor(jnp.asarray(data), q.format, q.matrix)
    dense = np.asarray(q.dequantize())
    assert np.ptp(dense[:32], axis=0).max() == 0 and np.abs(dense).min() > 0
    x = random((2, 64), 2)
    with jax.default_matmul_precision("float32"):
        close(matmul(x, prepack(q)), x @ dense, 1e-5)


def test_layers_of_a_stack_and_experts():
    stack = weight("q5_k", (3,))
    dense = np.asarray(stack.dequantize(), np.float64)
    x = random((6, 512), 2)
    for held in (stack, prepack(stack)):
        layer = jax.jit(lambda i, q=held: matmul(x, layer_of(q, i)))
        close(layer(jnp.int32(2)), x @ dense[2], 1e-4)
    sizes = jnp.array([1, 0, 4], jnp.int32)
    y = jax.jit(grouped_matmul)(x, sizes, stack)
    want = np.concatenate([x[:1] @ dense[0], x[1:5] @ dense[2], np.zeros((1, OUT))])
    close(y, want, 1e-4)


def test_what_is_said_about_products():
    assert "qjax.prepack takes them apart" in explain((1, 512), weight("q4_k"))
    assert "codes index a grid" in explain((1, 512), weight("iq2_xxs"))
    assert "ggml-q4_k" in explain((1, 512), prepack(weight("q4_k")))
    assert explain((1, 128), weight("mxfp4")).count("ggml-mxfp4") == 1


@pytest.mark.parametrize("name", ["q4_0", "q4_k", "q6_k", "iq2_xxs"])
def test_no_dense_weight_is_made(name):
    rows, cols = 4096, 14336
    block = TYPES[name]
    codes = jax.ShapeDtypeStruct((rows // block.elements * block.bytes, cols), np.uint8)
    q = GgmlTensor(codes, Ggml(name), (rows, cols))
    x = jax.ShapeDtypeStruct((16, rows), np.float32)
    dy = jax.ShapeDtypeStruct((16, cols), np.float32)

    def gradient(x, dy, w):
        return jax.vjp(lambda x: matmul(x, w), x)[1](dy)[0]

    with target("cpu"):
        for function, arrays in ((matmul, (x,)), (gradient, (x, dy))):
            compiled = jax.jit(function).lower(*arrays, q).compile()
            size = compiled.memory_analysis().temp_size_in_bytes
            assert size < 0.1 * 2 * rows * cols, function
