"""Encoding without temporaries on any platform, in plain jnp.

A packing unit is cut into its rows (strided slices), the codes of each are computed,
shifted and merged: an elementwise expression from float rows to bytes, which XLA fuses
into one loop behind the reduction that finds the scales. What lives beside the operands
and the result is the scales. Codes and packing written as separate steps (as
`reference.py` does) cost three float32 copies of the weight.

Groups and rows that do not divide into packing units go the way of the reference.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from ..weights import Weight, WeightSpec
from . import reference
from .rules import (
    FLOAT8,
    encode_values,
    multiplier,
    pack_rows,
    scale_of,
    stored_dtype,
    unit_rows,
)


def obstacle(spec: WeightSpec) -> str | None:
    """Why the fused path does not apply; None when it does."""
    unit = unit_rows(spec.bits)
    if not spec.k or not spec.n:
        return "the matrix is empty"
    if spec.k % unit or (spec.groups > 1 and spec.group % unit):
        return f"groups of {spec.group} in {spec.k} rows cut packing units of {unit}"
    if spec.k % spec.group and spec.group < spec.k:
        return f"{spec.k} rows leave a short group of {spec.group}"
    return None


def encode(
    w: Any,
    spec: WeightSpec,
    *,
    table: np.ndarray | None = None,
    scale: Any = None,
    across: int = 1,
) -> Weight:
    """See `api.encode`; falls back to the reference where `obstacle` says so."""
    if obstacle(spec) is not None:
        return reference.encode(w, spec, table=table, scale=scale, across=across)
    own = scale is None
    if own:
        scale = scales(w, spec, across)
    lead, unit = w.shape[:-2], unit_rows(spec.bits)
    groups, group = scale.shape[-2], min(spec.group, spec.k)
    rows = w.reshape(*lead, groups, group // unit, unit, spec.n)
    each = scale[..., :, None, :]
    by_table = own and spec.kind == "table"
    if by_table:
        each = multiplier(each)
    codes = []
    for i in range(unit):
        row = reference.finite(rows[..., i, :])
        u = row * each if by_table else reference.divided(row, each)
        codes.append(encode_values(u, spec, table))
    stored = _store(codes, spec)
    shape = (*lead, spec.packed_k, spec.n)
    leaf = reference.weight_table(spec, table, w.shape)
    return Weight(stored.reshape(shape), scale, None, leaf)


def _store(codes, spec):
    dtype = stored_dtype(spec)
    if spec.kind in FLOAT8:
        return lax.bitcast_convert_type(codes[0].astype(jnp.uint8), dtype)
    if spec.bits == 8:
        return codes[0].astype(dtype)
    packed = [byte.astype(dtype) for byte in pack_rows(codes, spec.bits)]
    return packed[0] if len(packed) == 1 else jnp.stack(packed, axis=-2)


def scales(w: Any, spec: WeightSpec, across: int = 1) -> Any:
    """See `api.scale_of`."""
    if spec.k % min(spec.group, max(spec.k, 1)):
        return scale_of(reference.absmax(reference.finite(w), spec, across), spec)
    return scale_of(absmax(w, spec, across), spec)


def absmax(w: Any, spec: WeightSpec, across: int = 1) -> Any:
    """Largest finite magnitude of each group, float32 `[*layers, groups, n]`.

    XLA's CPU backend reduces along rows one number at a time and writes what it reduces
    to memory first; there a loop over rows keeps whole rows of maxima instead, four to
    five times as fast.

    Args:
      w: float `[*layers, k, n]`; `spec.group` divides `k`, or is larger.
      spec: the groups.
      across: columns that share a group.

    Returns:
      The maxima, repeated over the columns that share them.
    """
    group = min(spec.group, spec.k)
    rows = w.reshape(*w.shape[:-2], spec.k // group, group, spec.n)
    top = lax.platform_dependent(rows, cpu=_loop_max, default=_plain_max)
    return reference.spread(top, across)


def _plain_max(rows):
    return jnp.max(_size(rows), axis=-2)


def _loop_max(rows):
    *lead, group, n = rows.shape
    step = math.gcd(group, 8)
    cut = rows.reshape(*lead, group // step, step, n)

    def widen(i, top):
        part = lax.dynamic_index_in_dim(cut, i, axis=-3, keepdims=False)
        for j in range(step):
            top = jnp.maximum(top, _size(part[..., j, :]))
        return top

    return lax.fori_loop(0, group // step, widen, _size(rows[..., 0, :]))


def _size(x):
    size = jnp.abs(x.astype(jnp.float32))
    return jnp.where(size <= jnp.finfo(jnp.float32).max, size, 0.0)


def bytes_moved(w: Any, spec: WeightSpec) -> int:
    """Bytes that an encoder must read and write once."""
    lead = math.prod(w.shape[:-2])
    return w.size * w.dtype.itemsize + lead * (spec.packed_k + 4 * spec.groups) * spec.n
