"""Learned rounding against a NumPy reference, and what is learned is what is stored."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.errors import NonFiniteError, SpecError
from qjax.formats import FP4, FP8, MXFP4, NF4, NVFP4, Cast, Int
from qjax.methods import RTN, SignRound, Statistics, method_from_dict, quantize
from qjax.methods.rounding import Offsets, Rounding
from qjax.methods.signround import tune_block

ROWS, COLS = 32, 5
FORMATS = [
    Int(1, 24),
    Int(8, 16),
    Int(4, 16, symmetric=False, scale_dtype="float16", zero_dtype="uint8"),
    Int(3, 5, symmetric=False, axis="out", scale_dtype="bfloat16"),
    NF4(64, double=True),
    FP4(32),
    MXFP4(),
    NVFP4(),
]


def names(fmt):
    return f"{fmt.name}-{getattr(fmt, 'scale_dtype', '')}"


@pytest.fixture
def w(rng):
    return (0.1 * rng.standard_t(4, size=(ROWS, COLS))).astype(np.float32)


@pytest.fixture
def statistics(rng):
    mix = np.eye(ROWS) + 0.3 * rng.standard_normal((ROWS, ROWS))
    x = rng.standard_normal((100, ROWS)) @ mix
    zeros = Statistics.zeros(ROWS, hessian=True)
    return zeros.add(jnp.asarray(x, jnp.float32))


def output_error(q, w, statistics):
    h = 2 * np.asarray(statistics.hessian, np.float64) / float(statistics.count)
    e = np.asarray(q.dequantize(), np.float64) - w
    return float(np.sum(e * (h @ e)))


def reference(w, h, s0, z0, bits, steps):
    """Algorithm 1 of arXiv 2309.05516 on tr(E^T H E), gradients by hand, float64."""
    w, h, s0 = (x.astype(np.float64) for x in (w, h, s0[:, None, :]))
    rows, cols = w.shape
    top, symmetric = 2**bits - 1, z0 is None
    g = w.reshape(len(s0), -1, cols)
    v, low, high = np.zeros_like(g), np.ones_like(s0), np.ones_like(s0)
    floor = -(2 ** (bits - 1)) if symmetric else 0
    z0 = z0 if symmetric else z0[:, None, :].astype(np.float64)
    least, best = np.inf, None
    for t in range(steps + 1):
        if symmetric:
            s, z = s0 * high, 0.0
        else:
            s = s0 * (low + high) / 2
            z = (z0 + top / 2 * (low - 1)) * s0 / s
        u = (g / s).astype(np.float32) + v + z  # extremes lie on a tie: as stored
        q = np.clip(np.round(u), floor, floor + top)
        fake = ((q - z) * s).reshape(rows, cols)
        error = np.sum((fake - w) * (h @ (fake - w)))
        if error < least:
            least, best = error, (fake, q)
        slope = (2 * h @ (fake - w)).reshape(g.shape)
        inside = (u >= floor - 0.5) & (u <= floor + top + 0.5)
        rate = (1 - t / steps) / steps
        ds = np.sum(slope * (q - z - inside * g / s), 1, keepdims=True)
        dz = np.sum(slope * s * (inside - 1.0), 1, keepdims=True)
        if symmetric:
            step = rate * np.sign(ds * s0)
            high = np.clip(high - step, 0.1, 2)
        else:
            through = ds - dz * z / s  # the zero-point is in units of the scale
            dlow = through * s0 / 2 + dz * top / 2 * s0 / s
            dhigh = through * s0 / 2
            low = np.clip(low - rate * np.sign(dlow), 0.1, 2)
            high = np.clip(high - rate * np.sign(dhigh), 0.1, 2)
        v = np.clip(v - rate * np.sign(slope * s * inside), -0.5, 0.5)
    return best[0], least


@pytest.mark.parametrize("symmetric", [True, False])
def test_agrees_with_a_numpy_reference(w, statistics, symmetric):
    h = np.asarray(statistics.mean_hessian())
    fmt = Int(3, 16, symmetric=symmetric)
    plain = quantize(w, fmt)
    zero = None if symmetric else np.asarray(plain.zero)
    want, least = reference(w, h, np.asarray(plain.scale), zero, 3, 20)
    q = quantize(w, fmt, SignRound(20, rule="auto"), statistics=statistics)
    np.testing.assert_allclose(q.dequantize(), want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(output_error(q, w, statistics), least, rtol=1e-3)
    assert least < 0.9 * output_error(plain, w, statistics)


@pytest.mark.parametrize("fmt", FORMATS, ids=names)
def test_what_is_learned_is_what_is_stored(rng, fmt):
    # In two programs: nothing may depend on what is compiled together.
    w = jnp.asarray(0.1 * rng.standard_t(4, size=(64, 5)), jnp.float32)
    plain = quantize(w, fmt)

    def moved(w):
        rounding = Rounding.build(w, fmt, RTN().fit)
        s = rounding.start()
        uniform = jax.random.uniform(jax.random.key(1), s.v.shape) - 0.5
        ends = 1 + 0.4 * (jax.random.uniform(jax.random.key(2), s.high.shape) - 0.5)
        return rounding, Offsets(uniform, ends, None if s.low is None else 2 - ends)

    @jax.jit
    def fakes(w):
        rounding, offsets = moved(w)
        return rounding.fake(offsets), rounding.fake(rounding.start())

    fake, start = fakes(w)
    if not getattr(fmt, "double", False):  # whose codes RTN takes for exact scales
        np.testing.assert_array_equal(np.asarray(start), plain.dequantize())
    stored = jax.jit(lambda w: moved(w)[0].freeze(moved(w)[1]))(w)
    np.testing.assert_array_equal(np.asarray(fake), stored.dequantize())
    assert np.any(np.asarray(fake) != np.asarray(plain.dequantize()))


@pytest.mark.parametrize("fmt", [NF4(32), NVFP4()], ids=names)
def test_other_grids_improve(w, statistics, fmt):
    learned = quantize(w, fmt, SignRound(60), statistics=statistics)
    plain = quantize(w, fmt, RTN("mse"))
    assert output_error(learned, w, statistics) < output_error(plain, w, statistics)


def test_offsets_choose_between_neighbours(w):
    rounding = Rounding.build(jnp.asarray(w), NF4(32), RTN().fit)
    start = rounding.start()
    scale = np.abs(w).max(0)
    table = np.asarray(NF4(32).table, np.float64)
    for v in (-0.5, 0.5):
        got = rounding.fake(start._replace(v=jnp.full_like(start.v, v))) / scale
        u = w.astype(np.float64) / scale
        index = np.searchsorted(table, u, side="right") - 1  # table[i] <= u
        want = index if v < 0 else np.searchsorted(table, u, side="left")
        want = np.clip(want, 0, 15)
        inner = (np.abs(u) < 1) & (np.abs(u[None] - table[:, None, None]) > 1e-6).all(0)
        np.testing.assert_allclose(np.asarray(got)[inner], table[want][inner], 1e-5)


def test_dead_inputs_keep_their_start(w, statistics):
    h = np.asarray(statistics.hessian).copy()
    h[:16], h[:, :16] = 0, 0  # a whole group never fires: a singular Hessian
    dead = dataclasses.replace(statistics, hessian=jnp.asarray(h))
    fmt = Int(2, 16)
    learned = quantize(w, fmt, SignRound(20, rule="auto"), statistics=dead)
    plain = quantize(w, fmt)
    a, b = np.asarray(learned.dequantize()), np.asarray(plain.dequantize())
    np.testing.assert_array_equal(a[:16], b[:16])
    assert np.any(a[16:] != b[16:])


def block(weights, x, rest):
    h = jnp.tanh(jnp.matmul(x * rest, weights["up"], precision="highest"))
    return x + jnp.matmul(h, weights["down"], precision="highest")


@pytest.fixture
def problem(rng):
    up = (0.2 * rng.standard_normal((16, 24))).astype(np.float32)
    down = (0.2 * rng.standard_normal((24, 16))).astype(np.float32)
    x = rng.standard_normal((7, 5, 16)).astype(np.float32)
    norm = np.exp(rng.standard_normal(16)).astype(np.float32)
    y = x + np.tanh(x * norm @ up) @ down
    return {"up": up, "down": down}, x, y, norm


def numpy_error(q, x, y, norm):
    up, down = (np.asarray(q[k].dequantize(), np.float64) for k in ("up", "down"))
    return np.mean(np.square(x + np.tanh(x * norm @ up) @ down - y))


FMTS = {"up": Int(2, 8, symmetric=False), "down": Int(3, 24)}
METHOD = SignRound(40, batch=3, rule="auto")


def test_block_reports_the_error_of_what_it_returns(problem):
    weights, x, y, norm = problem
    q, report = tune_block(block, weights, FMTS, x, y, METHOD, rest=norm)
    plain = {path: quantize(w, FMTS[path]) for path, w in weights.items()}
    np.testing.assert_allclose(report.start, numpy_error(plain, x, y, norm), 1e-4)
    np.testing.assert_allclose(report.best, numpy_error(q, x, y, norm), 1e-4)
    assert report.best < 0.6 * report.start
    assert report.best == min(report.checks) and len(report.checks) == 5
    again, other = tune_block(block, weights, FMTS, x, y, METHOD, rest=norm)
    assert other == report
    for path in FMTS:
        assert q[path].format == FMTS[path]
        np.testing.assert_array_equal(q[path].codes, again[path].codes)


def test_blocks_of_one_shape_share_a_program(problem):
    weights, x, y, norm = problem
    traced = []

    def counted(weights, x, rest):
        traced.append(1)
        return block(weights, x, rest)

    method = SignRound(4, batch=3)
    tune_block(counted, weights, FMTS, x, y, method, rest=norm)
    count = len(traced)
    halves = {path: w / 2 for path, w in weights.items()}
    _, report = tune_block(counted, halves, FMTS, 2 * x, y, method, rest=norm / 2)
    assert count == len(traced) and report.best <= report.start


def test_padding_does_not_count(problem):
    weights, x, y, norm = problem
    method = SignRound(10, batch=7, rule="auto")
    mask = np.ones(x.shape[:2], np.float32)
    mask[:, 3:] = 0
    spoiled = np.where(mask[..., None] > 0, y, 1e3).astype(np.float32)
    masked = tune_block(block, weights, FMTS, x, spoiled, method, rest=norm, mask=mask)
    cut = tune_block(block, weights, FMTS, x[:, :3], y[:, :3], method, rest=norm)
    np.testing.assert_allclose(masked[1].start, cut[1].start, 1e-4)
    np.testing.assert_allclose(masked[1].best, cut[1].best, 1e-2)


def test_a_hopeless_rate_keeps_the_start(problem):
    weights, x, y, norm = problem
    method = SignRound(1, lr=10.0, batch=7, rule="auto", checks=1)
    q, report = tune_block(block, weights, FMTS, x, y, method, rest=norm)
    assert report.step == 0 and report.best == report.start < report.checks[0]
    for path, w in weights.items():
        plain = quantize(w, FMTS[path])
        np.testing.assert_array_equal(q[path].codes, plain.codes)


def test_fields_survive_json():
    method = SignRound(50, lr=0.01, minmax_lr=0.0, batch=4, seed=3, rule="mse")
    assert method_from_dict(method.to_dict()) == method


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"steps": 0}, "steps is 0, expected a positive integer"),
        ({"batch": 1.5}, r"batch is 1\.5"),
        ({"lr": 0.0}, "lr > 0 or None"),
        ({"seed": -1}, "non-negative integer seed"),
        ({"rule": "best"}, "rule is 'best'"),
    ],
)
def test_bad_fields(fields, text):
    with pytest.raises(SpecError, match=text):
        SignRound(**fields)


def test_bad_requests(w, statistics, problem):
    with pytest.raises(SpecError, match="needs statistics"):
        quantize(w, Int(3, 16), SignRound())
    for fmt in (FP8(), Cast()):
        with pytest.raises(SpecError, match=f"cannot learn rounding to {fmt.name}"):
            quantize(w, fmt, SignRound(), statistics=statistics)
    with pytest.raises(SpecError, match=r"weight \[16, 5\] and Hessian \[32, 32\]"):
        quantize(w[:16], Int(3, 16), SignRound(), statistics=statistics)
    weights, x, y, norm = problem
    with pytest.raises(SpecError, match="same paths"):
        tune_block(block, weights, {"up": Int(2, 8)}, x, y, rest=norm)
    with pytest.raises(SpecError, match=r"equal samples and time"):
        tune_block(block, weights, FMTS, x, y[:3], rest=norm)
    with pytest.raises(SpecError, match=r"mask \[7\]"):
        tune_block(block, weights, FMTS, x, y, rest=norm, mask=np.ones(7))
    with pytest.raises(SpecError, match="experts of a stack"):
        stack = {"up": np.ones((2, 16, 24)), "down": weights["down"]}
        tune_block(block, stack, FMTS, x, y, rest=norm)
    with pytest.raises(NonFiniteError, match="output error is nan"):
        tune_block(block, weights, FMTS, x, y * np.nan, METHOD, rest=norm)
