"""The walk search and its error feedback against NumPy, and what the method refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax.pallas_kernels.native as native
from qjax.errors import SpecError
from qjax.formats import Int, Trellis
from qjax.formats.trellis import codebook_values
from qjax.methods import (
    RTN,
    Statistics,
    TrellisLDLQ,
    method_from_dict,
    quantize,
)
from qjax.pallas_kernels.quantize import trellis as kernel
from qjax.trellis import Incoherent, TrellisTensor

VALUES = codebook_values("3inst")


def cheapest(x: np.ndarray, bits: int, seam: int) -> float:
    """Least squared error of walks whose first state follows the low bits `seam`."""
    size = 2 ** (16 - bits)
    cost = np.full(size, np.inf)
    cost[seam] = 0
    states = np.arange(2**16)
    for number in x.astype(np.float64):
        total = cost[states >> bits] + (number - VALUES) ** 2
        cost = total.reshape(2**bits, size).min(0)
    return cost[seam]


def found(x, bits, **options):
    return np.asarray(kernel.search(jnp.asarray(x), VALUES, bits, **options))


@pytest.mark.parametrize("bits", [2, 4])
def test_the_walk_is_the_cheapest_of_its_seam(bits, rng):
    x = rng.normal(size=(2, 256)).astype(np.float32) * 1.2
    for tile, walk in zip(x, found(x, bits).astype(np.int64), strict=True):
        np.testing.assert_array_equal(  # every state follows the one before it
            walk >> bits, np.roll(walk, 1) & (2 ** (16 - bits) - 1)
        )
        cost = np.sum((tile.astype(np.float64) - VALUES[walk]) ** 2)
        least = cheapest(tile, bits, int(walk[0]) >> bits)
        assert least * (1 - 1e-9) <= cost <= least * 1.003


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_every_search_finds_the_same_walk(bits, rng):
    x = rng.normal(size=(1, 256)).astype(np.float32)
    x[0, :9] = 100.0, -100.0, 0, 4.5, -4.5, 0, 0, 0, 0
    plain = found(x, bits, backend="xla")
    if not native.status().loaded:
        pytest.skip("native CPU kernels are absent")
    best = native.status().isa
    try:
        for isa in (best, "plain"):
            assert native.choose_isa(isa)
            np.testing.assert_array_equal(found(x, bits, backend="native"), plain)
    finally:
        native.choose_isa(best)


@pytest.mark.parametrize(("bits", "most"), [(2, 0.074), (3, 0.0192), (4, 0.0051)])
def test_error_of_normal_weights(bits, most, rng):
    """QTIP, table 1: 0.069, 0.018 and 0.0046 for the best codes of 16-bit states."""
    w = rng.normal(size=(64, 64)).astype(np.float32)
    q = quantize(w, Trellis(bits))
    miss = np.mean((np.asarray(q.dequantize()) - w) ** 2) / np.mean(w**2)
    assert miss < most


def correlated(rows, seed=0):
    """Inputs in a few directions, two that never fire, and one much larger."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(400, 12)) @ rng.normal(size=(12, rows))
    x = x + 0.1 * rng.normal(size=x.shape)
    x[:, 3] *= 30
    x[:, [5, 40]] = 0
    return x.astype(np.float32)


def statistics(x):
    return Statistics.zeros(x.shape[1], hessian=True).add(jnp.asarray(x))


def hadamard_of(n):
    h = np.ones((1, 1))
    while h.shape[0] < min(n & -n, 128):
        h = np.block([[h, h], [h, -h]])
    return np.kron(np.eye(n // len(h)), h / len(h) ** 0.5)


def reference(w, x, q, damp=0.025):
    """The error of LDLQ by the definition, with the sides and scale that `q` has."""
    rows, cols = w.shape
    left, right = (np.asarray(q.factors(s), np.float64) for s in ("left", "right"))
    hl, hr = hadamard_of(rows), hadamard_of(cols)
    u = hl @ (w / left[:, None] / right) @ hr
    h = x.T.astype(np.float64) @ x * 2 / len(x)
    h = hl @ (h * left * left[:, None]) @ hl
    h = h + damp * np.mean(np.diagonal(h)) * np.eye(rows)
    blocks = [slice(i, i + 16) for i in range(0, rows, 16)]
    m, d = np.eye(rows), h.copy()
    for b in reversed(blocks):  # eliminate the last block, then the one before it
        m[: b.start, b] = d[: b.start, b] @ np.linalg.inv(d[b, b])
        d[: b.start, : b.start] -= m[: b.start, b] @ d[b, : b.start]
    scale = float(q.base.scale[0, 0])
    v = np.zeros_like(u)
    order = [(t % 4 * 2 + (0, 1, 8, 9)[k % 4], t // 4 + 8 * (k // 4))
             for t in range(32) for k in range(8)]  # fmt: skip
    for b in blocks:
        target = u[b] + m[: b.start, b].T @ (u - v)[: b.start]
        tiles = [[target[r, c + j] for r, c in order] for j in range(0, cols, 16)]
        walks = found(np.float32(np.array(tiles) / scale), 2, around=64)
        for j, walk in enumerate(walks):
            for (r, c), state in zip(order, walk, strict=True):
                v[b.start + r, 16 * j + c] = VALUES[state] * scale
    return left[:, None] * (hl @ v @ hr) * right


def output_error(w, v, x):
    return np.sum((x.astype(np.float64) @ (np.asarray(v, np.float64) - w)) ** 2)


def test_error_feedback_against_the_definition(rng):
    w, x = rng.normal(size=(48, 32)).astype(np.float32), correlated(48)
    q = quantize(w, Trellis(2), statistics=statistics(x))
    want = output_error(w, reference(w, x, q), x)
    got = output_error(w, q.dequantize(), x)
    # One rounding that falls the other way changes all that follow.
    assert got == pytest.approx(want, rel=0.05)
    plain = output_error(w, quantize(w, Trellis(2)).dequantize(), x)
    assert got < 0.5 * plain


def test_beats_rounding_to_integers_of_more_bits(rng):
    w, x = rng.normal(size=(128, 32)).astype(np.float32), correlated(128)
    q = quantize(w, Trellis(2), statistics=statistics(x))
    grid = quantize(w, Int(3, 64, symmetric=False), RTN("mse"))
    assert q.bits_per_weight < grid.bits_per_weight
    errors = [output_error(w, t.dequantize(), x) for t in (q, grid)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("equalize", [True, False])
def test_bits_per_weight(equalize):
    method, over = TrellisLDLQ(equalize=equalize), 0.0411 if equalize else 0.0137
    for shape in ((256, 256), (256, 768), (768, 256), (256, 128)):
        w = jax.ShapeDtypeStruct(shape, jnp.float32)
        q = jax.eval_shape(lambda w: method(w, Trellis(2)), w)
        assert 2 < q.bits_per_weight < 2 + over


def test_equalizing_uneven_weights(rng):
    """Columns of very different size."""
    w = (rng.normal(size=(64, 64)) * np.exp(rng.normal(size=64))).astype(np.float32)
    x = rng.normal(size=(500, 64)).astype(np.float32)
    errors = [
        output_error(
            w, quantize(w, Trellis(3), m, statistics=statistics(x)).dequantize(), x
        )
        for m in (TrellisLDLQ(equalize=False), TrellisLDLQ())
    ]
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("rotate", ["both", "in", "none"])
def test_rotations(rotate, rng):
    w = rng.normal(size=(32, 48)).astype(np.float32)
    q = quantize(w, Trellis(4), TrellisLDLQ(rotate=rotate))
    assert isinstance(q, TrellisTensor if rotate == "none" else Incoherent)
    assert np.mean((np.asarray(q.dequantize()) - w) ** 2) < 0.006


@pytest.mark.parametrize("case", ["zero-weight", "zero-hessian", "one-token"])
def test_degenerate_input(case, rng):
    w, x = rng.normal(size=(32, 16)).astype(np.float32), correlated(48)[:, :32]
    if case == "zero-weight":
        w = w * 0
    x = {"zero-hessian": x * 0, "one-token": x[:1]}.get(case, x)
    v = np.asarray(quantize(w, Trellis(2), statistics=statistics(x)).dequantize())
    assert np.isfinite(v).all()
    assert np.sum((v - w) ** 2) <= np.sum(w**2)


def test_leading_axes_shared_factors_and_repetition(rng):
    w = rng.normal(size=(2, 32, 16)).astype(np.float32)
    q = quantize(w, Trellis(3))
    assert q.shape == w.shape
    for i in range(2):
        one = quantize(w[i], Trellis(3))
        assert jax.tree.structure(one) == jax.tree.structure(q[i])
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(q[i]), strict=True):
            np.testing.assert_array_equal(a, b)
    stats, method = statistics(correlated(48)[:, :32]), TrellisLDLQ()
    shared = method.prepare([w[0], w[1]], Trellis(3), stats)
    a = quantize(w[0], Trellis(3), method, statistics=stats, shared=shared)
    b = quantize(w[0], Trellis(3), method, statistics=stats)
    np.testing.assert_array_equal(a.base.codes, b.base.codes)


def test_what_the_method_refuses(rng):
    w = rng.normal(size=(32, 24)).astype(np.float32)
    with pytest.raises(SpecError, match=r"out=24.*multiples of 16"):
        quantize(w, Trellis(2))
    with pytest.raises(SpecError, match="encodes the Trellis format, got int4"):
        quantize(w, Int(4, 16), TrellisLDLQ())
    with pytest.raises(SpecError, match="TrellisLDLQ"):
        quantize(w[:, :16], Trellis(2), RTN())
    with pytest.raises(SpecError, match="rotate is 'x'"):
        TrellisLDLQ(rotate="x")
    for bad in ({"around": 0}, {"around": 129}, {"seed": -1}, {"around": 1.5}):
        with pytest.raises(SpecError, match="around <= 128"):
            TrellisLDLQ(**bad)
    with pytest.raises(SpecError, match="damp"):
        TrellisLDLQ(damp=-1.0)
    method = TrellisLDLQ(damp=0.02, seed=3)
    assert method_from_dict(method.to_dict()) == method


def test_empty_and_half_precision(rng):
    assert quantize(np.zeros((0, 16), np.float32), Trellis(2)).shape == (0, 16)
    q = quantize(jnp.asarray(rng.normal(size=(16, 16)), jnp.bfloat16), Trellis(4))
    assert q.dequantize().dtype == jnp.bfloat16
