"""The definition against float64, and the messages that all backends share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import packing
from qjax.pallas_kernels.matmul_a8 import reference
from qjax.pallas_kernels.matmul_a8.api import matmul_a8, quantize_activations
from qjax.pallas_kernels.weights import KernelError

from .suite import FORMATS, FP8, INT, A8Suite, error, random_weight, rows


class TestReference(A8Suite):
    backend = "reference"


@pytest.mark.parametrize("name", FORMATS)
def test_definition_in_float64(name):
    weight, spec = random_weight(name, 256, 40)
    activation, x = FORMATS[name][1], rows(7, 256)
    top = reference.TOP[activation]
    absmax = np.abs(np.asarray(x)).max(1, keepdims=True)
    scale = np.where(absmax > 0, absmax / np.float32(top), 1).astype(np.float32)
    ratio = np.asarray(x) / scale
    if activation == INT:
        codes = np.round(ratio).astype(np.float64)
    else:
        codes = ratio.astype(jnp.dtype(FP8)).astype(np.float64)
    stored = np.asarray(weight.codes)
    if spec.bits < 8:
        stored = np.asarray(packing.unpack(weight.codes, spec.bits, spec.k))
    value = stored.astype(np.float64) - spec.offset

    def repeat(stat):
        return np.repeat(np.asarray(stat).astype(np.float64), spec.group, 0)[:256]

    if weight.zero is not None:
        value = value - repeat(weight.zero)
    exact = scale * (codes @ (value * repeat(weight.scale)))
    y = reference.matmul_a8(x, weight, spec, activation=activation)
    bound = reference.bound(x, weight, spec, activation=activation)
    assert (np.abs(np.asarray(y) - exact) <= np.asarray(bound) + 1e-30).all()


@pytest.mark.parametrize("dtype", [INT, FP8])
def test_rounding(dtype):
    top = reference.TOP[dtype]
    x = jnp.array([[top, 0.5, 1.5, -2.5, 0.0], [0, 0, 0, 0, 0], [1e-44, 0, 0, 0, 0]])
    codes, scale = quantize_activations(x.astype(jnp.float32), dtype)
    np.testing.assert_array_equal(scale, [[1], [1], [1]])
    even = [0, 2, -2] if dtype == INT else [0.5, 1.5, -2.5]
    np.testing.assert_array_equal(codes[0].astype(jnp.float32), [top, *even, 0])
    assert not np.asarray(codes[1:].astype(jnp.float32)).any()
    static, same = quantize_activations(x, dtype, 5e-4)
    np.testing.assert_array_equal(
        static[0].astype(jnp.float32), [top, top, top, -top, 0]
    )
    np.testing.assert_array_equal(same, np.full((3, 1), 5e-4, np.float32))


def test_a_row_that_is_not_finite_shows():
    weight, spec = random_weight("w4-g128", 256, 8)
    x = rows(3, 256).at[0, 5].set(jnp.nan).at[2, 1].set(jnp.inf)
    y = reference.matmul_a8(x, weight, spec)
    finite = np.isfinite(np.asarray(y))
    assert not finite[[0, 2]].any()
    assert finite[1].all()


MESSAGES = {
    "x has shape [4, 255], expected [m, 256]": {"x": jnp.zeros((4, 255))},
    "x has shape [4], expected two axes": {"x": jnp.zeros(4)},
    "x has dtype int32": {"x": jnp.zeros((4, 256), jnp.int32)},
    "activation is 'int4'": {"activation": "int4"},
    "bias has shape [5], expected [128]": {"bias": jnp.zeros(5)},
    "bias has dtype int32, expected a float": {"bias": jnp.zeros(128, jnp.int32)},
    "x_scale is None, expected the scale": {"x": jnp.zeros((4, 256), jnp.int8)},
    "x_scale has shape [3], expected [4, 1]": {"x_scale": jnp.ones(3)},
    "out_dtype is 'int8', expected one of": {"out_dtype": "int8"},
    "out_dtype is None, expected one of": {"out_scale": jnp.float32(1)},
    "out_scale has shape [2]": {"out_scale": jnp.ones(2), "out_dtype": "int8"},
    "layer is given, expected None": {"layer": jnp.int32(0)},
}


@pytest.mark.parametrize("message", MESSAGES)
def test_messages(message):
    assert message in error("reference", **MESSAGES[message])


def test_messages_about_the_weight():
    weight, spec = random_weight("w4-g128", 256, 128)
    assert "codes has shape" in error("tpu", spec=dataclasses.replace(spec, bits=2))
    assert "scale has shape" in error("tpu", spec=dataclasses.replace(spec, group=64))
    stack = jax.tree.map(lambda a: a[None], weight)
    assert "layer is None" in error("tpu", weight=stack)
    assert "backend is 'cuda'" in error("cuda")
    with pytest.raises(KernelError, match="dtype is 'int4'"):
        quantize_activations(jnp.zeros((2, 2)), "int4")


def test_codes_and_floats_agree():
    weight, spec = random_weight("w4-g32-asymmetric", 256, 64)
    x = rows(5, 256)
    codes, scale = quantize_activations(x)
    y = matmul_a8(codes, weight, spec, x_scale=scale, backend="reference")
    np.testing.assert_array_equal(y, matmul_a8(x, weight, spec, backend="reference"))
