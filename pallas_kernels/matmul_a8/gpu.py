"""Products with 8-bit activations on Hopper (Mosaic GPU), for weights of `layout`.

The weight is the left operand of `wgmma` and tokens are the right one: 64 columns of
the result per warpgroup, 8 to 256 tokens, so that one token wastes no memory traffic.
8-bit weights are read from shared memory; 4-bit ones are masked in registers: a signed
nibble in the high half of a byte is the int8 number `16 (code - 8)`, three operations
for eight weights. For float8 a nibble in the low half of a byte is the subnormal number
`code 2**-9`. Either way sums are exact multiples and the factor goes into the scale.

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

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from .. import hopper, versions
from ..weights import KernelError, Weight, WeightSpec
from . import layout, reference, specs

F32 = jnp.float32
DEEP = 128
"""Rows of a weight per `wgmma` group: 128 bytes, one swizzle."""
_NAME = "matmul_a8_hopper"


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
        config = specs.gpu_default(spec, m, narrow, _rest(spec, w, activation))
    plan = _plan(spec, w, codes, config, out)
    rows, columns = layout.padded(spec)
    tokens = plan.m_tiles * config.tokens
    codes = jnp.pad(codes, [(0, tokens - m), (0, rows - spec.k)])
    operands = [codes, w.codes, _scale(w.scale)]
    if plan.zero:
        operands.append(w.zero.astype(_type(w.zero)))
    if layer is not None:
        operands.append(jnp.reshape(layer, (1,)).astype(jnp.int32))
    if not config.split:
        operands.append(jnp.pad(scale[:, 0], (0, tokens - m)))
        bias32 = jnp.zeros(spec.n, F32) if bias is None else bias.astype(F32)
        operands.append(jnp.pad(bias32, (0, columns - spec.n)))
    y: Any = _call(plan, interpret)(*operands)
    if not config.split:
        return y[:m, : spec.n]
    y = _total(y, plan)[:m, : spec.n] * scale
    y = y if bias is None else y + bias.astype(F32)
    if out_scale is not None:
        return reference.round_to(y, jnp.asarray(out_scale, F32), out.name)
    return y.astype(out)


def _scale(scale):
    """Scales that the kernel cannot read are converted; bytes are exponents."""
    if scale.dtype == jnp.uint8:
        return jnp.exp2(scale.astype(F32) - 127)
    return scale.astype(_type(scale))


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A product with all its static numbers."""

    spec: WeightSpec
    config: specs.GpuConfig
    dtype: str
    out_dtype: str
    scale_dtype: str
    zero_dtype: str
    stacked: bool
    tokens: int

    @property
    def zero(self) -> bool:
        """Whether zero-points are arrays."""
        return bool(self.zero_dtype)

    @property
    def integer(self) -> bool:
        """Whether sums are int32."""
        return self.dtype == "int8"

    @property
    def width(self) -> int:
        """Output columns of a tile."""
        return 64 * self.config.warpgroups

    @property
    def outer(self) -> int:
        """Columns of the stored weight."""
        return layout.padded(self.spec)[1]

    @property
    def m_tiles(self) -> int:
        """Tiles of tokens."""
        return -(-self.tokens // self.config.tokens)

    @property
    def steps(self) -> int:
        """Steps of a tile."""
        return layout.padded(self.spec)[0] // self.config.rows

    @property
    def tiles(self) -> int:
        """Tiles; tokens vary fastest."""
        return self.outer // self.width * self.m_tiles

    @property
    def blocks(self) -> int:
        """Size of the grid."""
        most = self.tiles * (self.steps if self.config.split else 1)
        return min(self.config.blocks, most)

    @property
    def single(self) -> bool:
        """One scale per column."""
        return self.spec.group >= self.spec.k

    @property
    def parts(self) -> int:
        """Groups in 128 rows."""
        return 1 if self.single else max(1, DEEP // self.spec.group)

    @property
    def pieces(self) -> int:
        """Rows of scales per step."""
        return 1 if self.single else max(1, self.config.rows // self.spec.group)

    @property
    def factor(self) -> float:
        """Sums times this are sums of codes."""
        if self.spec.bits == 8:
            return 1.0
        return 2.0**-4 if self.integer else 2.0**9

    @property
    def offset(self) -> float:
        """Subtracted from stored codes beside `zero`."""
        return _offset(self.spec, self.dtype)

    @property
    def rest(self) -> bool:
        """Whether sums of the activations are needed."""
        return self.zero or self.offset != 0

    @property
    def out(self) -> jax.ShapeDtypeStruct:
        """What the kernel writes."""
        tokens = self.m_tiles * self.config.tokens
        if self.config.split:
            return jax.ShapeDtypeStruct((self.shares, self.outer, tokens), F32)
        return jax.ShapeDtypeStruct((tokens, self.outer), jnp.dtype(self.out_dtype))

    def edges(self):
        """First block of each tile and the one behind its last, `[2, tiles]`."""
        total, t = self.tiles * self.steps, np.arange(self.tiles)
        first = [self.owner(i * self.steps) for i in t]
        last = [self.owner(min(total, (i + 1) * self.steps) - 1) + 1 for i in t]
        return np.array([first, last])

    def owner(self, step):
        """The block that does a step: the last `b` with `b total // blocks <= step`."""
        total = self.tiles * self.steps
        return ((step + 1) * self.blocks + total - 1) // total - 1

    @property
    def shares(self) -> int:
        """Most blocks that share a tile."""
        first, last = self.edges()
        return int((last - first).max())


def _offset(spec, activation):
    """What is still to subtract from stored codes, beside zero-points."""
    if spec.kind != "int":
        return 0.0
    shift = 0.0 if spec.layout == layout.TAGS[1] else 128.0
    if spec.bits == 4:
        shift = 8.0 if activation == "int8" else 0.0
    return spec.offset - shift


def _rest(spec, w, activation):
    """Whether sums of the activations are needed."""
    return w.zero is not None or _offset(spec, activation) != 0


def _plan(spec, w, x, config, out):
    plan = _Plan(
        spec=spec,
        config=config,
        dtype=jnp.dtype(x.dtype).name,
        out_dtype=out.name,
        scale_dtype=jnp.dtype(_type(w.scale)).name,
        zero_dtype="" if w.zero is None else jnp.dtype(_type(w.zero)).name,
        stacked=w.codes.ndim == (4 if spec.bits == 4 else 3),
        tokens=x.shape[0],
    )

    def need(condition, what):
        if not condition:
            raise KernelError(f"{_NAME}: config {config}: {what}")

    need(
        plan.outer % plan.width == 0, f"{plan.width} columns do not divide {plan.outer}"
    )
    need(config.rows % DEEP == 0, f"rows are not a multiple of {DEEP}")
    need(layout.padded(spec)[0] % config.rows == 0, "rows do not divide k")
    group = spec.group
    fits = plan.single or group % config.rows == 0 or config.rows % group == 0
    need(fits, f"rows do not hold whole groups of {group}")
    need(config.tokens % 8 == 0 and 8 <= config.tokens <= 256, "tokens")
    need(config.split or config.tokens % 64 == 0, "whole tiles need 64 tokens")
    need(config.split or out.itemsize == 2, "whole tiles are written in 16 bits")
    return plan


def _type(stat):
    """The type in which the kernel reads scales or zero-points."""
    kept = (jnp.float32, jnp.bfloat16, jnp.float16)
    return stat.dtype if stat.dtype in kept else F32


def _total(y, plan):
    """Partial sums `[shares, n, m]` added in order, transposed."""
    shares, outer, tokens = y.shape
    config = plan.config
    first, last = plan.edges()
    counts = (last - first).reshape(outer // plan.width, 1, plan.m_tiles, 1)
    full = (outer // plan.width, plan.width, plan.m_tiles, config.tokens)
    total = jnp.zeros(full, F32)
    for piece in range(shares):  # fewer blocks may share a tile: the rest is undefined
        mine = jnp.asarray(counts > piece)
        total = total + jnp.where(mine, y[piece].reshape(full), F32(0))
    return total.reshape(outer, tokens).T


def _tile(shape, dtype, stages):
    """Shared memory for 8-bit operands: 128-byte swizzled."""
    transforms = (plgpu.TilingTransform((8, DEEP)), plgpu.SwizzleTransform(DEEP))
    return plgpu.SMEM((stages, *shape), dtype, transforms=transforms)


def _call(plan: _Plan, interpret):
    config, spec = plan.config, plan.spec
    dtype, stages = jnp.dtype(plan.dtype), config.stages
    chunks = config.rows // DEEP
    if spec.bits == 4:
        shape = (stages, config.warpgroups, chunks * layout.WORDS, 128)
        codes = plgpu.SMEM(shape, jnp.int32)
    else:
        codes = _tile((plan.width, config.rows), dtype, stages)
    scratch = dict(
        x_smem=_tile((config.tokens, config.rows), dtype, stages),
        codes_smem=codes,
        full=plgpu.Barrier(num_arrivals=_loads(plan), num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=stages),
    )
    if not plan.single:
        stat = (stages, plan.pieces, plan.width)
        scratch["scale_smem"] = plgpu.SMEM(stat, jnp.dtype(plan.scale_dtype))
        if plan.zero:
            scratch["zero_smem"] = plgpu.SMEM(stat, jnp.dtype(plan.zero_dtype))
    if config.operand:
        scratch["operand"] = _tile((64, DEEP), dtype, config.warpgroups)
    if not config.split:
        transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        scratch["out_smem"] = plgpu.SMEM(
            (config.warpgroups, 2, 64, 64),
            jnp.dtype(plan.out_dtype),
            transforms=transforms,
        )
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
        name=_NAME,
        cost=cost,
        interpret=interpret,
    )


def _loads(plan):
    """Copies per stage."""
    return 2 + (0 if plan.single else 1 + plan.zero)


def _body(plan: _Plan, interpret, x, codes, scale, *refs, **scratch):
    refs = list(refs)
    zero = refs.pop(0) if plan.zero else None
    layer = refs.pop(0)[0] if plan.stacked else None
    sx, bias = (None, None) if plan.config.split else (refs.pop(0), refs.pop(0))
    (out,) = refs

    def of_layer(ref):
        return ref if layer is None or ref is None else ref.at[layer]

    inputs = (x, of_layer(codes), of_layer(scale), of_layer(zero))
    warpgroup, block = lax.axis_index("wg"), lax.axis_index("cta")

    @pl.when(warpgroup == plan.config.warpgroups)
    def _copies():
        plgpu.set_max_registers(hopper.MEMORY_REGISTERS, action="decrease")
        _copy(plan, block, inputs, scratch)

    @pl.when(warpgroup < plan.config.warpgroups)
    def _computes():
        plgpu.set_max_registers(
            hopper.registers(plan.config.warpgroups), action="increase"
        )
        _compute(plan, interpret, block, warpgroup, inputs, (sx, bias), out, scratch)


def _span(plan, block):
    """First step of a block and the one behind its last, among its own."""
    if plan.config.split:
        total = plan.tiles * plan.steps
        return block * total // plan.blocks, (block + 1) * total // plan.blocks
    own = (plan.tiles - block + plan.blocks - 1) // plan.blocks
    return jnp.int32(0), own * plan.steps


def _place(plan, block, step):
    """Column tile, token tile and step in the tile of one of a block's steps."""
    tile = step // plan.steps
    inner = step - tile * plan.steps
    tile = tile if plan.config.split else block + tile * plan.blocks
    return tile // plan.m_tiles, lax.rem(tile, plan.m_tiles), inner


def _copy(plan, block, inputs, scratch):
    """The warpgroup that copies: fills stages as they become free."""
    x, codes, scale, zero = inputs
    config = plan.config
    first, last = _span(plan, block)

    def step(i, _):
        slot = lax.rem(i - first, config.stages)

        @pl.when(i - first >= config.stages)
        def _wait():
            plgpu.barrier_wait(scratch["free"].at[slot])

        outer, m_tile, inner = _place(plan, block, i)
        full = scratch["full"].at[slot]
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

    lax.fori_loop(first, last, step, None)


def _compute(plan, interpret, block, warpgroup, inputs, ends, out, scratch):
    """A warpgroup that multiplies: tile after tile of the block's share."""
    config = plan.config
    first, last = _span(plan, block)

    def tile_body(t, _):
        start = jnp.maximum(first, t * plan.steps)
        stop = jnp.minimum(last, (t + 1) * plan.steps)
        outer, m_tile, _ = _place(plan, block, start)
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
    kind = jnp.int32 if plan.integer else F32
    accumulator = plgpu.ACC((64, config.tokens), kind)  # pyright: ignore
    accumulators = [accumulator] * (1 + plan.rest)
    multiply = functools.partial(_multiply, plan, interpret, warpgroup, scratch)

    def enter(i):
        slot = lax.rem(i - first, config.stages)
        plgpu.barrier_wait(scratch["full"].at[slot])
        return slot

    if plan.single:
        return pl.run_scoped(
            functools.partial(_run, plan, start, stop, first, enter, multiply, scratch),
            *accumulators,
        )

    def step(i, total):
        slot = enter(i)
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
        plgpu.barrier_arrive(scratch["free"].at[slot])
        return total

    zeros = jnp.zeros((64, config.tokens), F32)
    zeros = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
    return lax.fori_loop(start, stop, step, zeros)


def _run(plan, start, stop, first, enter, multiply, scratch, *sums):
    """All steps into one accumulator; a stage is freed one step after its product."""
    config = plan.config
    behind = int(plan.spec.bits == 8 and not plan.rest and not config.operand)

    def free(i):
        plgpu.barrier_arrive(scratch["free"].at[lax.rem(i - first, config.stages)])

    def step(i, _):
        slot = enter(i)
        for chunk in range(config.rows // DEEP):
            multiply(slot, chunk, 0, sums)
        plgpu.wgmma_wait(behind * (config.rows // DEEP))
        if not behind:
            free(i)
            return

        @pl.when(i > start)
        def _():
            free(i - 1)

    lax.fori_loop(start, stop, step, None)
    if behind:
        plgpu.wgmma_wait(0)
        free(stop - 1)
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
        words = versions.load(words, _words_layout())
        add(sums[0], _fragment(words, plan.dtype, part, plan.parts, interpret))
    if len(sums) > 1:
        add(sums[1], _ones(plan.dtype, part, plan.parts, interpret))


def _words_layout():
    return plgpu.Layout.WG_STRIDED((layout.WORDS, 128), vec_size=4)


def _keeps(word, part, parts):
    """Whether a word (16 rows) belongs to one of `parts` groups of 128 rows."""
    return word * parts // layout.WORDS == part


def _fragment(words, dtype, part, parts, interpret):
    """Nibbles `[8, 128]` int32 as the left operand `[64, 128]`; other groups zero."""
    if interpret:
        return _fragment_arrays(words, dtype, part, parts)
    shape = plgpu.ShapeDtypeStruct(
        (64, DEEP), jnp.dtype(dtype), layout=plgpu.Layout.WGMMA_8BIT
    )

    @plgpu.inline_mgpu(arg_types=(_words_layout(),), return_type=shape)
    def emit(_, words):
        flat = [
            vector.extract(register, [], [i])
            for register in words.registers.flat
            for i in range(4)
        ]
        halves = []
        for i, word in enumerate(flat):
            pair = _nibbles(word, dtype) if _keeps(i, part, parts) else [_const(0)] * 2
            halves += pair
        return _operand(halves, dtype)

    return emit(words)  # pyright: ignore[reportCallIssue] - the context is passed


def _nibbles(word, dtype):
    """Low and high nibbles of a word's bytes, as four numbers each."""
    if dtype == "int8":
        high = _const(0xF0F0F0F0)
        return [arith.andi(arith.shli(word, _const(4)), high), arith.andi(word, high)]
    low = _const(0x0F0F0F0F)
    word = arith.xori(word, _const(0x88888888))
    return [arith.andi(word, low), arith.andi(arith.shrui(word, _const(4)), low)]


def _ones(dtype, part, parts, interpret):
    """The left operand whose products are sums of `x` over one group."""
    if interpret:
        row = lax.broadcasted_iota(jnp.int32, (64, DEEP), 1)
        mine = lax.div(row * parts, jnp.int32(DEEP)) == part
        return jnp.where(mine, F32(1), F32(0)).astype(dtype)
    shape = plgpu.ShapeDtypeStruct(
        (64, DEEP), jnp.dtype(dtype), layout=plgpu.Layout.WGMMA_8BIT
    )
    one = 0x01010101 if dtype == "int8" else 0x38383838

    @plgpu.inline_mgpu(arg_types=(), return_type=shape)
    def emit(_):
        kept = [_keeps(i // 2, part, parts) for i in range(2 * layout.WORDS)]
        return _operand([_const(one if keep else 0) for keep in kept], dtype)

    return emit()  # pyright: ignore[reportCallIssue] - the context is passed


def _const(value):
    i32 = ir.IntegerType.get_signless(32)
    return arith.constant(i32, ir.IntegerAttr.get(i32, value - (value >> 31 << 32)))


def _operand(halves, dtype):
    """Sixteen registers of four numbers, in the order of `wgmma`'s left operand."""
    i32 = ir.IntegerType.get_signless(32)
    frame = mgpu.WGMMA_LAYOUT_8BIT
    element = mgpu.utils.dtype_to_ir_type(jnp.dtype(dtype))
    registers = np.empty(frame.registers_shape((64, DEEP)), dtype=object)
    flat = np.empty(registers.size, dtype=object)
    for i, half in enumerate(halves):
        value = vector.broadcast(ir.VectorType.get((1,), i32), half)
        flat[i] = vector.bitcast(ir.VectorType.get((4,), element), value)
    signed = True if dtype == "int8" else None
    return mgpu.FragmentedArray(
        _registers=flat.reshape(registers.shape), _layout=frame, _is_signed=signed
    )


def _fragment_arrays(words, dtype, part, parts):
    """`_fragment` with arrays: the same numbers, for the interpreter."""
    words = lax.bitcast_convert_type(words, jnp.uint32).reshape(2, 128, 4)
    word = words.transpose(0, 2, 1).reshape(layout.WORDS, 128)
    if dtype == "int8":
        mask = jnp.uint32(0xF0F0F0F0)
        both = [(word << jnp.uint32(4)) & mask, word & mask]
    else:
        mask = jnp.uint32(0x0F0F0F0F)
        word = word ^ jnp.uint32(0x88888888)
        both = [word & mask, (word >> jnp.uint32(4)) & mask]
    index = lax.broadcasted_iota(jnp.int32, (2, layout.WORDS, 128), 1)
    kept = lax.div(index * parts, jnp.int32(layout.WORDS)) == part
    value = jnp.where(kept, jnp.stack(both), jnp.uint32(0))
    number = lax.bitcast_convert_type(value, jnp.dtype(dtype))
    # half, word, warp, g, q, byte: columns are (warp, half, g), rows (word, q, byte)
    number = number.reshape(2, layout.WORDS, 4, 8, 4, 4)
    return number.transpose(2, 0, 3, 1, 4, 5).reshape(64, DEEP)


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
    for part in range(tokens // 64):
        place = scratch["out_smem"].at[warpgroup, part % 2]
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        piece = total[:, part * 64 : (part + 1) * 64]
        turned = plgpu.layout_cast(piece, plgpu.Layout.WGMMA_TRANSPOSED)
        hopper.transpose(place)[...] = turned
        plgpu.commit_smem()
        rows = pl.ds(m_tile * tokens + part * 64, 64)
        plgpu.copy_smem_to_gmem(place, out.at[rows, pl.ds(column, 64)])
