"""Range rules, HQQ, batching, and what `quantize` refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.errors import NonFiniteError, SpecError
from qjax.formats import MXFP4, NF4, Int
from qjax.methods import HQQ, RTN, method_from_dict, quantize
from qjax.wrappers import Transposed

ROWS, COLS = 64, 6


@pytest.fixture
def w(rng):
    return rng.standard_t(3, size=(ROWS, COLS)).astype(np.float32)


def miss(w, fmt, method=None, power=2.0, **options) -> float:
    q = quantize(w, fmt, method, **options)
    return float(np.mean(np.abs(np.asarray(q.dequantize()) - w) ** power))


@pytest.mark.parametrize(
    "fmt",
    [Int(3, 32), Int(3, 32, symmetric=False), MXFP4(), NF4(64)],
    ids=lambda f: f.name,
)
def test_mse_rule_lowers_the_squared_error(w, fmt):
    assert miss(w, fmt, RTN("mse")) < miss(w, fmt)


def test_weighted_mse_serves_the_weights(w):
    importance = np.ones((ROWS, 1), np.float32)
    importance[::4] = 100.0
    fmt, method = Int(3, 32), RTN("mse")
    plain = quantize(w, fmt, method).dequantize()
    weighted = quantize(w, fmt, method, importance=importance).dequantize()
    a, b = (
        np.sum(importance * np.square(np.asarray(x) - w)) for x in (plain, weighted)
    )
    assert b < a


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rule", ["percentile", "mean-std"])
def test_clipping_rules_stay_inside_the_extremes(w, rule, symmetric):
    w[5, 1] = 20.0  # an outlier that absmax would follow
    fmt = Int(4, "channel", symmetric=symmetric)
    method = RTN(rule, percentile=95.0, stds=2.5)
    assert miss(w, fmt, method, power=0.5) < miss(w, fmt, power=0.5)
    top = np.asarray(quantize(w, fmt, method).dequantize()).max()
    assert top < 18
    wide = RTN(rule, percentile=100.0, stds=1e6)
    np.testing.assert_allclose(
        quantize(w, fmt, wide).scales(), quantize(w, fmt).scales(), rtol=1e-5
    )


def test_minmax_covers_the_range_exactly(w):
    q = quantize(w, Int(8, "channel", symmetric=False))
    got = np.asarray(q.dequantize())
    np.testing.assert_allclose(got.min(0), w.min(0), rtol=1e-4)
    np.testing.assert_allclose(got.max(0), w.max(0), rtol=1e-4)


HQQ_CASES = [
    Int(4, 32, symmetric=False),
    Int(2, 32, symmetric=False, axis="in"),
    Int(3, 6, symmetric=False, axis="out"),
    Int(4, 32),
    Int(1, 32),
    Int(8, 32, symmetric=False, scale_dtype="float16", zero_dtype="float16"),
    Int(3, 24, symmetric=False),
]


@pytest.mark.parametrize("fmt", HQQ_CASES, ids=lambda f: f.name)
def test_hqq_is_not_worse_than_rounding(w, fmt):
    assert miss(w, fmt, HQQ(), power=1.0) <= miss(w, fmt, power=1.0)


@pytest.mark.parametrize("method", [RTN("mse"), HQQ()], ids=lambda m: m.name)
def test_batches_equal_their_slices(w, method):
    """Batched fits agree with single ones up to the order of sums."""
    fmt = Int(3, 32, symmetric=False)
    stack = np.stack([w, w[::-1] * 2])
    q = quantize(stack, fmt, method)
    for i in range(2):
        one = quantize(np.ascontiguousarray(stack[i]), fmt, method).dequantize()
        np.testing.assert_allclose(np.asarray(q[i].dequantize()), one, atol=1e-5)


def test_axis_minus_one_groups_along_the_last_axis(w):
    table = np.ascontiguousarray(w.T)
    q = quantize(table, Int(4, 32), axis=-1)
    assert isinstance(q, Transposed)
    assert q.shape == table.shape
    np.testing.assert_array_equal(q.base.codes, quantize(w, Int(4, 32)).codes)
    np.testing.assert_array_equal(
        np.asarray(q.dequantize()), np.asarray(q.base.dequantize()).T
    )


def test_methods_round_trip_through_dict():
    for method in (RTN("mse", grid=7), HQQ(beta=3.0), RTN(stochastic=True)):
        assert method_from_dict(method.to_dict()) == method


def test_quantize_under_jit_equals_quantize(w):
    fmt = Int(4, 32)
    inside = jax.jit(lambda w: quantize(w, fmt))(w)
    np.testing.assert_array_equal(inside.codes, quantize(w, fmt).codes)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_weights_are_named(bad):
    w = np.ones((2, 8, 4), np.float32)
    w[1, 2, 3] = bad
    w[1, 7, 0] = np.nan
    message = (
        r"layers.0.attn.q.kernel: 2 of 64 weights are NaN or infinite, the first at "
        rf"index \(1, 2, 3\) \({bad}\); expected finite weights. Repair the source, or "
        "pass nonfinite='zero' or nonfinite='clip'"
    )
    with pytest.raises(NonFiniteError, match=message):
        quantize(w, Int(4, 4), name="layers.0.attn.q.kernel")
    with pytest.raises(NonFiniteError, match=r"first at index \(1, 0, 7\) \(nan\)"):
        quantize(np.swapaxes(w, -1, -2), Int(4, 4), axis=-1)


def test_nonfinite_zero_and_clip():
    w = np.ones((8, 2), np.float32)
    w[0, 0], w[1, 0], w[2, 0] = np.nan, np.inf, -np.inf
    fmt = Int(8, "channel", symmetric=False)
    zeroed = np.asarray(quantize(w, fmt, nonfinite="zero").dequantize())
    np.testing.assert_allclose(zeroed[:3, 0], 0, atol=1e-2)
    clipped = np.asarray(quantize(w, fmt, nonfinite="clip").dequantize())
    assert np.isfinite(clipped).all()
    np.testing.assert_allclose(clipped[:3, 0], [0, 1, -1], atol=1e-2)
    np.testing.assert_allclose(clipped[:, 1], 1, atol=1e-2)
    inside = jax.jit(lambda w: quantize(w, fmt).dequantize())(w)
    assert np.isfinite(np.asarray(inside)).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize(np.ones(4, np.float32), Int()), "rank 1 .shape .4,.. cannot"),
        (
            lambda: quantize(np.ones((8, 2), np.int32), Int()),
            "dtype int32 is not a float",
        ),
        (lambda: quantize(np.ones((8, 2), bool), Int()), "dtype bool is not a float"),
        (
            lambda: quantize(np.ones((8, 2), np.float32), Int(4, 16)),
            "int4-g16: group of 16 is larger than the in axis",
        ),
        (
            lambda: quantize(np.ones((8, 2), np.float32), Int(4, 8), nonfinite="drop"),
            "nonfinite is 'drop', expected one of 'raise', 'zero', 'clip'",
        ),
        (
            lambda: quantize(np.ones((8, 2), np.float32), Int(4, 8), axis=0),
            "axis is 0, expected one of -2, -1",
        ),
        (
            lambda: quantize(np.ones((64, 2), np.float32), NF4(64), HQQ()),
            "HQQ fits integer formats .Int., got nf4-b64",
        ),
        (
            lambda: quantize(
                np.ones((8, 2), np.float32), Int(4, 8), RTN(stochastic=True)
            ),
            "needs a random key: pass key=",
        ),
        (lambda: RTN("best"), "RTN: rule is 'best', expected one of 'auto', 'absmax'"),
        (lambda: RTN(percentile=40), r"percentile 40 is not in \(50, 100\]"),
        (lambda: RTN(grid=1), "needs 0 < shrink < 1, integer grid >= 2, stds > 0"),
        (lambda: HQQ(lp_norm=2), "needs 0 < lp_norm <= 1, beta > 0 and kappa >= 1"),
        (lambda: HQQ(iterations=0), "iterations is 0, expected a positive integer"),
        (lambda: method_from_dict({"kind": "GPTQ9"}), "unknown kind 'GPTQ9'; known"),
        (lambda: method_from_dict({"kind": "RTN", "x": 1}), "method RTN: .*'x'"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(SpecError, match=message):
        call()


def test_indexing_into_the_matrix_is_refused(w):
    q = quantize(np.stack([w, w]), Int(4, 32))
    with pytest.raises(SpecError, match="only the 1 leading axes can be indexed"):
        q[0, 1]
    with pytest.raises(SpecError, match=r"dequantize\(\) first to cut the matrix"):
        q[..., 1]
    assert jnp.asarray(q[0].codes).shape == (32, 6)
