"""Decode attention on TPU: one pass over the codes of a layer, an online softmax.

The grid is (batch, groups of key heads, blocks of slots). A step copies `[heads, block,
row]` codes, key and value together, with the scales of its slots. All queries that
share a key head are rows of one product. Codes become bfloat16, which holds them
exactly; scales stay outside the products: key scales multiply scores, value scales
multiply weights.

Blocks before the first and past the last slot that a row sees are neither copied nor
computed: their index repeats a neighbour's, which the pipeline does not copy again.

Heads whose width is no multiple of 128 lanes are not cut out of their row: queries are
padded with zeros over the value half, and the value half of the result is kept.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from . import specs
from .reference import KV, MASKED, encode, reach

LANES = 128


def attention(
    q,
    cache: KV,
    queries,
    keys,
    *,
    layer=None,
    window=None,
    softcap: float | None = None,
    scale: Any = 1.0,
    config: specs.Config | None = None,
    interpret: Any = False,
):
    """Returns attention of `q [batch, heads, time, head_dim]` over a cache.

    Arguments are those of `api.decode_attention`, checked; `q` is rotated already.
    """
    problem = specs.Problem.of(q, cache)
    tiles = config or specs.config(specs.default_device(), problem)
    block = specs.divisor(problem.length, tiles.block, LANES)
    heads = specs.divisor(problem.kv_heads, tiles.heads, 1)
    batch, kv_heads, width = problem.batch, problem.kv_heads, problem.head_dim
    whole = width % LANES != 0
    inner = problem.row if whole else width
    compute = jnp.float32 if q.dtype == jnp.float32 else jnp.bfloat16
    unit = 8 if compute == jnp.float32 else 16
    rows = -(-problem.rows // unit) * unit
    spare = rows - problem.rows

    x = q.reshape(batch, kv_heads, problem.rows, width).astype(compute)
    x = jnp.pad(x, [(0, 0), (0, 0), (0, spare), (0, inner - width)])
    high = jnp.tile(queries, (1, problem.heads // kv_heads))
    high = jnp.pad(high, [(0, 0), (0, spare)], constant_values=-1)
    low = jnp.zeros_like(high) if window is None else high - window + 1
    bounds = jnp.stack([high, jnp.maximum(low, 0)], axis=-1)
    bounds = jnp.pad(bounds, [(0, 0), (0, 0), (0, LANES - 2)])

    first, last = reach(queries, keys, window)
    codes, scales = cache if layer is not None else KV(*(a[None] for a in cache))
    index = jnp.zeros((), jnp.int32) if layer is None else layer
    prefetch = (
        jnp.asarray(index, jnp.int32).reshape(1),
        first // block,
        (last + block - 1) // block,
    )
    y = _call(
        problem, block, heads, rows, inner, whole, softcap, compute, interpret
    )(
        *prefetch,
        jnp.asarray(scale, jnp.float32).reshape(1, 1),
        x,
        bounds,
        keys[:, None, :],
        codes,
        scales,
    )  # fmt: skip
    y = y[:, :, : problem.rows]
    y = y[..., inner - width :] if whole else y
    return y.reshape(q.shape).astype(q.dtype)


def _call(problem, block, heads, rows, inner, whole, softcap, compute, interpret):
    """The `pallas_call` over (batch, groups of key heads, blocks)."""
    p = problem
    count = p.length // block

    def at(b, j, first, last):
        return jnp.clip(first[b] + j, 0, jnp.maximum(last[b] - 1, 0))

    def per_row(b, h, j, layer, first, last):
        return b, 0, 0

    def per_head(b, h, j, layer, first, last):
        return b, h, 0, 0

    head = pl.BlockSpec((None, heads, rows, inner), per_head)
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(p.batch, p.kv_heads // heads, count),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            head,
            pl.BlockSpec((None, rows, LANES), per_row),
            pl.BlockSpec(
                (None, 1, block), lambda b, h, j, n, f, e: (b, 0, at(b, j, f, e))
            ),
            pl.BlockSpec(
                (None, None, heads, block, p.row),
                lambda b, h, j, n, f, e: (n[0], b, h, at(b, j, f, e), 0),
            ),
            pl.BlockSpec(
                (None, None, heads, 2, block),
                lambda b, h, j, n, f, e: (n[0], b, h, 0, at(b, j, f, e)),
            ),
        ],
        out_specs=head,
        scratch_shapes=[
            pltpu.VMEM((heads, rows, LANES), jnp.float32),
            pltpu.VMEM((heads, rows, LANES), jnp.float32),
            pltpu.VMEM((heads, rows, inner), jnp.float32),
        ],
    )
    return pl.pallas_call(
        functools.partial(
            _kernel, count=count, kind=p.kind, whole=whole, softcap=softcap
        ),
        grid_spec=grid_spec,
        out_shape=jax.ShapeDtypeStruct((p.batch, p.kv_heads, rows, inner), compute),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=p.flops,
            bytes_accessed=p.cache_bytes + p.batch * p.kv_heads * p.length * 4,
            transcendentals=p.batch * p.heads * p.time * p.length,
        ),
        name=f"decode_attention_{p.kind}",
        interpret=interpret,
    )


def _decode(codes, kind, whole, dtype):
    """Key codes and value codes as floats; the same array where rows stay whole.

    4-bit codes come 8 too large; `_absorb` takes that off the products.
    """
    if kind == "int4":
        words = pltpu.bitcast(codes, jnp.int32)  # four bytes to a lane: four at once
        high = lax.shift_right_logical(words, jnp.full_like(words, 4))
        nibbles = [pltpu.bitcast(w & 0x0F0F0F0F, jnp.int8) for w in (words, high)]
        return tuple(x.astype(dtype) for x in nibbles)
    both = codes.astype(dtype)
    if whole:
        return both, both
    half = both.shape[1] // 2
    return both[:, :half], both[:, half:]


def _kernel(
    layer, first, last, scale, q, bounds, keys, codes, scales, out, top, total, mixed,
    *, count, kind, whole, softcap,
):  # fmt: skip
    """One block of slots for the queries of a group of key heads."""
    del layer
    row, step = pl.program_id(0), pl.program_id(2)

    @pl.when(step == 0)
    def _():
        top[...] = jnp.full(top.shape, MASKED, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        mixed[...] = jnp.zeros(mixed.shape, jnp.float32)

    @pl.when(first[row] + step < last[row])
    def _():
        place = keys[...]
        seen = (place <= bounds[:, 0:1]) & (place >= bounds[:, 1:2])
        for head in range(q.shape[0]):
            one = [x.at[head] for x in (q, codes, scales, top, total, mixed)]
            _absorb(seen, scale[0, 0], *one, kind=kind, whole=whole, softcap=softcap)

    @pl.when(step == count - 1)
    def _():
        summed = total[:, :, 0:1]
        share = jnp.where(summed == 0.0, 1.0, summed)
        out[...] = (mixed[...] / share).astype(out.dtype)


def _absorb(seen, scale, q, codes, scales, top, total, mixed, *, kind, whole, softcap):
    """Online softmax of one head over one block."""
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    key, value = _decode(codes[...], kind, whole, q.dtype)
    score = lax.dot_general(
        q[...],
        key,
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
        precision=precision,
    )
    if kind == "int4":
        score -= 8.0 * jnp.sum(q[...].astype(jnp.float32), axis=1, keepdims=True)
    score = score * (scales[0:1, :].astype(jnp.float32) * scale)
    if softcap is not None:
        score = jnp.tanh(score * (1.0 / softcap)) * softcap
    score = jnp.where(seen, score, MASKED)
    old = top[:, 0:1]
    new = jnp.maximum(old, jnp.max(score, axis=1, keepdims=True))
    weight = jnp.where(seen, jnp.exp(score - new), 0.0)
    fade = jnp.exp(old - new)
    summed = total[:, 0:1] * fade + jnp.sum(weight, axis=1, keepdims=True)
    top[...] = jnp.broadcast_to(new, top.shape)
    total[...] = jnp.broadcast_to(summed, total.shape)
    weight = (weight * scales[1:2, :].astype(jnp.float32)).astype(q.dtype)
    more = lax.dot_general(
        weight,
        value,
        (((1,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
        precision=precision,
    )
    if kind == "int4":
        more -= 8.0 * jnp.sum(weight.astype(jnp.float32), axis=1, keepdims=True)
    mixed[...] = mixed[...] * fade + more


def write(k, v, cache: KV, index, *, layer=None, rotate="none", interpret: Any = False):
    """Writes tokens into the slots from `index` on, in place.

    Only the tiles that hold these slots are read and written back: 32 slots of codes
    for one token, as the chip packs bytes, blocks of 128 slots for more. Arguments are
    those of `api.write_kv`, checked.
    """
    new = encode(k, v, cache.kind, rotate=rotate, scale_dtype=cache.scale.dtype)
    codes, scales = cache if layer is not None else KV(*(a[None] for a in cache))
    _, batch, kv_heads, length, width = codes.shape
    time = k.shape[2]
    tile = 32 if time == 1 else LANES
    count = 1 if time == 1 else (time + LANES - 2) // LANES + 1
    heads = specs.divisor(kv_heads, 8, 1)
    index = jnp.asarray(index, jnp.int32)
    number = jnp.asarray(0 if layer is None else layer, jnp.int32)
    at = jnp.stack([number, index, index // tile, index // LANES])
    if time == 1:
        fresh = KV(
            new.codes, jnp.broadcast_to(new.scale, (*new.scale.shape[:3], LANES))
        )
    else:  # moved to where the slots lie in their blocks
        zero, offset = jnp.zeros((), jnp.int32), lax.rem(index, LANES)
        window = (batch, kv_heads, count * LANES, width)
        fresh = KV(
            lax.dynamic_update_slice(
                jnp.zeros(window, codes.dtype), new.codes, (zero, zero, offset, zero)
            ),
            lax.dynamic_update_slice(
                jnp.zeros((batch, kv_heads, 2, count * LANES), scales.dtype),
                new.scale,
                (zero, zero, zero, offset),
            ),
        )

    def codes_block(j, at):  # steps past the end repeat the last block
        return jnp.minimum(at[2] + j, length // tile - 1)

    def scale_block(j, at):
        return jnp.minimum(at[3] + j, length // LANES - 1)

    def part(j, at):
        return scale_block(j, at) - at[3]

    rows = 1 if time == 1 else LANES
    stored = [
        pl.BlockSpec(
            (None, None, heads, tile, width),
            lambda b, h, j, at: (at[0], b, h, codes_block(j, at), 0),
        ),
        pl.BlockSpec(
            (None, None, heads, 2, LANES),
            lambda b, h, j, at: (at[0], b, h, 0, scale_block(j, at)),
        ),
    ]
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(batch, kv_heads // heads, count),
        in_specs=[
            pl.BlockSpec(
                (None, heads, rows, width), lambda b, h, j, at: (b, h, part(j, at), 0)
            ),
            pl.BlockSpec(
                (None, heads, 2, LANES), lambda b, h, j, at: (b, h, 0, part(j, at))
            ),
            *stored,
        ],
        out_specs=stored,
    )
    touched = batch * kv_heads * count * (tile * width + LANES * 8)
    done = pl.pallas_call(
        functools.partial(_write_kernel, time=time, length=length),
        grid_spec=grid_spec,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (codes, scales)],
        input_output_aliases={3: 0, 4: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=0, bytes_accessed=2 * touched, transcendentals=0
        ),
        name=f"write_kv_{cache.kind}",
        interpret=interpret,
    )(at, *fresh, codes, scales)
    return KV(*done) if layer is not None else KV(*(x[0] for x in done))


def _write_kernel(
    at, new_codes, new_scales, codes, scales, out_codes, out_scales, *, time, length
):
    """Replaces the slots of a tile that lie in the call's range."""
    index, step = at[1], pl.program_id(2)

    def inside(shape, axis, first):
        size = shape[axis]
        tile = jnp.minimum(first + step, length // size - 1)
        slot = tile * size + lax.broadcasted_iota(jnp.int32, shape, axis)
        return (slot >= index) & (slot < index + time)

    wide = jnp.float32 if codes.dtype == jnp.float8_e4m3fn else jnp.int32
    for head in range(codes.shape[0]):
        old, new = codes[head].astype(wide), new_codes[head].astype(wide)
        seen = inside(old.shape, 0, at[2])
        mixed = jnp.where(seen, jnp.broadcast_to(new, old.shape), old)
        out_codes[head] = mixed.astype(codes.dtype)
        seen = inside(scales[head].shape, 1, at[3])
        out_scales[head] = jnp.where(seen, new_scales[head], scales[head])
