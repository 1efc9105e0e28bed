"""`embed`: rows of a dense or quantized table.

A quantized table `[vocab, dim]` is `Transposed(q)` with `q` `[dim, vocab]`, so a row of
the table is a column of `q`: its codes and scales are gathered and decoded, and nothing
else. A table quantized along `vocab` itself gathers the byte rows of each id. Gradients
of float leaves are the scatters that automatic differentiation derives.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from qjax.errors import SpecError, UnsupportedError
from qjax.formats.trellis import TILE
from qjax.ops import trained
from qjax.ops.blocks import (
    code_values,
    cut_leaf,
    decode,
    materialize_scale,
    replaced,
    scale_values,
    take,
)
from qjax.packing import row_multiple, unpack
from qjax.tensor import LayoutTensor, QuantizedTensor
from qjax.trellis import Incoherent, TrellisTensor
from qjax.wrappers import (
    InputScaled,
    LowRank,
    Permuted,
    Rotated,
    RowParts,
    SplitInputs,
    Trained,
    Transposed,
    hadamard,
)


def embed(
    ids: Int[Array, "*batch"],
    table: Float[Array, "vocab dim"] | QuantizedTensor,
    *,
    dtype: Any = None,
) -> Float[Array, "*batch dim"]:
    """Looks up rows of a table: `table[ids]`.

    Ids outside `[0, vocab)` are clipped, as in compiled JAX indexing.

    Args:
      ids: integer ids.
      table: float array or quantized tensor `[vocab, dim]`.
      dtype: dtype of the result; default that of the table.

    Returns:
      `[*batch, dim]`.

    Raises:
      SpecError: `ids` are not integers or the table is not a matrix.
      UnsupportedError: no rule to gather rows through a wrapper.
    """
    ids = jnp.asarray(ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise SpecError(f"embed: ids have dtype {ids.dtype}, expected integers")
    if table.ndim != 2:
        raise SpecError(
            f"embed: the table has shape {list(table.shape)}, expected [vocab, dim]"
        )
    dtype = dtype or table.dtype  # pyright: ignore[reportAttributeAccessIssue]
    vocab, dim = table.shape
    if not vocab or not ids.size:
        if ids.size:
            raise SpecError(f"embed: {ids.size} ids into an empty table [0, {dim}]")
        return jnp.zeros((*ids.shape, dim), dtype)
    flat = jnp.clip(ids.reshape(-1).astype(jnp.int32), 0, vocab - 1)
    rows = _rows(table, flat, False)
    return rows.astype(dtype).reshape(*ids.shape, dim)


def _rows(w, ids, transpose):
    """Float rows `ids` of `w`, or of its transpose: `[ids, ...]`."""
    if not isinstance(w, QuantizedTensor):
        return jnp.take(w.T if transpose else w, ids, axis=0)
    if isinstance(w, Transposed):
        return _rows(w.base, ids, not transpose)
    if isinstance(w, Trained):
        return trained.rows(_rows, w, ids, transpose)
    if isinstance(w, LayoutTensor):
        q = materialize_scale(w)
        return jax.vmap(lambda i: _column(q, i) if transpose else _row(q, i))(ids)
    if isinstance(w, LowRank):
        first, second = (w.b.T, w.a.T) if transpose else (w.a, w.b)
        repair = jnp.take(first, ids, axis=0) @ second
        return _rows(w.base, ids, transpose) + repair.astype(jnp.float32)
    if isinstance(w, InputScaled):
        s = w.s.astype(jnp.float32)
        return _rows(w.base, ids, transpose) * (s if transpose else s[ids][:, None])
    if isinstance(w, Permuted):
        inverse = jnp.argsort(w.perm)
        if transpose:
            return jnp.take(_rows(w.base, ids, True), inverse, axis=-1)
        return _rows(w.base, inverse[ids], False)
    if isinstance(w, SplitInputs):
        base, rows = _rows(w.base, ids, transpose), w.rows.astype(jnp.float32)
        if transpose:
            return base.at[:, w.index].set(rows[:, ids].T, mode="drop")
        own = ids[:, None] == w.index[None, :]
        found = jnp.any(own, axis=1, keepdims=True)
        return jnp.where(found, own.astype(jnp.float32) @ rows, base)
    if isinstance(w, RowParts):
        return _rows_of_parts(w, ids, transpose)
    if isinstance(w, Rotated) and transpose:
        return hadamard(_rows(w.base, ids, True)) * w.signs.astype(jnp.float32)
    if isinstance(w, Incoherent) and w.right is None and transpose:
        rows = _rows(w.base, ids, True)
        return rows if w.left is None else hadamard(rows, w.block) * w.factors("left")
    raise UnsupportedError(
        f"embed: cannot gather rows through {type(w).__name__}; use "
        "embed(ids, table.dequantize())"
    )


def _rows_of_parts(w: RowParts, ids, transpose):
    """Rows of all parts, added where they belong; see `_rows`."""
    rows, cols = w.matrix
    total = jnp.zeros((ids.shape[0], rows if transpose else cols), jnp.float32)
    for at, part in w.windows():
        if transpose:
            own = _rows(part, ids, True)
            total = total.at[:, at].add(own.astype(jnp.float32))
            continue
        own = _rows(part, jnp.clip(ids - at.start, 0, part.matrix[0] - 1), False)
        inside = (ids >= at.start) & (ids < at.stop)
        total = total + jnp.where(inside[:, None], own.astype(jnp.float32), 0.0)
    return total


def _column(q: LayoutTensor, i) -> Float[Array, " in"]:
    """Column `i` of the matrix."""
    if isinstance(q, TrellisTensor):
        tiles = decode(take(q, "out", i // TILE * TILE, TILE))
        return lax.dynamic_index_in_dim(tiles, i % TILE, 1, keepdims=False)
    if q.vector:
        return decode(take(q, "out", i, 1))[:, 0]
    rows, bits = q.matrix[0], q.format.code_bits
    places = jnp.arange(rows, dtype=jnp.int32)
    if q.flat:  # a run of codes that may start within a byte
        per = max(8 // bits, 1)
        places = places + i * rows
        codes = q.codes[places // per, 0]
        shift = (places % per * bits).astype(jnp.uint8)
        codes = (codes >> shift) & jnp.uint8(2**bits - 1)
    else:
        codes = cut_leaf(q.codes, i, 1, 1)
        codes = (codes if bits >= 8 else unpack(codes, bits, rows))[:, 0]
    return _scaled(q, codes, places, i)


def _row(q: LayoutTensor, i) -> Float[Array, " out"]:
    """Row `i`, from the packing unit, tile or vectors that hold it."""
    if isinstance(q, TrellisTensor):
        tiles = decode(take(q, "in", i // TILE * TILE, TILE))
        return lax.dynamic_index_in_dim(tiles, i % TILE, 0, keepdims=False)
    if q.vector:
        group = q.vector[0]
        rows = decode(take(q, "in", i // group * group, group))
        return lax.dynamic_index_in_dim(rows, i % group, 0, keepdims=False)
    if q.flat:
        raise UnsupportedError(
            f"embed: {q!r} is stored flat over the transpose, so a row is scattered "
            "over it; quantize the table's transpose and wrap it in Transposed"
        )
    bits = q.format.code_bits
    unit = row_multiple(bits) if bits < 8 else 1
    turns = unit * bits // 8 if bits < 8 else 1
    codes = cut_leaf(q.codes, i // unit * turns, turns, 0)
    if bits < 8:
        codes = unpack(codes, bits, unit)
    codes = lax.dynamic_index_in_dim(codes, i % unit, 0, keepdims=False)
    return _scaled(q, codes, i, jnp.arange(q.matrix[1], dtype=jnp.int32))


def _scaled(q, codes, row, column):
    """Decodes a vector of codes; `row` and `column` say where they are."""
    kind, size = q.grouping.kind, max(q.grouping.size, 1)
    at = {
        "tensor": (0, 0),
        "channel": (0, column),
        "in": (row // size, column),
        "out": (row, column // size),
        "block": (row // size, column // size),
        "flat": (row // size, 0),
    }[kind]
    if getattr(q, "columnwise", False) and kind == "channel":
        q = replaced(q, codebook=q.codebook[:, column])
    values = code_values(q, codes)
    if getattr(q, "zero", None) is not None:
        values = values - q.zero[at].astype(jnp.float32)
    if q.scale is not None:
        scale = scale_values(q.scale[at])
        if getattr(q, "global_scale", None) is not None:
            scale = scale / q.global_scale[0, 0]
        values = values * scale
    if getattr(q, "offset", None) is not None:
        values = values + q.offset[0, 0]
    return values
