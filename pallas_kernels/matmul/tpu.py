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

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .. import versions
from ..weights import Weight, WeightSpec
from . import decode, reference, specs, tpu_plan, tpu_tiles
from .specs import Config
from .tpu_plan import make_plan

__all__ = ["Config", "matmul", "obstacle"]


obstacle = specs.obstacle


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
    plan = make_plan(spec, config, x, w, transpose, out_dtype)
    w, layer = _single(plan, w, layer)
    run = _transposed if transpose else _forward
    return run(plan, x, w, layer, bias, interpret).astype(out_dtype)


def _single(plan, w, layer):
    """Arrays with a layer axis, and the layer; codes padded to whole regions."""
    spec = plan.spec
    missing = plan.regions * plan.byte_rows - w.codes.shape[-2]
    if missing and layer is not None:
        w, layer = reference.pick(w, layer), None
    table = w.table if w.table is None else tpu_plan.split(w.table, plan.terms)
    table = decode.table_operand(plan.dec, spec, plan.tiles.chip, table)
    if table is not None and table.ndim == 3 and layer is not None:
        table = jnp.broadcast_to(table, (w.codes.shape[0], *table.shape))
    w = w._replace(
        codes=tpu_plan.code_bytes(plan, w.codes),
        scale=tpu_plan.stored(w.scale),
        zero=tpu_plan.stored(w.zero),
    )
    w = w._replace(table=table)
    if layer is None:
        w, layer = Weight(*(None if a is None else a[None] for a in w)), 0
    if missing:
        pad = ((0, 0), (0, missing), (0, 0))
        w = w._replace(codes=jnp.pad(w.codes, pad))
    return w, jnp.asarray(layer, jnp.int32).reshape(1)


def _forward_kernel(plan, names, *arrays):
    refs = dict(zip(names, arrays, strict=True))
    if plan.tiles.prefill:

        @pl.when(pl.program_id(1) == 0)
        def _fill():
            tpu_tiles.stage(plan, refs)
            for r in range(plan.regions):
                lines = slice(r * plan.region, (r + 1) * plan.region)
                if not plan.after:
                    refs["panel"][0, lines, :] = tpu_tiles.weight(plan, refs, r)
                    continue
                for term in range(plan.terms):
                    refs["panel"][term, lines, :] = tpu_tiles.decoded(
                        plan, refs, r, term
                    )

        for name, staged in zip(("scale", "zero"), plan.stages, strict=True):
            refs[name] = refs["staged_" + name] if staged else refs.get(name)
    else:
        tpu_tiles.stage(plan, refs)
    if not plan.after:
        total = tpu_tiles.dot(refs["x"][...], refs["panel"][0])
    elif plan.tiles.prefill:

        def panel(r, term):
            return refs["panel"][term, r * plan.region : (r + 1) * plan.region, :]

        total = tpu_tiles.accumulate(plan, refs, panel)
    else:
        decoded = functools.partial(tpu_tiles.decoded, plan, refs)
        total = tpu_tiles.accumulate(plan, refs, decoded)
    if "bias" in refs:
        total = total + refs["bias"][...]
    refs["y"][...] = total.astype(plan.out)


def _forward(plan, x, w, layer, bias, interpret):
    spec, tiles = plan.spec, plan.tiles
    m, n = x.shape[0], spec.n
    left, sums = tpu_plan.arranged(plan, x)
    m_tiles, n_tiles = -(-m // tiles.rows), -(-n // tiles.columns)
    copies = left.shape[0] // m_tiles
    inputs = {
        "x": (left, pl.BlockSpec((copies, plan.rows), lambda i, j, _: (j, 0))),
        **tpu_plan.blocks(plan, w, lambda i, j: i),
    }
    if sums is not None:
        block = pl.BlockSpec((tiles.rows, spec.groups), lambda i, j, _: (j, 0))
        inputs["sums"] = (sums, block)
    if bias is not None:
        block = pl.BlockSpec((1, tiles.columns), lambda i, j, _: (0, i))
        inputs["bias"] = (bias.astype(jnp.float32)[None], block)
    scratch = tpu_plan.staging(plan)
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


def _transposed_kernel(plan, names, *arrays):
    refs = dict(zip(names, arrays, strict=True))
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _clear():
        refs["sum"][...] = jnp.zeros_like(refs["sum"])

    tpu_tiles.stage(plan, refs)
    left: Any = None
    for r in range(plan.regions):
        lines = slice(r * plan.region, (r + 1) * plan.region)
        if not plan.after:
            weight = tpu_tiles.clean(plan, tpu_tiles.weight(plan, refs, r))
            part = tpu_tiles.dot(refs["x"][...], weight, ((1,), (1,)))
        else:
            first = tpu_tiles.group_of(plan, r)
            if r == 0 or plan.per > 1 or first != tpu_tiles.group_of(plan, r - 1):
                left = tpu_tiles.scaled_left(plan, refs, first)
            part = tpu_tiles.transposed_part(plan, refs, r, *left)
        refs["sum"][:, lines] += part

    @pl.when(step == pl.num_programs(1) - 1)
    def _write():
        refs["y"][...] = refs["sum"][...].astype(plan.out)


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
        **tpu_plan.blocks(plan, w, lambda i, j: j),
    }
    if plan.per > 1 and plan.after:
        mask = np.arange(-(-plan.per // 8) * 8)[:, None] == order // spec.group
        whole = pl.BlockSpec(mask.shape, lambda i, j, _: (0, 0))
        inputs["mask"] = (jnp.asarray(mask, jnp.float32), whole)
    scratch = tpu_plan.staging(plan)
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
