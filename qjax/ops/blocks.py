"""Cutting a quantized matrix into blocks that are quantized matrices themselves.

A block of rows (`in`) or columns (`out`) of a `LayoutTensor` is a `LayoutTensor` of the
same format with slices of the same leaves, so whatever works on a weight works on a
block, and no dense weight larger than a block ever exists. Cuts fall between packing
units and between groups; the flat layout can only be cut along `out`, and a trellis
between tiles.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Shaped

from qjax.additive import AdditiveTensor, decode_additive
from qjax.formats.kmeans import lookup
from qjax.formats.trellis import TILE
from qjax.ggml import GgmlTensor
from qjax.packing import packed_rows, row_multiple
from qjax.tensor import (
    AffineTensor,
    CodebookTensor,
    LayoutTensor,
    QuantizedTensor,
    load_scale,
    load_zero,
)
from qjax.trellis import TrellisTensor

Axis = Literal["in", "out"]
Window = tuple[int, Any, int]
"""Where a block lies in a leaf: `(axis, start, size)`."""
FLOAT8 = (jnp.float8_e4m3fn, jnp.float8_e5m2)


def replaced(q: Any, **fields: Any) -> Any:
    """`dataclasses.replace` for classes whose base is not itself a dataclass."""
    return dataclasses.replace(q, **fields)


def materialize_scale(q: LayoutTensor) -> LayoutTensor:
    """Decodes nested scales and zero-points to float32; costs one scale array each."""
    if not isinstance(q.scale, QuantizedTensor):
        return q
    if isinstance(getattr(q, "zero", None), QuantizedTensor):
        q = replaced(q, zero=load_zero(gathered(q.zero)))  # pyright: ignore[reportAttributeAccessIssue]
    return replaced(q, scale=load_scale(gathered(q.scale)))


def gathered(tree: Any) -> Any:
    """`tree`, whole on every device of a mesh with explicit axes."""
    if not jax.sharding.get_abstract_mesh().explicit_axes:
        return tree
    return jax.tree.map(lambda v: jax.sharding.reshard(v, PartitionSpec()), tree)


def same_variance(tree: Any) -> Any:
    """Makes all leaves vary over the same manual mesh axes, inside `shard_map`.

    Loop carries must have the type of what is added to them, and a gradient that of its
    input; outside `shard_map` this does nothing.
    """

    def axes(leaf):
        return jax.typeof(leaf).manual_axis_type.varying

    names = frozenset().union(*map(axes, jax.tree.leaves(tree)))

    def vary(leaf):
        missing = tuple(names - axes(leaf))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(vary, tree)


def zeros_like_sum(shape: tuple[int, ...], dtype: Any, *terms: Array) -> Array:
    """Zeros to which results computed from `terms` can be added in a loop."""
    zeros = jnp.zeros(shape, dtype)
    return same_variance((zeros, *terms))[0]


def cut_step(q: LayoutTensor, axis: Axis) -> int | None:
    """Multiple at which `q` can be cut along `axis`; None when it cannot be cut."""
    group = q.grouping
    if isinstance(q, TrellisTensor):
        return TILE
    if q.vector:
        return q.vector[0] if axis == "in" else 1
    unit = row_multiple(q.format.code_bits) if q.format.code_bits < 8 else 1
    if group.kind == "flat":
        rows, whole = q.matrix[0], math.lcm(group.size, unit)
        return whole // math.gcd(rows, whole) if axis == "out" and rows else None
    if axis == "in":
        return math.lcm(unit, group.size) if group.kind in ("in", "block") else unit
    return group.size if group.kind in ("out", "block") else 1


def windows(q: LayoutTensor, axis: Axis, start: Any, size: int) -> dict[str, Window]:
    """Where the block `[start, start + size)` along `axis` lies in each leaf.

    Args:
      q: a weight whose leaves have no leading axes.
      axis: the matrix axis.
      start: a multiple of `cut_step`; may be traced.
      size: a multiple of `cut_step`, or what is left.

    Returns:
      Field name to window; fields that a block shares with the whole are absent.
    """
    group, bits = q.grouping, min(q.format.code_bits, 8)
    if isinstance(q, TrellisTensor):
        if axis == "in":
            return {"codes": (0, start // TILE, size // TILE)}
        return {"codes": (1, start * bits, size * bits)}
    if q.vector and axis == "in":
        weights, codes = q.vector
        return {"codes": (0, start // weights * codes, size // weights * codes)}
    if group.kind == "flat":
        rows = q.matrix[0]
        groups = -(-size * rows // group.size)
        codes = (0, start * rows * bits // 8, packed_rows(size * rows, bits))
        return _present(q, codes, (0, start * rows // group.size, groups))
    grouped = group.kind == "block" or group.kind == axis
    if axis == "in":
        codes = (0, start * bits // 8, packed_rows(size, bits))
        shared = group.kind in ("channel", "tensor")
    else:
        codes = (1, start, size)
        shared = group.kind == "tensor"
    where = int(axis == "out")
    if shared:
        return {"codes": codes}
    if grouped:
        stats = (where, start // group.size, -(-size // group.size))
    else:
        stats = (where, start, size)
    return _present(q, codes, stats)


def _present(q: LayoutTensor, codes: Window, stats: Window) -> dict[str, Window]:
    """Windows of the leaves that exist: codes, scale, zero, tables of columns."""
    found = {"codes": codes}
    for name in ("scale", "zero"):
        if getattr(q, name, None) is not None:
            found[name] = stats
    if getattr(q, "columnwise", False) and codes[0] == 1:
        found["codebook"] = codes
    return found


def take(q: LayoutTensor, axis: Axis, start: Any, size: int) -> LayoutTensor:
    """The block `[start, start + size)` along `axis`; see `windows`."""
    cut = {
        name: cut_leaf(getattr(q, name), at, length, where)
        for name, (where, at, length) in windows(q, axis, start, size).items()
    }
    rows, cols = q.matrix
    matrix = (size, cols) if axis == "in" else (rows, size)
    return replaced(q, matrix=matrix, **cut)


def cut_leaf(leaf: Shaped[Array, "..."], start: Any, size: int, axis: int) -> Array:
    """`lax.dynamic_slice_in_dim`, on the bits of small floats.

    XLA's CPU compiler widens the operand of a slice of 8- or 16-bit floats, all of it.
    """
    if jnp.issubdtype(leaf.dtype, jnp.inexact) and leaf.dtype.itemsize < 4:
        leaf, start = lax.optimization_barrier((leaf, start))
        bits = lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}")
        part = lax.dynamic_slice_in_dim(bits, start, size, axis)
        return lax.bitcast_convert_type(part, leaf.dtype)
    return lax.dynamic_slice_in_dim(leaf, start, size, axis)


def decode(q: LayoutTensor) -> Float[Array, "in out"]:
    """`q.dequantize(float32)` with 16-entry tables read by selection, not gathers."""
    if isinstance(q, AdditiveTensor):
        return decode_additive(q.codes, q.codebooks, q.scale)
    if isinstance(q, GgmlTensor):
        return q.dequantize(jnp.float32)
    values = code_values(q, q.unpacked())
    if q.scale is None:
        return values
    group = q.grouping
    values = group.split(values)
    if isinstance(q, AffineTensor) and q.zero is not None:
        values = values - group.load(load_zero(q.zero))
    values = group.join(values * group.load(q.scales()))
    offset = getattr(q, "offset", None)
    return values if offset is None else values + offset


def code_values(
    q: LayoutTensor, codes: Shaped[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Real numbers of unpacked codes of `q`, before zero-point and scale."""
    if isinstance(q, CodebookTensor):
        return lookup(codes, q.table())
    if codes.dtype in FLOAT8:
        return float8_values(codes)
    return q.format.decode(codes)


def float8_values(codes: Shaped[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Float8 codes as float32, exactly, by integer arithmetic on their bits.

    XLA's CPU compiler converts through float16, several times slower.
    """
    mantissa, bias = (2, 15) if codes.dtype == jnp.float8_e5m2 else (3, 7)
    bits = lax.bitcast_convert_type(codes, jnp.uint8).astype(jnp.int32)
    size = bits & 0x7F
    exponent = (127 - bias) << 23
    normal = lax.bitcast_convert_type((size << (23 - mantissa)) + exponent, jnp.float32)
    tiny = size.astype(jnp.float32) * 2.0 ** (1 - bias - mantissa)
    value = jnp.where(size < (1 << mantissa), tiny, normal)
    if codes.dtype == jnp.float8_e5m2:
        value = jnp.where(size == 0x7C, jnp.inf, jnp.where(size > 0x7C, jnp.nan, value))
    else:
        value = jnp.where(size == 0x7F, jnp.nan, value)
    return jnp.where(bits > 0x7F, -value, value)


def scale_values(leaf: Shaped[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`load_scale` of an array, float8 decoded by `float8_values`."""
    if leaf.dtype in FLOAT8:
        return float8_values(leaf)
    return load_scale(leaf)
