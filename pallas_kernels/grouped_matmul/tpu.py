"""Grouped products on TPU: one grid over column tiles and visits of row tiles.

A step multiplies one tile of rows by one block of one expert, `[k, columns]`, packed as
it is stored, so that a block comes from HBM once per column tile and expert: the next
visit with the same expert finds it in VMEM, experts without rows are never read, and
the number of visits is a dynamic bound of the grid. Column tiles are the outer loop.

* few rows (decode): each group's codes are multiplied as integers and the product is
  scaled, which costs no work per weight but the conversion;
* many rows (prefill, `Config.cache`): the block is decoded and scaled once per expert
  into VMEM as the dtype of `x` and all tiles of the expert multiply by that.

The gated form reads both weights in the same step and keeps `act(g) * u` only. The
transposed product runs over tiles of `k` and contracts whole rows of `n`.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..weights import Weight, WeightSpec
from . import specs
from .reference import ACTIVATIONS
from .specs import Config

LANES = 128
_NT = (((1,), (1,)), ((), ()))
_NN = (((1,), (0,)), ((), ()))


def matmul(
    x,
    group_sizes,
    weights: tuple[Weight, ...],
    spec: WeightSpec,
    *,
    bias=None,
    out_dtype=None,
    transpose: bool = False,
    activation: str | None = None,
    config: Config | None = None,
    interpret: Any = False,
):
    """`x W` per group, or the gated form for two weights.

    Args:
      x: `[m, k]` sorted by expert, or `[m, n]` when `transpose`.
      group_sizes: int32 `[experts]`.
      weights: one weight, or gate and up, with leading axes of experts.
      spec: what they mean.
      bias: `[experts, n]` (`[experts, k]` when `transpose`) or None; one weight only.
      out_dtype: dtype of the result; default that of `x`.
      transpose: multiply by the transposes.
      activation: name of the gate's function, for two weights.
      config: tiles; default `specs.default`.
      interpret: parameters of the TPU interpreter, or False.

    Returns:
      `[m, n]`, or `[m, k]`.
    """
    m = x.shape[0]
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    if x.dtype == jnp.float16:
        x = x.astype(jnp.float32)
    experts = group_sizes.shape[0]
    config = config or specs.default(
        spec, m, experts, x.dtype, transpose=transpose, weights=len(weights)
    )
    plan = specs.visits(group_sizes, m, config.rows)
    columns = spec.k if transpose else spec.n
    x = jnp.pad(x, [(0, -m % config.rows), (0, 0)])
    y = _call(
        x, plan, weights, spec, bias, out_dtype, transpose, activation, config, interpret
    )
    return y[:m, :columns]


def _call(
    x, plan, weights, spec, bias, out_dtype, transpose, activation, config, interpret
):
    """The `pallas_call` on rows padded to whole tiles."""
    experts = plan.start.shape[0] - 1
    m, inner = x.shape
    columns = spec.k if transpose else spec.n
    tiles = -(-columns // config.columns)

    def block(shape, index):
        """One expert's block; `index` from the column tile to the last two indices."""
        return pl.BlockSpec(
            (None, *shape), lambda j, i, group, expert, *_: (expert[i], *index(j))
        )

    operands, in_specs = [x], [
        pl.BlockSpec((config.rows, inner), lambda j, i, g, e, tile, *_: (tile[i], 0))
    ]
    packed = config.columns * spec.packed_k // spec.k
    for weight in weights:
        if transpose:
            in_specs.append(block((packed, spec.n), lambda j: (j, 0)))
            stats = block((spec.groups, spec.n), lambda j: (0, 0))
        else:
            in_specs.append(block((spec.packed_k, config.columns), lambda j: (0, j)))
            stats = block((spec.groups, config.columns), lambda j: (0, j))
        operands += [weight.codes, weight.scale]
        in_specs.append(stats)
        if weight.zero is not None:
            operands.append(weight.zero)
            in_specs.append(stats)
        if weight.table is not None:
            operands.append(weight.table.astype(jnp.float32))
            in_specs.append(pl.BlockSpec(memory_space=pltpu.SMEM))
    if bias is not None:
        operands.append(bias.astype(jnp.float32)[:, None])
        in_specs.append(block((1, config.columns), lambda j: (0, j)))
    width = spec.n if transpose else config.columns
    scratch = []
    for weight in weights:
        scratch.append(pltpu.VMEM((spec.groups, width), jnp.float32))
        if weight.zero is not None:
            scratch.append(pltpu.VMEM((spec.groups, width), jnp.float32))
        if config.cache:
            shape = (config.columns, spec.n) if transpose else (spec.k, config.columns)
            scratch.append(pltpu.VMEM(shape, x.dtype))
    kernel = functools.partial(
        _kernel,
        spec=spec,
        config=config,
        count=len(weights),
        zero=weights[0].zero is not None,
        table=weights[0].table is not None,
        bias=bias is not None,
        transpose=transpose,
        activation=activation,
        experts=experts,
    )
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=5,
        grid=(tiles, plan.count),
        in_specs=in_specs,
        out_specs=pl.BlockSpec(
            (config.rows, config.columns), lambda j, i, g, e, tile, *_: (tile[i], j)
        ),
        scratch_shapes=scratch,
    )
    return pl.pallas_call(
        kernel,
        grid_spec=grid_spec,
        out_shape=jax.ShapeDtypeStruct((m, columns), out_dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=specs.VMEM_LIMIT,
        ),
        cost_estimate=_cost(x, weights, spec, columns, out_dtype),
        interpret=interpret,
        name="grouped_gate_up" if len(weights) > 1 else "grouped_matmul",
    )(*plan[:5], *operands)


def _cost(x, weights, spec, columns, out_dtype):
    """As if every expert had rows, or as many as there are rows."""
    m, experts = x.shape[0], weights[0].codes.shape[0]
    packed = sum(weight.nbytes for weight in weights)
    moved = packed * min(m, experts) // experts
    moved += x.size * x.dtype.itemsize + m * columns * jnp.dtype(out_dtype).itemsize
    flops = 2 * m * spec.k * spec.n * len(weights)
    return pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0)


class _Block:
    """One expert's block of one weight, in VMEM."""

    def __init__(self, spec, codes, scale, zero, table, factors, zeros, cached):
        self.spec = spec
        self.codes, self.scale, self.zero, self.table = codes, scale, zero, table
        self.factors, self.zeros, self.cached = factors, zeros, cached

    def load_statistics(self):
        """Scales, and zero-points as subtracted from `integers`, in float32."""
        self.factors[...] = _scales(self.scale[...])
        if self.zero is not None:
            zero = self.zero[...]
            if zero.dtype == jnp.uint8:
                zero = zero.astype(jnp.int32)
            self.zeros[...] = zero.astype(jnp.float32) + self.shift

    @property
    def shift(self) -> float:
        """What `values` lacks of the code's value."""
        if self.spec.kind != "int":
            return 0.0
        return self.spec.offset - _base(self.spec, self.codes.dtype)

    @property
    def shifted(self) -> bool:
        """Whether something is subtracted from `values`."""
        return self.zero is not None or self.shift != 0

    def zero_rows(self, group, count=1):
        """What to subtract from the `values` of some groups."""
        if self.zero is None:
            return jnp.float32(self.shift)
        return self.zeros[pl.ds(group, count), :]

    def values(self, expert, row, rows, dtype):
        """Codes of some rows as numbers, before zero-point and scale."""
        bits = self.spec.bits
        packed = self.codes[pl.ds(row * bits // 8, rows * bits // 8), :]
        return _values(packed, self.spec, self.table, expert, dtype)

    def weights(self, expert, row, rows, group, dtype):
        """Some rows of the weight; `group` is the group of the first."""
        value = self.values(expert, row, rows, jnp.float32)
        count = max(rows // self.spec.group, 1)
        scale = self.factors[pl.ds(group, count), :]
        zero = self.zero_rows(group, count)
        if count > 1:
            shape = (count, self.spec.group, value.shape[1])
            value = value.reshape(shape)
            scale = scale[:, None, :]
            zero = zero if self.zero is None else zero[:, None, :]
        if self.shifted:
            value = value - zero
        return (value * scale).astype(dtype).reshape(rows, -1)


def _base(spec, dtype):
    """What signed integers of the same bits lack of unsigned codes."""
    return 0 if dtype == jnp.int8 else 1 << (spec.bits - 1)


def _values(packed, spec, table, expert, dtype):
    """Packed byte rows to numbers, `[rows, columns]`."""
    bits = spec.bits
    if spec.kind in ("e4m3", "e5m2"):
        if packed.dtype == jnp.uint8:
            kind = jnp.float8_e4m3fn if spec.kind == "e4m3" else jnp.float8_e5m2
            packed = pltpu.bitcast(packed, kind)
        return packed.astype(jnp.float32).astype(dtype)
    if spec.kind == "int":
        if packed.dtype == jnp.int8:
            return packed.astype(dtype)
        top = sum(1 << i for i in range(bits - 1, 8, bits))
        signed = {8: jnp.int8, 4: jnp.int4, 2: jnp.int2}[bits]
        return pltpu.bitcast(packed ^ jnp.uint8(top), signed).astype(dtype)
    codes = pltpu.bitcast(packed, {4: jnp.uint4, 2: jnp.uint2}[bits]).astype(jnp.int32)
    if spec.kind == "e2m1":
        return _e2m1(codes).astype(dtype)
    nodes = [table[expert, i] for i in range(1 << bits)]
    for bit in range(bits):
        odd = (codes & (1 << bit)) != 0
        pairs = zip(nodes[::2], nodes[1::2], strict=True)
        nodes = [jnp.where(odd, high, low) for low, high in pairs]
    return nodes[0].astype(dtype)


def _e2m1(codes):
    """Float32 values of e2m1 codes: the exponent moves into place."""
    size = codes & 7
    normal = lax.bitcast_convert_type((size << 22) + (126 << 23), jnp.float32)
    value = jnp.where(size < 2, size.astype(jnp.float32) * 0.5, normal)
    return jnp.where(codes > 7, -value, value)


def _scales(scale):
    """Stored scales in float32; uint8 is E8M0."""
    if scale.dtype == jnp.uint8:
        return lax.bitcast_convert_type(scale.astype(jnp.int32) << 23, jnp.float32)
    return scale.astype(jnp.float32)


def _kernel(
    group_ref,
    expert_ref,
    tile_ref,
    start_ref,
    end_ref,
    *refs,
    spec,
    config,
    count,
    zero,
    table,
    bias,
    transpose,
    activation,
    experts,
):
    """One visit; see the module."""
    refs = list(refs)
    x_ref = refs.pop(0)
    stored = []
    for _ in range(count):
        codes, scale = refs.pop(0), refs.pop(0)
        zeros = refs.pop(0) if zero else None
        stored.append((codes, scale, zeros, refs.pop(0) if table else None))
    bias_ref = refs.pop(0) if bias else None
    out_ref = refs.pop(0)
    blocks = []
    for fields in stored:
        factors = refs.pop(0)
        zeros = refs.pop(0) if zero else None
        cached = refs.pop(0) if config.cache else None
        blocks.append(_Block(spec, *fields, factors, zeros, cached))
    j, visit = pl.program_id(0), pl.program_id(1)
    before = jnp.maximum(visit - 1, 0)
    group, expert = group_ref[visit], expert_ref[visit]
    first_visit = visit == 0
    new_expert = first_visit | (expert_ref[before] != expert)
    new_tile = first_visit | (tile_ref[before] != tile_ref[visit])
    # The transposed product finds its groups by the tile of k it computes.
    group0 = j * config.columns // spec.group if transpose else 0

    def store(y, column, width):
        where = (slice(None), pl.ds(column, width))
        row = lax.broadcasted_iota(jnp.int32, (config.rows, width), 0)
        row = row + tile_ref[visit] * config.rows
        mine = (row >= start_ref[group]) & (row < end_ref[group])
        old = jnp.where(new_tile, jnp.zeros((), out_ref.dtype), out_ref[where])
        out_ref[where] = jnp.where(mine, y.astype(out_ref.dtype), old)

    @pl.when(group == experts)
    def _():
        store(jnp.zeros((config.rows, config.columns), jnp.float32), 0, config.columns)

    @pl.when((group < experts) & new_expert)
    def _():
        for block in blocks:
            block.load_statistics()
            if config.cache:
                _decode(block, expert, group0, config, transpose)

    @pl.when(group < experts)
    def _():
        if transpose:
            for column, part in _transposed(x_ref, blocks[0], expert, group0, config):
                if bias_ref is not None:
                    part = part + bias_ref[:, column : column + part.shape[1]]
                store(part, column, part.shape[1])
            return
        run = _cached if config.cache else _scaled
        y = [run(x_ref, block, expert, config) for block in blocks]
        if activation is not None:
            y = [ACTIVATIONS[activation](y[0]) * y[1]]
        if bias_ref is not None:
            y = [y[0] + bias_ref[...]]
        store(y[0], 0, config.columns)


def _dot(x, w, dims):
    exact = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(
        x, w, dims, precision=exact, preferred_element_type=jnp.float32
    )


def _scaled(x_ref, block, expert, config):
    """Products of codes, scaled per group; of scaled weights where groups are small."""
    spec, rows = block.spec, x_ref.shape[0]
    step = specs.piece(spec, config.chunk)
    dtype = x_ref.dtype
    start = jnp.zeros((rows, config.columns), jnp.float32)

    def weights(i, total):
        w = block.weights(expert, i * step, step, i * (step // spec.group), dtype)
        return total + _dot(x_ref[:, pl.ds(i * step, step)], w, _NN)

    if step > spec.group:
        return _loop(spec.k // step, weights, start)
    pieces = spec.group // step

    def codes(g, total):
        part, sums = None, None
        for piece in range(pieces):
            row = g * spec.group + piece * step
            rows_of_x = x_ref[:, pl.ds(row, step)]
            y = _dot(rows_of_x, block.values(expert, row, step, dtype), _NN)
            part = y if part is None else part + y
            if block.shifted:
                s = jnp.sum(rows_of_x.astype(jnp.float32), 1, keepdims=True)
                sums = s if sums is None else sums + s
        if block.shifted:
            part = part - sums * block.zero_rows(g)
        return total + part * block.factors[pl.ds(g, 1), :]

    return _loop(spec.groups, codes, start)


def _decode(block, expert, group0, config, transpose):
    """The whole block, scaled, into `block.cached`."""
    spec = block.spec
    rows = block.cached.shape[0]
    step = specs.piece(spec, min(config.chunk, rows))

    def put(i, carry):
        group = group0 + i * step // spec.group
        w = block.weights(expert, i * step, step, group, block.cached.dtype)
        block.cached[pl.ds(i * step, step), :] = w
        return carry

    _loop(rows // step, put, 0)


def _cached(x_ref, block, expert, config):
    """Product with the decoded block."""
    del expert
    rows, k = x_ref.shape
    step = specs.divisor(k, specs.LANES, 2048)

    def add(i, total):
        part = pl.ds(i * step, step)
        return total + _dot(x_ref[:, part], block.cached[part, :], _NN)

    return _loop(k // step, add, jnp.zeros((rows, config.columns), jnp.float32))


def _transposed(x_ref, block, expert, group0, config):
    """Columns of the transposed product, a few at a time: `(first column, part)`."""
    spec, dtype = block.spec, x_ref.dtype
    step = specs.piece(spec, min(config.chunk, config.columns))
    for row in range(0, config.columns, step):
        if config.cache:
            w = block.cached[row : row + step, :]
        else:
            group = group0 + row // spec.group
            w = block.weights(expert, row, step, group, dtype)
        yield row, _dot(x_ref[...], w, _NT)


def _loop(count, body, start):
    """A loop, unrolled when it is short."""
    if count <= specs.UNROLL:
        for i in range(count):
            start = body(i, start)
        return start
    unroll = math.gcd(count, 8)
    return lax.fori_loop(0, count, body, start, unroll=unroll)
