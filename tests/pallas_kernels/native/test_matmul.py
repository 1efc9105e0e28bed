"""Native products against NumPy in float64, on every instruction set of the machine."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qjax.pallas_kernels import native
from qjax.pallas_kernels.matmul import cpu
from qjax.pallas_kernels.matmul_a8 import cpu as cpu_a8
from qjax.pallas_kernels.matmul_a8 import reference as reference_a8
from qjax.pallas_kernels.weights import KernelError, Weight, WeightSpec

from .cases import error_bound, random_weight, top_of

FORMATS = [("int", bits) for bits in range(1, 9)]
FORMATS += [("table", bits) for bits in (1, 2, 3, 4, 5, 8)]
FORMATS += [("e2m1", 4), ("e4m3", 8), ("e5m2", 8)]

pytestmark = pytest.mark.skipif(not native.status().loaded, reason=str(native.status()))


AVAILABLE = [isa for isa in native.ISAS if native.choose_isa(isa)] or ["none"]
native.choose_isa("")
TILED = {"amx-emulated": "plain", "amx": "avx512"}
"""Instruction sets with tiles, and those that decode and scale for them."""


@pytest.fixture(params=AVAILABLE)
def isa(request):
    assert native.choose_isa(request.param)
    yield request.param
    native.choose_isa("")


def compare(spec, m, rng, *, transpose=False, dtype="float32", bias=False, **kwargs):
    w, dense = random_weight(rng, spec, **kwargs)
    rows, cols = (spec.n, spec.k) if transpose else (spec.k, spec.n)
    x = jnp.asarray(rng.standard_normal((m, rows)).astype(np.float32)).astype(dtype)
    b = jnp.asarray(rng.standard_normal(cols).astype(np.float32)) if bias else None
    y = cpu.matmul(x, w, spec, bias=b, transpose=transpose)
    assert y.dtype == x.dtype and y.shape == (m, cols)
    x64 = np.asarray(x).astype(np.float64)
    exact = x64 @ (dense.T if transpose else dense)
    if bias:
        exact = exact + np.asarray(b, np.float64)
    limit = error_bound(
        x64, dense, spec, top_of(w, spec, dense), x.dtype.name, transpose
    )
    limit = limit + np.abs(exact) * 2.0**-7 * (x.dtype != jnp.float32)
    limit = limit + np.abs(exact) * 2.0**-22
    if x.dtype == jnp.float16:
        limit = np.where(np.abs(exact) < 65000, limit, np.inf)  # may overflow
    assert np.all(np.abs(np.asarray(y).astype(np.float64) - exact) <= limit)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("kind", "bits"), FORMATS)
def test_every_format_on_every_isa(isa, kind, bits, transpose, rng):
    offset = 2.0 ** (bits - 1) if kind == "int" else 0.0
    for k, n, group, m in [(192, 130, 64, 1), (104, 67, 104, 7), (320, 33, 320, 2)]:
        spec = WeightSpec(k, n, kind, bits, group, offset)
        compare(spec, m, rng, transpose=transpose)


@settings(deadline=None, max_examples=25)
@given(
    m=st.integers(1, 40),
    k=st.integers(1, 300),
    n=st.integers(1, 200),
    units=st.integers(1, 12),
    form=st.sampled_from(FORMATS),
    scale=st.sampled_from(["float32", "bfloat16", "float16", "uint8", "float8_e4m3fn"]),
    zero=st.sampled_from([None, "float32", "uint8", "bfloat16"]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    bias=st.booleans(),
    transpose=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(m, k, n, units, form, scale, zero, dtype, bias, transpose, seed):
    kind, bits = form
    group = min(8 * units, k)
    spec = WeightSpec(k, n, kind, bits, group)
    if kind != "int":
        zero = None
    compare(
        spec,
        m,
        np.random.default_rng(seed),
        transpose=transpose,
        dtype=dtype,
        bias=bias,
        scale=scale,
        zero=zero,
    )


def test_signed_codes(isa, rng):
    spec = WeightSpec(96, 40, "int", 8, 32)
    for transpose in (False, True):
        compare(spec, 3, rng, signed=True, zero="float32", transpose=transpose)


def test_many_rows(rng):
    compare(WeightSpec(64, 24, "int", 4, 32), 1100, rng)
    compare(WeightSpec(64, 24, "table", 4, 32), 530, rng)


def test_layers_of_a_stack(rng):
    spec = WeightSpec(64, 48, "int", 4, 32, 8.0)
    pairs = [random_weight(rng, spec) for _ in range(3)]
    codes = jnp.stack([w.codes for w, _ in pairs])
    stack = Weight(codes, jnp.stack([w.scale for w, _ in pairs]))
    x = jnp.asarray(rng.standard_normal((2, 64)).astype(np.float32))
    picked = jax.jit(lambda x, i: cpu.matmul(x, stack, spec, layer=i))
    for i, (w, _) in enumerate(pairs):
        np.testing.assert_array_equal(picked(x, i), cpu.matmul(x, w, spec))
    with pytest.raises(Exception, match="layer 3 of 3"):
        picked(x, 3).block_until_ready()
    with pytest.raises(KernelError, match="pass a layer for a stack"):
        cpu.matmul(x, stack, spec)


def test_vmap_and_scan(rng):
    spec = WeightSpec(32, 16, "int", 4, 32)
    w, _ = random_weight(rng, spec)
    x = jnp.asarray(rng.standard_normal((3, 2, 32)).astype(np.float32))
    rows = jax.vmap(lambda a: cpu.matmul(a, w, spec))(x)
    np.testing.assert_array_equal(rows[1], cpu.matmul(x[1], w, spec))


def test_no_rows(rng):
    spec = WeightSpec(32, 16)
    w, _ = random_weight(rng, spec)
    assert cpu.matmul(jnp.zeros((0, 32)), w, spec).shape == (0, 16)


def test_non_finite(isa, rng):
    spec = WeightSpec(64, 20, "int", 4, 32)
    w, _ = random_weight(rng, spec)
    x = jnp.ones((3, 64)).at[0, 3].set(jnp.inf).at[1, 40].set(jnp.nan)
    y = np.asarray(cpu.matmul(x, w, spec))
    assert np.isnan(y[:2]).all() and np.isfinite(y[2]).all()
    spec = WeightSpec(8, 20, "e4m3", 8, 8)
    w, _ = random_weight(rng, spec)
    codes = np.array(w.codes).view(np.uint8)
    codes[2, 5] = 0x7F
    w = w._replace(codes=jnp.asarray(codes.view(w.codes.dtype)))
    assert np.isnan(np.asarray(cpu.matmul(x[2:, :8], w, spec))[0]).tolist() == [
        i == 5 for i in range(20)
    ]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_int8_activations(isa, bits, rng):
    spec = WeightSpec(192, 70, "int", bits, 64, 2.0 ** (bits - 1))
    w, dense = random_weight(rng, spec, zero="uint8")
    x = jnp.asarray(rng.standard_normal((7, 192)).astype(np.float32)).at[2].set(0)
    codes, scale = reference_a8.quantize_activations(x)
    exact = (np.asarray(codes, np.float64) * np.asarray(scale, np.float64)) @ dense
    limit = reference_a8.bound(x, w, spec)
    assert np.all(np.abs(cpu_a8.matmul(x, w, spec) - exact) <= limit)
    given_codes = cpu_a8.matmul(codes, w, spec, x_scale=scale)
    assert np.all(np.abs(given_codes - exact) <= limit)
    static = cpu_a8.matmul(x, w, spec, x_scale=0.02)
    wanted = reference_a8.matmul_a8(x, w, spec, x_scale=0.02)
    limit = reference_a8.bound(x, w, spec, x_scale=0.02)
    assert np.all(np.abs(static - wanted) <= 2 * limit)


@settings(deadline=None, max_examples=40)
@given(
    m=st.integers(1, 40),
    k=st.integers(1, 300),
    n=st.integers(1, 200),
    units=st.integers(1, 20),
    bits=st.integers(1, 8),
    signed=st.booleans(),
    zero=st.sampled_from([None, "float32", "uint8"]),
    rounded=st.booleans(),
    seed=st.integers(0, 2**31),
)
@example(
    m=512, k=256, n=80, units=16, bits=4, signed=False, zero=None, rounded=False, seed=0
)
@example(
    m=17,
    k=300,
    n=150,
    units=32,
    bits=8,
    signed=True,
    zero="float32",
    rounded=False,
    seed=0,
)
@example(
    m=33, k=264, n=70, units=9, bits=3, signed=False, zero="uint8", rounded=True, seed=0
)
def test_tiles_give_the_same_bits(m, k, n, units, bits, signed, zero, rounded, seed):
    rng = np.random.default_rng(seed)
    spec = WeightSpec(k, n, "int", bits, min(8 * units, k), 2.0 ** (bits - 1))
    w, _ = random_weight(rng, spec, zero=zero, signed=signed and bits == 8)
    x = jnp.asarray(rng.standard_normal((m, k)).astype(np.float32))
    matmul = cpu_a8.matmul if rounded else cpu.matmul
    found = {}
    for isa in {*TILED, *TILED.values()}.intersection(AVAILABLE):
        native.choose_isa(isa)
        found[isa] = np.asarray(matmul(x, w, spec))
    native.choose_isa("")
    for tiled in TILED.keys() & found.keys():
        np.testing.assert_array_equal(found[tiled], found[TILED[tiled]], tiled)


def test_tiles_are_tested():
    """On every machine in their emulation, and on the unit where Linux lists it."""
    assert "amx-emulated" in AVAILABLE
    info = Path("/proc/cpuinfo")
    flags = info.read_text("utf-8").split() if info.exists() else []
    if {"amx_tile", "amx_int8", "avx512_vnni"} <= set(flags):
        assert "amx" in AVAILABLE


def test_concurrent_calls(isa, rng):
    spec = WeightSpec(256, 300, "int", 4, 64)
    w, _ = random_weight(rng, spec)
    x = jnp.asarray(rng.standard_normal((5, 256)).astype(np.float32))
    run = jax.jit(lambda x: cpu.matmul(x, w, spec))
    wanted = np.asarray(run(x))
    with ThreadPoolExecutor(6) as pool:
        for y in pool.map(lambda i: np.asarray(run(x)), range(60)):
            np.testing.assert_array_equal(y, wanted)


def test_no_dense_temporary(rng):
    spec = WeightSpec(512, 512, "int", 4, 64)
    w, _ = random_weight(rng, spec)
    x = jnp.zeros((2, 512))
    for transpose in (False, True):
        run = jax.jit(lambda x, w, t=transpose: cpu.matmul(x, w, spec, transpose=t))
        memory = run.lower(x, w).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 512 * 512 // 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": jnp.ones((3, 16))}, "scale has shape"),
        ({"codes": jnp.zeros((15, 16), jnp.uint8)}, "codes has shape"),
        ({"zero": jnp.ones((2, 16), jnp.int32)}, "zero has dtype int32"),
    ],
)
def test_wrong_arrays(change, message, rng):
    spec = WeightSpec(32, 16, "int", 4, 16)
    w, _ = random_weight(rng, spec)
    with pytest.raises(KernelError, match=message):
        cpu.matmul(jnp.ones((1, 32)), w._replace(**change), spec)


def test_wrong_activations(rng):
    spec = WeightSpec(32, 16, "int", 4, 16)
    w, _ = random_weight(rng, spec)
    with pytest.raises(KernelError, match=r"x has shape \[1, 31\], expected \[m, 32\]"):
        cpu.matmul(jnp.ones((1, 31)), w, spec)
    with pytest.raises(KernelError, match="x has dtype int32"):
        cpu.matmul(jnp.ones((1, 32), jnp.int32), w, spec)
    with pytest.raises(KernelError, match="bias has shape"):
        cpu.matmul(jnp.ones((1, 32)), w, spec, bias=jnp.ones(3))
    with pytest.raises(KernelError, match="pass x_scale"):
        cpu_a8.matmul(jnp.ones((1, 32), jnp.int8), w, spec)


def test_obstacles():
    assert cpu.obstacle(WeightSpec(32, 16), 1, jnp.float32) is None
    assert "cut packing units" in cpu.obstacle(
        WeightSpec(32, 16, "int", 3, 12), 1, jnp.float32
    )
    assert "layout" in cpu.obstacle(WeightSpec(32, 16, layout="tpu"), 1, jnp.float32)
    assert "x is int32" in cpu.obstacle(WeightSpec(32, 16), 1, jnp.int32)
    assert "'table'" in cpu_a8.obstacle(WeightSpec(32, 16, "table"), 1, jnp.float32)


def test_the_handler_checks_sizes(rng):
    """What reaches it without the wrapper is refused, not read out of bounds."""
    spec = WeightSpec(32, 16, "int", 4, 16)
    w, _ = random_weight(rng, spec)
    none = jnp.zeros((0,), jnp.float32)
    attributes = {
        "k": np.int64(64),
        "n": np.int64(16),
        "kind": np.int64(0),
        "bits": np.int64(4),
        "group": np.int64(16),
        "offset": np.float32(0),
        "transpose": False,
        "strips": False,
        "x_bits": np.int64(16),
    }
    call = jax.ffi.ffi_call("qjax_matmul", jax.ShapeDtypeStruct((1, 16), jnp.float32))
    operands = (jnp.ones((1, 64)), w.codes, w.scale, none, none, none, none)
    for change, message in [
        ({}, "codes do not have the packed shape"),
        ({"k": np.int64(32), "strips": True}, "codes do not have the packed shape"),
        ({"strips": True, "group": np.int64(4)}, "groups cut a strip"),
        ({"strips": True, "transpose": True}, "no transpose"),
    ]:
        with pytest.raises(Exception, match=message):
            call(*operands, jnp.int32(0), **attributes | change).block_until_ready()
