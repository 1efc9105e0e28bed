"""Cases of the weight encoders for the benchmark drivers.

Bytes are those of the floats read once and of codes and scales written once. `dense`
is the cast of the same weight to bfloat16.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from qjax.pallas_kernels.quantize import api, specs
from qjax.pallas_kernels.quantize.xla import bytes_moved
from qjax.pallas_kernels.weights import WeightSpec

SHAPES = {"4096x14336": (4096, 14336)}
CPU_SHAPES = {"1024x2048": (1024, 2048)}
NF4 = (
    "-1 -.6961928 -.52507305 -.3949175 -.28444138 -.18477343 -.09105004 0 .0795803 "
    ".1609302 .2461123 .33791524 .44070983 .562617 .72295684 1"
)
FORMATS = {
    "int4-g128": ("int", 4, 128, 8.0),
    "int3-g64": ("int", 3, 64, 4.0),
    "int2-g64": ("int", 2, 64, 2.0),
    "int8-g128": ("int", 8, 128, 0.0),
    "int8-channel": ("int", 8, 0, 0.0),
    "nf4-b64": ("table", 4, 64, 0.0),
    "fp8-g128": ("e4m3", 8, 128, 0.0),
    "fp8-channel": ("e4m3", 8, 0, 0.0),
}
"""Kind, bits, group (0: one per column) and offset by name."""


TIMED = ("int4-g128", "int8-channel", "nf4-b64", "fp8-g128")
"""Formats whose times are taken on GPUs, where the whole run has minutes."""
SAMPLES = ((256, 128, jnp.bfloat16), (4096, 1000, jnp.float32))
"""What correctness is measured on."""


def spec_of(name, k, n):
    """The spec of a format for a matrix."""
    kind, bits, group, offset = FORMATS[name]
    return WeightSpec(k, n, kind, bits, group or k, offset)


def run(spec, backend, w, interpret=False):
    """Codes and scale of a weight."""
    table = np.array(NF4.split(), np.float32) if spec.kind == "table" else None
    if backend == "tpu" and interpret:
        from jax.experimental.pallas import tpu as pltpu

        interpret = pltpu.InterpretParams()
    got = api.encode(w, spec, table=table, backend=backend, interpret=interpret)
    return got.codes, got.scale


def correctness(backend):
    """Share of codes that differ from the reference's, and of scales."""
    rng = np.random.default_rng()
    interpret = backend == "interpret"
    kernels = {"cpu": ("xla",), "gpu": ("gpu", "xla"), "interpret": ("tpu",)}
    samples = SAMPLES[: 1 if interpret else 2]
    for name, (k, n, dtype) in itertools.product(FORMATS, samples):
        spec = spec_of(name, k, n)
        w = jnp.asarray(rng.standard_normal((k, n)), dtype)
        want = jax.jit(functools.partial(run, spec, "reference"))(w)
        for kernel in kernels.get(backend, ("tpu", "xla")):
            call = functools.partial(run, spec, kernel, interpret=interpret)
            got = call(w) if interpret else jax.jit(call)(w)
            pairs = zip(got, want, strict=True)
            wrong = [np.mean(np.asarray(a) != np.asarray(b)) for a, b in pairs]
            label = f"encode-{kernel}-{name}-{jnp.dtype(dtype).name}-{k}x{n}"
            # Division need not be correctly rounded everywhere.
            yield {"case": label, "error": float(max(wrong)), "bound": 1e-4}


def timing(backend):
    """Encoders on rotating weights."""
    shapes = CPU_SHAPES if backend == "cpu" else SHAPES
    names = TIMED if backend == "gpu" else tuple(FORMATS)
    kernels = {"cpu": ("xla",), "gpu": ("gpu", "xla")}.get(backend, ("tpu", "xla"))
    dtypes = (jnp.float32, jnp.bfloat16)
    cast = jax.jit(lambda w: (2 * w).astype(jnp.bfloat16))
    for (label, (k, n)), dtype in itertools.product(shapes.items(), dtypes):
        keys = jax.random.split(jax.random.key(0), 2)
        arrays = [(jax.random.normal(key, (k, n), dtype),) for key in keys]
        for name, kernel in itertools.product(names, kernels):
            spec = spec_of(name, k, n)
            yield {
                "case": f"encode-{kernel}-{name}-{jnp.dtype(dtype).name}-{label}",
                "bytes": bytes_moved(arrays[0][0], spec),
                "flops": 20 * k * n,
                "run": jax.jit(functools.partial(run, spec, kernel)),
                "arrays": arrays,
                "dense": (cast, arrays),
            }


def tpu_cases():
    """Every format, from float32 and bfloat16; see `tpu_aot.py`."""
    label, (k, n) = "4096x14336", SHAPES["4096x14336"]
    for name in FORMATS:
        for dtype in (jnp.float32, jnp.bfloat16):
            spec = spec_of(name, k, n)
            w = jax.ShapeDtypeStruct((k, n), dtype)
            rows = specs.tpu_config(spec, w.dtype.itemsize).rows
            yield {
                "name": f"encode-{name}-{jnp.dtype(dtype).name}-{label}",
                "fn": functools.partial(run, spec, "tpu"),
                "args": (w,),
                "bytes": bytes_moved(w, spec),
                "steps": -(-k // rows) * -(-n // specs.LANES),
                "kernel": "encode_weight",
                "fast": name in ("int4-g128", "nf4-b64") and dtype == jnp.float32,
            }


def gpu_cases():
    """Every format, from float32 and bfloat16; see `gpu_aot.py`."""
    for case in tpu_cases():
        spec = case["fn"].args[0]
        yield {key: case[key] for key in ("name", "args", "fast")} | {
            "fn": functools.partial(run, spec, "gpu"),
            # Scales of whole columns are found by XLA, in parts.
            "temporaries": 16 << 20,
        }
