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
from .reference import KV, MASKED, reach

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
