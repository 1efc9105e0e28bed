"""Cases of attention over a quantized key-value cache.

`correctness` compares kernels with the reference, within its bound, over lengths,
windows, soft-caps, padding and rotations; `timing` sets decode over int8, fp8 and int4
caches beside attention over a bfloat16 cache of the same context; `tpu_cases` are
compiled by `benchmarks/tpu_aot.py`.
"""

import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from qjax.pallas_kernels.attention import api, reference, specs

CHIP_KINDS = {
    "v5e": "TPU v5 lite",
    "v5p": "TPU v5",
    "v6e": "TPU v6 lite",
    "7x": "TPU7x",
}
CACHE_BYTES = 200 << 20
"""Four times the largest cache of a device: what calls rotate through."""


def _shapes(batch, kv_heads, groups, length, width, kind, time=1):
    """Abstract q, cache, lengths."""
    cache = jax.eval_shape(
        lambda: reference.empty(batch, kv_heads, length, width, kind)
    )
    q = jax.ShapeDtypeStruct((batch, kv_heads * groups, time, width), jnp.bfloat16)
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


def gpu_cases() -> Iterator[dict]:
    """Decode at 8192 tokens, and writes of a token and of a prompt, which XLA does.

    Every kind and width of a head with few and with all queries that the kernel takes,
    and with a window and a soft-cap. Rotations happen around the kernel.
    """
    for kind, width in itertools.product(reference.KINDS, (64, 128)):
        yield _decode_case(kind, width, 4, rotate="both", fast=width == 128)
        yield _decode_case(kind, width, 16, time=4)
        yield _decode_case(kind, width, 4, rotate="keys", window=1024, softcap=30.0)
        for time in (1, 1024):
            yield _write_case(kind, width, time)


def _decode_case(kind, width, groups, time=1, fast=False, **options):
    q, cache, lengths = _shapes(8, 8, groups, 8192, width, kind, time=time)
    assert specs.obstacle("gpu", specs.Problem.of(q, cache)) is None
    run = functools.partial(api.decode_attention, backend="gpu", scale=0.088, **options)
    more = "".join(f"-{k}-{v}" for k, v in options.items())
    return {
        "name": f"attention-{kind}-g{groups}-t{time}{more}-8x8x8192x{width}",
        "fn": run,
        "args": (q, cache, lengths),
        "fast": fast,
    }


def _write_case(kind, width, time):
    """In place: temporaries are those of the call's tokens."""
    k, cache, _ = _shapes(8, 8, 1, 8192, width, kind, time=time)
    return {
        "name": f"attention-write-{kind}-t{time}-8x8x8192x{width}",
        "fn": lambda k, v, cache, index: api.write_kv(k, v, cache, index),
        "args": (k, k, cache, jax.ShapeDtypeStruct((), jnp.int32)),
        "donate": (2,),
        "kernels": False,
        "temporaries": 4 * k.size + (1 << 20),
        "fast": width == 128 and time == 1,
    }


def _random(kind, batch, kv_heads, groups, length, width, time, rotate, seed):
    """Random queries and a filled cache."""
    keys = jax.random.split(jax.random.key(seed), 3)

    def draw(key, *shape):
        return jax.random.normal(key, shape, jnp.bfloat16)

    cache = reference.empty(batch, kv_heads, length, width, kind)
    k = draw(keys[0], batch, kv_heads, length, width)
    v = draw(keys[1], batch, kv_heads, length, width)
    cache = jax.jit(functools.partial(api.write_kv, rotate=rotate))(k, v, cache, 0)
    return draw(keys[2], batch, kv_heads * groups, time, width), cache


def correctness(backend) -> Iterator[dict]:
    """Largest error over the bound of every kind, over shapes and options."""
    if backend == "cpu":
        return
    small = backend == "interpret"
    shapes = [(128, 4, 1), (128, 1, 3), (128, 8, 2), (64, 4, 1), (64, 8, 8)]
    options = [
        {},
        {"window": 100, "softcap": 20.0},
        {"rotate": "keys"},
        {"rotate": "both", "window": 3},
    ]
    seed = int(np.random.default_rng().integers(2**31))
    for kind in reference.KINDS:
        for (width, groups, time), option in itertools.product(shapes, options):
            length = 256 if small else 4096
            shape = (
                (2, 2, groups, length, width)
                if small
                else (4, 4, groups, length, width)
            )
            found = _compare(backend, kind, shape, time, option, seed)
            if found is not None:
                name = "-".join(f"{k}{v}" for k, v in option.items()) or "plain"
                case = f"attention-{kind}-g{groups}-t{time}-d{width}-{name}"
                yield {"case": f"{case}-seed{seed}", **found}


def _compare(backend, kind, shape, time, option, seed):
    """Error and bound of one call with ragged lengths; None where it is refused."""
    batch, kv_heads, groups, length, width = shape
    rotate = option.get("rotate", "none")
    q, cache = _random(kind, batch, kv_heads, groups, length, width, time, rotate, seed)
    name = "tpu" if backend == "interpret" else backend
    if specs.obstacle(name, specs.Problem.of(q, cache)):
        return None
    lengths = jax.random.randint(jax.random.key(seed), (batch,), 0, length + 1)
    lengths = lengths.astype(jnp.int32).at[0].set(length)
    queries, keys = reference.positions_from_lengths(lengths, time, length)
    extra = {}
    if backend == "interpret":
        extra = {
            "interpret": pltpu.InterpretParams(),
            "config": specs.Config(block=128, heads=2),
        }
    option = option | {"scale": width**-0.5}
    run = functools.partial(api.decode_attention, backend=name, **option, **extra)
    y = jax.jit(run)(q, cache, lengths).astype(jnp.float32)
    arguments = (q, cache, queries, keys)
    exact = jax.jit(functools.partial(reference.attend, **option))(*arguments)
    limit = jax.jit(functools.partial(reference.bound, compute="bfloat16", **option))(
        *arguments
    )
    # A NaN anywhere is the largest error.
    share = jnp.nan_to_num(jnp.abs(y - exact) / (limit + 1e-30), nan=jnp.inf)
    return {"error": float(jnp.max(share)), "bound": 1.0}


def _dense(q, k, v, lengths):
    """Attention over a bfloat16 cache, as XLA compiles it."""
    batch, width = q.shape[0], q.shape[-1]
    x = q.reshape(batch, k.shape[1], -1, width)
    score = jnp.einsum("bhgd,bhsd->bhgs", x, k, preferred_element_type=jnp.float32)
    seen = jnp.arange(k.shape[2])[None] < lengths[:, None]
    score = jnp.where(seen[:, None, None], score * width**-0.5, -1e30)
    weight = jax.nn.softmax(score, axis=-1).astype(q.dtype)
    return jnp.einsum("bhgs,bhsd->bhgd", weight, v).reshape(q.shape)


def timing(backend) -> Iterator[dict]:
    """Decode of one token per row at 4k to 32k tokens."""
    if backend not in ("gpu", "tpu"):
        return
    for batch, length in ((16, 4096), (4, 16384), (1, 32768)):
        for kind in reference.KINDS:
            shape = (8, 4, length, 128)
            lengths = jnp.full((batch,), length, jnp.int32)
            q, cache = _random(kind, batch, *shape, 1, "none", 0)
            problem = specs.Problem.of(q, cache)
            if specs.obstacle(backend, problem):
                continue
            copies = max(1, -(-CACHE_BYTES // problem.cache_bytes))
            arrays = [
                (q, jax.tree.map(jnp.copy, cache), lengths) for _ in range(copies)
            ]
            key = jax.random.key(1)
            k = jax.random.normal(key, (batch, 8, length, 128), jnp.bfloat16)
            run = functools.partial(
                api.decode_attention, backend=backend, scale=128**-0.5
            )
            yield {
                "case": f"attention-{kind}-b{batch}-h8x4-d128-{length}",
                "bytes": problem.cache_bytes,
                "flops": problem.flops,
                "peak": "bf16",
                "run": jax.jit(run),
                "arrays": arrays,
                "dense": (jax.jit(_dense), [(q, k, k + 1, lengths)] * 2),
                "bar": {"dense": 1.0},
            }
