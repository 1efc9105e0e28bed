"""`Rotate`, and learned rotations."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.errors import SpecError
from qjax.formats import Int
from qjax.methods import (
    AWQ,
    RTN,
    Rotate,
    Statistics,
    learn_rotation,
    rounding_loss,
)
from qjax.wrappers import InputScaled, Rotated

quantize: Any = qjax.quantize
matmul: Any = qjax.matmul

ROWS, COLS, TOKENS = 96, 12, 200  # blocks of 32
FMT = Int(4, 32)


def hadamard_matrix(n: int) -> np.ndarray:
    h = np.ones((1, 1))
    while len(h) < (n & -n):
        h = np.block([[h, h], [h, -h]])
    return np.kron(np.eye(n // len(h)), h) / np.sqrt(len(h))


@pytest.fixture
def w(rng):
    w = rng.standard_normal((ROWS, COLS)).astype(np.float32)
    w[rng.choice(ROWS, 6, replace=False)] *= 15  # input features with outliers
    return w


@pytest.fixture
def known(rng):
    x = rng.standard_normal((TOKENS, ROWS)).astype(np.float32)
    return Statistics.zeros(ROWS, hessian=True).add(jnp.asarray(x))


def test_the_base_is_the_rotated_weight_rounded(w, known):
    q = quantize(w, FMT, Rotate(RTN(), seed=3), statistics=known)
    assert isinstance(q, Rotated)
    assert q.signs.dtype == jnp.int8
    signs = np.asarray(q.signs, np.float64)
    turned = hadamard_matrix(ROWS) @ (signs[:, None] * w)
    want = quantize(turned.astype(np.float32), FMT).dequantize()
    got = q.base.dequantize()
    assert np.mean(np.isclose(got, want, atol=1e-4)) > 0.99  # but for ties
    x = np.eye(ROWS, dtype=np.float32)[:5]
    np.testing.assert_allclose(matmul(x, q), x @ np.asarray(q.dequantize()), atol=1e-4)
    extra = q.bits_per_weight - quantize(w, FMT).bits_per_weight
    assert extra == pytest.approx(8 / COLS)


def test_outliers_are_spread(w):
    def miss(method):
        return np.mean(np.square(np.asarray(quantize(w, FMT, method).dequantize()) - w))

    assert miss(Rotate(RTN())) < 0.5 * miss(RTN())


def test_inner_methods_see_rotated_statistics(w, known):
    q = quantize(w, FMT, Rotate(AWQ(grid=3), seed=1), statistics=known)
    assert isinstance(q, Rotated)
    assert isinstance(q.base, InputScaled)
    nested = quantize(w, FMT, AWQ(Rotate(RTN()), grid=3), statistics=known)
    assert isinstance(nested, InputScaled)
    assert isinstance(nested.base, Rotated)
    for one in (q, nested):
        np.testing.assert_allclose(one.dequantize(), w, atol=3)
    with pytest.raises(SpecError, match="rotate-awq: needs statistics"):
        quantize(w, FMT, Rotate(AWQ()))


def test_shared_signs_and_batches(w):
    method = Rotate(RTN(), seed=5)
    shared = method.prepare([w, w[:, :3]], FMT, None)
    alone, given = quantize(w, FMT, method), quantize(w, FMT, method, shared=shared)
    np.testing.assert_array_equal(alone.dequantize(), given.dequantize())
    other = quantize(w, FMT, Rotate(RTN(), seed=6))
    assert np.any(np.asarray(other.signs) != np.asarray(alone.signs))
    stack = quantize(np.stack([w, -w]), FMT, method)
    assert stack.signs.shape == (2, ROWS)
    np.testing.assert_allclose(stack[0].dequantize(), alone.dequantize(), atol=1e-4)


def test_messages():
    with pytest.raises(SpecError, match="size 5 is odd"):
        quantize(np.ones((5, 4), np.float32), Int(4, "channel"), Rotate())
    with pytest.raises(SpecError, match="Rotate: seed is -1, expected an integer"):
        Rotate(seed=-1)
    with pytest.raises(SpecError, match="inner is None, expected a method"):
        Rotate(None)  # pyright: ignore[reportArgumentType]
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"steps": 0}, "needs steps >= 1"),
        ({"momentum": 1.0}, r"momentum in \[0, 1\)"),
    )
    for options, text in cases:
        with pytest.raises(SpecError, match=text):
            learn_rotation(jnp.sum, jnp.eye(4), **options)
    with pytest.raises(SpecError, match="start is not orthogonal"):
        learn_rotation(jnp.sum, 2 * jnp.eye(4))


def test_cayley_descent_finds_a_known_minimum(rng):
    """`|R - Q|^2` over rotations has its minimum at the rotation `Q`."""
    n = 8
    skew = rng.standard_normal((n, n)) * 0.2
    target = np.linalg.qr(np.eye(n) + skew - skew.T)[0]
    target *= np.sign(np.diag(target))
    target = jnp.asarray(target, jnp.float32)
    assert np.linalg.det(target) > 0  # reachable from the identity
    loss = lambda r: jnp.sum(jnp.square(r - target))  # noqa: E731
    r, values = learn_rotation(loss, jnp.eye(n), steps=150, rate=0.2, momentum=0.5)
    np.testing.assert_allclose(r, target, atol=5e-3)
    np.testing.assert_allclose(np.asarray(r) @ np.asarray(r).T, np.eye(n), atol=2e-6)
    assert values[0] > 0.3
    assert values[-1] < 1e-3 * values[0]


def relative_error(w, h, r, fmt) -> float:
    """What `rounding_loss` states for one reader, in float64 but for the rounding."""
    turned = (r.T @ w).astype(np.float32)
    d = r @ (np.asarray(quantize(turned, fmt).dequantize(), np.float64) - turned)
    return float(np.trace(d.T @ h @ d) / np.trace(w.T @ h @ w))


def test_learned_rotation_lowers_the_rounding_error(rng):
    n = 32
    w = rng.standard_normal((n, 24)).astype(np.float32)
    w[[2, 9]] *= 10
    x = rng.standard_normal((300, n)) @ np.diag(rng.uniform(0.2, 3, n))
    h = (x.T @ x).astype(np.float32)
    back = rng.standard_normal((16, n)).astype(np.float32)
    fmt = Int(3, 16)
    loss = rounding_loss([(w, jnp.asarray(h))], [(back, None)], fmt)
    start = jnp.asarray(hadamard_matrix(n), jnp.float32)
    r, values = learn_rotation(loss, start, steps=60, rate=0.1)
    turned = (back @ np.asarray(r)).astype(np.float32)
    miss = np.asarray(quantize(turned, fmt).dequantize(), np.float64) - turned
    writer = np.sum(np.square(miss)) / np.sum(np.square(back.astype(np.float64)))
    reader = relative_error(w, h.astype(np.float64), np.asarray(r, np.float64), fmt)
    learned = (reader + writer) / 2
    # The extreme weight of a group is at code 3.5, so noise moves it by one code.
    assert float(loss(r)) == pytest.approx(learned, rel=6e-2)
    assert learned < 0.93 * float(values[0])
    again, _ = learn_rotation(loss, start, steps=60, rate=0.1)
    assert np.asarray(again).tobytes() == np.asarray(r).tobytes()
    assert jax.tree.leaves(r)[0].dtype == jnp.float32
