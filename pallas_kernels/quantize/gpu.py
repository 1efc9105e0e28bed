"""Encoding on GPU (Mosaic GPU): one group of rows and 128 columns per warpgroup.

A thread has one column. It reads its rows of a group, one coalesced load per row of the
warpgroup, and keeps them in registers: their largest magnitude, the scale, the codes
and the bytes follow without another thread and without shared memory. Rows that share a
byte are registers of the same thread, so packing is shifts and ors. Loads do not wait
for each other, and several warpgroups share a processor. Where registers do not hold a
group it is read twice, the second time from the cache.

Scales of groups of more than 256 rows are found by XLA beforehand (a read of the weight
more). The last columns of a matrix and the last rows of a group are encoded by programs
that reach back into what others write too, with the same bytes.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import versions
from ..weights import Weight, WeightSpec
from .reference import finite, weight_table
from .rules import (
    encode_values,
    multiplier,
    pack_rows,
    scale_of,
    stored_dtype,
    unit_rows,
)
from .specs import GPU_COLUMNS, GPU_GROUP, gpu_chunks, gpu_obstacle, gpu_rows

obstacle = gpu_obstacle


def finds_scales(spec: WeightSpec) -> bool:
    """Whether `encode` finds the scales itself: a cache holds the groups."""
    return min(spec.group, spec.k) <= GPU_GROUP


def encode(
    w: Any,
    spec: WeightSpec,
    *,
    table: np.ndarray | None = None,
    scale: Any = None,
    multiply: bool = False,
    config: Any = None,
    interpret: Any = False,
) -> Weight:
    """See `api.encode`; scales of large groups are the caller's.

    `multiply`: weights are multiplied by the reciprocals of the scales.
    """
    del config
    *lead, k, n = w.shape
    own = scale is None
    matrices = w.size // (k * n)
    chunks = 1 if own else gpu_chunks(spec)
    operands = [w.reshape(-1, n)]
    shapes = [versions.result((matrices * spec.packed_k, n), jnp.uint8, w)]
    scales = versions.result((matrices * spec.groups, n), jnp.float32, w)
    if own:
        shapes.append(scales)
    else:
        operands.append(scale.reshape(scales.shape))

    def encode_weight(*refs):
        _kernel(spec, table, own, multiply, *map(lax.axis_index, _AXES), *refs)

    codes, *found = plgpu.kernel(
        encode_weight,
        grid=(-(-n // GPU_COLUMNS), chunks, scales.shape[0]),
        grid_names=_AXES,
        out_type=shapes,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=interpret or None,
    )(*operands)
    codes = codes.reshape(*lead, spec.packed_k, n)
    if stored_dtype(spec) != jnp.uint8:
        codes = lax.bitcast_convert_type(codes, stored_dtype(spec))
    scale = found[0].reshape(*lead, spec.groups, n) if own else scale
    return Weight(codes, scale, None, weight_table(spec, table, w.shape))


_AXES = ("columns", "chunk", "group")


def _kernel(spec, table, own, multiply, column, chunk, group, w_ref, *refs):
    """Finds the scales of a group and encodes it; given scales: encodes a chunk."""
    codes_ref, scale_ref = refs if own else reversed(refs)
    size, rows, chunks = min(spec.group, spec.k), gpu_rows(spec), gpu_chunks(spec)
    first = column * GPU_COLUMNS
    if spec.n % GPU_COLUMNS:
        first = jnp.minimum(first, spec.n - GPU_COLUMNS)
    columns = pl.ds(first, GPU_COLUMNS)

    def load(c):
        start = 0 if chunks == 1 else jnp.minimum(c * rows, size - rows)
        row = group * size + start
        return row, [finite(w_ref[row + i, columns]) for i in range(rows)]

    def absmax(block):
        return functools.reduce(jnp.maximum, map(jnp.abs, block))

    store = functools.partial(_store, spec, table, multiply, codes_ref, columns)

    def again(c, _):
        store(*load(c), scale_ref[group, columns])
        return 0

    if not own:
        again(chunk, 0)
        return
    row, block = load(0)
    top = absmax(block)
    if chunks > 1:
        top = lax.fori_loop(
            1, chunks, lambda c, top: jnp.maximum(top, absmax(load(c)[1])), top
        )
    scale = scale_of(top, spec)
    scale_ref[group, columns] = scale
    if chunks == 1:
        store(row, block, scale)
    else:
        lax.fori_loop(0, chunks, again, 0)


def _store(spec, table, multiply, codes_ref, columns, row, block, scale):
    """Encodes, packs and writes rows from `row` on that share their scales."""
    unit = unit_rows(spec.bits)
    each = multiplier(scale) if multiply else scale
    byte = row // unit * (unit * spec.bits // 8)
    for u in range(0, len(block), unit):
        units = [x * each if multiply else x / each for x in block[u : u + unit]]
        codes = [encode_values(x, spec, table) for x in units]
        packed = codes if spec.bits == 8 else pack_rows(codes, spec.bits)
        for i, run in enumerate(packed):
            at = byte + u * spec.bits // 8 + i
            codes_ref[at, columns] = (run & jnp.int32(255)).astype(jnp.uint8)
