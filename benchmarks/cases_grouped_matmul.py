"""Cases of the grouped (mixture-of-experts) products for the benchmark drivers.

Shapes are those of Mixtral 8x7B (8 experts of 4096 x 14336, 2 per token) and of models
with many small experts (128 of 2048 x 768, 8 per token). `tpu_cases` counts a step of
the grid: one block of one expert.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from qjax.pallas_kernels.grouped_matmul import reference, specs
from qjax.pallas_kernels.grouped_matmul.api import grouped_gate_up, grouped_matmul
from qjax.pallas_kernels.grouped_matmul.tpu import matmul
from qjax.pallas_kernels.matmul.reference import tolerance
from qjax.pallas_kernels.weights import KernelError, Weight, WeightSpec

CHIPS = ("v5e", "v5p", "v6e", "7x")
MODELS = {"mixtral": (8, 4096, 14336, 2), "many": (128, 2048, 768, 8)}
"""Experts, k, n, experts per token."""
FORMATS = {
    "int4-g128": dict(kind="int", bits=4, group=128, offset=8.0),
    "int4-g64-zero": dict(kind="int", bits=4, group=64, offset=0.0),
    "int8-channel": dict(kind="int", bits=8, group=0, offset=128.0),
    "int2-g128": dict(kind="int", bits=2, group=128, offset=2.0),
    "nf4-g64": dict(kind="table", bits=4, group=64),
    "mxfp4": dict(kind="e2m1", bits=4, group=32),
    "fp8-channel": dict(kind="e4m3", bits=8, group=0),
}


def spec_of(name, k, n):
    """The spec of a format for a matrix; group 0 is one scale per column."""
    fields = FORMATS[name]
    return WeightSpec(k, n, **(fields | {"group": fields["group"] or k}))


def shapes(spec, experts, name):
    """Shapes of a stacked weight."""
    scale = jnp.uint8 if name == "mxfp4" else jnp.bfloat16
    codes = jnp.float8_e4m3fn if spec.kind == "e4m3" else jnp.uint8
    stats = (experts, spec.groups, spec.n)
    struct = jax.ShapeDtypeStruct
    return Weight(
        struct((experts, spec.packed_k, spec.n), codes),
        struct(stats, scale),
        struct(stats, jnp.bfloat16) if name.endswith("zero") else None,
        struct((experts, 16), jnp.float32) if spec.kind == "table" else None,
    )


def random_weight(name, experts, k, n, seed=0):
    """Random canonical arrays of a format, made on the device, and their spec."""
    spec = spec_of(name, k, n)
    shape = shapes(spec, experts, name)
    keys = jax.random.split(jax.random.key(seed), 3)
    codes = jax.random.bits(keys[0], shape.codes.shape, jnp.uint8)
    if spec.kind == "e4m3":
        codes = jax.lax.bitcast_convert_type(codes & 0x77, jnp.float8_e4m3fn)
    if shape.scale.dtype == jnp.uint8:
        scale = jax.random.randint(keys[1], shape.scale.shape, 120, 128)
        scale = scale.astype(jnp.uint8)
    else:
        scale = jax.random.uniform(keys[1], shape.scale.shape, minval=0.01)
        scale = scale.astype(shape.scale.dtype)
    zero = table = None
    if shape.zero is not None:
        zero = jax.random.uniform(keys[2], shape.zero.shape, maxval=15.0)
        zero = zero.astype(shape.zero.dtype)
    if shape.table is not None:
        table = jax.random.normal(keys[2], shape.table.shape)
    return Weight(codes, scale, zero, table), spec


def prepared(backend, weight, spec):
    """The weight in the layout that the backend reads."""
    if backend == "gpu":
        from qjax.pallas_kernels.matmul import gpu_layout

        return jax.jit(lambda w: gpu_layout.prepack(w, spec)[0])(weight), _tag(spec)
    return weight, spec


def _tag(spec):
    """The spec that `gpu_layout.prepack` returns."""
    from qjax.pallas_kernels.matmul import gpu_layout

    weight = jax.eval_shape(lambda: random_weight(_name(spec), 1, spec.k, spec.n)[0])
    found = []
    jax.eval_shape(lambda w: found.append(gpu_layout.prepack(w, spec)[1]), weight)
    return found[0]


def _name(spec):
    return next(name for name in FORMATS if spec_of(name, spec.k, spec.n) == spec)


def product(backend, spec, activation=None, **options):
    """A jitted `(x, sizes, *weights) -> y`; two weights with an activation."""
    if backend == "interpret":
        options |= {"interpret": pltpu.InterpretParams()}
    backend = "tpu" if backend == "interpret" else backend
    options |= {"spec": spec, "backend": backend}
    if activation is not None:
        options["activation"] = activation
    function = grouped_matmul if activation is None else grouped_gate_up
    return jax.jit(functools.partial(function, **options))


def routed(experts, rows, seed=0):
    """Rows of each expert when every row goes to a random one."""
    ids = np.random.default_rng(seed).integers(0, experts, rows)
    return np.bincount(ids, minlength=experts).astype(np.int32)


def correctness(backend):
    """Largest error over the bound: ragged groups, empty experts, both regimes."""
    if backend == "cpu":
        return
    groups = {
        "decode": (1, 0, 3, 0, 0, 2, 1, 0),
        "ragged": (17, 0, 64, 5, 130, 1, 0, 33),
        "one": (0, 0, 0, 40, 0, 0, 0, 0),
        "none": (0,) * 8,
    }
    if backend != "interpret":
        groups["prefill"] = (700, 0, 515, 130, 3, 257, 0, 64)
    for name in FORMATS:
        for label, sizes in groups.items():
            for kind in ("product", "transposed", "gate-up"):
                found = _compare(backend, name, sizes, kind)
                if found is not None:
                    yield {"case": f"grouped-{name}-{label}-{kind}", **found}


def _compare(backend, name, sizes, kind, k=512, n=384):
    """Error and bound; None where the backend refuses, which others then do."""
    experts, m = len(sizes), sum(sizes) + 5
    (gate, spec), (up, _) = (random_weight(name, experts, k, n, s) for s in (0, 1))
    gate = gate._replace(scale=gate.scale if name == "mxfp4" else gate.scale * 0.02)
    transpose, gated = kind == "transposed", kind == "gate-up"
    inner = n if transpose else k
    x = jax.random.normal(jax.random.key(2), (m, inner)).astype(jnp.bfloat16)
    group_sizes = jnp.asarray(sizes, jnp.int32)
    weights = (gate, up) if gated else (gate,)
    packed = [prepared(backend, weight, spec) for weight in weights]
    options = {"activation": "silu"} if gated else {"transpose": transpose}
    run = product(backend, packed[0][1], **options)
    try:
        y = run(x, group_sizes, *(weight for weight, _ in packed))
    except KernelError:
        return None
    if gated:
        exact = reference.exact_gate_up(x, sizes, gate, up, spec, "silu")
    else:
        exact = reference.exact(x, sizes, gate, spec, transpose=transpose)
    error = np.abs(np.asarray(y.astype(jnp.float32), np.float64) - exact[0])
    limit = np.maximum(tolerance(*exact, "bfloat16"), 1e-30)
    return {"error": float(np.max(error / limit)), "bound": 1.0}


def timing(backend):
    """Decode of 8 tokens and prefill of 2048, single and gated."""
    if backend == "cpu":
        return
    for model in MODELS:
        for name in FORMATS:
            yield from _timed(backend, model, name, 8, None)
        yield from _timed(backend, model, "int4-g128", 8, "silu")
        for name in ("int4-g128", "int8-channel"):
            yield from _timed(backend, model, name, 2048, None)
        yield from _timed(backend, model, "int4-g128", 2048, "silu")


def _timed(backend, model, name, tokens, activation, cache=60 << 20):
    experts, k, n, top = MODELS[model]
    m, count = tokens * top, 1 if activation is None else 2
    weight, spec = random_weight(name, experts, k, n)
    size, sizes = weight.nbytes, routed(experts, m)
    packed, changed = prepared(backend, weight, spec)
    del weight
    run = product(backend, changed, activation)
    x, groups = jnp.ones((m, k), jnp.bfloat16), jnp.asarray(sizes)
    try:
        jax.eval_shape(run, x, groups, *([packed] * count))
    except KernelError:
        return
    active = count * size * int(np.count_nonzero(sizes)) // experts
    turns = [
        (x, groups, *(jax.tree.map(jnp.copy, packed) for _ in range(count)))
        for _ in range(max(1, -(-4 * cache // active)))
    ]
    dense = jnp.zeros((experts, k, n), jnp.bfloat16)
    yield {
        "case": f"grouped-{model}-{name}-m{m}" + ("-gate-up" if count > 1 else ""),
        "bytes": active + 2 * m * (k + n),
        "flops": 2 * m * k * n * count,
        "peak": "bf16",
        "run": run,
        "arrays": turns,
        "dense": (jax.jit(jax.lax.ragged_dot), [(x, dense, groups)])
        if count == 1
        else None,
        "bar": {"bandwidth": 0.7} if name == "int4-g128" and tokens == 8 else None,
    }


def tpu_cases():
    """Decode and prefill of every format; see `tpu_aot.py`."""
    for model, (experts, k, n, top) in MODELS.items():
        for name in FORMATS:
            spec = spec_of(name, k, n)
            weight = shapes(spec, experts, name)
            for kind, tokens in (
                ("product", 8),
                ("gate-up", 8),
                ("product", 2048),
                ("transposed", 2048),
            ):
                yield _tpu_case(model, name, spec, weight, experts, tokens * top, kind)


def _tpu_case(model, name, spec, weight, experts, m, kind):
    """One case; every expert has rows."""
    transpose, count = kind == "transposed", 2 if kind == "gate-up" else 1
    columns, inner = (spec.k, spec.n) if transpose else (spec.n, spec.k)
    fn, steps = {}, {}
    for chip in CHIPS:
        config = specs.default(
            spec,
            m,
            experts,
            jnp.bfloat16,
            transpose=transpose,
            weights=count,
            chip=chip,
        )
        fn[chip] = functools.partial(
            matmul,
            spec=spec,
            transpose=transpose,
            activation="silu" if count > 1 else None,
            config=config,
        )
        visits = max(experts, -(-m // config.rows))
        steps[chip] = visits * -(-spec.n // config.columns)
    return {
        "name": f"grouped-{model}-{name}-m{m}-{kind}",
        "fn": fn,
        "args": (
            jax.ShapeDtypeStruct((m, inner), jnp.bfloat16),
            jax.ShapeDtypeStruct((experts,), jnp.int32),
            (weight,) * count,
        ),
        "bytes": count * weight.nbytes + m * (inner + columns) * 2,
        "steps": steps,
        "flops": 2 * m * spec.k * spec.n * count,
        "kernel": "grouped",
        "temporaries": 4 * m * (inner + columns) * 2 + (1 << 20),
        "fast": model == "many" and name == "int4-g128" and not transpose,
    }


def gpu_cases():
    """Decode and prefill of every format on Hopper; see `gpu_aot.py`."""
    for model, (experts, k, n, top) in MODELS.items():
        for name in FORMATS:
            spec = spec_of(name, k, n)
            for kind, tokens in (
                ("product", 8),
                ("gate-up", 8),
                ("product", 2048),
                ("gate-up", 2048),
                ("transposed", 2048),
            ):
                yield _gpu_case(model, name, spec, experts, tokens * top, kind)


def _gpu_case(model, name, spec, experts, m, kind):
    """One case with prepacked weights."""
    from qjax.pallas_kernels.matmul import gpu_layout

    def pack(weight):
        return gpu_layout.prepack(weight, spec)[0]

    weight = jax.eval_shape(pack, shapes(spec, experts, name))
    transpose, count = kind == "transposed", 2 if kind == "gate-up" else 1
    columns, inner = (spec.k, spec.n) if transpose else (spec.n, spec.k)
    options = {"activation": "silu"} if count > 1 else {"transpose": transpose}
    return {
        "name": f"grouped-{model}-{name}-m{m}-{kind}",
        "fn": product("gpu", _tag(spec), **options),
        "args": (
            jax.ShapeDtypeStruct((m, inner), jnp.bfloat16),
            jax.ShapeDtypeStruct((experts,), jnp.int32),
            *(weight,) * count,
        ),
        # x and the result in places of their experts, the result also in float32.
        "temporaries": (64 << 20) + 8 * (m + 128 * experts) * (inner + columns),
        "fast": model == "many" and name == "int4-g128" and kind != "transposed",
    }
