"""Encoding on GPU (Mosaic GPU): one group of rows and 128 columns per warpgroup.

A thread has one column. It reads its rows of a group, one coalesced load per row of the
warpgroup, and keeps them in registers: their largest magnitude, the scale, the codes
and the bytes follow without another thread, without shared memory and without reading
the weight again. Rows that share a byte are registers of the same thread, so packing is
shifts and ors. Loads of a group do not wait for each other, and several warpgroups
share a processor.

Scales of groups of more than 128 rows are found by XLA beforehand (a read of the weight
more); their rows are encoded 128 at a time. The last columns and rows of a matrix are
encoded by programs that reach back into what others write too, with the same bytes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

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
from .specs import GPU_COLUMNS, GPU_ROWS, gpu_obstacle

obstacle = gpu_obstacle


def finds_scales(spec: WeightSpec) -> bool:
    """Whether `encode` finds the scales itself: registers hold a group."""
    return min(spec.group, spec.k) <= GPU_ROWS


def encode(
    w: Any,
    spec: WeightSpec,
    *,
    table: np.ndarray | None = None,
    scale: Any = None,
    across: int = 1,
    config: Any = None,
    interpret: Any = False,
) -> Weight:
    """See `api.encode`; `across` and scales of large groups are the caller's."""
    del across, config
    *lead, k, n = w.shape
    own = scale is None
    matrices = w.size // (k * n)
    group = min(spec.group, k)
    chunks = -(-group // GPU_ROWS)
    operands = [w.reshape(-1, n)]
    shapes = [jax.ShapeDtypeStruct((matrices * spec.packed_k, n), jnp.uint8)]
    scales = jax.ShapeDtypeStruct((matrices * spec.groups, n), jnp.float32)
    if own:
        shapes.append(scales)
    else:
        operands.append(scale.reshape(scales.shape))
    body = functools.partial(_kernel, spec, table, own, chunks)
    codes, *found = plgpu.kernel(
        lambda *refs: body(*(lax.axis_index(a) for a in _AXES), *refs),
        grid=(-(-n // GPU_COLUMNS), chunks, scales.shape[0]),
        grid_names=_AXES,
        out_type=shapes,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        **({"interpret": interpret} if interpret else {}),
    )(*operands)
    codes = codes.reshape(*lead, spec.packed_k, n)
    if stored_dtype(spec) != jnp.uint8:
        codes = lax.bitcast_convert_type(codes, stored_dtype(spec))
    scale = found[0].reshape(*lead, spec.groups, n) if own else scale
    return Weight(codes, scale, None, weight_table(spec, table, w.shape))


_AXES = ("columns", "chunk", "group")


def _kernel(spec, table, own, chunks, column, chunk, group, w_ref, *refs):
    """Encodes the rows of a chunk of a group."""
    codes_ref, scale_ref = refs if own else reversed(refs)
    size, unit = min(spec.group, spec.k), unit_rows(spec.bits)
    rows = min(size, GPU_ROWS)
    first = column * GPU_COLUMNS
    if spec.n % GPU_COLUMNS:
        first = jnp.minimum(first, spec.n - GPU_COLUMNS)
    columns = pl.ds(first, GPU_COLUMNS)
    start = 0 if chunks == 1 else jnp.minimum(chunk * rows, size - rows)
    row = group * size + start
    block = [finite(w_ref[row + i, columns]) for i in range(rows)]
    if own:
        scale = scale_of(functools.reduce(jnp.maximum, map(jnp.abs, block)), spec)
        scale_ref[group, columns] = scale
    else:
        scale = scale_ref[group, columns]
    by_table = own and spec.kind == "table"
    each = multiplier(scale) if by_table else scale
    byte = (row // unit) * (unit * spec.bits // 8)
    for u in range(0, rows, unit):
        units = [x * each if by_table else x / each for x in block[u : u + unit]]
        codes = [encode_values(x, spec, table) for x in units]
        packed = codes if spec.bits == 8 else pack_rows(codes, spec.bits)
        for i, run in enumerate(packed):
            at = byte + u * spec.bits // 8 + i
            codes_ref[at, columns] = (run & jnp.int32(255)).astype(jnp.uint8)
