"""Encoders: every backend against the reference, and the reference against qjax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from qjax.formats import FP4, FP8, NF4, Int
from qjax.methods import RTN
from qjax.methods.array import _quantize
from qjax.pallas_kernels.quantize import api, reference, rules, specs, tpu, xla
from qjax.pallas_kernels.weights import WeightSpec

from .suite import TABLES, EncodeSuite, equal_bytes, make_spec, random_weight, refusal


def pytest_generate_tests(metafunc):
    """Runs each backend's formats."""
    if metafunc.function.__name__ == "test_equals_the_reference":
        metafunc.parametrize("name", metafunc.cls.formats)


class TestXla(EncodeSuite):
    backend = "xla"

    @settings(max_examples=15, deadline=None)
    @given(
        bits=st.integers(1, 8),
        group=st.integers(1, 40),
        k=st.integers(1, 80),
        n=st.integers(1, 9),
        seed=st.integers(0, 2**31),
    )
    def test_ragged(self, bits, group, k, n, seed):
        spec = make_spec("int", bits, min(group, k), k, n)
        self.check(random_weight((k, n), seed=seed), "int", spec)

    @pytest.mark.parametrize("name", ["int", "nf4", "e4m3"])
    def test_no_temporary_of_the_weight(self, name):
        spec = make_spec(name, 8 if name == "e4m3" else 4, 64, 1024, 512)
        table = NF4().table if name == "nf4" else None
        run = jax.jit(functools.partial(api.encode, spec=spec, table=table))
        w = jax.ShapeDtypeStruct((1024, 512), jnp.float32)
        used = run.lower(w).compile().memory_analysis().temp_size_in_bytes
        assert used <= 1024 * 512 * 4 / 16


class TestTpu(EncodeSuite):
    """A format for each way of packing, rounding and finding scales."""

    backend = "tpu"
    interpret = pltpu.InterpretParams(detect_races=True)
    formats = (
        *("int1-g64", "int3-g64", "int4-g128", "int4-g0", "int8-g32"),
        *("nf44-g64", "nf44-g0", "e2m14-g32", "e4m38-g128"),
    )

    def test_many_tiles(self):
        spec = make_spec("int", 4, 32, 192, 300)
        w, config = random_weight((192, 300)), specs.TpuConfig(64, 128)
        got = self.encode(w, spec, config=config)
        equal_bytes(got, api.encode(w, spec, backend="reference"))

    def test_refuses_with_reasons(self):
        w = random_weight((96, 8))
        odd = make_spec("int", 4, 24, 96, 8)
        assert "multiple of 16" in refusal(w, odd, backend="tpu")
        half = make_spec("int", 4, 32, 96, 8)
        assert "float16" in refusal(w.astype(jnp.float16), half, backend="tpu")
        short = make_spec("int", 4, 0, 95, 8)
        assert "packing unit" in refusal(w[:95], short, backend="tpu")


if hasattr(plgpu, "InterpretGPUParams"):  # not in jax 0.10

    class TestGpu(EncodeSuite):
        """Ragged columns are written twice, which is a race of equal bytes."""

        backend = "gpu"
        interpret = plgpu.InterpretGPUParams()  # pyright: ignore
        formats = TestTpu.formats

        def test_many_programs(self):
            """Without ragged columns nothing is written twice."""
            spec = make_spec("int", 4, 32, 64, 256)
            w = random_weight((64, 256))
            races = plgpu.InterpretGPUParams(detect_races=True)  # pyright: ignore
            got = api.encode(w, spec, backend="gpu", interpret=races)
            equal_bytes(got, api.encode(w, spec, backend="reference"))

        @pytest.mark.parametrize("k", [160, 320])
        def test_ragged_rows(self, k):
            """Three or five runs of 64 rows share some; scales: found, and given."""
            spec = make_spec("int", 8, 0, k, 130)
            self.check(random_weight((k, 130)), "int", spec)


@pytest.mark.parametrize(
    "kind,bits,group",
    [("int", 3, 64), ("int", 4, 128), ("int", 8, 0), ("nf4", 4, 32), ("e4m3", 8, 32)],
)
def test_gpu_kernel_lowers(kind, bits, group):
    """Layouts and operations of the kernel; no GPU is needed to lower it."""
    spec = make_spec(kind, bits, group, 256, 200)
    run = functools.partial(
        api.encode, spec=spec, table=TABLES.get(kind), backend="gpu"
    )
    unchecked = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    exported = export.export(
        jax.jit(run), platforms=["cuda"], disabled_checks=unchecked
    )(jax.ShapeDtypeStruct((2, 256, 200), jnp.bfloat16))
    assert "mosaic_gpu" in exported.mlir_module()


def test_gpu_refuses_with_reasons():
    w = random_weight((96, 128))
    spec = make_spec("int", 4, 32, 96, 128)
    assert "float16" in refusal(w.astype(jnp.float16), spec, backend="gpu")
    odd = make_spec("int", 4, 3, 96, 128)
    assert "packing units" in refusal(w, odd, backend="gpu")
    short = make_spec("int", 4, 64, 96, 128)
    assert "short group" in refusal(w, short, backend="gpu")
    narrow = make_spec("int", 4, 32, 96, 100)
    assert "100 columns" in refusal(w[:, :100], narrow, backend="gpu")


# What `qjax.quantize` did before it called the encoders is in the golden tests; this
# holds the reference, written apart from `qjax.formats`, to the same bytes.
QJAX = (
    *(Int(bits, 32) for bits in range(1, 9)),
    Int(4, "channel"),
    Int(3, 20),
    NF4(32),
    FP4(64),
    FP8("e4m3", "channel"),
    FP8("e5m2", "channel"),
)


def _switch_off_fused(monkeypatch):
    for module in ("problem", "rtn"):
        for name in ("fused_codes", "group_absmax"):
            monkeypatch.setattr(f"qjax.methods.{module}.{name}", lambda *_: None)


@pytest.mark.parametrize("fmt", QJAX, ids=lambda f: f.name)
@pytest.mark.parametrize("module", [reference, xla], ids=["reference", "xla"])
def test_equals_the_general_way(fmt, module, monkeypatch):
    """The fused steps are switched off, so that qjax's own formats encode."""
    _switch_off_fused(monkeypatch)
    k, n = (128, 37) if fmt != Int(3, 20) else (77, 13)
    w = random_weight((k, n))
    q = jax.jit(lambda w: RTN()(w, fmt))(w)
    kind = {"NF4": "nf4", "FP4": "fp4"}.get(type(fmt).__name__, "int")
    group = getattr(fmt, "block", None) or getattr(fmt, "group", 0)
    group = 0 if isinstance(group, str) else group
    bits = fmt.code_bits
    if isinstance(fmt, FP8):
        spec = WeightSpec(k, n, fmt.element, 8, k)
    else:
        spec = make_spec(kind, bits, group, k, n)
    table = fmt.table if kind != "int" else None
    got = jax.jit(lambda w: module.encode(w, spec, table=table))(w)
    equal_bytes((got.codes, got.scale), (q.codes, q.scale))


@pytest.mark.parametrize(
    "fmt",
    [
        Int(4, 64),
        Int(4, "tensor"),
        Int(5, 64, scale_dtype="uint8"),
        NF4(64, double=True),
        NF4(64, scale_dtype="bfloat16"),
        FP8("e4m3", "block"),
    ],
    ids=lambda f: f.name,
)
@pytest.mark.parametrize("rule", ["auto", "mse"])
def test_quantize_is_the_same_with_and_without(fmt, rule, monkeypatch):
    w = random_weight((2, 128, 37))
    method = RTN(rule, grid=3)
    fused = _quantize(w, fmt, method, "none", None)
    _switch_off_fused(monkeypatch)
    general = jax.jit(lambda w: method(w, fmt))(w)
    equal_bytes(fused, general)


@pytest.mark.parametrize("kind,dtype", rules.FLOAT8.items())
def test_float8_by_arithmetic(kind, dtype):
    """Every FP8 number, every midpoint and their neighbours, against the cast."""
    top = rules.PEAKS[kind]
    values = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    values = np.unique(values[np.isfinite(values)])
    middle = (values[:-1] + values[1:]) / 2
    points = np.concatenate([values, middle])
    points = np.concatenate([points, np.nextafter(points, 1e9), -points[::3]])
    points = np.concatenate([points, [3 * top, -3 * top, 1e-30]]).astype(np.float32)
    want = jnp.clip(points, -top, top).astype(dtype)
    got = rules.encode_float8(jnp.asarray(points), kind)
    np.testing.assert_array_equal(
        np.asarray(got, np.uint8), np.asarray(want).view(np.uint8)
    )


def test_empty():
    for k, n in ((0, 4), (64, 0)):
        spec = WeightSpec(k, n, "int", 4, 64, 8.0)
        got = api.encode(jnp.zeros((k, n)), spec)
        assert got.codes.shape == (spec.packed_k, n)
        assert got.scale.shape == (spec.groups, n)


@pytest.mark.parametrize(
    "spec,options,words",
    [
        (WeightSpec(64, 8, "int", 4, 64, 8.0), {"backend": "cuda"}, "backend is"),
        (WeightSpec(65, 8, "int", 4, 64, 8.0), {}, "w has shape [64, 8]"),
        (WeightSpec(64, 8, "ints", 4, 64), {}, "spec.kind"),
        (WeightSpec(64, 8, "int", 9, 64), {}, "spec.bits is 9"),
        (WeightSpec(64, 8, "e4m3", 4, 64), {}, "spec.bits is 4"),
        (WeightSpec(64, 8, "int", 4, 0, 8.0), {}, "spec.group"),
        (WeightSpec(64, 8, "int", 4, 64, 3.0), {}, "spec.offset is 3.0"),
        (WeightSpec(64, 8, "int", 4, 64, 8.0, "fragments"), {}, "spec.layout"),
        (WeightSpec(64, 8, "int", 4, 64, 8.0), {"across": 0}, "across is 0"),
        (WeightSpec(64, 8, "table", 4, 64), {}, "table is None"),
        (WeightSpec(64, 8, "table", 4, 64), {"table": np.zeros(3)}, "16 finite"),
        (
            WeightSpec(64, 8, "int", 4, 32, 8.0),
            {"scale": jnp.ones((1, 8))},
            "scale has shape [1, 8], expected [2, 8]",
        ),
    ],
)
def test_bad_input_names_the_argument(spec, options, words):
    assert words in refusal(jnp.zeros((64, 8)), spec, **options)


def test_integers_are_refused():
    spec = WeightSpec(64, 8, "int", 4, 64, 8.0)
    assert "w has dtype int32" in refusal(jnp.zeros((64, 8), jnp.int32), spec)


def test_tpu_tiles_hold_whole_groups():
    for bits in range(1, 9):
        for group in (64, 128, 192):
            spec = make_spec("int", bits, group, 4096, 1000)
            if tpu.obstacle(spec, jnp.float32) is None:
                config = specs.tpu_config(spec)
                assert config.rows % specs.slab_rows(spec) == 0
                assert config.rows % group == 0
                assert config.columns % specs.LANES == 0
