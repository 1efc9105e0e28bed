"""Cases of attention over a quantized key-value cache.

    python benchmarks/tpu_aot.py --match attention     # compile for TPUs

`correctness` compares with the reference in float64-free exact bounds over many shapes;
`timing` sets decode over int8, fp8 and int4 caches beside a bfloat16 cache of the same
context; both are run by `benchmarks/kernels.py`.
"""

import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from qjax.pallas_kernels.attention import api, reference, specs

CHIP_KINDS = {
    "v5e": "TPU v5 lite",
    "v5p": "TPU v5",
    "v6e": "TPU v6 lite",
    "7x": "TPU7x",
}
L2_BYTES = 50 << 20


def _shapes(batch, kv_heads, groups, length, width, kind, dtype="bfloat16"):
    """Abstract q, cache, lengths."""
    cache = jax.eval_shape(
        lambda: reference.empty(batch, kv_heads, length, width, kind)
    )
    q = jax.ShapeDtypeStruct((batch, kv_heads * groups, 1, width), dtype)
    return q, cache, jax.ShapeDtypeStruct((batch,), jnp.int32)


def tpu_cases() -> Iterator[dict]:
    """Decode of 8 rows over 8 key heads of 128 at 8192 tokens."""
    for kind, groups in itertools.product(reference.KINDS, (4, 1)):
        args = _shapes(8, 8, groups, 8192, 128, kind)
        problem = specs.Problem.of(args[0], args[1])
        fns, steps = {}, {}
        for chip, device in CHIP_KINDS.items():
            tiles = specs.config(device, problem)
            block = specs.divisor(8192, tiles.block, 128)
            steps[chip] = 8 * 8 * 8192 // block // tiles.heads
            fns[chip] = functools.partial(
                api.decode_attention, backend="tpu", config=tiles, scale=0.088
            )
        yield {
            "name": f"attention-{kind}-g{groups}-8x8x8192x128",
            "fn": fns,
            "args": args,
            "bytes": problem.cache_bytes,
            "flops": problem.flops,
            "steps": steps,
            "kernel": "decode_attention",
            "bar": None,
            "fast": groups == 4,
        }
