"""What codes mean: tables, float grids, specifications, error messages."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qjax.errors import SpecError
from qjax.formats import (
    FP4,
    FP8,
    MXFP4,
    MXFP8,
    NF4,
    NVFP4,
    Cast,
    Dynamic8,
    Int,
    format_from_dict,
)
from qjax.formats.minifloat import decode_e8m0, encode_e2m1, encode_e8m0

ALL = [
    *(Int(b) for b in range(1, 9)),
    Int(4, 32, symmetric=False),
    NF4(),
    FP4(),
    Dynamic8(),
    Dynamic8(signed=False),
    FP8("e4m3"),
    FP8("e5m2"),
    MXFP4(),
    NVFP4(),
]
IDS = [f"{f.name}-{i}" for i, f in enumerate(ALL)]


def codes_of(fmt) -> jnp.ndarray:
    if isinstance(fmt, FP8):
        finite = np.arange(256, dtype=np.uint8).view(
            ml_dtypes.float8_e4m3fn if fmt.element == "e4m3" else ml_dtypes.float8_e5m2
        )
        return jnp.asarray(finite[np.isfinite(finite.astype(np.float32))])
    if isinstance(fmt, Int) and fmt.signed:
        return jnp.arange(-128, 128, dtype=jnp.int8)
    return jnp.arange(2**fmt.code_bits, dtype=jnp.uint8)


@pytest.mark.parametrize("fmt", ALL, ids=IDS)
def test_encode_is_nearest_and_inverts_decode(fmt, rng):
    codes = codes_of(fmt)
    values = np.asarray(fmt.decode(codes))
    decode_again = jax.jit(lambda v: fmt.decode(fmt.encode(v)))
    if not (isinstance(fmt, Dynamic8) and fmt.signed):  # 16-bit grid merges the least
        np.testing.assert_array_equal(np.asarray(decode_again(values)), values)
    u = rng.uniform(values.min(), values.max(), values.size).astype(np.float32)
    got = np.asarray(decode_again(u))
    best = np.abs(u[:, None] - values).min(1)
    slack = 2.0**-15 if isinstance(fmt, Dynamic8) and fmt.signed else 1e-6
    assert (np.abs(got - u) <= best + slack).all()


@pytest.mark.parametrize("fmt", ALL, ids=IDS)
def test_neighbour_is_adjacent(fmt):
    codes = codes_of(fmt)
    values = np.asarray(fmt.decode(codes))
    grid = np.unique(values)
    rank = np.searchsorted(grid, values)
    for up in (True, False):
        other = fmt.decode(fmt.neighbour(codes, jnp.full(codes.shape, up)))
        want = grid[np.clip(rank + (1 if up else -1), 0, len(grid) - 1)]
        twice = (np.asarray(other) == values) & (values == 0)  # -0 next to +0
        np.testing.assert_array_equal(np.where(twice, want, other), want)


def test_e2m1_rounds_ties_to_even():
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    ties = (grid[:-1] + grid[1:]) / 2
    for i, tie in enumerate(ties):
        want = i if i % 2 == 0 else i + 1
        below, above = np.nextafter(tie, np.float32([-9, 9]))
        codes = np.asarray(encode_e2m1(jnp.asarray([below, tie, above, -tie])))
        np.testing.assert_array_equal(codes, [i, want, i + 1, want + 8])
    np.testing.assert_array_equal(encode_e2m1(jnp.asarray([99.0, -99.0])), [7, 15])


@pytest.mark.parametrize("element", ["e4m3", "e5m2"])
def test_fp8_casts_as_ml_dtypes(element, rng):
    dtype = getattr(ml_dtypes, {"e4m3": "float8_e4m3fn"}.get(element, "float8_e5m2"))
    fmt = FP8(element)
    u = (rng.normal(size=4000) * 2.0 ** rng.integers(-12, 8, 4000)).astype(np.float32)
    bits = np.arange(256, dtype=np.uint8)
    grid = np.sort(bits.view(dtype).astype(np.float32))
    grid = grid[np.isfinite(grid)]
    u = np.concatenate([u, (grid[:-1] + grid[1:]) / 2])  # ties
    u = np.clip(u, -fmt.peak, fmt.peak)
    got = np.asarray(jax.jit(fmt.encode)(u))
    np.testing.assert_array_equal(got.view(np.uint8), u.astype(dtype).view(np.uint8))
    top = np.asarray(fmt.encode(jnp.asarray([1e9, -1e9])).astype(jnp.float32))
    np.testing.assert_array_equal(top, [fmt.peak, -fmt.peak])


def test_e8m0_is_a_power_of_two():
    codes = np.arange(255, dtype=np.uint8)
    want = np.exp2(codes.astype(np.float64) - 127).astype(np.float32)
    got = np.asarray(decode_e8m0(jnp.asarray(codes)))
    np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))
    exponents = codes.astype(np.float32) - 127
    np.testing.assert_array_equal(encode_e8m0(jnp.asarray(exponents)), codes)
    np.testing.assert_array_equal(encode_e8m0(jnp.asarray([-999.0, 999.0])), [0, 254])


def test_one_bit_has_two_symmetric_levels():
    np.testing.assert_array_equal(Int(1).decode(codes_of(Int(1))), [-0.5, 0.5])


EVERY = [*ALL, MXFP8("e5m2"), Cast("float16"), FP8("e5m2", "block"), NF4(128, True)]


@pytest.mark.parametrize("fmt", EVERY, ids=lambda f: f.name)
def test_round_trip_through_dict(fmt):
    again = format_from_dict(fmt.to_dict())
    assert again == fmt
    assert hash(again) == hash(fmt)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Int(9), r"Int\(9, 128\): bits is 9, expected one of 1, 2, 3"),
        (lambda: Int(0), "bits is 0, expected one of"),
        (lambda: Int(4, 0), r"Int\(4, 0\): group is 0, expected a positive integer"),
        (lambda: Int(4, "row"), "group is 'row', expected one of 'channel', 'tensor'"),
        (lambda: Int(4, axis="left"), "axis is 'left', expected one of 'in', 'out'"),
        (lambda: Int(4, scale_dtype="int4"), "scale_dtype is 'int4'"),
        (lambda: NF4(48), "NF4: block is 48, expected one of 32, 64"),
        (lambda: FP4(8192), "FP4: block is 8192"),
        (lambda: FP8("e3m4"), "FP8: element is 'e3m4', expected one of 'e4m3', 'e5m2'"),
        (lambda: FP8("e4m3", "row"), "granularity is 'row'"),
        (lambda: MXFP8("e2m1"), "MXFP8: element is 'e2m1'"),
        (lambda: Cast("float32"), "Cast: dtype is 'float32'"),
        (
            lambda: format_from_dict({"kind": "Int5"}),
            "unknown kind 'Int5'; known kinds",
        ),
        (
            lambda: format_from_dict({"kind": "NF4", "blocks": 64}),
            r"format NF4: unknown fields \['blocks'\]; known: \['block', 'double'",
        ),
        (
            lambda: Int(4, 128).grouping((64, 8)),
            "group of 128 is larger than the in axis of a matrix .in=64, out=8.; use a "
            "group of at most 64, or group='channel'",
        ),
        (
            lambda: Int(4, 16, axis="out").grouping((64, 8)),
            "group of 16 is larger than the out axis",
        ),
    ],
)
def test_refusals_say_what_was_expected(make, message):
    with pytest.raises(SpecError, match=message):
        make()
