"""Programs of the weight-only product for `gpu_aot.py`."""

import dataclasses

import jax
import jax.numpy as jnp
from cases_matmul import FORMATS, SHAPES, spec_of, weight_of

from qjax.pallas_kernels.matmul import gpu, gpu_layout, gpu_specs
from qjax.pallas_kernels.weights import Weight


def _weights(name, k, n, layers=None):
    """Shapes of a prepacked weight and its spec."""
    small, spec = weight_of(name, 256, 128)
    made = gpu_layout.prepack(small, spec)
    assert made is not None
    spec = dataclasses.replace(spec_of(name, k, n), layout=made[1].layout)
    rows, columns = gpu_layout.padded(spec)
    lead = () if layers is None else (layers,)
    struct, bits = jax.ShapeDtypeStruct, gpu_layout.codec(spec).bits
    stats = (*lead, gpu_layout.groups(spec), columns)
    return Weight(
        struct((*lead, columns // 64, rows // 64 * bits * 128), jnp.int32),
        struct(stats, small.scale.dtype),
        None if small.zero is None else struct(stats, small.zero.dtype),
        None if small.table is None else struct((*lead, 16), jnp.float32),
    ), spec


def _case(name, m, k, n, *, dtype="bfloat16", transpose=False, layers=None, fast=False):
    weight, spec = _weights(name, k, n, layers)
    x = jax.ShapeDtypeStruct((m, n if transpose else k), dtype)
    if gpu_specs.obstacle(spec, m, dtype, transpose=transpose) is not None:
        return
    config = gpu_specs.default(spec, m, dtype, jnp.dtype(dtype), transpose)
    shared = config.stages * gpu_specs.stage_bytes(spec, config, transpose)

    def call(x, weight, layer):
        layer = None if layers is None else layer
        return gpu.matmul(x, weight, spec, layer=layer, transpose=transpose)

    more = ("-transposed" if transpose else "") + ("" if layers is None else "-layers")
    more += "" if dtype == "bfloat16" else f"-{dtype}"
    yield {
        "name": f"matmul-{name}{more}-m{m}-{k}x{n}",
        "fn": call,
        "args": (x, weight, jax.ShapeDtypeStruct((), jnp.int32)),
        "shared": shared + gpu_specs.fixed_bytes(spec, config, transpose),
        # Partial sums of blocks that share a tile; three parts of float32 x.
        "temporaries": 256 << 20,
        "fast": fast,
    }


def gpu_cases():
    """Every format in every regime; other activations, layers, shapes of the main ones.

    Yields:
      Cases as `gpu_aot.py` describes them.
    """
    k, n = SHAPES[0]
    for name in FORMATS:
        main = name in ("int4-g128", "int8-channel", "nf4-g64")
        for m in (1, 16, 32, 64, 128, 512, 4096):
            yield from _case(name, m, k, n, fast=main and m in (1, 16, 4096))
        for m in (8, 4096):
            yield from _case(name, m, k, n, transpose=True, fast=main and m == 8)
            yield from _case(name, m, k, n, dtype="float16")
            yield from _case(name, m, k, n, dtype="float32")
        yield from _case(name, 1, k, n, layers=4, fast=name == "int4-g128")
    for shape in SHAPES[1:]:
        yield from _case("int4-g128", 16, *shape)
        yield from _case("int4-g128", 4096, *shape)
