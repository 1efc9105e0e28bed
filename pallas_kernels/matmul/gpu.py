"""Weight-only product on Hopper GPUs (Mosaic GPU), for weights of `gpu_layout`.

The weight is the left operand of `wgmma`, decoded in registers, 64 columns by 64 rows
at a time; tokens are the right operand, so that one token wastes no memory traffic. One
warpgroup copies (TMA) into a ring of stages, the others decode and multiply. Blocks are
persistent and own either

* an equal share of all steps (`Config.split`): sums of tiles that several blocks share
  go to memory and are added in a fixed order by an XLA fusion, which also applies bias
  and dtype (deterministic, no atomics, no block waits for another); or
* whole tiles, transposed in registers and written through shared memory.

Scales multiply sums of a group in float32 (`Config.post`, with zero-points subtracted
by a product with ones), the total when a column has one scale, or else weights in
registers, once rounded. Transposed products decode through shared memory. float32 `x`
is the sum of three bfloat16 ones, multiplied side by side.

Costs: beside the result, split products write `pieces` float32 partial results; `x` is
copied when its rows or columns do not fill tiles. Refused: see `gpu_specs.obstacle`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import hopper
from ..weights import KernelError, Weight, WeightSpec
from . import gpu_layout
from .gpu_specs import Config, default, obstacle

__all__ = ["Config", "matmul", "obstacle"]

_NAME = "matmul_hopper"


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
        raise KernelError(f"{_NAME}: {reason}")
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
    plan = _plan(spec, parts, w, config, out_dtype, transpose, biased, single)
    columns = spec.k if transpose else spec.n
    operands = [parts, gpu_layout.words(w), _bits(w.scale)]
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
        y = _total(y, plan)
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
        scale = _to_float(jnp.dtype(scale.dtype).name, _bits(scale))
    if zero is not None and zero.dtype.itemsize == 1:
        zero = _number(zero)
    return w._replace(scale=scale, zero=zero)


def _bits(scale):
    """8-bit floats as bytes: kernels decode both kinds of bytes."""
    if scale.dtype == jnp.float8_e4m3fn:
        return lax.bitcast_convert_type(scale, jnp.uint8)
    return scale


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A product with all its static numbers.

    `outer` is the axis of the weight that the result keeps, `inner` the contracted one.
    """

    spec: WeightSpec
    config: Config
    transpose: bool
    dtype: str
    out_dtype: str
    scale_dtype: str
    zero: str
    stacked: bool
    biased: bool
    outer: int
    inner: int
    m_tiles: int
    tokens: int

    @property
    def width(self) -> int:
        """Output columns of a tile."""
        return 64 * self.config.warpgroups

    @property
    def steps(self) -> int:
        """Steps of a tile."""
        return self.inner // self.config.rows

    @property
    def tiles(self) -> int:
        """Tiles; tokens vary fastest."""
        return self.outer // self.width * self.m_tiles

    @property
    def blocks(self) -> int:
        """Size of the grid."""
        return min(self.config.blocks, self.tiles * (self.steps if self.split else 1))

    @property
    def split(self) -> bool:
        """Whether blocks share tiles."""
        return self.config.split

    @property
    def whole(self) -> int:
        """Tiles per block where shares are whole tiles, else 0."""
        return 0 if self.tiles % self.blocks else self.tiles // self.blocks

    @property
    def deep(self) -> int:
        """Rows of the weight (axis k) that a step touches."""
        return self.width if self.transpose else self.config.rows

    @property
    def lanes(self) -> int:
        """Columns of the weight (axis n) that a step touches."""
        return 64 if self.transpose else self.width

    @property
    def pieces(self) -> int:
        """Rows of scales per step."""
        group = self.spec.group
        return 1 if group >= self.spec.k else max(1, self.deep // group)

    @property
    def single(self) -> bool:
        """One scale per column."""
        return self.spec.group >= self.spec.k

    @property
    def mode(self) -> str:
        """Where scales multiply: "end", "post" or "pre"."""
        # Four warpgroups have no registers for the sums that zero-points need.
        crowded = self.zero and self.config.tokens > 8 and self.config.warpgroups > 2
        if self.transpose or crowded:
            return "pre"
        if self.single:
            return "end"
        exact = self.config.post and self.spec.group % 64 == 0
        return "post" if exact else "pre"

    @property
    def decode(self) -> hopper.Decode:
        """How a block is decoded."""
        spec, pre = self.spec, self.mode == "pre"
        scales = max(1, 64 // spec.group) if pre and not self.single else int(pre)
        integer = spec.kind == "int"
        return hopper.Decode(
            gpu_layout.codec(spec),
            self.dtype,
            self.offset if integer else 0.0,
            scales,
            shifted=pre and bool(self.zero),
            centered=pre and bool(self.zero) and integer,
        )

    @property
    def offset(self) -> float:
        """Subtracted from stored integer codes."""
        unsigned = self.spec.bits == 8 and self.spec.layout == gpu_layout.TAGS[0]
        return self.spec.offset - (128 if unsigned else 0)

    @property
    def shares(self) -> int:
        """Most blocks that share a tile."""
        if not self.split:
            return 1
        edges = self._edges()
        return int(max(edges[1] - edges[0]))

    def _edges(self):
        """First block of each tile and the one behind its last, `[2, tiles]`."""
        total, t = self.tiles * self.steps, np.arange(self.tiles)
        first = [_owner(i * self.steps, self) for i in t]
        last = [min(total, (i + 1) * self.steps) - 1 for i in t]
        return np.array([first, [_owner(i, self) + 1 for i in last]])

    @property
    def counts(self):
        """How many blocks share each tile, `[tiles]`."""
        first, last = self._edges()
        return last - first

    @property
    def out(self) -> jax.ShapeDtypeStruct:
        """What the kernel writes."""
        if self.split:
            tokens = self.m_tiles * self.config.tokens
            shape = (self.shares, self.outer, tokens)
            return jax.ShapeDtypeStruct(shape, jnp.float32)
        shape = (self.tokens, self.outer)  # copies leave rows beyond the last out
        return jax.ShapeDtypeStruct(shape, jnp.dtype(self.out_dtype))


def _owner(step, plan):
    """The block that does a step: the largest `b` with `b steps // blocks <= step`."""
    if plan.whole:
        return step // (plan.steps * plan.whole)
    total = plan.tiles * plan.steps
    return ((step + 1) * plan.blocks + total - 1) // total - 1


def _plan(spec, x, w, config, out_dtype, transpose, biased, single):
    rows, columns = gpu_layout.padded(spec)
    outer, inner = (rows, columns) if transpose else (columns, rows)
    plan = _Plan(
        spec=spec,
        config=config,
        transpose=transpose,
        dtype=jnp.dtype(x.dtype).name,
        out_dtype=out_dtype.name,
        scale_dtype=jnp.dtype(w.scale.dtype).name,
        zero="" if w.zero is None else jnp.dtype(w.zero.dtype).name,
        stacked=w.codes.ndim == 3,
        biased=biased and not config.split,
        outer=outer,
        inner=inner,
        m_tiles=-(-x.shape[0] // config.tokens),
        tokens=x.shape[0],
    )

    def need(condition, what):
        if not condition:
            raise KernelError(f"{_NAME}: config {config}: {what}")

    need(
        outer % plan.width == 0, f"{plan.width} columns per tile do not divide {outer}"
    )
    need(config.rows == 64 or (config.rows == 128 and not transpose), "rows")
    need(config.tokens % 8 == 0 and 8 <= config.tokens <= 256, "tokens")
    need(config.split or config.tokens % 64 == 0, "whole tiles need 64 tokens")
    narrow = out_dtype.itemsize == 2 and x.dtype.itemsize == 2
    products = 0 if plan.whole else plan.blocks * (plan.tiles * plan.steps + 1)
    need(products < 2**31, "the numbers of steps do not fit 32 bits")
    need(config.split or narrow, "whole tiles are written in 16 bits")
    need(plan.mode != "pre" or not single, "float32 x needs `post`")
    return plan


def _total(y, plan):
    """Partial sums `[pieces, n, m]` added in order, transposed."""
    shares, outer, tokens = y.shape
    tiles = (outer // plan.width, 1, plan.m_tiles, 1)
    counts = plan.counts.reshape(tiles)
    full = (outer // plan.width, plan.width, plan.m_tiles, plan.config.tokens)
    total = None
    for piece in range(shares):
        part = y[piece].reshape(full)
        if piece:  # fewer blocks may share a tile: what they left is undefined
            part = jnp.where(jnp.asarray(counts > piece), part, jnp.float32(0))
        total = part if total is None else total + part
    assert total is not None
    return total.reshape(outer, tokens).T


def _call(plan: _Plan, interpret):
    config = plan.config
    x_type = jnp.dtype(plan.dtype)
    stages = config.stages
    bits = gpu_layout.codec(plan.spec).bits
    blocks = config.rows // 64
    shape = (
        (1, config.warpgroups * bits)
        if plan.transpose
        else (
            config.warpgroups,
            blocks * bits,
        )
    )
    scale_type = jnp.dtype(plan.scale_dtype)
    if scale_type == jnp.float8_e4m3fn:
        scale_type = jnp.dtype(jnp.uint8)
    scratch = dict(
        x_smem=hopper.tile((config.tokens, config.rows), x_type, stages),
        codes_smem=plgpu.SMEM((stages, *shape, 128), jnp.int32),
        scale_smem=_statistics(plan, scale_type),
        full=plgpu.Barrier(num_arrivals=3 + bool(plan.zero), num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=stages),
    )
    if plan.zero:
        scratch["zero_smem"] = _statistics(plan, jnp.dtype(plan.zero))
    if plan.spec.kind == "table":
        scratch["table_smem"] = plgpu.SMEM((256, 32), jnp.int32)
        scratch["table_ready"] = plgpu.Barrier(num_arrivals=1)
    if plan.transpose or config.smem_operand:
        scratch["operand"] = hopper.tile((64, 64), x_type, config.warpgroups)
    if not plan.split:
        transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        scratch["out_smem"] = plgpu.SMEM(
            (config.warpgroups, 2, 64, 64),
            jnp.dtype(plan.out_dtype),
            transforms=transforms,
        )
    spec = plan.spec
    tokens = plan.tokens
    packed = spec.k * spec.n * bits // 8
    cost = pl.CostEstimate(
        flops=2 * tokens * spec.k * spec.n,
        bytes_accessed=packed
        + spec.groups * spec.n * scale_type.itemsize
        + tokens * (spec.k + spec.n) * 2,
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


def _statistics(plan, dtype):
    """Shared memory for scales or zero-points; stages start at 128 bytes."""
    rows = plan.pieces
    while rows * plan.lanes * dtype.itemsize % 128:
        rows += 1
    return plgpu.SMEM((plan.config.stages, rows, plan.lanes), dtype)


def _body(plan: _Plan, interpret, x, codes, scale, *refs, **scratch):
    refs = list(refs)
    zero = refs.pop(0) if plan.zero else None
    table = refs.pop(0) if plan.spec.kind == "table" else None
    layer = refs.pop(0)[0] if plan.stacked else None
    bias = refs.pop(0) if plan.biased else None
    (out,) = refs

    def of_layer(ref):
        return ref if layer is None else ref.at[layer]

    inputs = (
        x,
        of_layer(codes),
        of_layer(scale),
        None if zero is None else of_layer(zero),
    )
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


def _span(plan, block):
    """First step of a block and the one behind its last, among its own."""
    if plan.split and plan.whole:
        run = plan.steps * plan.whole
        return block * run, (block + 1) * run
    if plan.split:
        total = plan.tiles * plan.steps
        # Each of `blocks` gets `total // blocks` or one more.
        return block * total // plan.blocks, (block + 1) * total // plan.blocks
    own = (plan.tiles - block + plan.blocks - 1) // plan.blocks
    return jnp.int32(0), own * plan.steps


def _place(plan, block, step):
    """Tile and step in the tile of one of a block's steps."""
    tile = step // plan.steps
    inner = step - tile * plan.steps
    return (tile if plan.split else block + tile * plan.blocks), inner


def _copy(plan, block, inputs, scratch):
    """The warpgroup that copies: fills stages as they become free."""
    x, codes, scale, zero = inputs
    config, bits = plan.config, gpu_layout.codec(plan.spec).bits
    first, last = _span(plan, block)

    def step(i, _):
        slot = lax.rem(i - first, config.stages)

        @pl.when(i - first >= config.stages)
        def _wait():
            plgpu.barrier_wait(scratch["free"].at[slot])

        tile, inner = _place(plan, block, i)
        outer, m_tile = tile // plan.m_tiles, lax.rem(tile, plan.m_tiles)
        full = scratch["full"].at[slot]
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

    lax.fori_loop(first, last, step, None)


def _compute(plan, interpret, block, warpgroup, inputs, bias, out, scratch):
    """A warpgroup that multiplies: tile after tile of the block's share."""
    first, last = _span(plan, block)
    tile_first = first // plan.steps
    tile_last = (last + plan.steps - 1) // plan.steps

    def tile_body(t, _):
        start = jnp.maximum(first, t * plan.steps)
        stop = jnp.minimum(last, (t + 1) * plan.steps)
        tile, _ = _place(plan, block, start)
        outer, m_tile = tile // plan.m_tiles, lax.rem(tile, plan.m_tiles)
        column = outer * plan.width + warpgroup * 64
        total = _tile_sum(plan, interpret, warpgroup, start, stop, first, scratch)
        if plan.mode == "end":
            total = _scaled_total(plan, total, inputs, column)
        if plan.split:
            piece = block - _owner(tile * plan.steps, plan)
            tokens = pl.ds(m_tile * plan.config.tokens, plan.config.tokens)
            out[piece, pl.ds(column, 64), tokens] = total[0]
        else:
            _write(plan, warpgroup, total[0], bias, out, column, m_tile, scratch)

    lax.fori_loop(tile_first, tile_last, tile_body, None)
    if not plan.split:
        plgpu.wait_smem_to_gmem(0)


def _tile_sum(plan, interpret, warpgroup, start, stop, first, scratch):
    """Sum over the steps of a tile, `[64, tokens]`, and the sum of `x` for zeros."""
    config = plan.config
    accumulator = plgpu.WGMMAAccumulatorRef((64, config.tokens), jnp.float32)
    ones = plan.mode != "pre" and bool(plan.zero)
    multiply = functools.partial(_multiply, plan, interpret, warpgroup, scratch)

    def enter(i):
        slot = lax.rem(i - first, config.stages)
        plgpu.barrier_wait(scratch["full"].at[slot])
        return slot

    if plan.mode != "post":

        def run(*sums):
            def step(i, _):
                slot = enter(i)
                for chunk in range(config.rows // 64):
                    multiply(slot, chunk, sums)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(scratch["free"].at[slot])

            lax.fori_loop(start, stop, step, None)
            return tuple(s[...] for s in sums)

        return pl.run_scoped(run, *([accumulator] * (1 + ones)))

    per_group = min(config.rows, plan.spec.group) // 64

    def step(i, total):
        slot = enter(i)
        for piece in range(config.rows // 64 // per_group):
            rows = _group_rows(plan, slot, piece, warpgroup, scratch)

            def run(*sums, piece=piece):
                for chunk in range(per_group):
                    multiply(slot, piece * per_group + chunk, sums)
                return tuple(s[...] for s in sums)

            sums = pl.run_scoped(run, *([accumulator] * (1 + ones)))
            total = total + _scaled(plan, sums, *rows)
        plgpu.barrier_arrive(scratch["free"].at[slot])
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
    if "operand" in scratch:
        operand = scratch["operand"].at[warpgroup]
        plgpu.wgmma_wait(0)  # the product before read it
        operand[...] = a
        plgpu.commit_smem()
        plgpu.wgmma(
            sums[0], hopper.transpose(operand) if plan.transpose else operand, x
        )
        plgpu.wgmma_wait(0)
    else:
        plgpu.wgmma(sums[0], a, x)
    if len(sums) > 1:
        one = plgpu.layout_cast(
            jnp.ones((64, 64), jnp.dtype(plan.dtype)), plgpu.Layout.WGMMA
        )
        if "operand" in scratch:
            operand = scratch["operand"].at[warpgroup]
            operand[...] = one
            plgpu.commit_smem()
            plgpu.wgmma(sums[1], operand, x)
            plgpu.wgmma_wait(0)
        else:
            plgpu.wgmma(sums[1], one, x)


def _row(plan, ref, index):
    """A row vector of scales or zero-points in float32, one per column."""
    return _to_float(plan.scale_dtype, hopper.load_row(ref.at[index]))


def _to_float(dtype, row):
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
        zero = _number(zero)
        if plan.decode.centered:
            near = _nearest(zero)
            centers.append(near.astype(dtype))
            shifts.append(((near - zero) * scale).astype(dtype))
        else:
            shifts.append((-zero * scale).astype(dtype))
    return (*scales, *shifts, *centers)


def _number(zero):
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
        zero = _number(hopper.load_row(scratch["zero_smem"].at[index]))
    return _row(plan, scratch["scale_smem"], index), zero


def _scaled(plan, sums, scale, zero):
    """A sum less the zero-point times the sum of `x`, times the scale."""
    value, tokens = sums[0], plan.config.tokens
    if zero is not None:
        value = value - sums[1] * _across(zero, tokens)
    return value * _across(scale, tokens)


def _scaled_total(plan, sums, inputs, column):
    """The total times the only scale of each column."""
    _, _, scale, zero = inputs
    index = (0, pl.ds(column, 64))
    if zero is not None:
        zero = _number(hopper.load_row(zero.at[index]))
    return (_scaled(plan, sums, _row(plan, scale, index), zero),)


def _write(plan, warpgroup, total, bias, out, column, m_tile, scratch):
    """A whole tile through shared memory, 64 tokens at a time."""
    if bias is not None:
        row = hopper.load_row(bias.at[pl.ds(column, 64)])
        total = total + _across(row, plan.config.tokens)
    total = total.astype(jnp.dtype(plan.out_dtype))
    for part in range(plan.config.tokens // 64):
        place = scratch["out_smem"].at[warpgroup, part % 2]
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        piece = total[:, part * 64 : (part + 1) * 64]
        turned = plgpu.layout_cast(piece, plgpu.Layout.WGMMA_TRANSPOSED)
        hopper.transpose(place)[...] = turned
        plgpu.commit_smem()
        tokens = pl.ds(m_tile * plan.config.tokens + part * 64, 64)
        plgpu.copy_smem_to_gmem(place, out.at[tokens, pl.ds(column, 64)])
