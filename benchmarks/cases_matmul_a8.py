"""Cases of products with 8-bit activations for the benchmark scripts."""

import functools

import jax
import jax.numpy as jnp

from qjax.pallas_kernels.matmul_a8 import api, specs
from qjax.pallas_kernels.weights import Weight, WeightSpec

SHAPES = ((4096, 14336), (14336, 4096), (8192, 8192))
INTEGER = ("v5e", "v5p", "v6e")


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
    formats = {
        "w4a8-g128": (WeightSpec(k, n, "int", 4, 128, 8.0), False),
        "w4a8-g128-asymmetric": (WeightSpec(k, n, "int", 4, 128, 0.0), True),
        "w4a8-g32": (WeightSpec(k, n, "int", 4, 32, 8.0), False),
        "w4a8-channel": (WeightSpec(k, n, "int", 4, k, 8.0), False),
        "w8a8-channel": (WeightSpec(k, n, "int", 8, k, 128.0), False),
        "w8a8-fp8": (WeightSpec(k, n, "e4m3", 8, k), False),
    }
    for name, (spec, zero) in formats.items():
        for m in (16, 512):
            yield from _tpu_case(name, spec, zero, m)


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
            "fast": m == 16 and name in ("w4a8-g128", "w8a8-channel", "w8a8-fp8"),
        }
