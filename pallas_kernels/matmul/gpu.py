"""Weight-only product on Hopper GPUs (Mosaic GPU), for weights of `gpu_layout`.

The weight is the left operand of `wgmma`, decoded in registers, 64 columns by 64 rows
at a time; tokens are the right operand, so that one token wastes no memory traffic. One
warpgroup copies (TMA) into a ring of stages, the others decode and multiply. Blocks are
persistent and own either

* an equal share of all steps (`Config.split`): sums of tiles that several blocks share
  go to memory and are added in a fixed order by an XLA fusion, which also applies bias
  and dtype; or
* whole tiles, transposed in registers and written through shared memory.

`gpu_tiles` has the sums of tiles and where scales go. float32 `x` is the sum of three
bfloat16 ones, multiplied side by side.

Costs: beside the result, split products write `shares` float32 partial results; `x` is
copied when its rows or columns do not fill tiles. Refused: see `gpu_specs.obstacle`.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import hopper
from ..weights import KernelError, Weight, WeightSpec
from . import gpu_layout, gpu_tiles
from .gpu_plan import NAME, Plan, make_plan
from .gpu_specs import Config, default, obstacle

__all__ = ["Config", "matmul", "obstacle"]


def matmul(
    x: Any,
    w: Weight,
    spec: WeightSpec,
    *,
    layer: Any = None,
    bias: Any = None,
    out_dtype: Any = None,
    transpose: bool = False,
    config: Config | None = None,
    interpret: Any = False,
) -> Any:
    """`x W + bias`, or `x W^T + bias`.

    Args:
      x: `[m, k]` (`[m, n]` when `transpose`).
      w: arrays of `gpu_layout.prepack`.
      spec: the spec it returned.
      layer: int32 scalar, index into the leading axis of the arrays, or None.
      bias: one float per column of the result, or None.
      out_dtype: dtype of the result; default that of `x`.
      transpose: multiply by the transpose.
      config: tiles; default the table's.
      interpret: False, or parameters of the GPU interpreter.

    Returns:
      `[m, n]` (`[m, k]`).

    Raises:
      KernelError: the product has an obstacle, or `config` does not fit it.
    """
    reason = obstacle(spec, x.shape[0], x.dtype, transpose=transpose)
    if reason is not None:
        raise KernelError(f"{NAME}: {reason}")
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    m = x.shape[0]
    if config is None:
        config = default(spec, m, x.dtype, out_dtype, transpose)
    single = x.dtype == jnp.float32
    parts = _thirds(x) if single else x
    rows, inner = -parts.shape[0] % 8, _inner(spec, transpose) - parts.shape[1]
    if (rows and parts.shape[0] > 8) or inner:  # copies fill in all other zeros
        parts = jnp.pad(parts, ((0, rows), (0, inner)))
    biased = bias is not None
    if transpose and spec.group >= 128:
        w = _widened(w)
    plan = make_plan(spec, parts, w, config, out_dtype, transpose, biased, single)
    columns = spec.k if transpose else spec.n
    operands = [parts, gpu_layout.words(w), gpu_layout.scales(w)]
    if plan.zero:
        operands.append(w.zero)
    if spec.kind == "table":
        operands.append(hopper.table_pairs(w.table, parts.dtype))
    if layer is not None:
        operands.append(jnp.reshape(layer, (1,)).astype(jnp.int32))
    if plan.biased:
        grown = jnp.pad(bias.astype(jnp.float32), (0, plan.outer - columns))
        operands.append(grown)
    call: Any = _call(plan, interpret)
    y = call(*operands)
    if config.split:
        y = plan.total(y)
        y = y[: 3 * m].reshape(3, m, -1).sum(0) if single else y
    y = y[:m, :columns]
    if bias is not None and not plan.biased:
        y = y + bias.astype(jnp.float32)
    return y.astype(out_dtype)


def _inner(spec, transpose):
    """The contracted axis, padded."""
    rows, columns = gpu_layout.padded(spec)
    return columns if transpose else rows


def _thirds(x):
    """Three bfloat16 matrices, stacked, whose sum is `x`."""
    parts = []
    for _ in range(3):
        parts.append(x.astype(jnp.bfloat16))
        x = x - parts[-1].astype(jnp.float32)
    return jnp.concatenate(parts)


def _widened(w):
    """Bytes as floats: a step needs 64 scales, and no copy may have fewer than 128."""
    scale, zero = w.scale, w.zero
    if scale.dtype.itemsize == 1:
        name = jnp.dtype(scale.dtype).name
        scale = gpu_tiles.to_float(name, gpu_layout.scales(w))
    if zero is not None and zero.dtype.itemsize == 1:
        zero = gpu_tiles.number(zero)
    return w._replace(scale=scale, zero=zero)


def _call(plan: Plan, interpret):
    config, spec = plan.config, plan.spec
    x_type, scale_type = jnp.dtype(plan.dtype), jnp.dtype(plan.scale_dtype)
    if scale_type == jnp.float8_e4m3fn:
        scale_type = jnp.dtype(jnp.uint8)
    stages, warpgroups = config.stages, config.warpgroups
    bits, zero = gpu_layout.codec(spec).bits, bool(plan.zero)
    shape = (warpgroups, config.rows // 64 * bits)
    if plan.transpose:
        shape = (1, warpgroups * bits)
    scratch = dict(
        x_smem=hopper.tile((config.tokens, config.rows), x_type, stages),
        codes_smem=plgpu.SMEM((stages, *shape, 128), jnp.int32),
        scale_smem=_statistics(plan, scale_type),
        **hopper.barriers(3 + zero, warpgroups, stages),
    )
    if zero:
        scratch["zero_smem"] = _statistics(plan, jnp.dtype(plan.zero))
    if spec.kind == "table":
        scratch["table_smem"] = plgpu.SMEM((256, 32), jnp.int32)
        scratch["table_ready"] = plgpu.Barrier(num_arrivals=1)
    if plan.transpose or config.smem_operand:
        scratch["operand"] = hopper.tile((64, 64), x_type, warpgroups)
    if not config.split:
        out_type = jnp.dtype(plan.out_dtype)
        scratch["out_smem"] = hopper.out_tiles(warpgroups, out_type)
    cost = pl.CostEstimate(
        flops=2 * plan.tokens * spec.k * spec.n,
        bytes_accessed=spec.k * spec.n * bits // 8
        + spec.groups * spec.n * scale_type.itemsize
        + plan.tokens * (spec.k + spec.n) * 2,
        transcendentals=0,
    )
    return hopper.kernel(
        functools.partial(_body, plan, interpret is not False),
        out_type=plan.out,
        scratch=scratch,
        grid=plan.blocks,
        threads=warpgroups + 1,
        name=NAME,
        cost=cost,
        interpret=interpret,
    )


def _statistics(plan, dtype):
    """Shared memory for scales or zero-points; stages start at 128 bytes."""
    rows = plan.pieces
    while rows * plan.lanes * dtype.itemsize % 128:
        rows += 1
    return plgpu.SMEM((plan.config.stages, rows, plan.lanes), dtype)


def _body(plan: Plan, interpret, x, codes, scale, *refs, **scratch):
    refs = list(refs)
    zero = refs.pop(0) if plan.zero else None
    table = refs.pop(0) if plan.spec.kind == "table" else None
    layer = refs.pop(0)[0] if plan.stacked else None
    bias = refs.pop(0) if plan.biased else None
    (out,) = refs

    def of_layer(ref):
        return ref if layer is None else ref.at[layer]

    zero = None if zero is None else of_layer(zero)
    inputs = (x, of_layer(codes), of_layer(scale), zero)

    def compute(block, warpgroup):
        if table is not None:
            ready = scratch["table_ready"]

            @pl.when(warpgroup == 0)
            def _fill():
                source = of_layer(table)
                hopper.fill_table(source, scratch["table_smem"], interpret=interpret)
                plgpu.barrier_arrive(ready)

            plgpu.barrier_wait(ready)
        if plan.spec.kind == "int":
            scratch["magic"] = hopper.magic_word(plan.decode, interpret=interpret)
        _compute(plan, interpret, block, warpgroup, inputs, bias, out, scratch)

    hopper.roles(
        plan.config.warpgroups,
        lambda block: _copy(plan, block, inputs, scratch),
        compute,
    )


def _copy(plan, block, inputs, scratch):
    """The warpgroup that copies: fills stages as they become free."""
    x, codes, scale, zero = inputs
    config, bits = plan.config, gpu_layout.codec(plan.spec).bits
    first, last = plan.span(block)

    def copy(step, slot, full):
        tile, inner = plan.place(block, step)
        outer, m_tile = plan.axes(tile)
        if plan.transpose:
            column, row = inner, outer * config.warpgroups
            count, run = 1, config.warpgroups * bits
        else:
            column, row = outer * config.warpgroups, inner * (config.rows // 64)
            count, run = config.warpgroups, config.rows // 64 * bits
        plgpu.copy_gmem_to_smem(
            codes.at[pl.ds(column, count), pl.ds(row * bits, run)],
            scratch["codes_smem"].at[slot],
            full,
        )
        tokens = pl.ds(m_tile * config.tokens, config.tokens)
        plgpu.copy_gmem_to_smem(
            x.at[tokens, pl.ds(inner * config.rows, config.rows)],
            scratch["x_smem"].at[slot],
            full,
        )
        piece = 0 if plan.single else row * 64 // plan.spec.group
        lanes = pl.ds(column * 64, plan.lanes)
        for source, name in ((scale, "scale_smem"), (zero, "zero_smem")):
            if source is not None:
                plgpu.copy_gmem_to_smem(
                    source.at[pl.ds(piece, plan.pieces), lanes],
                    scratch[name].at[slot, pl.ds(0, plan.pieces)],
                    full,
                )

    hopper.Ring(scratch, config.stages, first).fill(last, copy)


def _compute(plan, interpret, block, warpgroup, inputs, bias, out, scratch):
    """A warpgroup that multiplies: tile after tile of the block's share."""
    first, last = plan.span(block)
    tile_first = first // plan.steps
    tile_last = (last + plan.steps - 1) // plan.steps

    def tile_body(t, _):
        start = jnp.maximum(first, t * plan.steps)
        stop = jnp.minimum(last, (t + 1) * plan.steps)
        tile, _ = plan.place(block, start)
        outer, m_tile = plan.axes(tile)
        column = outer * plan.width + warpgroup * 64
        total = gpu_tiles.tile_sum(
            plan, interpret, warpgroup, start, stop, first, scratch
        )
        if plan.mode == "end":
            total = gpu_tiles.scaled_total(plan, total, inputs, column)
        if plan.config.split:
            piece = block - plan.owner(tile * plan.steps)
            tokens = pl.ds(m_tile * plan.config.tokens, plan.config.tokens)
            out[piece, pl.ds(column, 64), tokens] = total[0]
        else:
            gpu_tiles.write(
                plan, warpgroup, total[0], bias, out, column, m_tile, scratch
            )

    lax.fori_loop(tile_first, tile_last, tile_body, None)
    if not plan.config.split:
        plgpu.wait_smem_to_gmem(0)
