"""K-means tables: optimal clusters, error feedback onto tables, outliers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.errors import SpecError
from qjax.formats import Int, KMeans
from qjax.methods import RTN, Lloyd, Statistics, method_from_dict, quantize
from qjax.methods.clusters import fit_tables
from qjax.methods.hessian import damped, factor
from qjax.methods.sweeps import descent, refit, sweep

tables = jax.jit(fit_tables, static_argnums=(2, 3))


def objective(x, h, table):
    """Weighted squared error of the nearest centres, float64."""
    x, table = x.astype(np.float64), table.astype(np.float64)
    return float((h * np.square(x[:, None] - table).min(1)).sum())


def optimum(x, h, levels):
    """Least objective of any partition: dynamic programming over all cuts."""
    order = np.argsort(x)
    x, h = x[order].astype(np.float64), h[order].astype(np.float64)
    m, a, b = (np.concatenate([[0], np.cumsum(v)]) for v in (h, h * x, h * x * x))
    best = np.full(len(x) + 1, np.inf)
    best[0] = 0
    for _ in range(levels):
        old = best.copy()
        for j in range(1, len(x) + 1):
            i = np.arange(j)
            cost = b[j] - b[i] - (a[j] - a[i]) ** 2 / (m[j] - m[i])
            best[j] = min(old[j], (old[:j] + cost).min())
    return best[-1]


def lloyd(x, h, levels, rng):
    """Weighted k-means++ and at most 50 Lloyd iterations, as scikit-learn runs it."""
    centres = [rng.choice(x, p=h / h.sum())]
    for _ in range(levels - 1):
        far = h * np.square(x[:, None] - np.array(centres)).min(1)
        centres.append(rng.choice(x, p=far / far.sum()))
    table = np.array(centres)
    for _ in range(50):
        code = np.abs(x[:, None] - table).argmin(1)
        for k in range(levels):
            if (code == k).any():
                table[k] = np.average(x[code == k], weights=h[code == k])
    return objective(x, h, table)


def heavy(rng, shape):
    """Values with heavy tails, and weights that vary by orders of magnitude."""
    x = rng.standard_t(4, shape).astype(np.float32)
    return x, np.exp(1.5 * rng.normal(size=shape)).astype(np.float32)


def test_few_values_are_clustered_optimally(rng):
    x, h = heavy(rng, (60, 5))
    found = np.asarray(tables(x, h, 4, 20))
    assert (np.diff(found, axis=0) >= 0).all()
    for c in range(5):
        best = optimum(x[:, c], h[:, c], 4)
        assert objective(x[:, c], h[:, c], found[:, c]) <= best * 1.0005


def test_many_values_are_clustered_nearly_so(rng):
    """Never worse than k-means++ with 50 iterations, and within 3 % of the optimum."""
    x, h = heavy(rng, (400, 4))
    found = np.asarray(tables(x, h, 8, 50))
    for c in range(4):
        got = objective(x[:, c], h[:, c], found[:, c])
        assert got <= optimum(x[:, c], h[:, c], 8) * 1.03
        assert got <= lloyd(x[:, c], h[:, c], 8, rng) * 1.0001


def test_columns_without_spread_or_weight():
    x = np.zeros((9, 4), np.float32)
    x[:, 1] = -2.5
    x[::2, 2] = 7
    x[:, 3] = np.arange(9)
    h = np.ones_like(x)
    h[:, 3] = 0
    found = np.asarray(tables(x, h, 4, 5))
    assert np.isfinite(found).all()
    for c in range(3):
        assert objective(x[:, c], h[:, c], found[:, c]) < 1e-10
    assert objective(x[:, 3], h[:, 0], found[:, 3]) < 9  # as if weights were equal


@functools.cache
def problem(rows=150, cols=4):
    """A weight and its correlated inputs, one of which never fires."""
    rng = np.random.default_rng(3)
    mix = rng.normal(size=(rows, rows)) * np.linspace(0.1, 2, rows)
    x = (rng.normal(size=(2 * rows, rows)) @ mix / rows**0.5).astype(np.float32)
    x[:, 5] = 0
    statistics = Statistics.zeros(rows, hessian=True).add(jnp.asarray(x))
    return rng.normal(size=(rows, cols)).astype(np.float32), statistics


def loss(w, q, statistics):
    e = w - np.asarray(q.dequantize(), np.float64)
    return float((e * (np.asarray(statistics.hessian, np.float64) @ e)).sum())


def to_table(table):
    """A `Choose` of the nearest entries of a table."""

    def choose(_, goal):
        codes = jnp.argmin(jnp.abs(goal[0][:, None] - table), axis=1)
        return codes, table[codes][None]

    return choose


def test_sweep_is_gptq():
    """Onto a table, against the update of the paper with the inverse Hessian."""
    w, statistics = problem()
    table = np.linspace(-2, 2, 8).astype(np.float32)
    h = statistics.mean_hessian()
    m = factor(h, 0.01)[0]
    identity = jnp.eye(len(w), dtype=jnp.float32)
    codes, values = sweep(w, w, m - identity, to_table(jnp.asarray(table)))

    inverse = np.linalg.inv(np.asarray(damped(h, 0.01), np.float64))
    upper = np.linalg.cholesky(inverse).T
    rest, want = w.astype(np.float64), np.zeros(w.shape, int)
    for i in range(len(w)):
        want[i] = np.abs(rest[i][:, None] - table).argmin(1)
        error = (rest[i] - table[want[i]]) / upper[i, i]
        rest[i:] -= upper[i, i:, None] * error
    assert (np.asarray(codes) == want).mean() > 0.99
    np.testing.assert_allclose(np.asarray(values), table[np.asarray(codes)], atol=1e-6)


def test_sweep_is_coordinate_descent():
    w, statistics = problem()
    table = np.linspace(-2, 2, 8).astype(np.float32)
    h = damped(statistics.mean_hessian(), 0.01)
    start = np.round(w)
    codes, _ = sweep(w, start, descent(h), to_table(jnp.asarray(table)))

    h, v = np.asarray(h, np.float64), start.astype(np.float64)
    for i in range(len(w)):
        goal = v[i] + h[i] @ (w - v) / h[i, i]
        v[i] = table[np.abs(goal[:, None] - table).argmin(1)]
    assert (table[np.asarray(codes)] == v).mean() > 0.99


def test_refit_is_least_squares():
    """Tables of columns: the normal equations of each column, solved."""
    w, statistics = problem()
    h = damped(statistics.mean_hessian(), 0.01)
    codes = np.random.default_rng(0).integers(0, 4, w.shape)
    one_hot = (codes[..., None] == np.arange(4)).astype(np.float32)

    def decode(table):
        return jnp.einsum("nck,kc->nc", one_hot, table, precision="highest")

    start = jnp.zeros((4, w.shape[1]), jnp.float32)
    got = np.asarray(refit(decode, start, w, h, 12, columns=True))
    for c in range(w.shape[1]):
        p = one_hot[:, c].astype(np.float64)
        ph = p.T @ np.asarray(h, np.float64)
        want = np.linalg.solve(ph @ p, ph @ w[:, c])
        np.testing.assert_allclose(got[:, c], want, rtol=2e-3, atol=2e-4)


def test_codes_are_nearest_under_the_weights_of_statistics(rng):
    """The Fisher information is used when it is there; tables are as stored."""
    x, h = heavy(rng, (60, 5))
    _, base = problem(60)
    fisher = Statistics(*(getattr(base, f) for f in ("count", "total", "size")),
                        base.square, base.peak, gradient=jnp.asarray(h))  # fmt: skip
    q = quantize(x, KMeans(2), Lloyd(iterations=20), statistics=fisher)
    table = np.asarray(q.codebook, np.float32)
    assert q.codebook.dtype == jnp.float16
    assert q.bits_per_weight == pytest.approx(2 + 16 * 4 / 60)
    near = np.abs(x[:, None] - table).argmin(1)
    np.testing.assert_array_equal(np.asarray(q.unpacked()), near)
    for c in range(5):
        best = optimum(x[:, c], h[:, c], 4)
        assert objective(x[:, c], h[:, c], table[:, c]) <= best * 1.002


def test_feedback_lowers_the_output_error():
    w, statistics = problem()
    plain = quantize(w, KMeans(3), Lloyd(), statistics=statistics)
    method = Lloyd(feedback=True)
    fitted = quantize(w, KMeans(3), method, statistics=statistics)
    assert loss(w, fitted, statistics) < 0.7 * loss(w, plain, statistics)
    again = quantize(
        w,
        KMeans(3),
        method,
        statistics=statistics,
        shared=method.prepare([w], KMeans(3), statistics),
    )
    for a, b in zip(jax.tree.leaves(fitted), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_one_table_for_the_matrix():
    w, statistics = problem()
    fmt = KMeans(3, 32)
    square = statistics.square[:, None]
    starts = [quantize(w, fmt, RTN(r), importance=square) for r in ("auto", "mse")]
    plain = quantize(w, fmt, Lloyd(), statistics=statistics)
    assert plain.codebook.shape == (8,)
    assert plain.scale.dtype == jnp.float16
    assert float(jnp.max(jnp.abs(plain.codebook))) == 1.0

    def weighted(q):
        e = w - np.asarray(q.dequantize())
        return float((np.asarray(square) * e * e).sum())

    assert weighted(plain) < min(map(weighted, starts))
    fitted = quantize(w, fmt, Lloyd(feedback=True), statistics=statistics)
    assert loss(w, fitted, statistics) < 0.7 * loss(w, plain, statistics)


def test_groups_of_zeros_stay_zeros(rng):
    w = rng.normal(size=(64, 3)).astype(np.float32)
    w[:32, 1] = 0
    q = quantize(w, KMeans(2, 32), Lloyd())
    got = np.asarray(q.dequantize())
    assert (got[:32, 1] == 0).all()
    assert np.isfinite(got).all()


def test_outliers_are_kept_apart(rng):
    w = rng.normal(size=(64, 40)).astype(np.float32)
    far = rng.choice(w.size, 10, replace=False)
    w.flat[far] = 9 * np.sign(w.flat[far])
    method = Lloyd(outliers=10 / w.size, sensitive=4 / w.size)
    q = quantize(w, KMeans(2), method)
    assert q.values.shape == (14,)
    assert q.rows.dtype == q.cols.dtype == jnp.uint16
    place = np.asarray(q.rows).astype(int) * 40 + np.asarray(q.cols)
    assert (np.diff(place) > 0).all()
    assert set(far) <= set(place.tolist())
    got = np.asarray(q.dequantize())
    np.testing.assert_allclose(got.flat[place], w.flat[place], rtol=1e-3)
    assert float(jnp.max(jnp.abs(q.base.codebook.astype(jnp.float32)))) < 4


def test_stacked_matrices_are_quantized_one_by_one(rng):
    w = rng.normal(size=(2, 40, 4)).astype(np.float32)
    both, one = quantize(w, KMeans(2), Lloyd()), quantize(w[1], KMeans(2), Lloyd())
    np.testing.assert_array_equal(
        np.asarray(both[1].codebook), np.asarray(one.codebook)
    )
    np.testing.assert_array_equal(np.asarray(both[1].codes), np.asarray(one.codes))


def test_description_round_trips():
    method = Lloyd(outliers=0.004, feedback=True, weighting="gradient")
    assert method_from_dict(method.to_dict()) == method
    assert method.needs == {"gradient", "hessian"}
    assert method.name == "lloyd-feedback-sparse"
    assert Lloyd().needs == frozenset()
    assert Lloyd().uses == {"square"}


def test_messages():
    w = np.ones((8, 4), np.float32)
    with pytest.raises(SpecError, match=r"fits learned tables.*got int4-g8; use fmt="):
        quantize(w, Int(4, 8), Lloyd())
    with pytest.raises(SpecError, match=r"lloyd-feedback: needs statistics.*hessian"):
        quantize(w, KMeans(2), Lloyd(feedback=True))
    with pytest.raises(SpecError, match=r"table of its own.*method=Lloyd\(\)"):
        quantize(w, KMeans(2))
    with pytest.raises(SpecError, match="iterations is -1, expected an integer >= 0"):
        Lloyd(iterations=-1)
    with pytest.raises(SpecError, match=r"outliers is 0\.7, expected 0 <= x < 0\.5"):
        Lloyd(outliers=0.7)
    with pytest.raises(SpecError, match="bits is 9"):
        KMeans(9)
