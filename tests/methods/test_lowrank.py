"""Low-rank repair is optimal in the norm of the Hessian; alternation as in LoftQ."""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.errors import SpecError
from qjax.formats import Int
from qjax.methods import RTN, LowRankRepair, Statistics, quantize
from qjax.methods.lowrank import low_rank_factors
from qjax.wrappers import LowRank


def hessian(rng, size, rank=None):
    x = rng.standard_normal((4 * size, rank or size)) @ rng.standard_normal(
        (rank or size, size)
    )
    return (x.T @ x).astype(np.float32)


def error(e, h):
    e, h = np.asarray(e, np.float64), np.asarray(h, np.float64)
    return np.sum(e * (h @ e))


def least_error(e, h, rank):
    """Eckart and Young for L^T e, by another factor of h than the library's."""
    values, vectors = np.linalg.eigh(h.astype(np.float64))
    root = vectors @ np.diag(np.sqrt(np.maximum(values, 0))) @ vectors.T
    sizes = np.linalg.svd(root @ e.astype(np.float64), compute_uv=False)
    return np.sum(sizes[rank:] ** 2)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
@pytest.mark.parametrize("span", [None, 9], ids=["regular", "singular"])
@pytest.mark.parametrize("weighted", [True, False])
def test_product_is_optimal(rng, shape, span, weighted):
    e = rng.standard_normal(shape).astype(np.float32)
    h = hessian(rng, shape[0], span) if weighted else np.eye(shape[0], dtype=np.float32)
    a, b = low_rank_factors(jnp.asarray(e), 4, jnp.asarray(h) if weighted else None)
    assert a.shape == (shape[0], 4) and b.shape == (4, shape[1])
    got = error(e - np.asarray(a, np.float64) @ np.asarray(b, np.float64), h)
    want = least_error(e, h, 4)
    assert want * 0.999 <= got <= want * 1.002
    np.testing.assert_allclose(
        np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1), rtol=1e-4
    )


def test_an_exact_product_is_found(rng):
    e = rng.standard_normal((10, 3)) @ rng.standard_normal((3, 14))
    a, b = low_rank_factors(jnp.asarray(e, jnp.float32), 5)  # more than its rank
    np.testing.assert_allclose(np.asarray(a) @ np.asarray(b), e, atol=1e-3)
    a, b = low_rank_factors(jnp.zeros((10, 14)), 2)
    assert not np.any(np.asarray(a)) and np.all(np.isfinite(b))


@pytest.fixture
def problem(rng):
    w = rng.standard_normal((32, 24)).astype(np.float32)
    x = rng.standard_normal((90, 32)) @ rng.standard_normal((32, 32))
    zeros = Statistics.zeros(32, hessian=True)
    return w, zeros.add(jnp.asarray(x, jnp.float32))


FMT = Int(2, 16)


def test_repair_beats_plain_svd_at_the_output(problem):
    w, statistics = problem
    h = statistics.mean_hessian()
    plain = quantize(w, FMT)
    seen = quantize(w, FMT, LowRankRepair(RTN(), 4), statistics=statistics)
    blind = quantize(w, FMT, LowRankRepair(RTN(), 4, hessian=False))
    assert isinstance(seen, LowRank) and seen.a.dtype == jnp.float16
    np.testing.assert_array_equal(seen.base.codes, plain.codes)
    assert seen.nbytes == plain.nbytes + 2 * 4 * (32 + 24)
    e = w - np.asarray(plain.dequantize())
    got = [error(w - np.asarray(q.dequantize()), h) for q in (seen, blind)]
    np.testing.assert_allclose(got[0], least_error(e, np.asarray(h), 4), rtol=5e-3)
    assert got[0] < 0.8 * got[1] and got[1] < error(e, h)
    unweighted = error(w - np.asarray(blind.dequantize()), np.eye(32))
    np.testing.assert_allclose(unweighted, least_error(e, np.eye(32), 4), rtol=5e-3)


def rtn(w):
    """Int(2, 16) by round to nearest."""
    g = w.reshape(2, 16, -1)
    s = np.abs(g).max(1, keepdims=True) / np.float32(1.5)
    return (np.clip(np.round(g / s), -2, 1) * s).reshape(w.shape)


def test_alternation_agrees_with_numpy(problem):
    w, _ = problem
    method = LowRankRepair(RTN(), 4, hessian=False, iterations=4, dtype="float32")
    got = quantize(w, FMT, method).dequantize()
    product, best = np.zeros_like(w), (np.inf, None)
    for _ in range(4):
        base = rtn((w - product).astype(np.float32))
        u, s, v = np.linalg.svd(w - base, full_matrices=False)
        product = ((u[:, :4] * s[:4]) @ v[:4]).astype(np.float32)
        size = np.sum((w - base - product) ** 2)
        if size < best[0]:
            best = (size, base + product)
    np.testing.assert_allclose(np.sum((w - np.asarray(got)) ** 2), best[0], rtol=2e-2)


def test_stacks_are_batched(rng):
    w = rng.standard_normal((2, 16, 12)).astype(np.float32)
    method = LowRankRepair(RTN(), 3, hessian=False, iterations=2)
    both = quantize(w, FMT, method)
    for i in range(2):
        one = quantize(w[i], FMT, method).dequantize()
        np.testing.assert_allclose(both[i].dequantize(), one, atol=2e-3)


def test_bad_requests(problem):
    w, statistics = problem
    with pytest.raises(SpecError, match="rank is 0, expected a positive integer"):
        LowRankRepair(RTN(), 0)
    with pytest.raises(SpecError, match="expected a method other than LowRankRepair"):
        LowRankRepair(LowRankRepair(RTN()))
    with pytest.raises(SpecError, match="dtype is 'int8'"):
        LowRankRepair(RTN(), dtype="int8")
    with pytest.raises(SpecError, match="rank 25 of a weight"):
        quantize(w, FMT, LowRankRepair(RTN(), 25), statistics=statistics)
    with pytest.raises(SpecError, match="needs statistics"):
        quantize(w, FMT, LowRankRepair(RTN(), 2))
    assert LowRankRepair(RTN(), hessian=False).needs == frozenset()
