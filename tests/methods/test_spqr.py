"""SpQR: storage, a NumPy reference of its loop, and what outliers buy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.errors import SpecError
from qjax.formats import NF4, Int
from qjax.methods import GPTQ, SpQR, method_from_dict, quantize
from qjax.ops import matmul
from qjax.specs import describe, rebuild
from qjax.wrappers import Permuted, WithOutliers

from .calibrated import correlated, output_error, statistics_of

ROWS, COLS = 64, 32
FMT = Int(3, 16, symmetric=False)


@pytest.fixture
def x(rng):
    return correlated(rng, ROWS)


@pytest.fixture
def w(rng):
    return rng.standard_t(3, size=(ROWS, COLS)).astype(np.float32)


def three_bits(stat):
    """Statistics of 16 outputs each, quantized to 3 bits with 16-bit parameters."""
    out = np.zeros_like(stat)
    for k in range(0, len(stat), 16):
        part = stat[k : k + 16]
        low, high = part.min(), part.max()
        least = np.float32(max(abs(low), abs(high)) / 2**14)
        step = np.float32(np.float16(max((high - low) / np.float32(7), least)))
        zero = np.float32(np.float16(-low / step))
        out[k : k + 16] = (np.clip(np.round(part / step + zero), 0, 7) - zero) * step
    return out


def reference(w, h, damp):
    """Algorithm 1 without outliers: the loop over groups with two levels of scales."""
    h = h.astype(np.float64).copy()
    h[np.arange(ROWS), np.arange(ROWS)] += damp * np.mean(np.diag(h))
    hinv = np.linalg.cholesky(np.linalg.inv(h)).T
    w, out = w.astype(np.float64).copy(), np.zeros_like(w)
    for i in range(ROWS):
        if i % 16 == 0:
            group = w[i : i + 16].astype(np.float32)
            low, high = group.min(0), group.max(0)
            plain = (high - low) / np.float32(7)
            scale = three_bits(plain)
            zero = three_bits(-low / scale)
        q = np.clip(np.round(w[i] / scale + zero), 0, 7)
        out[i] = (q - zero) * scale
        w[i:] -= np.outer(hinv[i, i:], (w[i] - out[i]) / hinv[i, i])
    return out


def test_agrees_with_a_plain_loop(x, w):
    stats = statistics_of(x)
    method = SpQR(outliers=0.0, act_order=False, damp=0.1)
    got = np.asarray(quantize(w, FMT, method, statistics=stats).dequantize())
    expected = reference(w, np.asarray(stats.hessian), 0.1)
    same = np.isclose(got, expected, rtol=1e-3, atol=1e-3).all(axis=0)
    assert same.mean() >= 0.75  # a code on a border may fall to the other side
    a, b = (np.sum((x @ (v - w)) ** 2) for v in (got, expected))
    assert a == pytest.approx(b, rel=0.05)


def test_outliers_are_exact_and_fall_where_they_cost(x, w):
    w[20, 3] = 30.0
    stats = statistics_of(x)
    q = quantize(w, FMT, SpQR(outliers=0.02), statistics=stats)
    assert isinstance(q, Permuted)
    assert isinstance(q.base, WithOutliers)
    assert q.base.values.shape == (int(np.ceil(0.02 * ROWS * COLS)),)
    got = np.asarray(q.dequantize())
    order = np.asarray(q.perm)
    rows = order[np.asarray(q.base.rows)].tolist()
    places = set(zip(rows, q.base.cols.tolist(), strict=True))
    assert (20, 3) in places
    assert got[20, 3] == pytest.approx(30.0, abs=2.0)  # and its own feedback target
    without = quantize(w, FMT, SpQR(outliers=0.0), statistics=stats)
    assert output_error(x, w, q) < 0.6 * output_error(x, w, without)


def test_statistics_are_nested(x, w):
    q = quantize(
        w, FMT, SpQR(outliers=0.0, act_order=False), statistics=statistics_of(x)
    )
    # codes, and two 3-bit statistics per 16 weights with four halves per 256; four
    # rows of groups are stored in planes of eight.
    assert q.bits_per_weight == 3 + 2 * (3 * 2 / 16 + 32 / 256)
    for inner in (q.scale, q.zero):
        assert inner.format == Int(
            3, 16, symmetric=False, axis="out", scale_dtype="float16",
            zero_dtype="float16",
        )  # fmt: skip
        assert inner.shape == (ROWS // 16, COLS)
    assert float(q.scales().min()) > 0


def test_survives_files_and_multiplies(x, w):
    q = quantize(w, FMT, SpQR(), statistics=statistics_of(x))
    spec, arrays = describe("w", q)
    again = rebuild("w", spec, arrays.__getitem__)
    for a, b in zip(jax.tree.leaves(q), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    dense = x[:8] @ np.asarray(q.dequantize())
    np.testing.assert_allclose(
        matmul(jnp.asarray(x[:8]), q), dense, rtol=1e-3, atol=1e-2
    )


def test_repeats_give_the_same_bytes(x, w):
    stats = statistics_of(x)
    first = jax.tree.leaves(quantize(w, FMT, SpQR(), statistics=stats))
    second = jax.tree.leaves(quantize(w, FMT, SpQR(), statistics=stats))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def test_errs_less_than_gptq_with_larger_groups(x, w):
    stats = statistics_of(x)
    fmt = Int(3, 32, symmetric=False, scale_dtype="float16", zero_dtype="float16")
    ours = quantize(w, FMT, SpQR(damp=0.01), statistics=stats)
    plain = quantize(w, fmt, GPTQ(act_order=True), statistics=stats)
    assert output_error(x, w, ours) < output_error(x, w, plain)


def test_refuses_what_it_cannot_do(x, w):
    stats = statistics_of(x)
    for fmt in (Int(3, 16), Int(3, "channel", symmetric=False), NF4(64)):
        with pytest.raises(SpecError, match=r"use\s+Int\(3, 16, symmetric=False\)"):
            quantize(w, fmt, SpQR(), statistics=stats)
    with pytest.raises(SpecError, match="needs statistics"):
        quantize(w, FMT, SpQR())
    for bad in ({"outliers": 0.9}, {"scale_bits": 9}, {"act_order": "group"}):
        with pytest.raises(SpecError):
            SpQR(**bad)
    assert method_from_dict(SpQR(damp=1.0).to_dict()) == SpQR(damp=1.0)
