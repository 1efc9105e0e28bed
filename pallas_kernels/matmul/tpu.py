"""TPU kernels of the weight-only product, for v5e, v5p, v6e and 7x.

A grid step holds all `k` rows of a block of columns, decodes them in registers and
multiplies, so no accumulator crosses steps. Which way scales go depends on the rows of
`x`:

* few (decode): the product is of bare codes, exact in bfloat16 or float8, and a scale
  multiplies the partial sum of its group. Groups that are smaller than the matrix unit
  is deep share a product through a block-diagonal left side.
* many (prefill): the first step of a column block decodes it, scales included, into a
  bfloat16 panel in VMEM, and later steps only multiply.

`x` in float32 (float16) is split into three (two) bfloat16 terms whose products are
exact, and scales then always go after the product: the result is as exact as float32
sums are. The transposed product contracts columns, where scales differ, so they go
into `x` (few rows) or into the weight (many) and an accumulator of all `k` stays in
VMEM while columns go by.

Around the kernel XLA arranges `x` (rows in the decoder's order, split, padded), which
costs the size of `x` and nothing of the size of the weight. Where `k` does not divide
into whole registers the packed codes of the layer are padded, a copy of them.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .. import versions
from ..weights import Weight, WeightSpec
from . import decode, reference, specs
from .specs import Config

__all__ = ["Config", "matmul", "obstacle"]


def obstacle(
    spec: WeightSpec, m: int, x_dtype, *, transpose: bool = False
) -> str | None:
    """Why the kernels cannot do a product, or None; see `specs.obstacle`."""
    return specs.obstacle(spec, m, x_dtype, transpose=transpose)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Everything static about a call."""

    spec: WeightSpec
    tiles: Config
    dec: decode.Decoder
    region: int
    parts: int
    transpose: bool
    has_zero: bool
    stages: tuple[bool, bool]  # scale, zero: decoded into float32 scratch first
    ragged: bool
    out: Any

    @property
    def regions(self):
        return -(-self.spec.k // self.region)

    @property
    def rows(self):
        """`k`, padded to whole regions."""
        return self.regions * self.region

    @property
    def terms(self):
        """Operands whose sum is exact: entries of tables have more bits than codes."""
        return self.parts if self.spec.kind == "table" else 1

    @property
    def per(self):
        """Groups that share a product."""
        grouped = self.spec.groups > 1 and self.region > self.spec.group
        return self.region // self.spec.group if grouped else 1

    @property
    def after(self):
        """Whether scales are applied after the product."""
        return not self.tiles.prefill or self.parts > 1

    @property
    def corrects(self):
        """Whether there is anything to subtract: `zero - delta`."""
        return self.has_zero or self.dec.delta != 0

    @property
    def byte_rows(self):
        return self.region * self.spec.bits // 8


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
    """The product of `api.quantized_matmul`, which checks the arguments.

    Args:
      x: `[m, k]`; `[m, n]` when `transpose`.
      w: arrays in `spec.layout`.
      spec: what they mean.
      layer: int32 scalar for stacked arrays.
      bias: added to the result, or None.
      out_dtype: dtype of the result; default that of `x`.
      transpose: multiply by the transpose.
      config: tiles; default `specs.config` of the chip at hand.
      interpret: for `pallas_call`.

    Returns:
      `[m, n]`, or `[m, k]` when `transpose`.
    """
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    if config is None:
        config = specs.config(
            spec, x.shape[0], x.dtype, transpose=transpose, chip=specs.chip()
        )
    plan = _plan(spec, config, x, w, transpose, out_dtype)
    w, layer = _single(plan, w, layer)
    run = _transposed if transpose else _forward
    return run(plan, x, w, layer, bias, interpret).astype(out_dtype)


def _plan(spec, tiles, x, w, transpose, out_dtype):
    parts = specs.PARTS[x.dtype.name]
    natural = tiles.prefill or transpose
    mixed = not tiles.prefill and not transpose
    dec = decode.decoder(spec, tiles.chip, natural=natural, mixed=mixed)
    depth = specs.TUNED[tiles.chip].depth
    many = tiles.prefill and not transpose
    target = 1 if many else depth
    region = decode.region(spec, dec, target)
    ragged = transpose and spec.n % tiles.columns != 0

    def staged(a):
        return ragged or a.dtype not in (jnp.float32, jnp.bfloat16)

    stages = (staged(w.scale), w.zero is not None and staged(w.zero))
    half = jnp.dtype(out_dtype) == jnp.float16  # no such type in the kernels
    return _Plan(
        spec,
        tiles,
        dec,
        region,
        parts,
        transpose,
        w.zero is not None,
        stages,
        ragged,
        jnp.dtype(jnp.float32 if half else out_dtype),
    )


def _single(plan, w, layer):
    """Arrays with a layer axis, and the layer; codes padded to whole regions."""
    spec = plan.spec
    missing = plan.regions * plan.byte_rows - w.codes.shape[-2]
    if missing and layer is not None:
        w, layer = reference.pick(w, layer), None
    table = w.table if w.table is None else _split(w.table, plan.terms)
    table = decode.table_operand(plan.dec, spec, plan.tiles.chip, table)
    if table is not None and table.ndim == 3 and layer is not None:
        table = jnp.broadcast_to(table, (w.codes.shape[0], *table.shape))
    w = w._replace(
        codes=_bytes(plan, w.codes), scale=_stored(w.scale), zero=_stored(w.zero)
    )
    w = w._replace(table=table)
    if layer is None:
        w, layer = Weight(*(None if a is None else a[None] for a in w)), 0
    if missing:
        pad = ((0, 0), (0, missing), (0, 0))
        w = w._replace(codes=jnp.pad(w.codes, pad))
    return w, jnp.asarray(layer, jnp.int32).reshape(1)


def _bytes(plan, codes):
    """Codes in the dtype that the decoder reads; a view of bytes costs XLA a copy."""
    if plan.spec.kind in decode.FLOAT8 and codes.dtype == jnp.uint8:
        return lax.bitcast_convert_type(codes, decode.FLOAT8[plan.spec.kind])
    return codes


def _stored(a):
    """Scales or zeros as the kernel reads them: float16 and float8 as their bits."""
    if a is None or a.dtype in (jnp.float32, jnp.bfloat16, jnp.uint8):
        return a
    bits = jnp.int16 if a.dtype == jnp.float16 else jnp.int8
    return lax.bitcast_convert_type(a, bits)


# Around the kernels: activations.


def _split(x, parts):
    """`parts` bfloat16 arrays, stacked in front, that sum to `x`."""
    if parts == 1:
        return x.astype(jnp.bfloat16)[None]
    found, rest = [], x.astype(jnp.float32)
    for _ in range(parts):
        # Rounding by bits: compilers may drop a pair of conversions.
        head = lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
        found.append(head.astype(jnp.bfloat16))
        rest = rest - head
    return jnp.stack(found)


def _arranged(plan, x):
    """`x` as left side: `[m tiles * per * parts * rows, k]` and group sums, or None.

    Terms and copies for the groups of a region lie beside each other within a tile;
    copy `a` is zero outside the `a`-th group of each region.
    """
    spec, rows = plan.spec, plan.tiles.rows
    m = x.shape[0]
    x = jnp.pad(x, ((0, -m % rows), (0, plan.rows - spec.k)))
    tiles = x.shape[0] // rows
    sums = None
    if plan.after and plan.corrects:
        width = spec.group if spec.groups > 1 else plan.rows
        short = max(0, spec.groups * width - plan.rows)
        groups = jnp.pad(x, ((0, 0), (0, short)))
        groups = groups[:, : spec.groups * width].astype(jnp.float32)
        sums = jnp.sum(groups.reshape(-1, spec.groups, width), axis=-1)
    terms = _split(x, plan.parts if plan.after else 1)
    per = plan.per if plan.after else 1
    if per > 1 or not plan.dec.natural:
        order = plan.dec.order(plan.region)
        matrix = decode.permutation(order, per, spec.group)
        terms = terms.reshape(*terms.shape[:2], plan.regions, plan.region)
        terms = lax.dot_general(
            terms,
            jnp.asarray(matrix, jnp.bfloat16),
            (((3,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        ).astype(jnp.bfloat16)  # [parts, m, regions, per, region]
        terms = jnp.moveaxis(terms, 3, 0).reshape(per, -1, *x.shape)
    else:
        terms = terms[None]
    terms = terms.reshape(-1, tiles, rows, plan.rows)
    terms = jnp.moveaxis(terms, 1, 0).reshape(-1, plan.rows)
    return terms, sums


# Inside the kernels: scales.


def _half(bits):
    """float32 values of float16 bits, subnormals included."""
    u = bits.astype(jnp.int32)
    size = u & 0x7FFF
    normal = pltpu.bitcast((size << 13) + (112 << 23), jnp.float32)
    small = size.astype(jnp.float32) * jnp.float32(2.0**-24)
    value = jnp.where(size < 0x400, small, normal)
    value = jnp.where(size >= 0x7C00, jnp.float32(jnp.nan), value)
    return jnp.where((u & 0x8000) != 0, -value, value)


def _e4m3(bits):
    """float32 values of float8_e4m3fn bits."""
    u = bits.astype(jnp.int32)
    size = u & 0x7F
    normal = pltpu.bitcast((size << 20) + (120 << 23), jnp.float32)
    value = jnp.where(size < 8, size.astype(jnp.float32) * jnp.float32(2.0**-9), normal)
    value = jnp.where(size == 0x7F, jnp.float32(jnp.nan), value)
    return jnp.where((u & 0x80) != 0, -value, value)


def _e8m0(bits):
    return pltpu.bitcast(bits.astype(jnp.int32) << 23, jnp.float32)


def _float32(array, powers):
    """Stored scales or zeros in float32; `powers`: uint8 is E8M0, else integers."""
    if array.dtype == jnp.int16:
        return _half(array)
    if array.dtype == jnp.int8:
        return _e4m3(array)
    if array.dtype == jnp.uint8 and powers:
        return _e8m0(array)
    if array.dtype == jnp.uint8:
        return array.astype(jnp.int32).astype(jnp.float32)
    return array.astype(jnp.float32)


def _stage(plan, refs):
    """Decodes scales and zeros that rows cannot be read from, once per step."""
    for name, staged in zip(("scale", "zero"), plan.stages, strict=True):
        if not staged:
            continue
        value = _float32(refs[name][...], powers=name == "scale")
        if plan.ragged:  # what lies beyond the last column is undefined
            value = jnp.where(_valid(plan, value.shape), value, jnp.float32(0))
        refs[name] = refs["staged_" + name]
        refs[name][...] = value


def _valid(plan, shape):
    column = lax.broadcasted_iota(jnp.int32, shape, 1)
    first = pl.program_id(1) * plan.tiles.columns
    return column + first < plan.spec.n


def _row(ref, group):
    return ref[group : group + 1, :].astype(jnp.float32)


def _subtrahend(plan, refs, group):
    """`zero - delta`, a row or a number."""
    if not plan.has_zero:
        return jnp.float32(-plan.dec.delta)
    return _row(refs["zero"], group) - jnp.float32(plan.dec.delta)


def _decoded(plan, refs, r, term=0):
    """Operand of region `r`, or a term of it."""
    first = r * plan.byte_rows
    table = refs["table"][term] if "table" in refs else None
    packed = refs["codes"][first : first + plan.byte_rows, :]
    return decode.decode(plan.dec, plan.spec, packed, table)


def _group_of(plan, r):
    """First group of region `r`."""
    if plan.spec.groups == 1:
        return 0
    return r * plan.region // plan.spec.group


def _weight(plan, refs, r):
    """Region `r` with scales and zeros, bfloat16."""
    value = _decoded(plan, refs, r).astype(jnp.float32)
    if plan.dec.factor != 1:
        value = value * jnp.float32(plan.dec.factor)
    first = _group_of(plan, r)
    groups = range(first, min(first + plan.per, plan.spec.groups))
    scale = _spread(plan, refs, [_row(refs["scale"], g) for g in groups])
    if plan.corrects:
        rows = [_subtrahend(plan, refs, g) for g in groups]
        value = value - (_spread(plan, refs, rows) if plan.has_zero else rows[0])
    return (value * scale).astype(jnp.bfloat16)


def _spread(plan, refs, rows):
    """One row per group to the rows of a region."""
    if len(rows) == 1:
        return rows[0]
    columns = rows[0].shape[1]
    if plan.dec.natural:
        size = (plan.spec.group, columns)
        parts = [jnp.broadcast_to(row, size) for row in rows]
        parts += [parts[-1]] * (plan.per - len(rows))
        return jnp.concatenate(parts, axis=0)
    which = jnp.concatenate([refs["groups"][...]] * (columns // 128), axis=1)
    found = jnp.broadcast_to(rows[0], (plan.region, columns))
    for a, row in enumerate(rows[1:], 1):
        found = jnp.where(which == a, row, found)
    return found


def _dot(a, b, contract=((1,), (0,))):
    return lax.dot_general(
        a, b, (contract, ((), ())), preferred_element_type=jnp.float32
    )


# The forward product.


def _sum_terms(plan, product, copy):
    """Rows of one copy, its terms added."""
    rows, start = plan.tiles.rows, copy * plan.parts * plan.tiles.rows
    terms = [
        product[start + i * rows : start + (i + 1) * rows]
        for i in reversed(range(plan.parts))  # small terms first
    ]
    return functools.reduce(jnp.add, terms)


def _scaled(plan, refs, product, group):
    """`scale (factor product - (zero - delta) sum x)` of one group."""
    if plan.corrects:
        if plan.dec.factor != 1:
            product = product * jnp.float32(plan.dec.factor)
        sums = refs["sums"][:, group : group + 1]
        product = product - sums * _subtrahend(plan, refs, group)
    return product * _row(refs["scale"], group)


def _add(total, term):
    return term if total is None else total + term


def _accumulate(plan, refs, operand):
    """Sum over regions of products of bare codes, scaled by group."""
    total: Any = None
    partial: Any = None
    for r in range(plan.regions):
        lines = slice(r * plan.region, (r + 1) * plan.region)
        left = refs["x"][:, lines]
        products = [_dot(left, operand(r, t)) for t in reversed(range(plan.terms))]
        product = functools.reduce(jnp.add, products)
        first = _group_of(plan, r)
        if plan.per > 1:
            for a in range(min(plan.per, plan.spec.groups - first)):
                part = _sum_terms(plan, product, a)
                total = _add(total, _scaled(plan, refs, part, first + a))
            continue
        partial = _add(partial, _sum_terms(plan, product, 0))
        if r + 1 == plan.regions or _group_of(plan, r + 1) != first:
            total = _add(total, _scaled(plan, refs, partial, first))
            partial = None
    if plan.dec.factor != 1 and not plan.corrects:
        total = total * jnp.float32(plan.dec.factor)
    return total


def _forward_kernel(plan, names, *arrays):
    refs = dict(zip(names, arrays, strict=True))
    if plan.tiles.prefill:

        @pl.when(pl.program_id(1) == 0)
        def _fill():
            _stage(plan, refs)
            for r in range(plan.regions):
                lines = slice(r * plan.region, (r + 1) * plan.region)
                if not plan.after:
                    refs["panel"][0, lines, :] = _weight(plan, refs, r)
                    continue
                for term in range(plan.terms):
                    refs["panel"][term, lines, :] = _decoded(plan, refs, r, term)

        for name, staged in zip(("scale", "zero"), plan.stages, strict=True):
            refs[name] = refs["staged_" + name] if staged else refs.get(name)
    else:
        _stage(plan, refs)
    if not plan.after:
        total = _dot(refs["x"][...], refs["panel"][0])
    elif plan.tiles.prefill:

        def panel(r, term):
            return refs["panel"][term, r * plan.region : (r + 1) * plan.region, :]

        total = _accumulate(plan, refs, panel)
    else:
        decoded = functools.partial(_decoded, plan, refs)
        total = _accumulate(plan, refs, decoded)
    if "bias" in refs:
        total = total + refs["bias"][...]
    refs["y"][...] = total.astype(plan.out)


def _blocks(plan, w, column):
    """Operands of the weight and their blocks; `column` picks it from grid indices."""
    columns = plan.tiles.columns

    def block(rows):
        return pl.BlockSpec(
            (None, rows, columns), lambda i, j, layer: (layer[0], 0, column(i, j))
        )

    found = {"codes": (w.codes, block(w.codes.shape[1]))}
    found["scale"] = (w.scale, block(w.scale.shape[1]))
    if w.zero is not None:
        found["zero"] = (w.zero, block(w.zero.shape[1]))
    if w.table is not None:
        shape = (None, *w.table.shape[1:])
        table = pl.BlockSpec(shape, lambda i, j, layer: (layer[0], 0, 0, 0))
        found["table"] = (w.table, table)
    order = plan.dec.order(plan.region)
    if plan.per > 1 and not plan.dec.natural and not plan.after:
        groups = np.broadcast_to((order // plan.spec.group)[:, None], (len(order), 128))
        groups = jnp.asarray(groups, jnp.int32)
        whole = pl.BlockSpec(groups.shape, lambda i, j, layer: (0, 0))
        found["groups"] = (groups, whole)
    return found


def _staging(plan):
    """Scratch for scales and zeros that are decoded first."""
    shape = (plan.spec.groups, plan.tiles.columns)
    return {
        "staged_" + name: pltpu.VMEM(shape, jnp.float32)
        for name, staged in zip(("scale", "zero"), plan.stages, strict=True)
        if staged
    }


def _forward(plan, x, w, layer, bias, interpret):
    spec, tiles = plan.spec, plan.tiles
    m, n = x.shape[0], spec.n
    left, sums = _arranged(plan, x)
    m_tiles, n_tiles = -(-m // tiles.rows), -(-n // tiles.columns)
    copies = left.shape[0] // m_tiles
    inputs = {
        "x": (left, pl.BlockSpec((copies, plan.rows), lambda i, j, _: (j, 0))),
        **_blocks(plan, w, lambda i, j: i),
    }
    if sums is not None:
        block = pl.BlockSpec((tiles.rows, spec.groups), lambda i, j, _: (j, 0))
        inputs["sums"] = (sums, block)
    if bias is not None:
        block = pl.BlockSpec((1, tiles.columns), lambda i, j, _: (0, i))
        inputs["bias"] = (bias.astype(jnp.float32)[None], block)
    scratch = _staging(plan)
    if tiles.prefill:
        dtype = plan.dec.dtype if plan.after else jnp.bfloat16
        scratch["panel"] = pltpu.VMEM((plan.terms, plan.rows, tiles.columns), dtype)
    y = _call(
        plan,
        functools.partial(_forward_kernel, plan),
        (n_tiles, m_tiles),
        inputs,
        (
            (m_tiles * tiles.rows, n),
            (tiles.rows, tiles.columns),
            lambda i, j, _: (j, i),
        ),
        scratch,
        ("parallel", "arbitrary"),
        layer,
        interpret,
    )
    return y[:m]


def _call(plan, kernel, grid, inputs, output, scratch, semantics, layer, interpret):
    """The pallas_call: refs reach the kernel by name."""
    spec = plan.spec
    shape, block, index = output
    names = ("layer", *inputs, "y", *scratch)
    arrays = [array for array, _ in inputs.values()]
    layers = inputs["codes"][0].shape[0]
    weights = sum(
        a.size * a.dtype.itemsize // layers
        for name, (a, _) in inputs.items()
        if name in ("codes", "scale", "zero", "table")
    )
    others = sum(
        inputs[name][0].size * inputs[name][0].dtype.itemsize
        for name in inputs.keys() & {"x", "sums", "bias"}
    )
    turned = "-transposed" if plan.transpose else ""
    return pl.pallas_call(
        functools.partial(kernel, names),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[spec for _, spec in inputs.values()],
            out_specs=pl.BlockSpec(block, index),
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=versions.result(shape, plan.out, layer, *arrays),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=semantics, vmem_limit_bytes=plan.tiles.vmem
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * shape[0] * spec.k * spec.n * plan.parts,
            bytes_accessed=weights + others + shape[0] * shape[1] * plan.out.itemsize,
            transcendentals=0,
        ),
        name=f"matmul-{spec.kind}{spec.bits}{turned}",
        interpret=interpret,
    )(layer, *arrays)


# The transposed product.


def _transposed_kernel(plan, names, *arrays):
    refs = dict(zip(names, arrays, strict=True))
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _clear():
        refs["sum"][...] = jnp.zeros_like(refs["sum"])

    _stage(plan, refs)
    left: Any = None
    for r in range(plan.regions):
        lines = slice(r * plan.region, (r + 1) * plan.region)
        if not plan.after:
            weight = _clean(plan, _weight(plan, refs, r))
            part = _dot(refs["x"][...], weight, ((1,), (1,)))
        else:
            first = _group_of(plan, r)
            if r == 0 or plan.per > 1 or first != _group_of(plan, r - 1):
                left = _scaled_left(plan, refs, first)
            part = _transposed_part(plan, refs, r, *left)
        refs["sum"][:, lines] += part

    @pl.when(step == pl.num_programs(1) - 1)
    def _write():
        refs["y"][...] = refs["sum"][...].astype(plan.out)


def _clean(plan, operand):
    """Zeros where the columns of a ragged float8 block are undefined."""
    if not plan.ragged or plan.spec.kind not in decode.FLOAT8:
        return operand
    valid = _valid(plan, operand.shape)
    value = jnp.where(valid, operand.astype(jnp.float32), jnp.float32(0))
    return value.astype(operand.dtype)


def _scaled_left(plan, refs, first):
    """`x scale` of each group of a region as terms, and what to subtract."""
    lefts, subtract = [], []
    x = refs["x"][...].astype(jnp.float32)
    for group in range(first, min(first + plan.per, plan.spec.groups)):
        scaled = x * _row(refs["scale"], group)
        if plan.corrects:
            corrected = scaled * _subtrahend(plan, refs, group)
            subtract.append(jnp.sum(corrected, axis=1, keepdims=True))
        if plan.dec.factor != 1:
            scaled = scaled * jnp.float32(plan.dec.factor)
        rest = scaled
        for i in range(plan.parts):
            head = rest.astype(jnp.bfloat16)
            lefts.append(head)
            if i + 1 < plan.parts:
                rest = rest - head.astype(jnp.float32)
    return jnp.concatenate(lefts, axis=0), subtract


def _transposed_part(plan, refs, r, left, subtract):
    """Contribution of a column block to region `r` of the result."""
    products = [
        _dot(left, _clean(plan, _decoded(plan, refs, r, term)), ((1,), (1,)))
        for term in reversed(range(plan.terms))
    ]
    product = functools.reduce(jnp.add, products)
    copies = product.shape[0] // (plan.parts * plan.tiles.rows)
    total: Any = None
    for a in range(copies):
        part = _sum_terms(plan, product, a)
        if plan.corrects:
            part = part - subtract[a]
        if a:
            mask = refs["mask"][a : a + 1, :] > 0
            part = jnp.where(mask, part, total)
        total = part
    return total


def _transposed(plan, x, w, layer, bias, interpret):
    spec, tiles = plan.spec, plan.tiles
    m = x.shape[0]
    m_tiles, n_tiles = -(-m // tiles.rows), -(-spec.n // tiles.columns)
    x = x.astype(jnp.bfloat16 if plan.parts == 1 else jnp.float32)
    padded = (m_tiles * tiles.rows, n_tiles * tiles.columns)
    x = jnp.pad(x, ((0, padded[0] - m), (0, padded[1] - spec.n)))
    order = plan.dec.order(plan.region)
    inputs = {
        "x": (x, pl.BlockSpec((tiles.rows, tiles.columns), lambda i, j, _: (i, j))),
        **_blocks(plan, w, lambda i, j: j),
    }
    if plan.per > 1 and plan.after:
        mask = np.arange(-(-plan.per // 8) * 8)[:, None] == order // spec.group
        whole = pl.BlockSpec(mask.shape, lambda i, j, _: (0, 0))
        inputs["mask"] = (jnp.asarray(mask, jnp.float32), whole)
    scratch = _staging(plan)
    scratch["sum"] = pltpu.VMEM((tiles.rows, plan.rows), jnp.float32)
    y = _call(
        plan,
        functools.partial(_transposed_kernel, plan),
        (m_tiles, n_tiles),
        inputs,
        ((padded[0], plan.rows), (tiles.rows, plan.rows), lambda i, j, _: (i, 0)),
        scratch,
        ("parallel", "arbitrary"),
        layer,
        interpret,
    )[:m]
    if not plan.dec.natural:
        y = y.reshape(m, plan.regions, plan.region)[:, :, np.argsort(order)]
        y = y.reshape(m, plan.rows)
    y = y[:, : spec.k]
    if bias is None:
        return y
    return (y.astype(jnp.float32) + bias.astype(jnp.float32)).astype(plan.out)
