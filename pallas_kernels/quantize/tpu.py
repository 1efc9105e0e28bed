"""Encoding on TPU: tiles of floats in, tiles of bytes and scales out.

A grid step goes through its tile in slabs of whole groups and 128 columns. Per slab:
the absolute maxima over sublanes, then one strided read per row of a packing unit, so
that the rows whose codes share a byte are registers of the same shape; codes are
shifted and merged in 32-bit lanes and narrowed once. Bytes of 3, 5, 6 and 7 bit codes
pass through a scratch buffer that interleaves their runs.

Scales of a whole column are found by XLA beforehand (a read of the weight more).
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .. import versions
from ..weights import Weight, WeightSpec
from .reference import divided, finite, weight_table
from .rules import (
    FLOAT8,
    encode_values,
    multiplier,
    pack_rows,
    scale_of,
    stored_dtype,
    unit_rows,
)
from .specs import LANES, TpuConfig, slab_rows, tpu_config, tpu_obstacle

obstacle = tpu_obstacle


def finds_scales(spec: WeightSpec) -> bool:
    """Whether `encode` finds the scales itself: groups lie within a tile."""
    return spec.groups > 1


def encode(
    w: Any,
    spec: WeightSpec,
    *,
    table: np.ndarray | None = None,
    scale: Any = None,
    multiply: bool = False,
    config: TpuConfig | None = None,
    interpret: Any = False,
) -> Weight:
    """See `api.encode`; scales of whole columns are the caller's.

    `multiply`: weights are multiplied by the reciprocals of the scales.
    """
    config = config or tpu_config(spec, w.dtype.itemsize)
    lead = w.shape[:-2]
    stack = w.reshape(-1, spec.k, spec.n)
    rows, columns = config.rows, config.columns
    groups = rows // spec.group if spec.groups > 1 else 1

    def block(height):
        return pl.BlockSpec((None, height, columns), lambda a, j, i: (a, i, j))

    fixed = pl.BlockSpec((None, 1, columns), lambda a, j, i: (a, 0, j))
    scales = block(groups) if spec.groups > 1 else fixed
    shape = (len(stack), spec.packed_k, spec.n)
    shapes = [versions.result(shape, stored_dtype(spec), w)]
    outs, operands, ins = [block(rows * spec.bits // 8)], [stack], [block(rows)]
    if scale is None:
        shape = (len(stack), spec.groups, spec.n)
        shapes.append(versions.result(shape, jnp.float32, w))
        outs.append(scales)
    else:
        operands.append(scale.reshape(-1, spec.groups, spec.n))
        ins.append(scales)
    codes, *found = pl.pallas_call(
        functools.partial(_kernel, spec, table, scale is None, multiply),
        name="encode_weight",
        grid=(len(stack), pl.cdiv(spec.n, columns), pl.cdiv(spec.k, rows)),
        in_specs=ins,
        out_specs=outs,
        out_shape=shapes,
        scratch_shapes=[
            pltpu.VMEM((slab_rows(spec), LANES), jnp.float32),
            pltpu.VMEM((slab_rows(spec) * spec.bits // 8, LANES), jnp.int32),
        ],
        cost_estimate=cost(w, spec),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel")
        ),
        interpret=interpret,
    )(*operands)
    codes = codes.reshape(*lead, spec.packed_k, spec.n)
    scale = found[0].reshape(*lead, spec.groups, spec.n) if found else scale
    return Weight(codes, scale, None, weight_table(spec, table, w.shape))


def cost(w: Any, spec: WeightSpec) -> pl.CostEstimate:
    """Each float read once, each byte and scale written once."""
    matrices = w.size // (spec.k * spec.n)
    written = matrices * (spec.packed_k + 4 * spec.groups) * spec.n
    return pl.CostEstimate(
        flops=20 * w.size,
        bytes_accessed=w.size * w.dtype.itemsize + written,
        transcendentals=w.size,
    )


def _kernel(spec, table, own, multiply, w_ref, *refs):
    """Encodes a tile: loops over columns of a register's width and over slabs."""
    *rest, wide_ref, bytes_ref = refs
    codes_ref, scale_ref = (rest[0], rest[1]) if own else (rest[1], rest[0])
    slab, grouped = slab_rows(spec), spec.groups > 1
    out, per = slab * spec.bits // 8, slab // spec.group if grouped else 1

    def body(c, _):
        columns = pl.ds(pl.multiple_of(c * LANES, LANES), LANES)
        for s in range(w_ref.shape[0] // slab):
            # Strides need 32 bits and memory one register wide.
            wide_ref[...] = finite(w_ref[s * slab : (s + 1) * slab, columns])
            runs = [[] for _ in range(1 if spec.bits == 8 else _byte_rows(spec.bits))]
            for q in range(per):
                at = (pl.ds(s * per + q if grouped else 0, 1), columns)
                start, size = q * slab // per, slab // per
                if own:
                    top = jnp.abs(wide_ref[start : start + size, :])
                    top = jnp.max(top, axis=0, keepdims=True)
                    scale_ref[at] = scale_of(top, spec)
                rows = (wide_ref, start, size)
                parts = _bytes(*rows, scale_ref[at], multiply, spec, table)
                for run, part in zip(runs, parts, strict=True):
                    run.append(part)
            merged = [jnp.concatenate(run, axis=0) for run in runs]
            if len(merged) > 1:
                for i, run in enumerate(merged):
                    bytes_ref[pl.ds(i, run.shape[0], stride=len(merged)), :] = run
                merged = [bytes_ref[...]]
            at = (pl.ds(s * out, out), columns)
            if spec.kind in FLOAT8:
                bits = merged[0].astype(jnp.uint8)
                codes_ref[at] = lax.bitcast_convert_type(bits, codes_ref.dtype)
            else:
                codes_ref[at] = merged[0].astype(codes_ref.dtype)
        return 0

    lax.fori_loop(0, w_ref.shape[1] // LANES, body, 0)


def _byte_rows(bits):
    return unit_rows(bits) * bits // 8


def _bytes(wide_ref, start, size, scale, multiply, spec, table):
    """Byte rows, as int32, of `size` rows of a slab that share a row of scales."""
    unit = unit_rows(spec.bits)
    each = multiplier(scale) if multiply else scale
    codes = []
    for r in range(unit):
        at = pl.ds(start + r, size // unit, stride=unit if unit > 1 else None)
        row = wide_ref[at, :]
        u = row * each if multiply else divided(row, each)
        codes.append(encode_values(u, spec, table))
    return codes if spec.bits == 8 else pack_rows(codes, spec.bits)
