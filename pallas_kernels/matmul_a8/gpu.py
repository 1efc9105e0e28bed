"""Products with 8-bit activations on Hopper (Mosaic GPU), for weights of `layout`.

The weight is the left operand of `wgmma` and tokens are the right one: 64 columns of
the result per warpgroup, 8 to 256 tokens, so that one token wastes no memory traffic.
8-bit weights are read from shared memory; 4-bit ones are masked in registers to numbers
that are an exact multiple of the code (`gpu_operand`), and the factor goes into the
scale.

One warpgroup copies (TMA) into a ring of stages, the others multiply. Blocks are
persistent and own either an equal share of all steps (`Config.split`; partial sums are
added by XLA in a fixed order, together with `s_x`, bias and dtype) or whole tiles,
scaled, turned in registers and written in 16 bits through shared memory.

Groups are scaled after their product, in float32; that also takes sums out of the
14-bit accumulators of float8 products once per group. One scale per column is applied
at the end. Groups of 32 or 64 rows (4-bit codes) multiply 128 rows with the others set
to zero. Zero-points are subtracted with a product with ones.

Activations are rounded before, by XLA: a row has to be read whole before its first code
is known, so fusing that into tiles would read it twice.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import hopper, versions
from ..weights import KernelError, Weight, WeightSpec
from . import gpu_operand, layout, reference, specs
from .gpu_operand import DEEP
from .gpu_plan import NAME, Plan, make_plan, needs_sums, read_type

F32 = jnp.float32


def obstacle(
    spec: WeightSpec,
    m: int,
    x_dtype: Any,
    *,
    transpose: bool = False,
    activation: str = "int8",
) -> str | None:
    """Why this kernel cannot compute a product, or None when it can.

    Args:
      spec: the weight, prepacked by `layout`.
      m: rows of the activations.
      x_dtype: their dtype, a float or the 8-bit type itself.
      transpose: gradients are weight-only products; refused here.
      activation: 8-bit type of the activations.

    Returns:
      The reason, in words, or None.
    """
    if transpose:
        return "transposed products take float activations; use the weight-only kernel"
    if m < 1 or spec.k < 1 or spec.n < 1:
        return "there is nothing to multiply"
    activation = specs.activation_of(x_dtype) or activation
    reason = specs.pair_obstacle(spec, activation) or layout.obstacle(spec)
    if reason is not None:
        return reason
    if spec.layout not in layout.TAGS:
        return f"it reads prepacked weights, not {spec.layout!r}; layout.prepack"
    return None


def matmul(
    x: jax.Array,
    w: Weight,
    spec: WeightSpec,
    *,
    activation: str = "int8",
    x_scale: Any = None,
    layer: Any = None,
    bias: Any = None,
    out_dtype: Any = None,
    out_scale: Any = None,
    transpose: bool = False,
    config: specs.GpuConfig | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`matmul_a8` on a Hopper GPU; arguments as in `api.matmul_a8`, already checked.

    Codes without `x_scale` have scale 1.

    Raises:
      KernelError: the product has an obstacle, or `config` does not fit it.
    """
    activation = specs.activation_of(x.dtype) or activation
    reason = obstacle(
        spec, x.shape[0], x.dtype, transpose=transpose, activation=activation
    )
    if reason is not None:
        raise KernelError(f"matmul_a8: {reason}")
    m = x.shape[0]
    coded = x.dtype == jnp.dtype(activation)
    out = jnp.dtype(out_dtype or (F32 if coded else x.dtype))
    if coded:
        codes, scale = x, reference.spread(1.0 if x_scale is None else x_scale, m)
    else:
        codes, scale = reference.quantize_activations(x, activation, x_scale)
    narrow = out.itemsize == 2 and out_scale is None
    if config is None:
        config = specs.gpu_default(spec, m, narrow, needs_sums(spec, w, activation))
    plan = make_plan(spec, w, codes, config, out)
    rows, columns = layout.padded(spec)
    tokens = plan.m_tiles * config.tokens
    codes = jnp.pad(codes, [(0, tokens - m), (0, rows - spec.k)])
    operands = [codes, w.codes, _scale(w.scale)]
    if plan.zero:
        operands.append(w.zero.astype(read_type(w.zero)))
    if layer is not None:
        operands.append(jnp.reshape(layer, (1,)).astype(jnp.int32))
    if not config.split:
        operands.append(jnp.pad(scale[:, 0], (0, tokens - m)))
        bias32 = jnp.zeros(spec.n, F32) if bias is None else bias.astype(F32)
        operands.append(jnp.pad(bias32, (0, columns - spec.n)))
    y: Any = _call(plan, interpret)(*operands)
    if not config.split:
        return y[:m, : spec.n]
    y = plan.total(y)[:m, : spec.n] * scale
    y = y if bias is None else y + bias.astype(F32)
    if out_scale is not None:
        return reference.round_to(y, jnp.asarray(out_scale, F32), out.name)
    return y.astype(out)


def _scale(scale):
    """Scales that the kernel cannot read are converted; bytes are exponents."""
    if scale.dtype == jnp.uint8:
        return jnp.exp2(scale.astype(F32) - 127)
    return scale.astype(read_type(scale))


def _call(plan: Plan, interpret):
    config, spec = plan.config, plan.spec
    dtype, stages = jnp.dtype(plan.dtype), config.stages
    codes = hopper.tile((plan.width, config.rows), dtype, stages)
    if spec.bits == 4:
        words = config.rows // DEEP * layout.WORDS
        codes = plgpu.SMEM((stages, config.warpgroups, words, 128), jnp.int32)
    loads = 2 + (0 if plan.single else 1 + plan.zero)
    scratch = dict(
        x_smem=hopper.tile((config.tokens, config.rows), dtype, stages),
        codes_smem=codes,
        **hopper.barriers(loads, config.warpgroups, stages),
    )
    if not plan.single:
        stat = (stages, plan.pieces, plan.width)
        scratch["scale_smem"] = plgpu.SMEM(stat, jnp.dtype(plan.scale_dtype))
        if plan.zero:
            scratch["zero_smem"] = plgpu.SMEM(stat, jnp.dtype(plan.zero_dtype))
    if config.operand:
        scratch["operand"] = hopper.tile((64, DEEP), dtype, config.warpgroups)
    if not config.split:
        out_type = jnp.dtype(plan.out_dtype)
        scratch["out_smem"] = hopper.out_tiles(config.warpgroups, out_type)
    stats = spec.groups * spec.n * jnp.dtype(plan.scale_dtype).itemsize
    cost = pl.CostEstimate(
        flops=2 * plan.tokens * spec.k * spec.n,
        bytes_accessed=spec.k * spec.n * spec.bits // 8
        + stats
        + plan.tokens * (spec.k + 2 * spec.n),
        transcendentals=0,
    )
    return hopper.kernel(
        functools.partial(_body, plan, interpret is not False),
        out_type=plan.out,
        scratch=scratch,
        grid=plan.blocks,
        threads=config.warpgroups + 1,
        name=NAME,
        cost=cost,
        interpret=interpret,
    )


def _body(plan: Plan, interpret, x, codes, scale, *refs, **scratch):
    refs = list(refs)
    zero = refs.pop(0) if plan.zero else None
    layer = refs.pop(0)[0] if plan.stacked else None
    sx, bias = (None, None) if plan.config.split else (refs.pop(0), refs.pop(0))
    (out,) = refs

    def of_layer(ref):
        return ref if layer is None or ref is None else ref.at[layer]

    inputs = (x, of_layer(codes), of_layer(scale), of_layer(zero))
    hopper.roles(
        plan.config.warpgroups,
        lambda block: _copy(plan, block, inputs, scratch),
        lambda block, warpgroup: _compute(
            plan, interpret, block, warpgroup, inputs, (sx, bias), out, scratch
        ),
    )


def _copy(plan, block, inputs, scratch):
    """The warpgroup that copies: fills stages as they become free."""
    x, codes, scale, zero = inputs
    config = plan.config
    first, last = plan.span(block)

    def copy(step, slot, full):
        tile, inner = plan.place(block, step)
        outer, m_tile = plan.axes(tile)
        along = pl.ds(inner * config.rows, config.rows)
        lanes = pl.ds(outer * plan.width, plan.width)
        if plan.spec.bits == 4:
            run = config.rows // DEEP * layout.WORDS
            columns = pl.ds(outer * config.warpgroups, config.warpgroups)
            source = codes.at[columns, pl.ds(inner * run, run)]
        else:
            source = codes.at[lanes, along]
        plgpu.copy_gmem_to_smem(source, scratch["codes_smem"].at[slot], full)
        tokens = pl.ds(m_tile * config.tokens, config.tokens)
        plgpu.copy_gmem_to_smem(x.at[tokens, along], scratch["x_smem"].at[slot], full)
        if not plan.single:
            group = pl.ds(inner * config.rows // plan.spec.group, plan.pieces)
            for stat, name in ((scale, "scale_smem"), (zero, "zero_smem")):
                if stat is not None:
                    plgpu.copy_gmem_to_smem(
                        stat.at[group, lanes], scratch[name].at[slot], full
                    )

    hopper.Ring(scratch, config.stages, first).fill(last, copy)


def _compute(plan, interpret, block, warpgroup, inputs, ends, out, scratch):
    """A warpgroup that multiplies: tile after tile of the block's share."""
    config = plan.config
    first, last = plan.span(block)

    def tile_body(t, _):
        start = jnp.maximum(first, t * plan.steps)
        stop = jnp.minimum(last, (t + 1) * plan.steps)
        tile, _ = plan.place(block, start)
        outer, m_tile = plan.axes(tile)
        column = outer * plan.width + warpgroup * 64
        total = _tile_sum(plan, interpret, warpgroup, start, stop, first, scratch)
        if plan.single:
            _, _, scale, zero = inputs
            index = (0, pl.ds(column, 64))
            zero = None if zero is None else hopper.load_row(zero.at[index])
            scale = hopper.load_row(scale.at[index])
            total = _scaled(plan, total, scale, zero)
        if config.split:
            tile = outer * plan.m_tiles + m_tile
            piece = block - plan.owner(tile * plan.steps)
            tokens = pl.ds(m_tile * config.tokens, config.tokens)
            out[piece, pl.ds(column, 64), tokens] = total
        else:
            _write(plan, warpgroup, total, ends, out, column, m_tile, scratch)

    tile_last = (last + plan.steps - 1) // plan.steps
    lax.fori_loop(first // plan.steps, tile_last, tile_body, None)
    if not config.split:
        plgpu.wait_smem_to_gmem(0)


def _tile_sum(plan, interpret, warpgroup, start, stop, first, scratch):
    """Sum over the steps of a tile.

    Returns:
      Scaled sums `[64, tokens]`, or for one scale per column the accumulators: of codes
      and, where zero-points need it, of the activations.
    """
    config = plan.config
    ring = hopper.Ring(scratch, config.stages, first)
    kind = jnp.int32 if plan.integer else F32
    accumulator = plgpu.ACC((64, config.tokens), kind)  # pyright: ignore
    accumulators = [accumulator] * (1 + plan.rest)
    multiply = functools.partial(_multiply, plan, interpret, warpgroup, scratch)

    if plan.single:
        return pl.run_scoped(
            functools.partial(_run, plan, start, stop, ring, multiply), *accumulators
        )

    def step(i, total):
        slot = ring.enter(i)
        for chunk in range(config.rows // DEEP):
            for part in range(plan.parts):
                piece = (chunk * DEEP + part * DEEP // plan.parts) // plan.spec.group
                piece = piece if plan.pieces > 1 else 0
                index = (slot, piece, pl.ds(warpgroup * 64, 64))
                scale = hopper.load_row(scratch["scale_smem"].at[index])
                zero = None
                if plan.zero:
                    zero = hopper.load_row(scratch["zero_smem"].at[index])

                def run(*sums, chunk=chunk, part=part):
                    multiply(slot, chunk, part, sums)
                    return tuple(s[...] for s in sums)

                sums = pl.run_scoped(run, *accumulators)
                total = total + _scaled(plan, sums, scale, zero)
        ring.leave(slot)
        return total

    zeros = jnp.zeros((64, config.tokens), F32)
    zeros = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
    return lax.fori_loop(start, stop, step, zeros)


def _run(plan, start, stop, ring, multiply, *sums):
    """All steps into one accumulator; a stage is freed one step after its product."""
    config = plan.config
    behind = int(plan.spec.bits == 8 and not plan.rest and not config.operand)

    def step(i, _):
        slot = ring.enter(i)
        for chunk in range(config.rows // DEEP):
            multiply(slot, chunk, 0, sums)
        plgpu.wgmma_wait(behind * (config.rows // DEEP))
        if not behind:
            ring.leave(ring.slot(i))
            return

        @pl.when(i > start)
        def _():
            ring.leave(ring.slot(i - 1))

    lax.fori_loop(start, stop, step, None)
    if behind:
        plgpu.wgmma_wait(0)
        ring.leave(ring.slot(stop - 1))
    return tuple(s[...] for s in sums)


def _scaled(plan, sums, scale, zero):
    """A sum less the zero-point times the sum of `x`, times the scale; float32."""
    shape = (64, plan.config.tokens)

    def across(row):
        return lax.broadcast_in_dim(row, shape, (0,))

    value = sums[0].astype(F32)
    scale = scale.astype(F32)
    if plan.rest:
        rest = F32(plan.offset)
        rest = rest if zero is None else across(zero.astype(F32) + rest)
        value = value * F32(plan.factor) - sums[1].astype(F32) * rest
    else:
        scale = scale * F32(plan.factor)
    return value * across(scale)


def _multiply(plan, interpret, warpgroup, scratch, slot, chunk, part, sums):
    """Adds the product of 128 rows of the weight and `x` to the accumulators."""
    x = scratch["x_smem"].at[slot]
    along = pl.ds(chunk * DEEP, DEEP)
    x = hopper.transpose(x if plan.config.rows == DEEP else x.at[:, along])
    operand = scratch["operand"].at[warpgroup] if plan.config.operand else None

    def add(total, a):
        if operand is None:
            plgpu.wgmma(total, a, x)
            return
        operand[...] = a
        plgpu.commit_smem()
        plgpu.wgmma(total, operand, x)
        plgpu.wgmma_wait(0)

    if plan.spec.bits == 8:
        own = pl.ds(warpgroup * 64, 64)
        a = scratch["codes_smem"].at[slot, own, along]
        plgpu.wgmma(sums[0], a, x)
    else:
        run = pl.ds(chunk * layout.WORDS, layout.WORDS)
        words = scratch["codes_smem"].at[slot, warpgroup, run]
        a = gpu_operand.fragment(words, plan.dtype, part, plan.parts, interpret)
        add(sums[0], a)
    if len(sums) > 1:
        add(sums[1], gpu_operand.ones(plan.dtype, part, plan.parts, interpret))


def _write(plan, warpgroup, total, ends, out, column, m_tile, scratch):
    """A whole tile, times `s_x`, plus bias, through shared memory by 64 tokens."""
    sx, bias = ends
    tokens = plan.config.tokens
    shape = (64, tokens)
    of_token = plgpu.Layout.WGMMA.reduce(0)
    s = versions.load(sx.at[pl.ds(m_tile * tokens, tokens)], of_token, optimized=False)
    total = total * lax.broadcast_in_dim(s, shape, (1,))
    row = hopper.load_row(bias.at[pl.ds(column, 64)])
    total = (total + lax.broadcast_in_dim(row, shape, (0,))).astype(
        jnp.dtype(plan.out_dtype)
    )
    hopper.write_turned(total, scratch["out_smem"], warpgroup, out, m_tile, column)
