"""Statistics after a change of inputs are those of the changed inputs."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.methods import Statistics
from qjax.methods.change import drop_inputs, rotate_inputs, scale_inputs

ROWS, TOKENS = 48, 200  # blocks of 16


def collect(x, r, gradient) -> Statistics:
    zeros = Statistics.zeros(ROWS, hessian=True, cross=True)
    sums = zeros.add(jnp.asarray(x), jnp.asarray(r))
    return dataclasses.replace(sums, gradient=jnp.asarray(gradient))


@pytest.fixture
def batch(rng):
    x = rng.standard_normal((TOKENS, ROWS)).astype(np.float32)
    r = x + 0.1 * rng.standard_normal((TOKENS, ROWS)).astype(np.float32)
    return x, r, rng.random((ROWS, 3)).astype(np.float32)


def same(got, want, fields=("count", "total", "size", "square", "peak")):
    for field in (*fields, "hessian", "cross"):
        a, b = getattr(got, field), getattr(want, field)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-3, err_msg=field)


def test_scaled(batch, rng):
    x, r, gradient = batch
    t = rng.uniform(0.1, 3, ROWS).astype(np.float32)
    got: Any = scale_inputs(collect(x, r, gradient), jnp.asarray(t))
    want: Any = collect(x * t, r * t, gradient * np.square(t)[:, None])
    same(got, want)
    np.testing.assert_allclose(got.gradient, want.gradient, rtol=1e-5)


def hadamard_matrix() -> np.ndarray:
    h = np.ones((1, 1))
    while len(h) < 16:
        h = np.block([[h, h], [h, -h]])
    return np.kron(np.eye(3), h) / 4


def test_rotated(batch, rng):
    x, r, gradient = batch
    signs = rng.choice([-1.0, 1.0], ROWS).astype(np.float32)
    turn = (np.diag(signs) @ hadamard_matrix()).astype(np.float32)
    want: Any = collect(x @ turn, r @ turn, gradient)
    full = collect(x, r, gradient)
    got: Any = rotate_inputs(full, jnp.asarray(signs))
    same(got, want, ("count", "total", "square"))
    # estimates: normal inputs make them good ones
    np.testing.assert_allclose(got.size, want.size, rtol=0.2)
    np.testing.assert_allclose(got.peak, want.peak, rtol=0.5)
    means = gradient.reshape(3, 16, 3).mean(1).repeat(16, axis=0)
    np.testing.assert_allclose(got.gradient, means, rtol=1e-5)
    sums = dataclasses.replace(full, hessian=None, cross=None, gradient=None)
    alone: Any = rotate_inputs(sums, jnp.asarray(signs))
    np.testing.assert_allclose(alone.square, want.square, rtol=0.5)
    assert alone.hessian is None


def test_dropped(batch):
    x, r, gradient = batch
    index = jnp.array([5, ROWS, 31])
    got = drop_inputs(collect(x, r, gradient), index)
    keep = np.ones(ROWS, np.float32)
    keep[[5, 31]] = 0
    same(got, collect(x * keep, r * keep, gradient))
    assert drop_inputs(None, index) is None
    assert scale_inputs(None, jnp.ones(ROWS)) is None
    assert rotate_inputs(None, jnp.ones(ROWS)) is None
