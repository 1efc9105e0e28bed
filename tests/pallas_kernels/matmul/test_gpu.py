"""The Hopper product without a GPU: schedules, lowering, and interpreted products.

Every format and regime is lowered for CUDA (layouts, barriers, copies and instructions
are checked by the compiler). Where jax has a GPU interpreter, small products run in it
with race detection, their weights going through shared memory.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.pallas_kernels import hopper
from qjax.pallas_kernels.matmul import (
    gpu,
    gpu_layout,
    gpu_plan,
    gpu_specs,
    reference,
)
from qjax.pallas_kernels.matmul.api import quantized_matmul
from qjax.pallas_kernels.weights import KernelError, WeightSpec

from ..gpu_interpreter import interpreter, needs_interpreter
from .suite import FORMATS, random_weight, rows

TAKEN = [name for name in FORMATS if name != "int4-g96-asym"]
K, N = 512, 768


def prepared(name, k, n, seed=0, layers=None):
    """A random weight as it was and as the kernel wants it."""
    weight, spec = random_weight(name, k, n, seed, layers)
    made = gpu_layout.prepack(weight, spec)
    assert made is not None
    return weight, spec, *made


# --- Schedules ------------------------------------------------------------------------


def plan_of(config, m, k, n, transpose=False):
    _, _, weight, spec = prepared("int4-g128", 128, 64)
    spec = dataclasses.replace(spec, k=k, n=n)
    x = jax.ShapeDtypeStruct((m, n if transpose else k), jnp.bfloat16)
    return gpu_plan.make_plan(spec, x, weight, config, jnp.dtype("bfloat16"), transpose)


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 300),
    k=st.integers(1, 3000),
    n=st.integers(1, 3000),
    blocks=st.integers(1, 200),
    warpgroups=st.sampled_from([1, 2, 4]),
    split=st.booleans(),
    transpose=st.booleans(),
)
def test_every_step_is_done_once(m, k, n, blocks, warpgroups, split, transpose):
    """And sums of a tile go to different places, in order, as many as are added."""
    warpgroups = min(warpgroups, 2) if transpose else warpgroups
    config = gpu.Config(
        warpgroups, 64, 64, 2, split=split, blocks=blocks, post=not transpose
    )
    plan = plan_of(config, m, k, n, transpose)
    done, places = set(), {}
    for block in range(plan.blocks):
        first, last = (int(v) for v in plan.span(block))
        assert first < last
        for step in range(first, last):
            where = plan.place(block, step)
            assert where not in done
            done.add(where)
        if not split:
            assert first % plan.steps == last % plan.steps == 0
            continue
        for tile in range(first // plan.steps, -(-last // plan.steps)):
            owner = plan.owner(tile * plan.steps)
            places.setdefault(tile, []).append(block - owner)
    assert done == {(t, i) for t in range(plan.tiles) for i in range(plan.steps)}
    if split:
        for tile, found in places.items():
            assert found == list(range(plan.counts[tile]))
        assert plan.shares == max(plan.counts)


@pytest.mark.parametrize("warpgroups", [1, 2, 3, 4])
def test_registers_are_never_waited_for(warpgroups):
    count = warpgroups + 1
    start = min(65536 // (128 * count) // 8 * 8, 248)
    need = warpgroups * hopper.registers(warpgroups) + hopper.MEMORY_REGISTERS
    assert need <= start * count
    assert hopper.registers(warpgroups) >= start - 16
    assert hopper.registers(warpgroups) % 8 == 0


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", TAKEN)
def test_defaults_fit_shared_memory(name, dtype, transpose):
    _, _, weight, spec = prepared(name, 512, 256)
    for m in (1, 9, 40, 100, 300, 4096):
        if gpu.obstacle(spec, m, dtype, transpose=transpose):
            continue
        out = jnp.dtype(dtype)
        config = gpu_specs.default(spec, m, dtype, out, transpose)
        assert config.stages >= 3
        size = config.stages * gpu_specs.stage_bytes(spec, config, transpose)
        size += gpu_specs.fixed_bytes(spec, config, transpose)
        assert size <= gpu_specs.SHARED_BYTES
        assert config.rows % 64 == 0 and weight.codes.dtype == jnp.int32


# --- Lowering -------------------------------------------------------------------------


def lowered(
    name,
    m,
    dtype="bfloat16",
    *,
    transpose=False,
    layers=None,
    bias=False,
    out_dtype=None,
):
    """The exported program of a product."""
    k = 768 if layers is None else 512
    _, _, weight, spec = prepared(name, k, N, layers=layers)
    x = jax.ShapeDtypeStruct((m, N if transpose else k), dtype)
    columns = k if transpose else N
    b = jax.ShapeDtypeStruct((columns,), jnp.float32) if bias else None
    layer = None if layers is None else jax.ShapeDtypeStruct((), jnp.int32)

    def product(x, weight, bias, layer):
        return quantized_matmul(
            x,
            weight,
            spec,
            bias=bias,
            layer=layer,
            transpose=transpose,
            out_dtype=out_dtype,
            backend="gpu",
        )

    safe = jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")
    export = jax.export.export(
        jax.jit(product), platforms=["cuda"], disabled_checks=[safe]
    )
    program = export(x, weight, b, layer)
    assert program.out_avals[0].shape == (m, columns)
    assert program.out_avals[0].dtype == jnp.dtype(out_dtype or dtype)
    return program.mlir_module()


@pytest.mark.parametrize("m", [3, 1000])
@pytest.mark.parametrize("name", TAKEN)
def test_lowers(name, m):
    assert "mosaic_gpu" in lowered(name, m)


@pytest.mark.parametrize("m", [12, 48, 100, 300])
def test_lowers_in_every_regime(m):
    assert "mosaic_gpu" in lowered("int4-g128", m)
    assert "mosaic_gpu" in lowered("nf4-g64", m, transpose=True)


@pytest.mark.parametrize("name", TAKEN)
def test_lowers_transposed(name):
    assert "mosaic_gpu" in lowered(name, 3, transpose=True)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", ["int4-g128", "int8-asym", "fp8-e4m3", "mxfp8"])
def test_lowers_for_other_activations(name, dtype):
    if name == "mxfp8" and dtype == "float32":
        with pytest.raises(KernelError, match="multiple of 64 rows"):
            lowered(name, 5, dtype)
    else:
        for m in (5, 40):
            assert "mosaic_gpu" in lowered(name, m, dtype)


def test_lowers_transposed_with_few_bytes_of_zero_points():
    """A copy of 64 bytes would be refused by the compiler."""
    weight, spec = random_weight("int4-g128", 768, N)
    weight = weight._replace(zero=jnp.zeros(weight.scale.shape, jnp.uint8))
    packed, spec = gpu_layout.prepack(weight, spec) or pytest.fail("refused")
    packed = packed._replace(scale=jnp.zeros(packed.scale.shape, jnp.uint8))

    def product(x, w):
        return gpu.matmul(x, w, spec, transpose=True)

    x = jax.ShapeDtypeStruct((4, N), jnp.bfloat16)
    safe = jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")
    export = jax.export.export(
        jax.jit(product), platforms=["cuda"], disabled_checks=[safe]
    )
    assert export(x, packed).out_avals[0].shape == (4, 768)


@pytest.mark.parametrize("m", [5, 1000])
def test_results_may_be_wider(m):
    assert "mosaic_gpu" in lowered("int4-g128", m, out_dtype="float32")


@pytest.mark.parametrize("m", [3, 1000])
@pytest.mark.parametrize("name", ["int4-g128", "nf4-g64", "int4-g32-asym"])
def test_lowers_with_layers_and_bias(name, m):
    assert "mosaic_gpu" in lowered(name, m, layers=3, bias=True)
    assert "mosaic_gpu" in lowered(name, m, layers=3, bias=True, transpose=True)


@pytest.mark.parametrize("name", ["int4-g128", "nf4-g64", "fp8-e4m3"])
def test_one_token_needs_no_copy_of_x(name):
    """Rows and columns beyond the last are filled in by the copies themselves."""
    text = lowered(name, 1)
    assert "stablehlo.pad" not in text.split("mosaic_gpu")[0]


# --- Refusals -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype", "transpose", "reason"),
    [
        ("nf4-g64", "float32", False, "table entries round"),
        ("int4-g32-asym", "float32", False, "multiple of 64 rows"),
        ("int4-g128", "float32", True, "would round"),
    ],
)
def test_obstacles(name, dtype, transpose, reason):
    _, _, _, spec = prepared(name, 256, 128)
    found = gpu.obstacle(spec, 4, jnp.dtype(dtype), transpose=transpose)
    assert reason in (found or "")


def test_many_rows_in_single_precision_are_refused():
    _, _, _, spec = prepared("int4-g128", 256, 128)
    assert gpu.obstacle(spec, 64, jnp.float32) is None
    assert "65 rows" in (gpu.obstacle(spec, 65, jnp.float32) or "")


def test_canonical_weights_are_refused():
    weight, spec = random_weight("int4-g128", 256, 128)
    with pytest.raises(KernelError, match="not prepacked"):
        quantized_matmul(rows(4, 256, "bfloat16"), weight, spec, backend="gpu")


@pytest.mark.parametrize(("capability", "fits"), [("9.0", True), ("8.0", False)])
def test_other_gpus_are_refused(monkeypatch, capability, fits):
    device = type("Device", (), {"compute_capability": capability})()
    monkeypatch.setattr(jax, "devices", lambda platform: [device])
    _, _, _, spec = prepared("int4-g128", 256, 128)
    reason = gpu.obstacle(spec, 4, jnp.bfloat16)
    assert (reason is None) == fits
    assert fits or "8.0" in (reason or "")


@pytest.mark.parametrize(
    "change",
    [
        {"warpgroups": 3},
        {"rows": 96},
        {"tokens": 12},
        {"tokens": 512},
        {"split": False},
    ],
    ids=lambda c: next(iter(c)),
)
def test_configurations_that_do_not_fit(change):
    weight, spec = prepared("int4-g128", 256, 128)[2:]
    config = dataclasses.replace(gpu.Config(), **change)
    with pytest.raises(KernelError, match="config"):
        gpu.matmul(rows(4, 256, "bfloat16"), weight, spec, config=config)


def test_unusual_offsets_are_refused():
    spec = WeightSpec(256, 128, "int", 4, 128, 8.3, gpu_layout.TAGS[0])
    assert "offset 8.3" in (gpu.obstacle(spec, 4, jnp.bfloat16) or "")


# --- Products -------------------------------------------------------------------------

SMALL = gpu.Config(2, 8, 128, 2, blocks=3, smem_operand=True)
MANY = gpu.Config(2, 64, 64, 2, split=False, blocks=2, smem_operand=True)


def compare(name, m, k, n, config, dtype="bfloat16", *, layers=None, **options):
    """One interpreted product against the reference."""
    weight, spec, packed, changed = prepared(name, k, n, 1, layers)
    transpose = options.get("transpose", False)
    x = rows(m, n if transpose else k, dtype)
    if options.pop("bias", False):
        options["bias"] = rows(1, k if transpose else n, dtype, 3)[0]
    if layers is not None:
        options["layer"] = jnp.int32(layers - 1)
    run = functools.partial(gpu.matmul, config=config, **options)
    y = run(x, packed, changed, interpret=interpreter(detect_races=True))
    assert y.dtype == jnp.dtype(dtype)
    wanted, bound = reference.exact(x, weight, spec, **options)
    got = np.asarray(y.astype(jnp.float32), np.float64)
    limit = reference.tolerance(wanted, bound, dtype)
    assert got.shape == wanted.shape
    assert (np.abs(got - wanted) <= limit).all()


@needs_interpreter
class TestInterpreted:
    @pytest.mark.parametrize(
        "name",
        [
            "int4-g128",
            "int4-g32-asym",
            "int3-g32-asym",
            "int8-asym",
            "nf4-g64",
            "mxfp4",
            "nvfp4",
            "fp8-e4m3",
        ],
    )
    def test_formats(self, name):
        compare(name, 5, 256, 200, SMALL)

    @pytest.mark.parametrize("name", ["int4-g128", "nf4-g64"])
    def test_transposed(self, name):
        config = dataclasses.replace(SMALL, rows=64)
        compare(name, 9, 250, 256, config, transpose=True, bias=True)

    def test_layers_and_bias(self):
        compare("int4-g128", 3, 300, 256, SMALL, layers=3, bias=True)

    def test_single_precision(self):
        compare("int4-g128", 3, 256, 256, SMALL, "float32")

    def test_half_precision(self):
        compare("int4-g64-f16", 3, 256, 256, SMALL, "float16")

    def test_whole_tiles(self):
        compare("int4-g128", 70, 256, 256, MANY, bias=True)

    def test_ring_runs_around(self):
        config = dataclasses.replace(SMALL, blocks=1)
        compare("int4-g128", 5, 512, 512, config)
