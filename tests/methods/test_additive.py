"""Additive vector codes: the layout of AQLM, the search, the output error."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.additive import AdditiveTensor
from qjax.errors import FormatError, SpecError
from qjax.formats import Additive, Int
from qjax.methods import AQLM, RTN, Statistics, method_from_dict, quantize
from qjax.methods.additive import _search
from qjax.specs import describe, rebuild


def aqlm_dequantize(codes, codebooks, scales):
    """AQLM's `_dequantize_weight`, one block at a time: `[out, in]`."""
    count, size, out_group, in_group = codebooks.shape
    out, groups, _ = codes.shape
    w = np.zeros((out * out_group, groups * in_group))
    for o in range(out):
        for g in range(groups):
            block = sum(codebooks[c, codes[o, g, c] % size] for c in range(count))
            at = slice(o * out_group, (o + 1) * out_group)
            w[at, g * in_group : (g + 1) * in_group] = block * scales[o, 0, 0, 0]
    return w


@pytest.mark.parametrize(("count", "bits"), [(2, 8), (1, 16)])
def test_layout_is_that_of_aqlm(count, bits, rng):
    """Codes wrapped to signed integers, as its files hold them."""
    codebooks = rng.normal(size=(count, 2**bits, 1, 8)).astype(np.float16)
    scales = rng.normal(size=(6, 1, 1, 1)).astype(np.float16)
    codes = rng.integers(0, 2**bits, (6, 3, count)).astype(f"uint{bits}")
    want = aqlm_dequantize(
        codes.view(f"int{bits}").astype(int),
        codebooks.astype(np.float64),
        scales.astype(np.float64),
    )
    q = AdditiveTensor(
        jnp.asarray(codes.transpose(1, 2, 0).reshape(-1, 6)),
        jnp.asarray(scales.reshape(1, 6)),
        jnp.asarray(codebooks[:, :, 0]),
        Additive(count, bits, 8),
        (24, 6),
    )
    np.testing.assert_allclose(np.asarray(q.dequantize()).T, want, rtol=1e-3, atol=1e-5)


def test_search_finds_the_best_sum(rng):
    """With beams of all vectors: the best of all pairs."""
    goal = rng.normal(size=(4, 5)).astype(np.float32)
    books = rng.normal(size=(2, 8, 4)).astype(np.float32)
    zero = jnp.zeros((2, 5), jnp.int32)
    found = np.asarray(_search(jnp.asarray(goal), jnp.asarray(books), zero, 8))
    sums = (books[0][:, None] + books[1][None]).reshape(64, 4)
    for o in range(5):
        distance = np.square(sums - goal[:, o]).sum(1)
        got = distance[found[0, o] * 8 + found[1, o]]
        np.testing.assert_allclose(got, distance.min(), rtol=1e-4)
    best = jnp.asarray(found)
    stays = _search(jnp.asarray(goal), jnp.asarray(books), best, 1)
    np.testing.assert_array_equal(np.asarray(stays), found)


@functools.cache
def problem(rows=128, cols=96):
    rng = np.random.default_rng(3)
    mix = rng.normal(size=(rows, rows)) * np.linspace(0.1, 2, rows)
    x = (rng.normal(size=(2 * rows, rows)) @ mix / rows**0.5).astype(np.float32)
    x[:, 5] = 0
    statistics = Statistics.zeros(rows, hessian=True).add(jnp.asarray(x))
    return rng.normal(size=(rows, cols)).astype(np.float32), statistics


def loss(w, q, statistics):
    """tr(E^T H E) / tr(W^T H W)."""
    h = np.asarray(statistics.hessian, np.float64)
    e = w - np.asarray(q.dequantize(), np.float64)
    return float((e * (h @ e)).sum() / (w * (h @ w)).sum())


def test_output_error_is_far_below_that_of_rounding():
    w, statistics = problem()
    fmt, method = Additive(2, 8, 8), AQLM(rounds=3, iterations=8)
    q = quantize(w, fmt, method, statistics=statistics)
    plain = quantize(w, Int(2, 64), RTN("mse"), statistics=statistics)
    assert loss(w, q, statistics) < 0.4 * loss(w, plain, statistics)
    codes = 8 * q.codes.nbytes / w.size
    assert codes == 2.0
    assert q.codebooks.dtype == q.scale.dtype == jnp.float16
    unfitted = quantize(w, fmt, AQLM(rounds=0, iterations=8), statistics=statistics)
    assert loss(w, q, statistics) < loss(w, unfitted, statistics)


def test_one_codebook_and_a_singular_hessian(rng):
    """Fewer tokens than inputs, an output of zeros: everything stays finite."""
    w = rng.normal(size=(32, 6)).astype(np.float32)
    w[:, 2] = 0
    x = rng.normal(size=(4, 32)).astype(np.float32)
    statistics = Statistics.zeros(32, hessian=True).add(jnp.asarray(x))
    method = AQLM(rounds=1, iterations=2, steps=4)
    q = quantize(w, Additive(1, 8, 4), method, statistics=statistics)
    got = np.asarray(q.dequantize())
    assert np.isfinite(got).all()
    # 48 groups and 256 vectors: every group can have its own.
    np.testing.assert_allclose(got, w, atol=0.05)


def test_damaged_files_are_refused():
    books = jnp.zeros((1, 2**10, 8), jnp.float16)
    codes = jnp.full((2, 3), 1024, jnp.uint16)
    scale = jnp.ones((1, 3), jnp.float16)
    good = AdditiveTensor(codes - 1, scale, books, Additive(1, 10, 8), (16, 3))
    spec, arrays = describe("w", good)
    assert rebuild("w", spec, arrays.get).format == good.format
    with pytest.raises(FormatError, match=r"index 1024 outside 0\.\.1023"):
        rebuild("w", spec, {**arrays, "w.codes": codes}.get)
    with pytest.raises(FormatError, match=r"w.codebooks: shape \(1, 8, 8\)"):
        rebuild("w", spec, {**arrays, "w.codebooks": books[:, :8]}.get)
    with pytest.raises(FormatError, match="cannot be a AdditiveTensor"):
        rebuild("w", {**spec, "format": Int(4, 8).to_dict()}, arrays.get)


def test_messages():
    w = np.ones((12, 4), np.float32)
    with pytest.raises(SpecError, match="vectors of 8 do not divide in=12"):
        quantize(w, Additive(2, 8, 8), AQLM())
    with pytest.raises(SpecError, match=r"fits vector codebooks.*got int4-g4"):
        quantize(w, Int(4, 4), AQLM())
    with pytest.raises(SpecError, match=r"aqlm: needs statistics.*\(hessian\)"):
        quantize(w, Additive(2, 8, 4), AQLM())
    with pytest.raises(SpecError, match=r"indices of learned vectors.*AQLM\(\)"):
        quantize(w, Additive(2, 8, 4))
    with pytest.raises(SpecError, match="beam is 0, expected an integer >= 1"):
        AQLM(beam=0)
    with pytest.raises(SpecError, match="bits is 7"):
        Additive(2, 7)
    method = AQLM(rounds=2)
    assert method_from_dict(method.to_dict()) == method
