"""Observers against NumPy on all the data at once."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.calibration import (
    MSE,
    Entropy,
    MeanStd,
    MinMax,
    MovingAverage,
    Percentile,
)
from qjax.calibration.observers import static_scale
from qjax.errors import SpecError
from qjax.formats import Int
from qjax.methods import quantize

ALL = (
    MinMax(),
    MovingAverage(),
    MeanStd(),
    Percentile(bins=256),
    MSE(bins=256),
    Entropy(bins=256),
)

matmul: Any = qjax.matmul  # typed loosely


def batches(seed=0, count=4):
    """Heavy-tailed batches whose magnitude grows, so that histograms must widen."""
    rng = np.random.default_rng(seed)
    return [
        (rng.standard_t(4, size=(32, 16)) * 2.0**i + 0.1).astype(np.float32)
        for i in range(count)
    ]


def run(observer, data, weights=None):
    update = jax.jit(observer.update)
    state = observer.init()
    for i, x in enumerate(data):
        weight = None if weights is None else jnp.asarray(weights[i])
        state = update(state, jnp.asarray(x), weight)
    return state


def ends(observer, data, bits=8, weights=None):
    low, high = jax.jit(observer.range, static_argnums=1)(
        run(observer, data, weights), bits
    )
    return float(low), float(high)


def histogram(data, bins):
    """Counts of `|x|` up to the power of two above the peak, by `np.histogram`."""
    size = np.abs(np.concatenate([x.ravel() for x in data]).astype(np.float64))
    top = 2.0 ** np.frexp(size.max())[1]
    return np.histogram(size, bins=bins, range=(0, top))[0], top / bins, size


def test_minmax_and_moving_average():
    data = batches()
    whole = np.concatenate([x.ravel() for x in data])
    assert ends(MinMax(), data) == (whole.min(), whole.max())
    low, high = data[0].min(), data[0].max()
    for x in data[1:]:
        low += 0.25 * (x.min() - low)
        high += 0.25 * (x.max() - high)
    np.testing.assert_allclose(ends(MovingAverage(0.25), data), (low, high), rtol=1e-5)


def test_mean_std():
    data = [x + 100 for x in batches()]  # a mean that would cancel in a naive sum
    whole = np.concatenate([x.ravel() for x in data]).astype(np.float64)
    half = 2 * whole.std()
    want = (whole.mean() - half, whole.mean() + half)
    np.testing.assert_allclose(ends(MeanStd(2.0), data), want, rtol=1e-5)
    want = (whole.min(), whole.max())
    np.testing.assert_allclose(ends(MeanStd(1e3), data), want, rtol=1e-6)


@pytest.mark.parametrize("order", [1, -1])
def test_histogram_is_that_of_all_batches(order):
    data = batches()[::order]
    state = run(Percentile(bins=512), data)
    counts, width, size = histogram(data, 512)
    np.testing.assert_array_equal(state.counts, counts)
    assert float(state.peak) == size.max()
    assert 2.0 ** int(state.exponent) == pytest.approx(width * 512)


@pytest.mark.parametrize("percentile", [75.0, 99.0, 100.0])
def test_percentile(percentile):
    data = batches()
    _, width, size = histogram(data, 2048)
    low, high = ends(Percentile(percentile=percentile), data)
    want = np.percentile(size, percentile, method="inverted_cdf")
    assert low == -high
    assert want <= high <= want + width


@pytest.mark.parametrize("bits", [3, 8])
def test_mse(bits):
    data = batches()
    counts, width, size = histogram(data, 2048)
    centres, levels = (np.arange(2048) + 0.5) * width, 2 ** (bits - 1) - 1
    errors, tops = [], []
    for k in range(1, 129):
        top = size.max() * k / 128
        codes = np.minimum(np.round(centres / (top / levels)), levels)
        errors.append(np.sum(counts * np.square(codes * (top / levels) - centres)))
        tops.append(top)
    high = ends(MSE(), data, bits)[1]
    chosen = errors[int(np.argmin(np.abs(np.array(tops) - high)))]
    assert chosen <= min(errors) * (1 + 1e-4)

    def error(top):  # on the values themselves
        scale = top / levels
        return np.mean(
            np.square(np.clip(np.round(size / scale), 0, levels) * scale - size)
        )

    if bits == 3:
        assert error(high) < 0.5 * error(size.max())
    assert error(high) <= 1.01 * min(error(t) for t in tops)


def entropy_threshold(counts, width, levels, stride):
    """Migacz's procedure, loop by loop."""
    total, best, kept = counts.sum(), np.inf, 0
    for end in range(levels, len(counts) + 1, stride):
        inside = counts[:end].astype(np.float64)
        p = inside.copy()
        p[-1] += counts[end:].sum()
        p /= total
        q = np.zeros(end)
        members: list[list[int]] = [[] for _ in range(levels)]
        for b in range(end):
            members[min(b * levels // end, levels - 1)].append(b)
        for level in members:
            full = [b for b in level if inside[b] > 0]
            for b in full:
                q[b] = inside[level].sum() / len(full)
        q /= max(q.sum(), 1)
        q = np.maximum(q, 1e-4 / total)
        divergence = np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0]))
        if divergence < best:
            best, kept = divergence, end
    return (kept + 0.5) * width


@pytest.mark.parametrize("bits", [4, 8])
def test_entropy(bits):
    data = batches()
    counts, width, size = histogram(data, 512)
    want = entropy_threshold(counts, width, 2 ** (bits - 1), 8)
    high = ends(Entropy(bins=512, stride=8), data, bits)[1]
    assert high == pytest.approx(min(want, size.max()), rel=1e-5)
    assert high < size.max()


@pytest.mark.parametrize("observer", ALL, ids=lambda o: type(o).__name__)
def test_padding_and_bad_values_are_not_seen(observer):
    x = batches(count=1)[0]
    dirty = np.concatenate([x, np.full((3, 16), 1e6, np.float32)])
    weight = np.ones(35)
    weight[32:] = 0
    clean = ends(observer, [x])
    np.testing.assert_allclose(ends(observer, [dirty], weights=[weight]), clean, 1e-5)
    x[0, 0] = x[1, 1]
    dirty = x.copy()
    dirty[0, 0] = np.nan
    dirty[0, 1] = np.inf
    assert np.isfinite(ends(observer, [dirty])).all()
    for nothing in ([], [np.zeros((2, 4), np.float32)], [np.zeros((0, 4), np.float32)]):
        assert ends(observer, nothing) == (0, 0)
    assert float(static_scale(observer, observer.init())) == 1


def test_scales_serve_products():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((16, 32)).astype(np.float32)
    w = quantize(rng.standard_normal((32, 8)).astype(np.float32), Int(8, "channel"))
    scale = static_scale(MinMax(), run(MinMax(), [x]))
    assert float(scale) == pytest.approx(np.abs(x).max() / 127)
    got = matmul(x, w, activation="int8", x_scale=scale)
    codes = np.round(x / float(scale))
    want = codes @ np.asarray(w.dequantize()) * float(scale)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    eight = static_scale(MinMax(), run(MinMax(), [x]), "float8_e4m3fn")
    assert float(eight) == pytest.approx(np.abs(x).max() / 448)


def test_messages():
    for call, text in (
        (lambda: MovingAverage(0), "MovingAverage: rate is 0, expected"),
        (lambda: MeanStd(-1), "MeanStd: stds is -1"),
        (lambda: Percentile(bins=300), "Percentile: bins is 300, expected a power of"),
        (lambda: Percentile(percentile=10), r"percentile is 10, expected \(50, 100\]"),
        (lambda: MSE(grid=1), "MSE: grid is 1"),
        (lambda: Entropy(stride=0), "Entropy: stride is 0"),
        (lambda: static_scale(MinMax(), None, "int4"), "activation is 'int4'"),
        (lambda: Entropy(bins=256).range(Entropy(bins=256).init(), 10), "512 levels"),
    ):
        with pytest.raises(SpecError, match=text):
            call()
