"""GPTAQ, Qronos and LDLQ: references, and what the drift correction is worth."""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.errors import SpecError
from qjax.formats import Int
from qjax.methods import GPTAQ, GPTQ, LDLQ, RTN, Qronos, method_from_dict, quantize
from qjax.methods.hessian import damped

from .calibrated import correlated, output_error, statistics_of
from .drift_reference import gptaq, qronos

ROWS, COLS = 48, 12
FMT = Int(3, 16, symmetric=False, zero_dtype="uint8")


@pytest.fixture
def case(rng):
    """Inputs now, inputs in the original model, the weight, and statistics."""
    x = correlated(rng, ROWS)
    mix = np.eye(ROWS) + 0.05 * rng.normal(size=(ROWS, ROWS))
    r = (x @ mix + 0.1 * x.std() * rng.normal(size=x.shape)).astype(np.float32)
    w = rng.normal(size=(ROWS, COLS)).astype(np.float32)
    return x, r, w, statistics_of(x, r)


def min_max_grid(w):
    """Rounding to min-max groups of the weight itself, `(row, values) -> values`."""
    groups = w.reshape(-1, 16, COLS)
    low, high = np.minimum(groups.min(1), 0), np.maximum(groups.max(1), 0)
    scale = (high - low) / 7
    zero = np.round(-low / scale)

    def round_row(i, row):
        s, z = scale[i // 16], zero[i // 16]
        return (np.clip(np.round(row / s + z), 0, 7) - z) * s

    return round_row


def check(got, expected, x, aim):
    """Equal in nearly all columns: a weight on the border of two codes may cross it."""
    same = np.isclose(got, expected, rtol=1e-3, atol=1e-4).all(axis=0)
    assert same.mean() >= 0.75
    a, b = (np.sum((x @ v - aim) ** 2) for v in (got, expected))
    assert a == pytest.approx(b, rel=0.03)


@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_gptaq_agrees_with_its_original(case, alpha):
    x, r, w, stats = case
    h, cross = np.asarray(stats.hessian), np.asarray(stats.cross)
    expected = gptaq(w, h, cross, min_max_grid(w), alpha=alpha)
    method = GPTAQ(alpha=alpha, static_groups=True)
    got = np.asarray(quantize(w, FMT, method, statistics=stats).dequantize())
    check(got, expected, x, r @ w)
    plain = np.asarray(
        quantize(w, FMT, GPTQ(static_groups=True), statistics=stats).dequantize()
    )
    assert not np.array_equal(got, plain)


def test_qronos_agrees_with_its_paper(case):
    x, r, w, stats = case
    h, cross = np.asarray(stats.hessian), np.asarray(stats.cross)
    expected = qronos(w, h, cross, min_max_grid(w))
    q = quantize(w, FMT, Qronos(static_groups=True), statistics=stats)
    check(np.asarray(q.dequantize()), expected, x, r @ w)


def test_orders_keep_the_correction(case):
    """In activation order the same algorithms run on permuted inputs."""
    x, r, w, stats = case
    h, cross = np.asarray(stats.hessian), np.asarray(stats.cross)
    order = np.argsort(-np.diag(h), kind="stable")
    grid = min_max_grid(w)
    turned = (w[order], h[order][:, order], cross[order][:, order])
    for method, reference in (
        (Qronos(static_groups=True, act_order=True), qronos),
        (GPTAQ(static_groups=True, act_order=True, alpha=1.0), gptaq),
    ):
        options = {"alpha": 1.0} if reference is gptaq else {}
        expected = np.zeros_like(w)
        expected[order] = reference(
            *turned, lambda i, row: grid(order[i], row), **options
        )
        q = quantize(w, FMT, method, statistics=stats)
        check(np.asarray(q.dequantize()), expected, x, r @ w)


def test_correcting_drift_serves_the_original_outputs(case):
    x, r, w, stats = case
    fmt = Int(4, 16, symmetric=False, zero_dtype="uint8")
    methods = (RTN(), GPTQ(), Qronos())
    rtn, plain, corrected = (
        output_error(x, w, quantize(w, fmt, m, statistics=stats), r) for m in methods
    )
    assert corrected < plain < rtn


def test_without_drift_qronos_and_gptaq_are_gptq(rng):
    x = correlated(rng, ROWS)
    w = rng.normal(size=(ROWS, COLS)).astype(np.float32)
    stats = statistics_of(x, x)
    plain = np.asarray(quantize(w, FMT, GPTQ(), statistics=stats).dequantize())
    for method in (Qronos(), GPTAQ()):
        got = np.asarray(quantize(w, FMT, method, statistics=stats).dequantize())
        np.testing.assert_allclose(got, plain, rtol=1e-5, atol=1e-6)


def test_dead_inputs_stay(case):
    x, r, w, _ = case
    x[:, 5], r[:, 5] = 0, 0
    q = quantize(w, FMT, Qronos(), statistics=statistics_of(x, r))
    step = np.ptp(w[:16], axis=0) / 7
    assert (np.abs(np.asarray(q.dequantize())[5] - w[5]) <= step).all()


def test_ldlq_is_gptq_on_known_grids(case):
    _, _, w, stats = case
    a = quantize(w, FMT, LDLQ(range="minmax"), statistics=stats)
    b = quantize(w, FMT, GPTQ(static_groups=True), statistics=stats)
    np.testing.assert_array_equal(a.dequantize(), b.dequantize())
    with pytest.raises(SpecError, match="use GPTQ to choose scales on the way"):
        LDLQ(static_groups=False)


def test_needs_the_original_inputs(case):
    x, _, w, _ = case
    for method in (Qronos(), GPTAQ()):
        with pytest.raises(SpecError, match=r"needs statistics .*cross"):
            quantize(w, FMT, method, statistics=statistics_of(x))
        assert method_from_dict(method.to_dict()) == method
    with pytest.raises(SpecError, match="alpha"):
        GPTAQ(alpha=2.0)


def test_damping_fills_dead_inputs():
    h = jnp.diag(jnp.asarray([2.0, 0.0, 4.0], jnp.float32))
    np.testing.assert_allclose(jnp.diagonal(damped(h, 0.5)), [3.0, 4.0, 5.0])
