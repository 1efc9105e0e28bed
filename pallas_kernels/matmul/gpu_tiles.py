"""What a warpgroup of a Hopper product computes: sums of tiles, scaled and written.

Shared by the dense and the grouped product. Scales multiply sums of a group in float32
(mode "post", with zero-points subtracted by a product with ones), the total when a
column has one scale ("end"), or else weights in registers, once rounded ("pre").
Transposed products decode through shared memory.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import hopper
from . import gpu_layout


def tile_sum(plan, interpret, warpgroup, start, stop, first, scratch):
    """Sum over the steps of a tile.

    Args:
      plan: the product, a `gpu_plan.Plan`.
      interpret: decode with jnp.
      warpgroup: which 64 columns of the tile.
      start: first step.
      stop: the step behind the last.
      first: the step that had the first stage of the ring.
      scratch: of the kernel.

    Returns:
      The sum, float32 `[64, tokens]`, and in mode "end" with zero-points that of `x`.
    """
    config = plan.config
    ring = hopper.Ring(scratch, config.stages, first)
    accumulator = plgpu.WGMMAAccumulatorRef((64, config.tokens), jnp.float32)
    ones = plan.mode != "pre" and bool(plan.zero)
    multiply = functools.partial(_multiply, plan, interpret, warpgroup, scratch)

    if plan.mode != "post":

        def run(*sums):
            def step(i, _):
                slot = ring.enter(i)
                for chunk in range(config.rows // 64):
                    multiply(slot, chunk, sums)
                plgpu.wgmma_wait(0)
                ring.leave(slot)

            lax.fori_loop(start, stop, step, None)
            return tuple(s[...] for s in sums)

        return pl.run_scoped(run, *([accumulator] * (1 + ones)))

    per_group = min(config.rows, plan.spec.group) // 64

    def step(i, total):
        slot = ring.enter(i)
        for piece in range(config.rows // 64 // per_group):
            rows = _group_rows(plan, slot, piece, warpgroup, scratch)

            def run(*sums, piece=piece):
                for chunk in range(per_group):
                    multiply(slot, piece * per_group + chunk, sums)
                return tuple(s[...] for s in sums)

            sums = pl.run_scoped(run, *([accumulator] * (1 + ones)))
            total = total + _scaled(plan, sums, *rows)
        ring.leave(slot)
        return total

    zeros = jnp.zeros((64, config.tokens), jnp.float32)
    zeros = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
    return (lax.fori_loop(start, stop, step, zeros),)


def _multiply(plan, interpret, warpgroup, scratch, slot, chunk, sums):
    """Decodes block `chunk` of a step and adds its product to `sums[0]`."""
    bits = gpu_layout.codec(plan.spec).bits
    if plan.transpose:
        words = scratch["codes_smem"].at[slot, 0, pl.ds(warpgroup * bits, bits)]
    else:
        words = scratch["codes_smem"].at[slot, warpgroup, pl.ds(chunk * bits, bits)]
    words = hopper.load_words(words, plan.decode.codec)
    rows = _rows(plan, slot, chunk, warpgroup, scratch)
    table = scratch.get("table_smem")
    if table is not None and interpret:
        table = table[...]
    a = hopper.fragment(
        words, plan.decode, rows, table, scratch.get("magic"), interpret=interpret
    )
    x = scratch["x_smem"].at[slot]
    x = x if plan.config.rows == 64 else x.at[:, pl.ds(chunk * 64, 64)]
    x = hopper.transpose(x)
    operand = scratch["operand"].at[warpgroup] if "operand" in scratch else None
    if operand is None:
        plgpu.wgmma(sums[0], a, x)
    else:
        plgpu.wgmma_wait(0)  # the product before read it
        turned = hopper.transpose(operand) if plan.transpose else operand
        _multiply_shared(sums[0], a, x, operand, turned)
    if len(sums) > 1:
        one = jnp.ones((64, 64), jnp.dtype(plan.dtype))
        one = plgpu.layout_cast(one, plgpu.Layout.WGMMA)
        if operand is None:
            plgpu.wgmma(sums[1], one, x)
        else:
            _multiply_shared(sums[1], one, x, operand, operand)


def _multiply_shared(total, a, x, operand, turned):
    """Adds `a x` by way of shared memory; `turned` is `operand` as it multiplies."""
    operand[...] = a
    plgpu.commit_smem()
    plgpu.wgmma(total, turned, x)
    plgpu.wgmma_wait(0)


def _row(plan, ref, index):
    """A row vector of scales or zero-points in float32, one per column."""
    return to_float(plan.scale_dtype, hopper.load_row(ref.at[index]))


def to_float(dtype, row):
    """Stored scales as float32; bytes hold E8M0 or the bits of e4m3."""
    if row.dtype != jnp.uint8:
        return row.astype(jnp.float32)
    bits = row.astype(jnp.int32)
    if dtype == "uint8":
        small = jnp.full_like(bits, 0x00400000)  # 2**-127
        bits = jnp.where(bits == 0, small, bits << 23)
        return lax.bitcast_convert_type(bits, jnp.float32)
    # Sign to the top, exponent and mantissa below; a subnormal until it is multiplied.
    bits = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
    return lax.bitcast_convert_type(bits, jnp.float32) * jnp.float32(2.0**120)


def _rows(plan, slot, chunk, warpgroup, scratch):
    """Scales, shifts and centers of a block in `x`'s dtype (mode "pre")."""
    if plan.mode != "pre":
        return ()
    n = plan.decode.scales
    if plan.single:
        start = 0
    elif plan.transpose:
        start = warpgroup * 64 // plan.spec.group if plan.pieces > 1 else 0
    else:
        start = chunk * 64 // plan.spec.group if plan.pieces > 1 else 0
    lanes = pl.ds(0 if plan.transpose else warpgroup * 64, 64)
    dtype = jnp.dtype(plan.dtype)
    scales, shifts, centers = [], [], []
    for piece in range(n):
        index = (slot, start + piece, lanes)
        scale = _row(plan, scratch["scale_smem"], index)
        scales.append(scale.astype(dtype))
        if not plan.zero:
            continue
        zero = hopper.load_row(scratch["zero_smem"].at[index])
        zero = number(zero)
        if plan.decode.centered:
            near = _nearest(zero)
            centers.append(near.astype(dtype))
            shifts.append(((near - zero) * scale).astype(dtype))
        else:
            shifts.append((-zero * scale).astype(dtype))
    return (*scales, *shifts, *centers)


def number(zero):
    """Zero-points as float32; bytes are integers."""
    if zero.dtype == jnp.uint8:
        zero = zero.astype(jnp.int32)
    return zero.astype(jnp.float32)


def _nearest(zero):
    """The nearest integer of at most 127: adding 1.5 * 2**23 leaves no fraction."""
    big = jnp.float32(1.5 * 2**23)
    whole = (zero + big) - big
    return jnp.minimum(jnp.maximum(whole, jnp.float32(-127)), jnp.float32(127))


def _across(row, tokens):
    return lax.broadcast_in_dim(row, (64, tokens), (0,))


def _group_rows(plan, slot, piece, warpgroup, scratch):
    """Scale of a group, and its zero-point or None, one per column."""
    row = piece if plan.pieces > 1 else 0
    index = (slot, row, pl.ds(warpgroup * 64, 64))
    zero = None
    if plan.zero:
        zero = number(hopper.load_row(scratch["zero_smem"].at[index]))
    return _row(plan, scratch["scale_smem"], index), zero


def _scaled(plan, sums, scale, zero):
    """A sum less the zero-point times the sum of `x`, times the scale."""
    value, tokens = sums[0], plan.config.tokens
    if zero is not None:
        value = value - sums[1] * _across(zero, tokens)
    return value * _across(scale, tokens)


def scaled_total(plan, sums, inputs, column):
    """The total times the only scale of each column.

    Args:
      plan: the product.
      sums: what `tile_sum` returned.
      inputs: references; the last two are scales and zero-points `[1, outer]` or None.
      column: the first of 64 columns.

    Returns:
      float32 `[64, tokens]`, in a tuple.
    """
    _, _, scale, zero = inputs
    index = (0, pl.ds(column, 64))
    if zero is not None:
        zero = number(hopper.load_row(zero.at[index]))
    return (_scaled(plan, sums, _row(plan, scale, index), zero),)


def write(plan, warpgroup, total, bias, out, column, m_tile, scratch):
    """Writes a whole tile, plus bias.

    Args:
      plan: the product.
      warpgroup: which 64 columns of the tile.
      total: float32 `[64, tokens]`.
      bias: reference float32 `[outer]`, or None.
      out: reference `[rows, outer]`.
      column: the first of the 64 columns.
      m_tile: which `tokens` rows.
      scratch: of the kernel.
    """
    if bias is not None:
        row = hopper.load_row(bias.at[pl.ds(column, 64)])
        total = total + _across(row, plan.config.tokens)
    total = total.astype(jnp.dtype(plan.out_dtype))
    hopper.write_turned(total, scratch["out_smem"], warpgroup, out, m_tile, column)
