"""Cases of the weight-only products for `kernels.py` and `tpu_aot.py`.

Shapes are those of an 8B Llama's feed-forward layers and a square one. Every case goes
through `api.quantized_matmul` with the weight in the backend's own layout.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from qjax.pallas_kernels.matmul import reference
from qjax.pallas_kernels.matmul.api import quantized_matmul
from qjax.pallas_kernels.weights import KernelError, Weight, WeightSpec

FORMATS = {
    "int4-g128": dict(kind="int", bits=4, group=128, offset=8.0),
    "int4-g128-asym": dict(kind="int", bits=4, group=128, zero="uint8"),
    "int4-g32": dict(kind="int", bits=4, group=32, offset=8.0),
    "int4-channel": dict(kind="int", bits=4, offset=8.0),
    "int8-channel": dict(kind="int", bits=8, signed=True),
    "int8-g128": dict(kind="int", bits=8, group=128, offset=128.0),
    "int6-g128": dict(kind="int", bits=6, group=128, offset=32.0),
    "int3-g128": dict(kind="int", bits=3, group=128, offset=4.0),
    "int2-g128": dict(kind="int", bits=2, group=128, offset=2.0),
    "int1-g128": dict(kind="int", bits=1, group=128, offset=0.5),
    "nf4-g64": dict(kind="table", bits=4, group=64),
    "nf4-g128": dict(kind="table", bits=4, group=128),
    "fp8-channel": dict(kind="e4m3", bits=8),
    "fp8-e5m2": dict(kind="e5m2", bits=8),
    "mxfp4": dict(kind="e2m1", bits=4, group=32, scale="uint8"),
    "nvfp4": dict(kind="e2m1", bits=4, group=16, scale="float8_e4m3fn"),
}
SHAPES = ((4096, 14336), (14336, 4096), (8192, 8192))
NF4 = (
    "-1 -.6961928 -.52507305 -.3949175 -.28444138 -.18477343 -.09105004 0 .0795803 "
    ".1609302 .2461123 .33791524 .44070983 .562617 .72295684 1"
)


def spec_of(name, k, n):
    """The spec of a format for a matrix."""
    f = FORMATS[name]
    return WeightSpec(k, n, f["kind"], f["bits"], f.get("group", k), f.get("offset", 0))


def weight_of(name, k, n, seed=0):
    """Random canonical arrays of a format, and their spec."""
    options, spec = FORMATS[name], spec_of(name, k, n)
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (spec.packed_k, n), np.uint8)
    if spec.kind in ("e4m3", "e5m2"):
        codes = np.where(codes & 0x7F < 0x7B, codes, 0x80).astype(np.uint8)
        float8 = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}[spec.kind]
        codes = codes.view(jnp.dtype(float8))
    elif options.get("signed"):
        codes = codes.view(np.int8)
    shape, stored = (spec.groups, n), options.get("scale", "bfloat16")
    if stored == "uint8":
        scale = rng.integers(120, 131, shape, np.uint8)
    else:
        scale = rng.uniform(0.01, 0.1, shape).astype(jnp.dtype(stored))
    zero = options.get("zero")
    zero = rng.integers(0, 2**spec.bits, shape, np.uint8) if zero else None
    table = np.array(NF4.split(), np.float32) if spec.kind == "table" else None
    arrays = (codes, scale, zero, table)
    return Weight(*(None if a is None else jnp.asarray(a) for a in arrays)), spec


def prepared(backend, weight, spec):
    """The weight as the backend keeps it."""
    if backend in ("tpu", "interpret"):
        from qjax.pallas_kernels.matmul import layout

        return layout.prepack(weight, spec) or (weight, spec)
    if backend == "gpu":
        from qjax.pallas_kernels.matmul import gpu_layout

        return gpu_layout.prepack(weight, spec) or (weight, spec)
    return weight, spec


def product(backend, spec, **options):
    """A jitted `(x, weight) -> y`."""
    if backend == "interpret":
        options |= {"interpret": True}
    backend = "tpu" if backend == "interpret" else backend
    fn = functools.partial(quantized_matmul, spec=spec, backend=backend, **options)
    return jax.jit(lambda x, weight: fn(x, weight))


def correctness(backend):
    """Largest error over the bound, on shapes that do and do not divide."""
    small = backend == "interpret"
    shapes = [(1, 512, 256), (16, 1024, 384), (7, 512, 200), (130, 768, 256)]
    if not small:
        shapes += [(16, 4096, 1000), (300, 4096, 512), (4096, 512, 512)]
    calls = [(shape, "bfloat16", False) for shape in shapes]
    calls += [(shape, "bfloat16", True) for shape in shapes[1:4]]
    calls += [(shape, "float32", False) for shape in shapes[:2]]
    # All formats of one call before the next: a run that is cut has seen every kernel.
    for (m, k, n), dtype, transpose in calls:
        for name in FORMATS:
            found = _compare(backend, name, m, k, n, dtype, transpose)
            if found is not None:
                turned = "-transposed" if transpose else ""
                label = f"matmul-{name}-{dtype}-{m}x{k}x{n}{turned}"
                yield {"case": label, **found}


def _compare(backend, name, m, k, n, dtype, transpose):
    """Error and bound; None where the backend refuses, which others then do."""
    weight, spec = weight_of(name, k, n)
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(m, n if transpose else k)), dtype)
    packed, changed = prepared(backend, weight, spec)
    try:
        y = product(backend, changed, transpose=transpose)(x, packed)
    except KernelError:
        return None
    wanted, bound = reference.exact(x, weight, spec, transpose=transpose)
    error = np.abs(np.asarray(y.astype(jnp.float32), np.float64) - wanted)
    error = error / reference.tolerance(wanted, bound, dtype)
    return {"error": float(np.max(error)), "bound": 1.0}


BARS = {
    "int4-g128": {"bandwidth": 0.8},
    "int8-channel": {"bandwidth": 0.88},
    "fp8-channel": {"bandwidth": 0.88},
    "nf4-g64": {"bandwidth": 0.7},
}


def timing(backend):
    """Decode of every format on the first shape, of the main ones on all; prefill."""
    for shape in SHAPES:
        for name, bar in BARS.items():
            for m in (1, 16):
                yield from _timed(backend, name, m, shape, bar)
    for name in ("int4-g128", "nf4-g64", "fp8-channel"):
        bar = {"dense": 0.95} if name == "int4-g128" else None
        for m in (64, 256, 4096):
            yield from _timed(backend, name, m, SHAPES[0], bar if m == 4096 else None)
    for name in FORMATS.keys() - BARS.keys():
        yield from _timed(backend, name, 16, SHAPES[0], None)


def _timed(backend, name, m, shape, bar, cache=60 << 20):
    k, n = shape
    weight, spec = weight_of(name, k, n)
    size = weight.nbytes
    packed, changed = prepared(backend, weight, spec)
    run = product(backend, changed)
    x = jnp.ones((m, k), jnp.bfloat16)
    try:
        jax.eval_shape(run, x, packed)
    except KernelError:
        return
    copies = min(16, max(1, -(-4 * cache // size)))
    turns = [(x, jax.tree.map(jnp.copy, packed)) for _ in range(copies)]
    many = min(4, max(1, -(-4 * cache // (2 * k * n))))
    dense = [(x, jnp.ones((k, n), jnp.bfloat16)) for _ in range(many)]
    yield {
        "case": f"matmul-{name}-{m}x{k}x{n}",
        "bytes": size + 2 * m * (k + n),
        "flops": 2 * m * k * n,
        "peak": "bf16",
        "run": run,
        "arrays": turns,
        "dense": (jax.jit(lambda x, w: x @ w), dense),
        "bar": bar,
    }


def tpu_cases():
    """Every format in both regimes and transposed; see `tpu_aot.py`."""
    k, n = SHAPES[0]
    for name in FORMATS:
        yield _tpu_case(name, 16, k, n, fast=name in ("int4-g128", "fp8-channel"))
        yield _tpu_case(name, 2048, k, n)
        yield _tpu_case(name, 16, k, n, transpose=True)
        yield _tpu_case(name, 2048, k, n, transpose=True)
    for name in ("int4-g128", "int4-g128-asym", "nf4-g64"):
        yield _tpu_case(name, 64, k, n)
        yield _tpu_case(name, 16, k, n, dtype="float32")
        yield _tpu_case(name, 512, k, n, dtype="float32")
        yield _tpu_case(name, 7, 1000, 333)
        yield _tpu_case(name, 16, *SHAPES[1])
        yield _tpu_case(name, 2048, *SHAPES[1])
        yield _tpu_case(name, 16, k, n, layers=4)

    yield from _tuning(k, n)


def _tuning(k, n):
    """Tiles around the tuned ones, for `pallas_kernels/matmul/specs.py`."""
    for m, prefill, rows, columns in (
        (16, False, 16, 512),
        (16, False, 16, 1024),
        (16, False, 16, 2048),
        (64, False, 64, 1024),
        (64, True, 64, 1024),
        (128, False, 128, 1024),
        (128, True, 128, 1024),
        (256, True, 256, 512),
        (256, True, 256, 1024),
        (512, True, 512, 1024),
    ):
        case = _tpu_case("int4-g128", m, k, n, tiles=(prefill, rows, columns))
        regime = "panel" if prefill else "pass"
        yield case | {
            "name": f"tune-matmul-{regime}-m{m}-columns{columns}",
            "bar": None,
        }


def _tpu_case(
    name,
    m,
    k,
    n,
    *,
    transpose=False,
    dtype="bfloat16",
    layers=None,
    tiles=None,
    **more,
):
    from qjax.pallas_kernels.matmul import specs, tpu

    weight, spec = _shapes(name, k, n, layers)
    configs = {
        chip: specs.config(spec, m, dtype, transpose=transpose, chip=chip)
        for chip in specs.TUNED
    }
    if tiles is not None:
        prefill, rows, columns = tiles
        configs = {
            chip: dataclasses.replace(t, prefill=prefill, rows=rows, columns=columns)
            for chip, t in configs.items()
        }

    def call(x, weight, layer, *, config):
        layer = None if layers is None else layer
        return tpu.matmul(
            x, weight, spec, layer=layer, transpose=transpose, config=config
        )

    x = jax.ShapeDtypeStruct((m, n if transpose else k), dtype)
    bars = {"v5e": 0.9, "v6e": 0.9}
    main = name == "int4-g128" and m == 16 and not transpose and dtype == "bfloat16"
    turned = "-transposed" if transpose else ""
    turned += "" if dtype == "bfloat16" else f"-{dtype}"
    turned += "" if layers is None else "-layers"
    whole = weight.nbytes // (layers or 1)
    return {
        "name": f"matmul-{name}{turned}-m{m}-{k}x{n}",
        "fn": {c: functools.partial(call, config=configs[c]) for c in configs},
        "args": (x, weight, jax.ShapeDtypeStruct((), jnp.int32)),
        "bytes": whole + m * (k + n) * x.dtype.itemsize,
        "flops": 2 * m * k * n,
        "steps": {c: -(-n // t.columns) * -(-m // t.rows) for c, t in configs.items()},
        "kernel": "matmul-",
        "bar": bars if main else None,
        # Rows of x in another order, split or with a copy per group.
        "temporaries": 4 << 20 if m <= 64 else 16 * m * (k + n),
        **more,
    }


def _shapes(name, k, n, layers):
    """Shapes of a weight in the TPU layout, without making it."""
    small, spec = weight_of(name, 256, 128)
    from qjax.pallas_kernels.matmul import layout

    planes = layout.prepack(small, spec) is not None
    spec = spec_of(name, k, n)
    if planes:
        spec = WeightSpec(
            k, n, spec.kind, spec.bits, spec.group, spec.offset, layout.TAG
        )
    rows = layout.packed_rows(spec) if spec.layout == layout.TAG else spec.packed_k
    lead = () if layers is None else (layers,)
    struct = jax.ShapeDtypeStruct
    stats = (*lead, spec.groups, n)
    return Weight(
        struct((*lead, rows, n), small.codes.dtype),
        struct(stats, small.scale.dtype),
        None if small.zero is None else struct(stats, small.zero.dtype),
        None if small.table is None else struct((*lead, 16), jnp.float32),
    ), spec
