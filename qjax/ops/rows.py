"""Matrix-vector products on CPU that decode in registers.

XLA's CPU compiler fuses a chain of elementwise operations into one vectorized loop. A
step of the loop here reads a few packed rows, decodes each and adds `x[k] * w[k, :]` to
the running result, all in one fusion: weights are read once, in their packed size, and
nothing is stored but `partials` running results (independent parts of `in`, which the
compiler spreads over cores). All arithmetic is float32 on the exact activations; the
zero-point enters through sums of `x` over groups:

    y[n] = sum_g scale[g, n] * (sum_k x[k] code[k, n] - zero[g, n] sum_k x[k])

Every row of `x` decodes again, so this is for one to `MAX_ROWS` rows (`MAX_TABLE_ROWS`
where decoding is a table lookup). It needs groups along `in` (or one scale per column
or tensor) that divide `in` and hold whole packing units; `obstacle` says what is
missing.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from qjax.ops.blocks import code_values, cut_leaf, scale_values, zeros_like_sum
from qjax.packing import row_multiple, unpack_rows
from qjax.tensor import AffineTensor, CodebookTensor, LayoutTensor
from qjax.trellis import TrellisTensor

MAX_ROWS = 4
MAX_TABLE_ROWS = 2
STEP = 16
"""Rows of weights added per loop step: more spill registers, fewer cost loop turns."""
PARTIALS = 8
RESULT = 1 << 17
"""Running results, in elements: 512 kB of float32, within a core's cache."""


def obstacle(rows: int, q: LayoutTensor, transpose: bool) -> str | None:
    """Why `matvec` cannot compute this product, or None when it can."""
    if transpose:
        return "the product is with the transpose"
    if isinstance(q, TrellisTensor):
        return "its weights are walks through a trellis, not codes"
    if q.vector:
        return f"its codes stand for {q.vector[0]} weights each"
    table = isinstance(q, CodebookTensor)
    most = MAX_TABLE_ROWS if table else MAX_ROWS
    if not 1 <= rows <= most:
        return f"it is for 1 to {most} rows of x, not {rows}"
    kind, group = q.grouping.kind, _group(q)
    if kind not in ("in", "channel", "tensor"):
        return f"scales are grouped by {kind!r}, not along `in`"
    if not q.size:
        return "the weight is empty"
    if q.matrix[0] % group:
        return f"groups of {group} do not divide in={q.matrix[0]}"
    if _step(q) is None:
        return f"groups of {group} do not hold whole packing units"
    if isinstance(q, CodebookTensor) and q.format.code_bits > 4:
        return "its table has more than 16 levels"
    return None


def matvec(x: Float[Array, "m in"], q: LayoutTensor) -> Float[Array, "m out"]:
    """`x @ W` in float32; see the module for the method.

    Args:
      x: one to `MAX_ROWS` rows.
      q: a weight without `obstacle`.

    Returns:
      Product in the dtype of `x`.
    """
    (m, rows), dtype = x.shape, x.dtype
    cols, group = q.matrix[1], _group(q)
    per_step = _step(q)
    assert per_step is not None  # `obstacle` was asked
    grouped = q.grouping.kind == "in"
    parts = _partials(rows, group if grouped else per_step, per_step, m * cols)
    steps = rows // parts // per_step
    x = x.astype(jnp.float32)
    xs = x.reshape(m, parts, steps, per_step).transpose(2, 3, 1, 0)[..., None]
    sums = jnp.sum(xs, 1)
    # One byte row per index: slicing rows one by one is what lets XLA fuse them.
    codes = q.codes.reshape(parts, -1, cols)
    turns = codes.shape[1] // steps
    scale, zero = _by_part(q.scale, parts, grouped), _by_part(_zero(q), parts, grouped)
    group_steps = max(group // per_step, 1)

    def step(i, y):
        packed = [_row(codes, i * turns + j)[:, 0] for j in range(turns)]
        x_rows = lax.dynamic_index_in_dim(xs, i, 0, keepdims=False)
        term = 0.0
        for j, values in enumerate(_values(q, packed)):
            term = term + x_rows[j] * values[:, None, :]
        if grouped:
            if zero is not None:
                here = lax.dynamic_index_in_dim(sums, i, 0, keepdims=False)
                zeros = _row(zero, i // group_steps).astype(jnp.float32)
                term = term - here * zeros
            term = term * scale_values(_row(scale, i // group_steps))
        return y + term

    y = zeros_like_sum((parts, m, cols), jnp.float32, x, q.codes)
    y = jnp.sum(lax.fori_loop(0, steps, step, y), 0)
    return _finish(x, q, y, grouped).astype(dtype)


def _finish(x, q, y, grouped):
    """What is common to all groups: scale and zero of a column, offset, divisor."""
    total = jnp.sum(x, 1, keepdims=True)
    if not grouped:
        zero = _zero(q)
        if zero is not None:
            y = y - total * zero.astype(jnp.float32)
        if q.scale is not None:
            y = y * scale_values(q.scale)
    if getattr(q, "global_scale", None) is not None:
        y = y / q.global_scale
    if getattr(q, "offset", None) is not None:
        y = y + total * q.offset
    return y


def _values(q, packed):
    """Float32 rows of one step, before scale and stored zero-point."""
    bits = q.format.code_bits
    if bits < 8:
        turns = row_multiple(bits) * bits // 8
        units = [packed[i : i + turns] for i in range(0, len(packed), turns)]
        packed = [row for unit in units for row in unpack_rows(unit, bits)]
    if isinstance(q, AffineTensor):  # the implied zero-point comes later, on sums
        return [row.astype(jnp.float32) for row in packed]
    return [code_values(q, row) for row in packed]


def _zero(q):
    """Stored or implied zero-point, broadcast against the scale; None when absent."""
    if not isinstance(q, AffineTensor):
        return None
    if q.zero is not None:
        return q.zero
    offset = q.format.offset
    return jnp.full((q.scale.shape[-2], 1), offset, jnp.float32) if offset else None


def _by_part(leaf, parts, grouped):
    """Scale rows of each part: `[parts, groups of a part, out]`."""
    if leaf is None or not grouped:
        return leaf
    return leaf.reshape(parts, leaf.shape[0] // parts, leaf.shape[1])


def _row(stacked, i):
    return cut_leaf(stacked, i, 1, 1)


def _group(q):
    return q.grouping.size if q.grouping.kind == "in" else max(q.matrix[0], 1)


def _step(q):
    """Rows per loop step: whole packing units that divide a group."""
    bits = q.format.code_bits
    unit = row_multiple(bits) if bits < 8 else 1
    group = _group(q)
    fits = [r for r in range(unit, STEP + 1, unit) if group % r == 0]
    return fits[-1] if fits and fits[-1] >= min(4, group) else None


def _partials(rows, base, step, results):
    """Independent parts of `in`: whole groups, two or more steps, within the cache."""
    for parts in range(min(PARTIALS, max(RESULT // results, 1)), 1, -1):
        if rows % (parts * base) == 0 and rows // parts >= 2 * step:
            return parts
    return 1
