"""Decode attention on Hopper GPUs (Mosaic GPU): flash decoding over quantized blocks.

The grid is (batch, key head, split), flat: the slots between the first and the last
that a row sees are shared out evenly to `splits` thread blocks of one warpgroup each. A
step takes `block` slots: codes, key and value together, arrive by TMA and are decoded
once in registers to bfloat16 in shared memory; two products over 64 query rows follow,
with the softmax in registers between them. Query rows beyond those that share the key
head are padding, whose results are not stored. Key scales multiply scores, value scales
multiply weights.

Every split stores a normalized result and the logarithm of its softmax sum; a second,
ordered sum over splits makes the result independent of scheduling.

4-bit codes: `codes & 15` is the key plus 8, and `(codes & -16) ^ -128`, as a signed
byte, 16 times the value; both are exact in bfloat16.

The interpreter has no product with an operand in registers: there weights go through
shared memory.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import hopper, versions
from . import specs
from .reference import KV, MASKED, reach

ACC = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]
ROWS = 64
LOG2E = 1.4426950408889634
ROW = plgpu.Layout.WGMMA.reduce(1)
COLUMN = plgpu.Layout.WGMMA.reduce(0)


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
    p = specs.Problem.of(q, cache)
    tiles = config or specs.gpu_config(p)
    spare = ROWS - p.rows
    x = q.reshape(p.batch * p.kv_heads, p.rows, p.head_dim)
    x = jnp.pad(x, [(0, 0), (0, spare), (0, 0)])
    x = x.reshape(p.batch * p.kv_heads * ROWS, p.head_dim)
    high = jnp.tile(queries, (1, p.heads // p.kv_heads))
    high = jnp.pad(high, [(0, 0), (0, spare)], constant_values=-1)
    low = jnp.zeros_like(high) if window is None else high - window + 1
    bounds = jnp.stack([high, jnp.maximum(low, 0)], axis=1)  # [batch, 2, ROWS]
    first, last = reach(queries, keys, window)
    first, last = first // tiles.block, (last + tiles.block - 1) // tiles.block
    number = jnp.zeros((), jnp.int32) if layer is None else jnp.asarray(layer)
    layers = jnp.broadcast_to(number.astype(jnp.int32), first.shape)
    spans = jnp.stack([first, last, layers], axis=1)  # [batch, 3]
    factor = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), (ROWS,))
    codes = cache.codes
    if p.kind == "int4":
        codes = lax.bitcast_convert_type(codes, jnp.int8)
    y, logs = _call(p, tiles, softcap, interpret)(
        spans,
        x,
        bounds,
        factor,
        keys,
        codes.reshape(-1, p.row),
        cache.scale.reshape(-1, p.length),
    )
    y = y.reshape(p.batch, p.kv_heads, tiles.splits, -1, p.head_dim)
    logs = logs.reshape(p.batch, p.kv_heads, tiles.splits, ROWS)
    return _merge(y[:, :, :, : p.rows], logs[..., : p.rows]).reshape(q.shape)


def _merge(y, logs):
    """Sums the splits: `y [batch, heads, splits, rows, width]`, base-2 `logs`."""
    weight = jnp.exp2(logs - jnp.max(logs, axis=2, keepdims=True))
    weight = weight / jnp.sum(weight, axis=2, keepdims=True)
    return jnp.sum(y.astype(jnp.float32) * weight[..., None], axis=2).astype(y.dtype)


def _call(p: specs.Problem, tiles: specs.Config, softcap, interpret):
    """The kernel on a grid of batch * key heads * splits."""
    dtype = jnp.dtype(p.dtype)
    stored = jnp.dtype("int8" if p.kind == "int4" else p.kind)
    kept = -(-p.rows // 8) * 8
    items = p.batch * p.kv_heads * tiles.splits
    stages, block = tiles.stages, tiles.block
    wide = min(128, p.head_dim)  # a tile does not straddle key and value
    swizzle = hopper.swizzle(stored, wide)
    scratch = dict(
        q_smem=hopper.tile((ROWS, p.head_dim), dtype),
        codes_smem=plgpu.SMEM((stages, block, p.row), stored, transforms=swizzle),
        scale_smem=plgpu.SMEM((stages, 2, block), jnp.float32),
        place_smem=plgpu.SMEM((stages, block), jnp.int32),
        key_smem=hopper.tile((block, p.head_dim), dtype),
        value_smem=hopper.tile((block, p.head_dim), dtype),
        log_smem=plgpu.SMEM((ROWS,), jnp.float32),
        weight_smem=hopper.tile((ROWS, block), dtype) if interpret else None,
        ready=plgpu.Barrier(num_arrivals=1),
        full=plgpu.Barrier(num_arrivals=3, num_barriers=stages),
    )
    mesh = plgpu.Mesh(
        grid=(items,), grid_names=("cta",), num_threads=1, thread_name="wg"
    )

    def scoped(*refs):
        body = functools.partial(_body, p, tiles, softcap, *refs)
        pl.run_scoped(body, collective_axes="wg", **scratch)

    call: Any = pl.kernel(
        scoped,
        out_type=(
            jax.ShapeDtypeStruct((items * kept, p.head_dim), dtype),
            jax.ShapeDtypeStruct((items, ROWS), jnp.float32),
        ),
        mesh=mesh,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=interpret,
        cost_estimate=pl.CostEstimate(
            flops=p.flops,
            bytes_accessed=p.cache_bytes + 4 * p.batch * p.kv_heads * p.length,
            transcendentals=p.batch * p.heads * p.time * p.length,
        ),
        name=f"decode_attention_{p.kind}",
    )
    return call


def _body(
    p, tiles, softcap, spans, q, bounds, factor, keys, codes, scales, out, logs,
    *, q_smem, codes_smem, scale_smem, place_smem, key_smem, value_smem, log_smem,
    weight_smem, ready, full,
):  # fmt: skip
    """One split of one key head of one row."""
    item = lax.axis_index("cta")
    split = lax.rem(item, tiles.splits)
    head = item // tiles.splits
    row = head // p.kv_heads
    first, last = spans[row, 0], spans[row, 1]
    share = (last - first + tiles.splits - 1) // tiles.splits
    start = first + split * share
    stop = jnp.minimum(start + share, last)
    line = spans[row, 2] * (p.batch * p.kv_heads) + head

    def fetch(step):
        slot = lax.rem(step - start, tiles.stages)
        slots = pl.ds(step * tiles.block, tiles.block)
        base = line * p.length + step * tiles.block
        plgpu.copy_gmem_to_smem(
            codes.at[pl.ds(base, tiles.block)], codes_smem.at[slot], full.at[slot]
        )
        plgpu.copy_gmem_to_smem(
            scales.at[pl.ds(2 * line, 2), slots], scale_smem.at[slot], full.at[slot]
        )
        plgpu.copy_gmem_to_smem(keys.at[row, slots], place_smem.at[slot], full.at[slot])

    plgpu.copy_gmem_to_smem(q.at[pl.ds(head * ROWS, ROWS)], q_smem, ready)
    for i in range(tiles.stages):
        pl.when(start + i < stop)(functools.partial(fetch, start + i))
    high = versions.load(bounds.at[row, 0], ROW, optimized=False)
    low = versions.load(bounds.at[row, 1], ROW, optimized=False)
    times = versions.load(factor, ROW, optimized=False)
    plgpu.barrier_wait(ready)

    def step(i, carry):
        slot = lax.rem(i - start, tiles.stages)
        plgpu.barrier_wait(full.at[slot])
        _decode(p, codes_smem.at[slot], key_smem, value_smem)
        plgpu.commit_smem()

        def score(sums):
            plgpu.wgmma(sums, q_smem, hopper.transpose(key_smem))
            return sums[...]

        s = pl.run_scoped(score, ACC((ROWS, tiles.block), jnp.float32))
        key_scale = versions.load(scale_smem.at[slot, 0], COLUMN)
        value_scale = versions.load(scale_smem.at[slot, 1], COLUMN)
        place = versions.load(place_smem.at[slot], COLUMN)
        s = s * _down(key_scale, s.shape) * _across(times, s.shape)
        if softcap is not None:
            s = _tanh(s * (1.0 / softcap)) * softcap
        spread = _down(place, s.shape)
        seen = (spread <= _across(high, s.shape)) & (spread >= _across(low, s.shape))
        top, total, mixed = carry
        s = jnp.where(seen, s * LOG2E, MASKED)
        new = jnp.maximum(top, s.max(axis=1))
        weight = jnp.where(seen, jnp.exp2(s - _across(new, s.shape)), 0.0)
        fade = jnp.exp2(top - new)
        total = total * fade + weight.sum(axis=1)
        weight = (weight * _down(value_scale, s.shape)).astype(q_smem.dtype)

        if weight_smem is not None:
            weight_smem[...] = weight
            plgpu.commit_smem()
            weight = weight_smem

        def mix(sums):
            plgpu.wgmma(sums, weight, value_smem)
            return sums[...]

        more = pl.run_scoped(mix, ACC(mixed.shape, jnp.float32))
        mixed = mixed * _across(fade, mixed.shape) + more
        pl.when(i + tiles.stages < stop)(functools.partial(fetch, i + tiles.stages))
        return new, total, mixed

    zeros = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW)
    none = plgpu.layout_cast(jnp.full((ROWS,), MASKED, jnp.float32), ROW)
    blank = jnp.zeros((ROWS, p.head_dim), jnp.float32)
    blank = plgpu.layout_cast(blank, plgpu.Layout.WGMMA)
    top, total, mixed = lax.fori_loop(start, stop, step, (none, zeros, blank))
    share = jnp.where(total == 0.0, 1.0, total)
    mixed = mixed * _across(1.0 / share, mixed.shape)
    if p.kind == "int4":
        mixed = mixed * (1.0 / 16.0)
    q_smem[...] = mixed.astype(q_smem.dtype)
    log_smem[...] = top + jnp.log2(share)
    plgpu.commit_smem()
    kept = -(-p.rows // 8) * 8
    plgpu.copy_smem_to_gmem(q_smem.at[pl.ds(0, kept)], out.at[pl.ds(item * kept, kept)])
    plgpu.copy_smem_to_gmem(log_smem, logs.at[item])
    plgpu.wait_smem_to_gmem(0)


def _decode(p, codes, key, value):
    """Codes of a block as floats in shared memory."""
    dtype = key.dtype
    upcast = plgpu.Layout.WGMMA_UPCAST_2X

    def put(x, target, offset=0):
        if p.kind == "float8_e4m3fn":  # the instruction gives float16, exactly
            x = x.astype(jnp.float16).astype(jnp.float32)
        x = x.astype(dtype)
        x = x - offset if offset else x
        target[...] = plgpu.layout_cast(x, plgpu.Layout.WGMMA)

    if p.kind == "int4":
        both = versions.load(codes, upcast)
        put(both & jnp.int8(15), key, 8)
        put((both & jnp.int8(-16)) ^ jnp.int8(-128), value)
        return
    for half, target in enumerate((key, value)):
        part = codes.at[:, pl.ds(half * p.head_dim, p.head_dim)]
        put(versions.load(part, upcast), target)


def _across(x, shape):
    """A number per query row over all columns."""
    return lax.broadcast_in_dim(x, shape, (0,))


def _down(x, shape):
    """A number per slot over all rows."""
    return lax.broadcast_in_dim(x, shape, (1,))


def _tanh(x):
    """Tanh by exponentials: the approximate instruction has 11 bits."""
    return 1.0 - 2.0 / (jnp.exp2(x * (2.0 * LOG2E)) + 1.0)
