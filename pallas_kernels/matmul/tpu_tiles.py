"""Inside the TPU kernels: decoded regions of a weight, their products, their scales.

Shared by the dense and the grouped product. `plan` is a `tpu_plan.Plan`, `refs` are the
kernel's references by name, and region `r` is rows `r plan.region` and on of the
block's `plan.tiles.columns` columns of the weight.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from . import decode


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


def stage(plan, refs):
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


def decoded(plan, refs, r, term=0):
    """Bare codes of region `r`, or a term of them: `[region, columns]`."""
    first = r * plan.byte_rows
    table = refs["table"][term] if "table" in refs else None
    packed = refs["codes"][first : first + plan.byte_rows, :]
    return decode.decode(plan.dec, plan.spec, packed, table)


def group_of(plan, r):
    """First group of region `r`."""
    if plan.spec.groups == 1:
        return 0
    return r * plan.region // plan.spec.group


def weight(plan, refs, r):
    """Region `r` with scales and zeros: bfloat16 `[region, columns]`."""
    value = decoded(plan, refs, r).astype(jnp.float32)
    if plan.dec.factor != 1:
        value = value * jnp.float32(plan.dec.factor)
    first = group_of(plan, r)
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


def dot(a, b, contract=((1,), (0,))):
    """A product in the matrix unit with float32 sums."""
    return lax.dot_general(
        a, b, (contract, ((), ())), preferred_element_type=jnp.float32
    )


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


def accumulate(plan, refs, operand):
    """Sum over regions of products of bare codes, scaled by group.

    Args:
      plan: the product.
      refs: its references; "x" and "sums" as `tpu_plan.arranged` made them.
      operand: `operand(r, term)` gives bare codes of region `r`.

    Returns:
      float32 `[rows, columns]`.
    """
    total: Any = None
    partial: Any = None
    for r in range(plan.regions):
        lines = slice(r * plan.region, (r + 1) * plan.region)
        left = refs["x"][:, lines]
        products = [dot(left, operand(r, t)) for t in reversed(range(plan.terms))]
        product = functools.reduce(jnp.add, products)
        first = group_of(plan, r)
        if plan.per > 1:
            for a in range(min(plan.per, plan.spec.groups - first)):
                part = _sum_terms(plan, product, a)
                total = _add(total, _scaled(plan, refs, part, first + a))
            continue
        partial = _add(partial, _sum_terms(plan, product, 0))
        if r + 1 == plan.regions or group_of(plan, r + 1) != first:
            total = _add(total, _scaled(plan, refs, partial, first))
            partial = None
    if plan.dec.factor != 1 and not plan.corrects:
        total = total * jnp.float32(plan.dec.factor)
    return total


def clean(plan, operand):
    """Zeros where the columns of a ragged float8 block are undefined."""
    if not plan.ragged or plan.spec.kind not in decode.FLOAT8:
        return operand
    valid = _valid(plan, operand.shape)
    value = jnp.where(valid, operand.astype(jnp.float32), jnp.float32(0))
    return value.astype(operand.dtype)


def scaled_left(plan, refs, first):
    """The left side of a transposed product of bare codes.

    Args:
      plan: the product.
      refs: its references; "x" is `[rows, columns]`.
      first: the first group of a region.

    Returns:
      `x scale` of each group of the region as terms, bfloat16
      `[groups * parts * rows, columns]`, and what to subtract, one float32 `[rows, 1]`
      per group.
    """
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


def transposed_part(plan, refs, r, left, subtract):
    """Contribution of a column block to region `r` of the result.

    Args:
      plan: the product.
      refs: its references.
      r: the region.
      left: from `scaled_left`.
      subtract: from `scaled_left`.

    Returns:
      float32 `[rows, region]`.
    """
    products = [
        dot(left, clean(plan, decoded(plan, refs, r, term)), ((1,), (1,)))
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
