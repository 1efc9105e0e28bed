"""LLM.int8() against the documented arithmetic in NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.errors import SpecError
from qjax.formats import Int
from qjax.methods import RTN, LLMInt8, Statistics
from qjax.methods.llm_int8 import trim
from qjax.wrappers import SplitInputs

quantize: Any = qjax.quantize
matmul: Any = qjax.matmul

ROWS, COLS, TOKENS = 64, 20, 40
HOT = [5, 33, 60]
FMT = Int(8, "channel")


def data():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((TOKENS, ROWS)).astype(np.float32)
    x[:, HOT] *= 30
    w = rng.standard_normal((ROWS, COLS)).astype(np.float16).astype(np.float32)
    w[HOT] *= 4
    return x, w


def known(x) -> Statistics:
    return Statistics.zeros(ROWS).add(jnp.asarray(x))


def prepared(x, w, method=None):
    method = method or LLMInt8(most=0.1)
    shared = method.prepare([jnp.asarray(w)], FMT, known(x))
    return quantize(w, FMT, method, statistics=known(x), shared=shared)


def llm_int8(x, w, threshold=6.0, levels=127.5):
    """Section 3 of the paper; `levels` is 127 there, and 127.5 is `Int(8)`'s step."""
    hot = np.abs(x).max(0) >= threshold
    y = x[:, hot].astype(np.float64) @ w[hot].astype(np.float64)
    a, b = x[:, ~hot].astype(np.float64), w[~hot].astype(np.float64)
    row = np.abs(a).max(1, keepdims=True) / 127
    column = np.abs(b).max(0, keepdims=True) / levels
    codes = np.clip(np.round(b / column), -128, 127)
    return y + (np.round(a / row) @ codes) * row * column


@pytest.mark.parametrize("levels", [127.5, 127.0])
def test_arithmetic_is_that_of_the_paper(levels):
    x, w = data()
    q = prepared(x, w)
    assert isinstance(q, SplitInputs)
    np.testing.assert_array_equal(q.index, [*HOT, ROWS])  # three, of four slots
    got = np.asarray(matmul(x, q, activation="int8"))
    want = llm_int8(x, w, levels=levels)
    exact = x.astype(np.float64) @ w.astype(np.float64)
    size = np.abs(exact).max()
    # The largest weight of a column is at code 127.5, so noise moves it by one code.
    tolerance = 2e-4 if levels == 127.5 else 5e-3
    np.testing.assert_allclose(got / size, want / size, atol=tolerance)
    whole = np.asarray(matmul(x, quantize(w, FMT), activation="int8"))
    miss = lambda y: np.sqrt(np.mean(np.square(y - exact)))  # noqa: E731
    assert miss(got) < 0.1 * miss(whole)


def test_outlier_rows_are_kept_exactly_and_the_rest_rounded():
    x, w = data()
    q = prepared(x, w)
    dense = np.asarray(q.dequantize())
    np.testing.assert_array_equal(dense[HOT], w[HOT])
    rest = np.delete(np.arange(ROWS), HOT)
    step = np.abs(w[rest]).max(0) / 127.5
    assert (np.abs(dense - w)[rest] <= step / 2 + 1e-6).all()
    np.testing.assert_allclose(matmul(x, q), x @ dense, rtol=1e-4, atol=1e-3)


def test_traced_shapes_give_the_same_weight():
    x, w = data()
    traced = quantize(w, FMT, LLMInt8(most=0.1), statistics=known(x))
    assert traced.index.shape == (7,)  # ceil(0.1 * 64) slots
    np.testing.assert_array_equal(traced.dequantize(), prepared(x, w).dequantize())
    trimmed: Any = trim(traced)
    np.testing.assert_array_equal(trimmed.index, HOT)
    np.testing.assert_array_equal(trimmed.dequantize(), traced.dequantize())
    few = quantize(w, FMT, LLMInt8(most=0.01), statistics=known(x))
    hottest = np.abs(x).max(0).argmax()
    np.testing.assert_array_equal(few.index, [hottest])


def test_no_outliers_no_wrapper():
    x, w = data()
    cold = x.copy()
    cold[:, HOT] /= 30
    q = prepared(cold, w)
    padded = quantize(w, FMT, LLMInt8(), statistics=known(cold))
    assert isinstance(padded, SplitInputs)
    bare: Any = trim(padded)
    np.testing.assert_array_equal(bare.codes, q.codes)
    assert trim(q) is q
    assert not isinstance(q, SplitInputs)
    np.testing.assert_array_equal(q.dequantize(), quantize(w, FMT).dequantize())
    assert q.bits_per_weight < prepared(x, w).bits_per_weight
    extra = prepared(x, w).bits_per_weight - q.bits_per_weight
    assert extra == pytest.approx((4 * COLS * 16 + 4 * 32) / (ROWS * COLS))


def test_inner_methods_and_large_weights():
    x, w = data()
    w[5, 0] = 1e6  # beyond float16
    q = prepared(x, w, LLMInt8(most=0.1, inner=RTN("mse")))
    assert np.asarray(q.dequantize())[5, 0] == pytest.approx(65504)
    wide = prepared(x, w, LLMInt8(most=0.1, dtype="float32"))
    assert np.asarray(wide.dequantize())[5, 0] == 1e6
    assert LLMInt8(inner=RTN("mse")).name == "llm-int8-rtn-mse"


def test_gradients_pass_both_parts():
    x, w = data()
    q = prepared(x, w)
    got = jax.grad(lambda x: jnp.sum(matmul(x, q)))(jnp.asarray(x))
    want = np.asarray(q.dequantize()).sum(1)
    np.testing.assert_allclose(got, np.broadcast_to(want, x.shape), rtol=1e-3)


def test_messages():
    _, w = data()
    with pytest.raises(SpecError, match=r"llm-int8: needs statistics .*calibration"):
        quantize(w, FMT, LLMInt8())
    with pytest.raises(SpecError, match="threshold > 0 and 0 < most <= 1; got thre"):
        LLMInt8(threshold=0)
    with pytest.raises(SpecError, match="dtype is 'int4'"):
        LLMInt8(dtype="int4")
