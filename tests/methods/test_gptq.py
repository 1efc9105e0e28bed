"""GPTQ against its original in NumPy, its orders and ranges, and what it refuses."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.errors import NonFiniteError, SpecError
from qjax.formats import FP8, MXFP4, NF4, NVFP4, Cast, Int
from qjax.methods import GPTQ, method_from_dict, quantize
from qjax.methods.feedback import levels
from qjax.methods.hessian import MAX_RETRIES, check_curvature, damped, factor
from qjax.ops import matmul
from qjax.wrappers import Permuted

from .calibrated import correlated, output_error, statistics_of
from .gptq_reference import gptq

ROWS, COLS = 96, 20


def asym(bits, group):
    return Int(bits, group, symmetric=False, zero_dtype="uint8")


@pytest.fixture
def x(rng):
    return correlated(rng, ROWS)


@pytest.fixture
def w(rng):
    return rng.standard_t(5, size=(ROWS, COLS)).astype(np.float32)


REFERENCE = [
    (asym(4, 32), GPTQ(static_groups=False), {}),
    (asym(4, 32), GPTQ(), {"static_groups": True}),
    (Int(4, 32), GPTQ(damp=0.1, static_groups=False), {"percdamp": 0.1}),
    (asym(3, "channel"), GPTQ(), {"group": None}),
    (asym(3, 32), GPTQ(act_order=True, static_groups=False), {"actorder": True}),
    (
        asym(3, 32),
        GPTQ(act_order="group", static_groups=False),
        {"sorted_groups": True},
    ),
    (
        asym(3, 32),
        GPTQ(act_order=True, static_groups=True),
        {"actorder": True, "static_groups": True},
    ),
]


@pytest.mark.parametrize(
    ("fmt", "method", "options"), REFERENCE, ids=lambda v: getattr(v, "name", None)
)
def test_agrees_with_the_original(x, w, fmt, method, options):
    stats = statistics_of(x)
    options = {"group": fmt.group, "sym": fmt.symmetric} | options
    # The original finds scales on columns that lack the updates of their own block, so
    # only with blocks of one group does it do what its paper says.
    block = options["group"] or 32
    expected = gptq(
        w, np.asarray(stats.hessian), bits=fmt.bits, blocksize=block, **options
    )
    got = np.asarray(quantize(w, fmt, method, statistics=stats).dequantize())
    # A weight on the border of two codes may fall to the other side, and its error
    # then changes the rows behind it; everywhere else the numbers are equal.
    same = np.isclose(got, expected, rtol=1e-3, atol=1e-4).all(axis=0)
    assert same.mean() >= 0.8
    a, b = (np.sum((x @ (v - w)) ** 2) for v in (got, expected))
    assert a == pytest.approx(b, rel=0.03)


FORMATS = [
    Int(3, 40),  # a short last group
    Int(3, "tensor", symmetric=False),
    Int(3, 7, axis="out", symmetric=False, scale_dtype="float16"),
    NF4(32),
    NF4(32, double=True),
    MXFP4(),
    NVFP4(),
    FP8("e5m2", "block"),
    Cast("float16"),
]


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_every_format_errs_less_than_round_to_nearest(x, w, fmt):
    stats = statistics_of(x)
    q = quantize(w, fmt, GPTQ(act_order="group"), statistics=stats)
    plain = quantize(w, fmt)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), q) == jax.tree.map(
        lambda a: (a.shape, a.dtype), plain
    )
    assert output_error(x, w, q) < 0.75 * output_error(x, w, plain)


def test_groups_in_activation_order_are_permuted(x, w):
    stats = statistics_of(x)
    method = GPTQ(act_order=True, static_groups=False)
    q = quantize(w, asym(2, 32), method, statistics=stats)
    assert isinstance(q, Permuted)
    order = np.argsort(-np.asarray(stats.hessian).diagonal(), kind="stable")
    np.testing.assert_array_equal(q.perm, order)
    np.testing.assert_allclose(
        matmul(jnp.asarray(x), q), x @ np.asarray(q.dequantize()), rtol=2e-3, atol=2e-2
    )


@pytest.mark.parametrize("fmt", [asym(2, 32), MXFP4()], ids=lambda f: f.name)
def test_searched_ranges_err_less(x, w, fmt):
    stats = statistics_of(x)
    found = [
        output_error(x, w, quantize(w, fmt, GPTQ(range=rule), statistics=stats))
        for rule in ("minmax", "mse", "hessian")
    ]
    assert found[1] < found[0]
    assert found[2] < found[0]


@pytest.mark.parametrize(
    "fmt",
    [Int(4, 48, symmetric=False), Int(3, 4, axis="out", symmetric=False)],
    ids=lambda f: f.name,
)
def test_slices_of_columns_change_nothing(x, w, fmt, monkeypatch):
    shared = GPTQ().prepare([w], fmt, statistics_of(x))
    whole = GPTQ()(jnp.asarray(w), fmt, shared=shared)
    monkeypatch.setattr("qjax.methods.layerwise.SLICE", 8)  # 8, 8 and 4 again with 4
    sliced = GPTQ()(jnp.asarray(w), fmt, shared=shared)
    same = np.asarray(sliced.unpacked()) == np.asarray(whole.unpacked())
    assert same.all(axis=0).mean() >= 0.9  # sums of another order, see above
    scales = np.isclose(sliced.scales(), whole.scales(), rtol=1e-3)
    assert scales.all(axis=0).mean() >= 0.8


def test_inputs_shared_by_weights_are_factored_once(x, w):
    stats, fmt, method = statistics_of(x), asym(4, 32), GPTQ(act_order=True)
    shared = method.prepare([w, w[:, :4]], fmt, stats)
    assert check_curvature(shared, "layer") == 0
    q = quantize(w, fmt, method, statistics=stats)
    r = quantize(w, fmt, method, shared=shared)
    for a, b in zip(jax.tree.leaves(q), jax.tree.leaves(r), strict=True):
        np.testing.assert_array_equal(a, b)


def test_large_hessians_are_factored_in_blocks(rng):
    root = rng.normal(size=(768, 800))
    h = jnp.asarray(root @ root.T, jnp.float32)
    m, tries = factor(h, 0.01)
    exact = np.asarray(damped(h, 0.01), np.float64)
    upper = np.linalg.cholesky(exact[::-1, ::-1])[::-1, ::-1]
    np.testing.assert_allclose(m, upper / np.diag(upper), atol=1e-5)
    assert int(tries) == 0
    _, tries = factor(-h, 1e-3)  # not positive: damped until it is
    assert int(tries) == MAX_RETRIES


def test_singular_hessians_raise_the_damping(w):
    flat = np.ones((4, ROWS), np.float32)  # rank one, with one dead input
    flat[:, 7] = 0
    stats = statistics_of(flat)
    method = GPTQ(damp=1e-9)
    shared = method.prepare([w], asym(4, 32), stats)
    assert 1 <= check_curvature(shared, "layer") <= 8
    q = quantize(w, asym(4, 32), method, shared=shared)
    got = np.asarray(q.dequantize())
    assert np.isfinite(got).all()
    assert np.abs(got[7] - w[7]).max() < np.abs(w).max() / 4  # dead, but kept


def test_a_hessian_that_is_not_finite_is_reported(x, w):
    stats = statistics_of(x)
    assert stats.hessian is not None
    stats = dataclasses.replace(stats, hessian=stats.hessian.at[3, 5].set(jnp.nan))
    stats = dataclasses.replace(stats, hessian=stats.hessian.at[5, 3].set(jnp.nan))
    shared = GPTQ().prepare([w], asym(4, 32), stats)
    with pytest.raises(NonFiniteError, match=r"layers\.0\.mlp: the Hessian .* 8 times"):
        check_curvature(shared, "layers.0.mlp")


def test_repeats_give_the_same_bytes(x, w):
    fmt, method = asym(2, 32), GPTQ(act_order=True)
    shared = method.prepare([w], fmt, statistics_of(x))
    first, second = (
        # Two functions, so that the program is compiled twice.
        jax.tree.leaves(jax.jit(lambda w, s: method(w, fmt, shared=s))(w, shared))
        for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def test_sixteen_bit_weights_stay_sixteen_bit(x, w):
    stats = statistics_of(x)
    q = quantize(
        w.astype(jnp.bfloat16), asym(3, 32), GPTQ(act_order=True), statistics=stats
    )
    assert q.dequantize().dtype == jnp.bfloat16


def test_refuses_what_it_cannot_do(x, w):
    stats = statistics_of(x)
    with pytest.raises(SpecError, match=r"needs statistics .* pass calibration="):
        quantize(w, asym(4, 32), GPTQ())
    with pytest.raises(SpecError, match="cross output columns"):
        quantize(w, NF4(64), GPTQ(), statistics=stats)
    with pytest.raises(SpecError, match=r"one matrix \[in, out\]"):
        quantize(w[None], asym(4, 32), GPTQ(), statistics=stats)
    nested = Int(4, 32, scale_dtype="uint8")
    with pytest.raises(SpecError, match="quantized together"):
        quantize(w, nested, GPTQ(static_groups=False), statistics=stats)
    for bad in ({"damp": -1}, {"act_order": "x"}, {"range": "best"}):
        with pytest.raises(SpecError, match=next(iter(bad))):
            GPTQ(**bad)


def test_json_round_trip():
    method = GPTQ(damp=0.02, act_order="group", range="mse")
    assert method_from_dict(method.to_dict()) == method
    assert method.name == "gptq-group-order-mse"


@pytest.mark.parametrize("rows", [0, 1, 16, 48, 100, 1024])
@pytest.mark.parametrize("size", [1, 7, 96, 300, 768, 4096])
def test_levels_divide(size, rows):
    sizes, padded = levels(size, rows, 1)
    assert padded % sizes[0] == 0
    assert padded >= size
    assert padded <= -(-size // (rows or 1)) * (rows or 1) + 256
    assert sizes[-1] == 1 or sizes == (1,)
    assert all(a % b == 0 and a > b for a, b in itertools.pairwise(sizes))
    assert not rows or rows in sizes
