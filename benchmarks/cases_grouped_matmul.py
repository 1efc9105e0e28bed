"""Cases of the grouped (mixture-of-experts) products for the benchmark drivers.

Shapes are those of Mixtral 8x7B (8 experts of 4096 x 14336, 2 per token) and of models
with many small experts (128 of 2048 x 768, 8 per token). `tpu_cases` counts a step of
the grid: one block of one expert.
"""

import functools

import jax
import jax.numpy as jnp

from qjax.pallas_kernels.grouped_matmul import specs
from qjax.pallas_kernels.grouped_matmul.tpu import matmul
from qjax.pallas_kernels.weights import Weight, WeightSpec

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
