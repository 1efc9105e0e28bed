"""Products with 8-bit activations on TPU.

One step of the grid holds a tile of rows of `x` and a block of columns of the weight,
all of `k`. When a tile of rows is first visited its rows are rounded to 8 bits into
VMEM; every column block then multiplies those codes. Canonical 4-bit codes become int4
by reinterpreting bytes (`pltpu.bitcast` puts neighbouring rows into neighbouring
sublanes, which is how they are packed) and a sign flip that turns `code` into
`code - 8`; the rest of the zero-point is subtracted with sums of the activations:

    y = s_x sum_g scale_g (sum_l x_q c  -  r_g sum_l x_q),   r = zero + offset - shift

For float8 activations (7x) conversion and sign flip would bound the step, so nibbles
are not converted: byte `code` is the float8 number `code 2**-9`, a subnormal one up to
7. Low and high nibbles of 64 byte rows then are two runs of 64 rows, even and odd ones,
and the activations are put in that order when they are rounded.

Groups of 128 rows or more are one product each, scaled afterwards. Smaller groups share
a product of 128 rows: `x` is repeated with the other groups' rows set to zero, and the
copies' results are scaled apart. The matrix unit is 128 deep or deeper, so the copies
cost what separate products would.

Reads one layer of stacked arrays. Refuses what `specs.tpu_obstacle` names. Ragged rows
and columns are masked by the pipeline.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .. import versions
from ..weights import KernelError, Weight, WeightSpec
from . import reference, specs
from .specs import LANES, Config
from .tpu_plan import Plan

F32 = jnp.float32


def obstacle(
    spec: WeightSpec,
    m: int,
    x_dtype: Any,
    *,
    transpose: bool = False,
    activation: str = "int8",
    chip: str | None = None,
) -> str | None:
    """Why this kernel cannot compute a product, or None when it can.

    Args:
      spec: the weight.
      m: rows of the activations.
      x_dtype: their dtype, a float or the 8-bit type itself.
      transpose: gradients are weight-only products; refused here.
      activation: 8-bit type of the activations.
      chip: "v5e", "v5p", "v6e" or "7x"; default the first device's, if it is a TPU.

    Returns:
      The reason, in words, or None.
    """
    if transpose:
        return "transposed products take float activations; use the weight-only kernel"
    if m < 1 or spec.k < 1 or spec.n < 1:
        return "there is nothing to multiply"
    activation = specs.activation_of(x_dtype) or activation
    return specs.tpu_obstacle(spec, activation, chip or specs.chip())


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
    config: Config | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`matmul_a8` on a TPU; arguments as in `api.matmul_a8`, already checked.

    Codes without `x_scale` have scale 1.

    Raises:
      KernelError: the product has an obstacle.
    """
    activation = specs.activation_of(x.dtype) or activation
    reason = obstacle(
        spec,
        x.shape[0],
        x.dtype,
        transpose=transpose,
        activation=activation,
        chip=config.chip if config else None,
    )
    if reason is not None:
        raise KernelError(f"matmul_a8: {reason}")
    config = config or specs.default(spec, x.shape[0], activation)
    coded = x.dtype == jnp.dtype(activation)
    x_scale = 1.0 if coded and x_scale is None else x_scale
    out = jnp.dtype(out_dtype or (F32 if coded else x.dtype))
    inner = jnp.dtype(F32) if out == jnp.float16 else out
    x = x.astype(F32) if x.dtype == jnp.float16 else x
    y = _call(
        x,
        w,
        spec,
        None if x_scale is None else reference.spread(x_scale, x.shape[0]),
        layer,
        bias,
        inner,
        out_scale,
        activation,
        config,
        interpret,
    )
    return y.astype(out)


def _stat(array, layer, *, powers=False):
    """Scales or zero-points `[layers, groups, n]` as the kernel reads them, and layer.

    float32 and bfloat16 are read in place; others are converted here, one layer of
    them, which costs a pass over a hundredth of the weight. `powers`: uint8 is E8M0.
    """
    if array.dtype in (jnp.float32, jnp.bfloat16):
        stacked = array if array.ndim == 3 else array[None]
        return stacked, jnp.int32(0) if layer is None else layer
    array = array if layer is None else array[layer]
    value = array.astype(F32)
    if powers and array.dtype == jnp.uint8:
        value = jnp.exp2(value - 127)
    return value[None], jnp.int32(0)


def _call(
    x, w, spec, x_scale, layer, bias, out, out_scale, activation, config, interpret
):
    """The `pallas_call`."""
    m, n, k = x.shape[0], spec.n, spec.k
    rows, columns = config.rows, config.columns
    layer = None if layer is None else jnp.asarray(layer, jnp.int32)
    codes = w.codes if w.codes.ndim == 3 else w.codes[None]
    scale, scale_layer = _stat(w.scale, layer, powers=True)
    layers = [jnp.int32(0) if layer is None else layer, scale_layer]
    tiles, steps = -(-m // rows), -(-n // columns)
    cores = min(specs.CHIPS[config.chip].cores, steps)
    per_core = -(-steps // cores)

    def column(c, j):
        return jnp.minimum(c * per_core + j, steps - 1)

    def weight_block(height, which):
        return pl.BlockSpec(
            (None, height, columns),
            lambda c, i, j, layers: (layers[which], 0, column(c, j)),
        )

    operands = [x, codes, scale]
    in_specs = [
        pl.BlockSpec((rows, k), lambda c, i, j, _: (i, 0)),
        weight_block(spec.packed_k, 0),
        weight_block(spec.groups, 1),
    ]
    if w.zero is not None:
        zero, zero_layer = _stat(w.zero, layer)
        layers.append(zero_layer)
        operands.append(zero)
        in_specs.append(weight_block(spec.groups, 2))
    if x_scale is not None:
        operands.append(x_scale)
        in_specs.append(pl.BlockSpec((rows, 1), lambda c, i, j, _: (i, 0)))
    if bias is not None:
        operands.append(bias.astype(F32).reshape(1, n))
        in_specs.append(
            pl.BlockSpec((1, columns), lambda c, i, j, _: (0, column(c, j)))
        )
    if out_scale is not None:
        operands.append(jnp.asarray(out_scale, F32).reshape(1))
        in_specs.append(pl.BlockSpec(memory_space=pltpu.SMEM))
    signed = codes.dtype == jnp.int8
    plan = Plan(spec, config, activation, w.zero is not None, signed)
    scratch = [
        pltpu.VMEM((plan.parts * rows, k), jnp.dtype(activation)),
        pltpu.VMEM((rows, 1), F32),
        pltpu.VMEM((plan.units * rows, LANES), F32),
        pltpu.VMEM((1 if config.unroll else spec.groups, columns), F32),
        pltpu.VMEM((1 if config.unroll else spec.groups, columns), F32),
        pltpu.VMEM((rows, columns), plan.sum_dtype),
    ]
    moved = tiles * (codes[0].size + scale[0].size * scale.dtype.itemsize)
    return pl.pallas_call(
        functools.partial(
            _kernel,
            plan=plan,
            given=x_scale is not None,
            bias=bias is not None,
            quantized=out_scale is not None,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(cores, tiles, per_core),
            in_specs=in_specs,
            out_specs=pl.BlockSpec(
                (rows, columns), lambda c, i, j, _: (i, column(c, j))
            ),
            scratch_shapes=scratch,
        ),
        out_shape=versions.result((m, n), out, *operands),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=specs.CHIPS[config.chip].vmem,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * m * n * k,
            bytes_accessed=moved + x.size * x.dtype.itemsize + m * n * out.itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
        name=f"matmul_a8_{activation}",
    )(jnp.stack(layers), *operands)


def _kernel(layers, x, codes, scale, *refs, plan, given, bias, quantized):
    """One block of the result; rounds the rows when they are new."""
    refs = list(refs)
    zero = refs.pop(0) if plan.zero else None
    x_scale = refs.pop(0) if given else None
    bias = refs.pop(0) if bias else None
    out_scale = refs.pop(0) if quantized else None
    y, xq, sx, sums, scale32, zero32, total = refs

    @pl.when(pl.program_id(2) == 0)
    def _():
        _round(x, x_scale, xq, sx, sums, plan)

    if not plan.config.unroll:  # rows are picked by a traced index: 32 bits only
        scale32[...] = scale[...].astype(F32)
        scale = scale32
        if zero is not None:
            zero32[...] = zero[...].astype(F32)
            zero = zero32
    config = plan.config
    for start in range(0, config.columns, config.strip):
        cols = slice(start, start + config.strip)
        acc = _product(xq, sums, codes, scale, zero, total, cols, plan)
        acc = acc * (sx[...] * F32(1 / plan.unit_value))
        if bias is not None:
            acc = acc + bias[:, cols]
        if out_scale is not None:
            acc = reference.round_to(acc, out_scale[0], y.dtype.name)
        y[:, cols] = acc.astype(y.dtype)


def _round(x, x_scale, xq, sx, sums, plan):
    """Codes, scales and group sums of a tile of rows."""
    rows = x.shape[0]
    coded = x.dtype == jnp.dtype(plan.activation)
    piece = plan.piece
    pieces = plan.spec.k // piece
    if x_scale is not None:
        sx[...] = x_scale[...]
    else:

        def most(i, best):
            part = jnp.abs(x[:, pl.ds(i * piece, piece)].astype(F32))
            return jnp.maximum(best, jnp.max(part, axis=1, keepdims=True))

        absmax = lax.fori_loop(0, pieces, most, jnp.zeros((rows, 1), F32))
        sx[...] = reference.row_scale(absmax, plan.activation)

    def store(i, _):
        at = pl.ds(i * piece, piece)
        part = x[:, at].astype(F32)
        if not coded:
            part = reference.round_to(part, sx[...], plan.activation).astype(F32)
        if plan.rest:
            _sum_units(part, sums, i, plan)
        if plan.parts == 1:
            xq[:, at] = _turn(part, plan).astype(xq.dtype)
            return 0
        lane = lax.broadcasted_iota(jnp.int32, part.shape, 1)
        owner = (lane >> (plan.group.bit_length() - 1)) & (plan.parts - 1)
        for q in range(plan.parts):
            mine = jnp.where(owner == q, part, F32(0))
            xq[q * rows : (q + 1) * rows, at] = _turn(mine, plan).astype(xq.dtype)
        return 0

    if plan.rest:
        sums[...] = jnp.zeros_like(sums)
    lax.fori_loop(0, pieces, store, 0)


def _turn(part, plan):
    """Activations in the order of nibbles: of 128 rows the even ones, then the odd."""
    if not plan.nibbles:
        return part
    start = lax.broadcasted_iota(jnp.int32, (LANES, LANES), 0)
    end = lax.broadcasted_iota(jnp.int32, (LANES, LANES), 1)
    half = LANES // 2
    source = jnp.where(end < half, 2 * end, 2 * (end - half) + 1)
    swap = jnp.where(start == source, F32(1), F32(0)).astype(jnp.bfloat16)
    pieces = [
        jnp.dot(
            part[:, i : i + LANES].astype(jnp.bfloat16),
            swap,
            preferred_element_type=F32,
        )
        for i in range(0, part.shape[1], LANES)
    ]
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=1)


def _sum_units(part, sums, i, plan):
    """Adds the sums of one piece to those of its units, which fill whole lanes.

    They are stored as they will be subtracted: times what a code counts and, without
    zero-points, times the one that is left.
    """
    rows, width = part.shape[0], min(plan.unit, plan.piece)
    factor = plan.unit_value * (1.0 if plan.zero else plan.beyond)
    for q in range(plan.piece // width):
        total = jnp.sum(part[:, q * width : (q + 1) * width], axis=1, keepdims=True)
        unit = _quotient(i * plan.piece + q * width, plan.unit)
        sums[pl.ds(unit * rows, rows), :] += jnp.broadcast_to(
            total * F32(factor), (rows, LANES)
        )


def _decode(codes, at, cols, plan):
    """A piece of the weight in the type of the activations."""
    dtype = jnp.dtype(plan.activation)
    part = codes[at, cols]
    if plan.spec.kind == "e4m3":
        return part if part.dtype == dtype else pltpu.bitcast(part, dtype)
    if plan.nibbles:
        runs = []
        for i in range(0, part.shape[0], LANES // 2):
            byte = part[i : i + LANES // 2]
            runs += [byte & jnp.uint8(15), byte >> jnp.uint8(4)]
        return jnp.concatenate([pltpu.bitcast(run, dtype) for run in runs], axis=0)
    if plan.spec.bits < 8:
        top, short = {4: (0x88, jnp.int4), 2: (0xAA, jnp.int2)}[plan.spec.bits]
        return pltpu.bitcast(part ^ jnp.uint8(top), short).astype(dtype)
    if part.dtype == jnp.int8:
        return part
    return pltpu.bitcast(part ^ jnp.uint8(0x80), jnp.int8)


def _product(xq, sums, codes, scale, zero, total, cols, plan):
    """`x_q W` for some columns, scaled by the weight's scales, float32."""
    piece, rows = plan.piece, plan.config.rows
    bytes_of = plan.spec.packed_k * piece // plan.spec.k
    prefer = jnp.int32 if plan.integer else F32
    if plan.config.unroll:
        scale = scale[:, cols].astype(F32)
        zero = None if zero is None else zero[:, cols].astype(F32)

    def row(stat, g):
        return stat[g : g + 1] if plan.config.unroll else stat[pl.ds(g, 1), cols]

    pieces = plan.spec.k // piece

    def dot(i):
        w = _decode(codes, pl.ds(i * bytes_of, bytes_of), cols, plan)
        left = xq[:, pl.ds(i * piece, piece)]
        return lax.dot_general(
            left, w, (((1,), (0,)), ((), ())), preferred_element_type=prefer
        )

    def scaled(value, g, unit):
        value = value.astype(F32)
        if plan.rest:
            less = sums[pl.ds(unit * rows, rows), :]
            less = jnp.tile(less, (1, plan.config.strip // LANES))
            if plan.zero:
                rest = F32(plan.beyond)
                less = less * (row(zero, g) + rest)
            value = value - less
        return value * row(scale, g)

    if plan.whole:
        keep = plan.config.unroll
        acc = jnp.zeros((rows, plan.config.strip), plan.sum_dtype)
        if keep:
            for i in range(pieces):
                acc = acc + dot(i)
            return scaled(acc, 0, 0)
        total[:, cols] = acc

        def add(i, _):
            total[:, cols] += dot(i)
            return 0

        lax.fori_loop(0, pieces, add, 0)
        return scaled(total[:, cols], 0, 0)

    def groups(i):
        result = dot(i)
        found = jnp.zeros((rows, plan.config.strip), F32)
        for q in range(plan.parts):
            unit = i * plan.parts + q
            group = _quotient(unit * plan.unit, plan.group)
            one = scaled(result[q * rows : (q + 1) * rows], group, unit)
            found = one if plan.parts == 1 else found + one
        return found

    if plan.config.unroll:
        acc = jnp.zeros((rows, plan.config.strip), F32)
        for i in range(pieces):
            acc = acc + groups(i)
        return acc
    total[:, cols] = jnp.zeros((rows, plan.config.strip), F32)

    def add_groups(i, _):
        total[:, cols] += groups(i)
        return 0

    lax.fori_loop(0, pieces, add_groups, 0)
    return total[:, cols]


def _quotient(a, b):
    """`a // b` for numbers that are not negative, where jnp's would look at signs."""
    return a // b if isinstance(a, int) else lax.div(a, jnp.int32(b))
