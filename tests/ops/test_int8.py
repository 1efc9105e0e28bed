"""Products on int8 operands, forwards and backwards, beside float ones."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.errors import SpecError, UnsupportedError
from qjax.ops import int8
from qjax.ops.int8 import int8_matmul


def rounded(x):
    """Rows as their int8 codes stand for them, in float64."""
    x = np.asarray(x, np.float64)
    scale = np.abs(x).max(1, keepdims=True) / 127
    return np.round(x / scale) * scale


def products(x, w, dy, **settings):
    y, pull = jax.vjp(lambda x, w: int8_matmul(x, w, **settings), x, w)
    return [np.asarray(y), *(np.asarray(g) for g in pull(dy))]


@pytest.fixture
def operands(rng):
    shapes = ((2, 6, 16), (16, 8), (2, 6, 8))
    return [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes]


@pytest.mark.parametrize("on", list(itertools.product((False, True), repeat=3)))
def test_each_switch_rounds_its_product(operands, on):
    x, w, dy = operands
    names = ("forward", "dgrad", "wgrad")
    found = products(x, w, dy, **dict(zip(names, on, strict=True)))
    flat, slope = x.reshape(-1, 16), dy.reshape(-1, 8)
    pairs = [(flat, w.T), (slope, w), (flat.T, slope.T)]
    for got, (a, b), switch in zip(found, pairs, on, strict=True):
        use = rounded if switch else np.asarray
        expected = use(a) @ use(b).T
        got = got.reshape(expected.shape)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
        if switch:
            assert np.abs(got - np.asarray(a) @ np.asarray(b).T).max() > 1e-4


def test_random_rounding_is_right_on_average(operands):
    x, w, dy = operands
    tiny = dy.at[0, 0].multiply(1e-3).at[0, 0, 0].set(100.0)  # lost by nearest

    def grads(key):
        _, pull = jax.vjp(lambda x: int8_matmul(x, w, key=key), x)
        return pull(tiny)[0]

    keys = jax.random.split(jax.random.key(0), 2000)
    mean = np.asarray(jnp.mean(jax.lax.map(grads, keys), axis=0))[0, 0]
    columns = rounded(w)  # the weight is rounded to nearest
    expected = np.asarray(tiny[0, 0], np.float64) @ columns.T
    nearest = np.asarray(grads(None))[0, 0]
    assert np.abs(mean - expected).max() < 0.1
    rest = np.asarray(tiny[0, 0, 1:], np.float64) @ columns[:, 1:].T
    np.testing.assert_allclose(nearest, expected - rest, atol=1e-3)
    again = grads(keys[0])
    np.testing.assert_array_equal(again, grads(keys[0]))


def test_dtypes_are_those_of_the_operands(operands):
    x, w, dy = operands
    y, dx, dw = products(x.astype(jnp.bfloat16), w, dy.astype(jnp.bfloat16))
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)


def test_zero_rows_stay_zero():
    y, dx, dw = products(jnp.zeros((3, 4)), jnp.zeros((4, 2)), jnp.zeros((3, 2)))
    assert not (y.any() or dx.any() or dw.any())


def test_bad_arguments(operands, monkeypatch):
    x, w, _ = operands
    with pytest.raises(SpecError, match=r"x has shape \[2, 6, 16\] and w \[8, 16\]"):
        int8_matmul(x, w.T)
    monkeypatch.setattr(int8, "MOST", 8)
    with pytest.raises(UnsupportedError, match="a sum of 16 products"):
        int8_matmul(x, w)
