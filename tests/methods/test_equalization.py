"""AWQ and SmoothQuant against their reference algorithms in NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.errors import SpecError
from qjax.formats import MXFP4, NF4, Cast, Int
from qjax.methods import AWQ, RTN, SmoothQuant, Statistics
from qjax.methods.clip import clip_weight
from qjax.methods.smoothquant import rounded_error
from qjax.wrappers import InputScaled

from .awq_reference import autoawq, autoawq_clip, autoawq_scale

quantize: Any = qjax.quantize  # typed loosely

ROWS, COLS, TOKENS, GROUP, GRID = 64, 24, 160, 16, 8
FMT = Int(3, GROUP, symmetric=False, zero_dtype="uint8")


def data(seed=0, outliers=True):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((TOKENS, ROWS)) @ rng.standard_normal((ROWS, ROWS)) * 0.2
    x = x + 0.5 * rng.standard_normal((TOKENS, ROWS))
    if outliers:
        x[:, [3, 20, 41]] *= 12
    w = rng.standard_t(4, size=(ROWS, COLS)) * 0.1
    return x.astype(np.float32), w.astype(np.float32)


def known(x, hessian=True) -> Statistics:
    return Statistics.zeros(x.shape[1], hessian=hessian).add(jnp.asarray(x))


def output_error(x, w, q) -> float:
    d = np.asarray(q.dequantize(jnp.float32), np.float64) - w
    return float(np.sum(np.square(x.astype(np.float64) @ d)))


@pytest.mark.parametrize("duo", [True, False])
def test_scales_are_those_of_autoawq(duo):
    x, w = data()
    more = data(7)[1]
    weights = [m.T.astype(np.float64) for m in (w, more)]
    want: Any = autoawq_scale(x.astype(np.float64), weights, 3, GROUP, GRID, duo)
    method = AWQ(RTN(), grid=GRID, duo=duo, dtype="float32")
    shared = jax.jit(lambda a, b, s: method.prepare([a, b], FMT, s))(w, more, known(x))
    np.testing.assert_allclose(1 / np.asarray(shared.t), want, rtol=2e-4)


def test_clipping_is_that_of_autoawq():
    x, w = data(1)
    want = autoawq_clip(w.T.astype(np.float64), x.astype(np.float64), 3, GROUP).T
    got = np.asarray(clip_weight(jnp.asarray(w), FMT, known(x)))
    assert np.mean(got != w) > 0.01  # something is clipped
    # A range clipped on both sides has its zero-point at 3.5 exactly: float noise says
    # whether it becomes 3 or 4, and with it which clip is best.
    assert np.mean(np.isclose(got, want, rtol=1e-4, atol=1e-6)) > 0.96


@pytest.mark.parametrize("seed", [0, 1])
def test_error_is_at_most_that_of_autoawq(seed):
    x, w = data(seed)
    scales = autoawq_scale(x, [w.T], 3, GROUP, GRID)
    dense = autoawq(x, w, scales, 3, GROUP)
    reference = float(np.sum(np.square(x.astype(np.float64) @ (dense - w))))
    plain = output_error(x, w, quantize(w, FMT))
    errors = [
        output_error(x, w, quantize(w, FMT, AWQ(inner, GRID), statistics=known(x)))
        for inner in (RTN(), RTN("mse"))
    ]
    assert errors[0] <= reference * 1.06  # ties of zero-points, see above
    assert errors[1] <= errors[0] * 1.0001
    assert errors[1] <= reference
    assert reference < 0.6 * plain


@pytest.mark.parametrize(
    "fmt", [NF4(32), NF4(32, double=True), MXFP4(), Int(4, 24), Cast()], ids=str
)
def test_any_format_is_no_worse_than_its_inner_method(fmt):
    x, w = data(2)
    q = quantize(w, fmt, AWQ(RTN(), 4), statistics=known(x))
    assert isinstance(q, InputScaled)
    assert output_error(x, w, q) <= output_error(x, w, quantize(w, fmt)) * 1.01


def test_sums_are_enough_and_bits_count_the_scales():
    x, w = data(3)
    q = quantize(w, FMT, AWQ(grid=GRID, hessian=False), statistics=known(x, False))
    assert output_error(x, w, q) < 0.8 * output_error(x, w, quantize(w, FMT))
    base = quantize(w, FMT)
    assert q.bits_per_weight == pytest.approx(base.bits_per_weight + 16 / COLS)
    importance = np.ones((ROWS, 1), np.float32)
    flat = quantize(
        w, FMT, AWQ(grid=2), statistics=known(x), importance=jnp.asarray(importance)
    )
    assert np.isfinite(np.asarray(flat.dequantize())).all()


def test_dead_inputs_and_empty_calibration():
    x, w = data(4)
    x[:, 10] = 0
    for statistics in (known(x), known(x[:1]), Statistics.zeros(ROWS, hessian=True)):
        for method in (AWQ(grid=3), SmoothQuant()):
            q = quantize(w, FMT, method, statistics=statistics)
            s = np.asarray(q.s, np.float32)
            assert np.isfinite(s).all() and (s > 0).all()
            miss = np.abs(np.asarray(q.dequantize()) - w)
            assert np.isfinite(miss).all()
            assert miss.max() <= 2 * np.abs(w).max()


def test_equal_bytes_for_equal_inputs():
    x, w = data(5)
    a, b = (quantize(w, FMT, AWQ(grid=3), statistics=known(x)) for _ in range(2))
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


W8 = Int(8, "channel")


@pytest.mark.parametrize("alpha", [0.5, 0.85])
def test_smoothing_is_that_of_the_paper(alpha):
    x, w = data(6)
    more = data(8)[1]
    peak_w = np.maximum(np.abs(w).max(1), np.abs(more).max(1)).clip(1e-5)
    want = np.abs(x).max(0).clip(1e-5) ** alpha / peak_w ** (1 - alpha)
    method = SmoothQuant(alpha=alpha, dtype="float32")
    shared = method.prepare([jnp.asarray(w), jnp.asarray(more)], W8, known(x))
    np.testing.assert_allclose(1 / np.asarray(shared.t), want, rtol=1e-4)
    q = quantize(w, W8, method, statistics=known(x), shared=shared)
    np.testing.assert_allclose(q.dequantize(), w, atol=0.02)


def w8a8_error(x, w, q) -> float:
    """Both factors rounded: int8 rows of the scaled input, the weight as stored."""
    moved, base = x.astype(np.float64), q
    if isinstance(q, InputScaled):
        moved, base = moved * np.asarray(q.s, np.float64), q.base
    step = np.abs(moved).max(1, keepdims=True) / 127
    rounded = np.round(moved / step) * step
    y = rounded @ np.asarray(base.dequantize(), np.float64)
    return float(np.mean(np.square(y - x.astype(np.float64) @ w)))


def test_searched_smoothing_lowers_the_error_of_w8a8():
    x, w = data(9)
    plain = w8a8_error(x, w, quantize(w, W8))
    searched = w8a8_error(x, w, quantize(w, W8, SmoothQuant(), statistics=known(x)))
    fixed = [
        w8a8_error(x, w, quantize(w, W8, SmoothQuant(alpha=a), statistics=known(x)))
        for a in (0.25, 0.5, 0.75)
    ]
    assert searched < 0.5 * plain
    assert searched < 1.15 * min(fixed)


def test_modelled_error_is_near_the_measured_one():
    x, w = data(10, outliers=False)
    ones = jnp.ones((ROWS,), jnp.float32)
    model = float(rounded_error([jnp.asarray(w)], W8, known(x), ones))
    measured = w8a8_error(x, w, quantize(w, W8)) * COLS  # the model sums over outputs
    assert 0.8 * measured < model < 2.5 * measured


@pytest.mark.parametrize("method", [AWQ(), SmoothQuant()], ids=lambda m: m.name)
def test_messages(method):
    with pytest.raises(
        SpecError, match=f"{method.name}: needs statistics .*calibration="
    ):
        quantize(data()[1], FMT, method)
    for call, text in (
        (lambda: AWQ(inner="rtn"), "AWQ: inner is 'rtn', expected a method"),  # pyright: ignore[reportArgumentType]
        (lambda: AWQ(grid=0), "AWQ: grid is 0, expected a positive integer"),
        (lambda: AWQ(dtype="int8"), "AWQ: dtype is 'int8', expected one of"),
        (
            lambda: SmoothQuant(alpha=1.5),
            r"alpha is 1.5, expected a number in \[0, 1\]",
        ),
    ):
        with pytest.raises(SpecError, match=text):
            call()
