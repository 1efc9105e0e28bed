"""Products with activations rounded to 8 bits, through every wrapper and backend."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.errors import SpecError, UnsupportedError
from qjax.ops import explain, matmul
from qjax.ops.inputs import rounded_input
from qjax.pallas_kernels.matmul_a8.reference import TOP, quantize_activations
from qjax.wrappers import RoundedInputs

from .conftest import random, weight, wrap


def rounded(x, activation, scale=None):
    codes, scale = quantize_activations(x, activation, scale)
    return codes.astype(jnp.float32) * scale


def close(got, want, tolerance=2e-5):
    scale = float(jnp.max(jnp.abs(want)))
    np.testing.assert_allclose(got, want, atol=tolerance * scale)


@pytest.mark.parametrize(
    "name", ["int4-g32", "int8-channel", "int3-g32", "nf4", "mxfp4"]
)
@pytest.mark.parametrize("activation", ["int8", "float8_e4m3fn"])
def test_is_the_product_of_rounded_activations(name, activation):
    q = weight(name)
    for rows in (1, 5):
        x = random((rows, 96), 2)
        for scale in (None, jnp.float32(0.02)):
            y = matmul(x, q, activation=activation, x_scale=scale)
            want = rounded(x, activation, scale) @ q.dequantize()
            tolerance = 2e-5 if activation == "int8" else 1e-4
            close(y, want, tolerance)


def test_wrappers_round_what_the_base_is_multiplied_by():
    q = weight("int4-g32")
    x = random((3, 96), 2)
    w = wrap(q)["scaled"]
    want = rounded(x * w.s, "int8") @ q.dequantize()
    close(matmul(x, w, activation="int8"), want)
    back = wrap(q)["transposed"]
    x = random((3, 40), 2)
    close(
        matmul(x, back, activation="int8"), rounded(x, "int8") @ q.dequantize().T, 1e-4
    )


@pytest.mark.parametrize("kind", ["scaled", "permuted", "rotated", "split", "low-rank"])
def test_a_static_scale_belongs_to_what_is_rounded(kind):
    """One row has the same scale, whether it is static or the row's own."""
    w = wrap(weight("int4-g32"))[kind]
    dynamic = dataclasses.replace(w, base=RoundedInputs(w.base))
    x = random((1, 96), 2)
    scale = jnp.max(jnp.abs(rounded_input(x, dynamic))) / 127
    static = dataclasses.replace(w, base=RoundedInputs(w.base, "int8", scale))
    close(matmul(x, static), matmul(x, dynamic), 1e-6)
    assert rounded_input(x, w) is None


@pytest.mark.parametrize("out", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("dtype, activation", [("bfloat16", None), ("float32", "int8")])
def test_rounded_results(out, activation, dtype):
    """Within a step of the exact result; clipped beyond the greatest code."""
    q, x = weight("int4-g32"), random((2, 3, 96), 2, dtype)
    exact = x if activation is None else rounded(x.reshape(6, 96), activation)
    exact = exact.reshape(2, 3, 96).astype(jnp.float32) @ q.dequantize()
    scale = jnp.max(jnp.abs(exact)) / 100
    scale = scale / 4 if out == "float8_e4m3fn" else scale / 2
    y = matmul(x, q, activation=activation, out_dtype=out, out_scale=scale)
    assert y.dtype == jnp.dtype(out) and y.shape == exact.shape
    top = TOP[out]
    want = np.clip(np.asarray(exact / scale), -top, top)
    step = 1.0 if out == "int8" else 2.0**-3 * np.abs(want) + 2.0**-9
    far = np.abs(np.asarray(y.astype(jnp.float32)) - want)
    assert (far <= 0.5 * step + 2e-5 * top).all()
    assert np.abs(np.asarray(y.astype(jnp.float32))).max() == pytest.approx(
        top, rel=0.15
    )


def test_gradient_passes_straight_through():
    q = weight("int4-g32")
    x = random((3, 96), 2)

    def loss(x, q):
        return jnp.sum(matmul(x, q, activation="int8"))

    dx, dq = jax.grad(loss, argnums=(0, 1), allow_int=True)(x, q)
    close(dx, jnp.ones((3, 40)) @ q.dequantize().T, 1e-4)
    used = rounded(x, "int8")

    def exact(scale):
        return jnp.sum(used @ dataclasses.replace(q, scale=scale).dequantize())

    close(dq.scale, jax.grad(exact)(q.scale), 1e-4)


def test_dense_weights_too():
    x, w = random((3, 96), 2), random((96, 40), 1)
    close(matmul(x, w, activation="int8"), rounded(x, "int8") @ w)
    dx = jax.grad(lambda x: jnp.sum(matmul(x, w, activation="int8")))(x)
    close(dx, jnp.ones((3, 40)) @ w.T)


def test_explain_says_what_rounds():
    assert explain((1, 96), weight("int4-g32"), activation="int8").startswith("native")
    text = explain((1, 96), weight("nf4"), activation="int8")
    assert "activations int8 as floats" in text and "not integers" in text


def test_messages():
    q, x = weight("nf4"), random((1, 96), 2)
    with pytest.raises(SpecError, match="activation is 'int4', expected None"):
        matmul(x, q, activation="int4")
    with pytest.raises(SpecError, match="x_scale is given, but activation is None"):
        matmul(x, q, x_scale=jnp.float32(1))
    with pytest.raises(SpecError, match="out_scale None, expected neither"):
        matmul(x, q, out_dtype="int8")
    with pytest.raises(SpecError, match="a dtype and a scalar"):
        matmul(x, q, out_dtype="int8", out_scale=jnp.ones(40))
    with pytest.raises(SpecError, match="out_dtype is 'uint8', expected None"):
        matmul(x, q, out_dtype="uint8", out_scale=1.0)
    with pytest.raises(UnsupportedError, match=r"backend 'native' cannot .*int8"):
        matmul(x, q, activation="int8", backend="native")
