"""Cases of products with 8-bit activations for `kernels.py` and the AOT scripts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from qjax.pallas_kernels.matmul_a8 import api, layout, reference, specs
from qjax.pallas_kernels.weights import KernelError, Weight, WeightSpec

SHAPES = ((4096, 14336), (14336, 4096), (8192, 8192))
INTEGER = ("v5e", "v5p", "v6e")
FORMATS = {
    "w8a8": (dict(kind="int", bits=8, offset=128.0), "int8"),
    "w8a8-fp8": (dict(kind="e4m3", bits=8), "float8_e4m3fn"),
    "w8a8-fp8-g128": (dict(kind="e4m3", bits=8, group=128), "float8_e4m3fn"),
    "w4a8": (dict(kind="int", bits=4, offset=8.0), "int8"),
    "w4a8-g128": (dict(kind="int", bits=4, group=128, offset=8.0), "int8"),
    "w4a8-g128-asymmetric": (dict(kind="int", bits=4, group=128, zero=True), "int8"),
    "w4a8-g64": (dict(kind="int", bits=4, group=64, offset=8.0), "int8"),
    "w4a8-g32": (dict(kind="int", bits=4, group=32, offset=8.0), "int8"),
    "w4a8-fp8-g128": (
        dict(kind="int", bits=4, group=128, offset=8.0),
        "float8_e4m3fn",
    ),
}
"""Weight and activation type of every case."""
FP8_UNIT = 2.0**-13
"""Rounding of one addition in the accumulators of Hopper's 8-bit floats."""


def weight_of(name, k, n, seed=0):
    """Random canonical arrays of a format, and their spec."""
    options = FORMATS[name][0]
    group = options.get("group", k)
    spec = WeightSpec(
        k, n, options["kind"], options["bits"], group, options.get("offset", 0.0)
    )
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (spec.packed_k, n), np.uint8)
    if spec.kind == "e4m3":
        codes = np.where(codes & 0x7F == 0x7F, 0, codes).astype(np.uint8)
        codes = codes.view(jnp.dtype("float8_e4m3fn"))
    shape = (spec.groups, n)
    scale = rng.uniform(0.01, 0.1, shape).astype(jnp.dtype("bfloat16"))
    zero = None
    if options.get("zero"):
        zero = rng.integers(0, 16, shape).astype(jnp.dtype("bfloat16"))
    arrays = (codes, scale, zero, None)
    return Weight(*(None if a is None else jnp.asarray(a) for a in arrays)), spec


def prepared(backend, weight, spec):
    """The weight as the backend keeps it."""
    if backend == "gpu":
        return layout.prepack(weight, spec) or (weight, spec)
    return weight, spec


def product(backend, spec, activation, **options):
    """A jitted `(x, weight) -> y`."""
    if backend == "interpret":
        options |= {"interpret": True}
    backend = "tpu" if backend == "interpret" else backend
    fn = functools.partial(
        api.matmul_a8, spec=spec, activation=activation, backend=backend, **options
    )
    return jax.jit(lambda x, weight: fn(x, weight))


def correctness(backend):
    """Largest error over the bound, on shapes that do and do not divide."""
    shapes = [(1, 512, 256), (16, 1024, 384), (7, 512, 200), (130, 768, 256)]
    if backend != "interpret":
        shapes += [(16, 4096, 1000), (300, 4096, 512), (4096, 512, 512)]
    for name in FORMATS:
        for m, k, n in shapes:
            for out in ("bfloat16", "float32"):
                found = _compare(backend, name, m, k, n, out)
                if found is not None:
                    yield {"case": f"matmul_a8-{name}-{out}-{m}x{k}x{n}", **found}


def _compare(backend, name, m, k, n, out):
    """Error and bound; None where the backend refuses."""
    weight, spec = weight_of(name, k, n)
    activation = FORMATS[name][1]
    x = jnp.asarray(np.random.default_rng(1).normal(size=(m, k)), jnp.bfloat16)
    packed, changed = prepared(backend, weight, spec)
    try:
        y = product(backend, changed, activation, out_dtype=out)(x, packed)
    except KernelError:
        return None
    wanted = reference.matmul_a8(
        x, weight, spec, activation=activation, out_dtype="float32"
    )
    hopper = backend == "gpu" and activation != "int8"
    unit = FP8_UNIT / 32 if hopper else 2.0**-24  # 32 products are added at once
    bound = reference.bound(x, weight, spec, activation=activation, out=out, unit=unit)
    error = jnp.abs(y.astype(jnp.float32) - wanted)
    ratio = jnp.where(error > 0, error / jnp.maximum(bound, jnp.float32(1e-30)), 0)
    return {"error": float(jnp.max(ratio)), "bound": 1.0}


def timing(backend):
    """Decode and prefill of every format."""
    for name in FORMATS:
        for m in (1, 16, 64):
            yield from _timed(backend, name, m, SHAPES[0])
        yield from _timed(backend, name, 4096, (4096, 4096))
    for shape in SHAPES[1:]:
        yield from _timed(backend, "w4a8-g128", 16, shape)


def _timed(backend, name, m, shape, cache=60 << 20):
    k, n = shape
    weight, spec = weight_of(name, k, n)
    activation = FORMATS[name][1]
    packed, changed = prepared(backend, weight, spec)
    run = product(backend, changed, activation)
    x = jnp.ones((m, k), jnp.bfloat16)
    try:
        jax.eval_shape(run, x, packed)
    except KernelError:
        return
    copies = min(16, max(1, -(-4 * cache // weight.nbytes)))
    many = min(4, max(1, -(-4 * cache // (2 * k * n))))
    bar = {"bandwidth": 0.75 if spec.bits == 4 else 0.88}
    if m > 64:
        bar = {"rate": 1200e12} if spec.bits == 8 and spec.group >= k else None
    yield {
        "case": f"matmul_a8-{name}-{m}x{k}x{n}",
        "bytes": weight.nbytes + 2 * m * (k + n),
        "flops": 2 * m * k * n,
        "peak": "int8" if activation == "int8" else "fp8",
        "run": run,
        "arrays": [(x, jax.tree.map(jnp.copy, packed)) for _ in range(copies)],
        "dense": (
            jax.jit(lambda x, w: x @ w),
            [(x, jnp.ones((k, n), jnp.bfloat16)) for _ in range(many)],
        ),
        "bar": bar if backend == "gpu" else None,
    }


def _weights(spec, zero=False):
    """Shapes of the arrays of a weight."""
    stat = jax.ShapeDtypeStruct((spec.groups, spec.n), jnp.bfloat16)
    kind = jnp.float8_e4m3fn if spec.kind == "e4m3" else jnp.uint8
    codes = jax.ShapeDtypeStruct((spec.packed_k, spec.n), kind)
    return Weight(codes, stat, stat if zero else None)


def _nbytes(weight):
    return sum(a.size * a.dtype.itemsize for a in weight if a is not None)


def _tpu_call(x, w, *, spec, activation, config):
    return api.matmul_a8(
        x, w, spec, activation=activation, backend="tpu", config=config
    )


def tpu_cases():
    """Programs for `tpu_aot.py`: decode and prefill, both activation types."""
    k, n = SHAPES[0]
    for name in FORMATS:
        if name == "w4a8-fp8-g128":
            continue  # the int8 format of the same weight, on 7x
        options = FORMATS[name][0]
        spec = WeightSpec(
            k,
            n,
            options["kind"],
            options["bits"],
            options.get("group", k),
            options.get("offset", 0.0),
        )
        for m in (16, 512):
            yield from _tpu_case(name, spec, bool(options.get("zero")), m)


def _tpu_case(name, spec, zero, m):
    w = _weights(spec, zero)
    x = jax.ShapeDtypeStruct((m, spec.k), jnp.bfloat16)
    for activation in specs.ACTIVATIONS:
        if specs.pair_obstacle(spec, activation):
            continue
        chips = INTEGER if activation == "int8" else ("7x",)
        chips = [c for c in chips if not specs.tpu_obstacle(spec, activation, c)]
        configs = {c: specs.default(spec, m, activation, c) for c in chips}
        if not chips:
            continue
        bar = {"v5e": 0.6, "v6e": 0.6, "7x": 0.9}
        fp8 = "-fp8" if activation != "int8" and "fp8" not in name else ""
        yield {
            "name": f"matmul_a8-{name}{fp8}-m{m}-{spec.k}x{spec.n}",
            "fn": {
                c: functools.partial(
                    _tpu_call, spec=spec, activation=activation, config=configs[c]
                )
                for c in chips
            },
            "args": (x, w),
            "bytes": _nbytes(w) + m * (spec.k + spec.n) * 2,
            "flops": 2 * m * spec.k * spec.n,
            "steps": {
                c: -(-spec.n // configs[c].columns) * -(-m // configs[c].rows)
                for c in chips
            },
            "kernel": "matmul_a8",
            "chips": chips,
            "bar": bar if m == 16 and name == "w4a8-g128" else None,
            "fast": m == 16 and name in ("w4a8-g128", "w8a8", "w8a8-fp8"),
        }


def gpu_cases():
    """Programs for `gpu_aot.py`: decode and prefill of every stored format."""
    k, n = SHAPES[0]
    for name, (_, activation) in FORMATS.items():
        small, spec = weight_of(name, 256, 128)
        ready = layout.prepack(small, spec)
        if ready is None:
            continue
        group = spec.group if spec.group < spec.k else k
        spec = dataclasses.replace(ready[1], k=k, n=n, group=group)
        rows, columns = layout.padded(spec)
        shape = (columns, rows)
        if spec.bits == 4:
            shape = (columns // 64, rows // layout.UNIT * layout.WORDS, 128)
        stat = jax.ShapeDtypeStruct((layout.groups(spec), columns), jnp.bfloat16)
        codes = jax.ShapeDtypeStruct(shape, ready[0].codes.dtype)
        weight = Weight(codes, stat, None if small.zero is None else stat)
        for m in (16, 4096):
            yield {
                "name": f"matmul_a8-{name}-m{m}-{k}x{n}",
                "fn": product("gpu", spec, activation),
                "args": (jax.ShapeDtypeStruct((m, k), jnp.bfloat16), weight),
                "fast": name in ("w8a8", "w8a8-fp8", "w4a8-g128"),
            }
