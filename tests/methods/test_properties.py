"""What quantization guarantees, as properties over random weights.

Shapes are fixed, so that every format compiles once; hypothesis draws the values.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.formats import FP4, FP8, MXFP4, MXFP8, NF4, NVFP4, Cast, Int
from qjax.methods import RTN, quantize
from qjax.methods.rtn import round_to_scales

ROWS, COLS = 64, 6

SYMMETRIC = [Int(b, 16) for b in (1, 2, 3, 4, 8)]
ASYMMETRIC = [Int(b, 16, symmetric=False) for b in (2, 4)]
MINIFLOATS = [FP8(), FP8("e5m2", "tensor"), MXFP4(), MXFP8(), NVFP4()]
TABLES = [NF4(32), NF4(32, double=True), FP4(64)]
OTHERS = [Int(4, "channel"), Int(4, 16, scale_dtype="uint8"), Cast()]
ALL = SYMMETRIC + ASYMMETRIC + MINIFLOATS + TABLES + OTHERS

few = settings(max_examples=12, derandomize=True, deadline=None)
dense = jax.jit(lambda q: q.dequantize(jnp.float32))
ids = lambda f: f.name + ("-nested" if f == OTHERS[1] else "")  # noqa: E731


@st.composite
def weights(draw, low=-20, high=20):
    """Normal or heavy-tailed, of any magnitude, with zeros here and there."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    w = rng.normal(size=(ROWS, COLS))
    if draw(st.booleans()):
        w = rng.standard_t(1.5, size=(ROWS, COLS))
    w[rng.random(w.shape) < draw(st.sampled_from([0.0, 0.5]))] = 0
    return (w * 2.0 ** draw(st.integers(low, high))).astype(np.float32)


def values(w, fmt) -> np.ndarray:
    return np.asarray(dense(quantize(w, fmt)))


@pytest.mark.parametrize("fmt", SYMMETRIC + ASYMMETRIC, ids=ids)
@few
@given(w=weights())
def test_error_is_at_most_half_a_step(fmt, w):
    q = quantize(w, fmt)
    scale = np.repeat(np.asarray(q.scales()), 16, axis=0)
    miss = np.abs(np.asarray(dense(q)).astype(np.float64) - w)
    ulp = np.spacing(np.abs(w).max(axis=0, keepdims=True)) * 4
    assert (miss <= scale / 2 + ulp).all()


@pytest.mark.parametrize("fmt", [*MINIFLOATS, Cast()], ids=ids)
@few
@given(w=weights())
def test_sign_symmetry(fmt, w):
    np.testing.assert_array_equal(values(-w, fmt), -values(w, fmt))


@pytest.mark.parametrize("fmt", ALL, ids=ids)
@few
@given(w=weights(-8, 8), power=st.integers(-8, 8))
def test_equivariance_under_powers_of_two(fmt, w, power):
    factor = np.float32(2.0**power)
    np.testing.assert_array_equal(values(w * factor, fmt), values(w, fmt) * factor)


@pytest.mark.parametrize("fmt", [f for f in ALL if f not in TABLES[1:2]], ids=ids)
@few
@given(w=weights(), seed=st.integers(0, 99))
def test_permuting_columns_commutes(fmt, w, seed):
    if getattr(fmt, "scale_dtype", "") == "uint8":
        return  # blocks of nested scales run over columns
    order = np.random.default_rng(seed).permutation(COLS)
    np.testing.assert_array_equal(values(w[:, order], fmt), values(w, fmt)[:, order])


@pytest.mark.parametrize("fmt", [*ASYMMETRIC, FP8(), NF4(32), FP4(64)], ids=ids)
@few
@given(w=weights())
def test_absmax_quantization_is_a_fixed_point(fmt, w):
    once = quantize(w, fmt)
    twice = quantize(dense(once), fmt)
    a, b = (np.asarray(dense(q)) for q in (once, twice))
    tolerance = 1e-5 * np.abs(w).max(axis=0, keepdims=True)
    assert (np.abs(a - b) <= tolerance).all()


@pytest.mark.parametrize("fmt", SYMMETRIC + MINIFLOATS, ids=ids)
@few
@given(w=weights(-8, 8))
def test_requantizing_with_the_same_scales_is_exact(fmt, w):
    q = quantize(w, fmt)
    again = jax.jit(round_to_scales, static_argnums=1)(
        dense(q), fmt, q.scale, None, getattr(q, "global_scale", None)
    )
    np.testing.assert_array_equal(np.asarray(dense(again)), np.asarray(dense(q)))


@pytest.mark.parametrize("fmt", ALL, ids=ids)
def test_zeros_stay_zeros(fmt):
    got = values(np.zeros((ROWS, COLS), np.float32), fmt)
    if fmt == Int(1, 16):  # one bit has no zero; the scale is then 1
        assert set(np.unique(got)) <= {-0.5, 0.5}
    else:
        np.testing.assert_array_equal(got, 0)


@pytest.mark.parametrize("fmt", ALL, ids=ids)
@pytest.mark.parametrize("value", [1e-38, 1e37, -1.0])
def test_extreme_and_constant_weights_stay_finite(fmt, value):
    got = values(np.full((ROWS, COLS), value, np.float32), fmt)
    assert np.isfinite(got).all()
    if abs(value) == 1 and fmt.code_bits > 1:
        np.testing.assert_allclose(got, value, rtol=0.34)


@pytest.mark.parametrize("fmt", [Int(2, 16, symmetric=False), FP8(), NF4(32)], ids=ids)
def test_stochastic_rounding_is_unbiased_and_reproducible(fmt, rng):
    w = rng.normal(size=(ROWS, COLS)).astype(np.float32)
    n = 800
    method = RTN(stochastic=True)

    @jax.jit
    def draw(keys):
        one = lambda key: method(jnp.asarray(w), fmt, key=key).dequantize()  # noqa: E731
        draws = jax.vmap(one)(keys)
        return draws.mean(0), draws.std(0), draws[:2]

    mean, std, first = map(np.asarray, draw(jax.random.split(jax.random.key(3), n)))
    floor = 0.03 * np.ptp(w, axis=0)  # a choice too rare to be drawn has no spread
    bound = 5 * np.maximum(std, floor) / np.sqrt(n)
    assert (np.abs(mean - w) <= bound).all()
    assert (first[0] != first[1]).any()
    key = jax.random.key(7)
    a, b = (quantize(w, fmt, method, key=key) for _ in range(2))
    np.testing.assert_array_equal(a.codes, b.codes)
    other = quantize(w, fmt, method, key=jax.random.key(8))
    assert (np.asarray(a.codes) != np.asarray(other.codes)).any()


def test_nvfp4_uses_the_whole_range_of_its_scales(rng):
    w = (rng.normal(size=(ROWS, COLS)) * 1e-3).astype(np.float32)
    q = quantize(w, NVFP4())
    assert q.scale.dtype == jnp.float8_e4m3fn
    assert np.asarray(q.scale).astype(np.float32).max() == 448
    np.testing.assert_allclose(q.global_scale, 448 * 6 / np.abs(w).max(), rtol=1e-6)
    assert np.asarray(q.unpacked()).max() <= 15


@pytest.mark.parametrize("fmt", [MXFP4(), MXFP8()], ids=ids)
def test_mx_scales_never_saturate(fmt, rng):
    w = (rng.standard_t(1.5, size=(ROWS, COLS))).astype(np.float32)
    q = quantize(w, fmt)
    reach = np.repeat(np.asarray(q.scales()), 32, axis=0) * fmt.peak
    assert (np.abs(w) <= reach).all()
    assert (reach < 2.001 * np.abs(w).reshape(2, 32, COLS).max(1).repeat(32, 0)).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_codes_are_the_nearest_for_the_scale_as_stored(dtype, rng):
    w = rng.normal(size=(ROWS, COLS)).astype(np.float32)
    fmt = dataclasses.replace(Int(4, 16), scale_dtype=dtype)
    q = quantize(w, fmt)
    assert q.scale.dtype == dtype
    scale = np.repeat(np.asarray(q.scale, np.float32), 16, axis=0)
    want = np.clip(np.round(w / scale), -8, 7) * scale
    np.testing.assert_array_equal(np.asarray(dense(q)), want)
