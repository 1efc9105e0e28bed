"""Which code a number gets: elementwise, from comparisons and arithmetic only.

The rules are those of `qjax.formats`, bit for bit: integers round to nearest, ties to
even; tables take the nearest entry and go up only when strictly above the midpoint;
E2M1 and FP8 round to nearest, ties to the even code, and saturate. Nothing here looks
anything up in memory, so that the same lines run inside a kernel and under XLA.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from ..weights import FIELDS, KernelError, WeightSpec

PEAKS = {"table": 1.0, "e2m1": 6.0, "e4m3": 448.0, "e5m2": 57344.0}
TINY = float(np.finfo(np.float32).tiny)
FLOAT8 = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}
_E2M1_BOUNDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_FLOAT8_BITS = {"e4m3": (3, 7), "e5m2": (2, 15)}  # mantissa bits, exponent bias


def unit_rows(bits: int) -> int:
    """Rows that packing treats as one unit: 8 for fields, `8 // bits` otherwise."""
    return 8 if len(FIELDS.get(bits, (1,))) > 1 else max(8 // bits, 1)


def peak(spec: WeightSpec) -> float:
    """Largest magnitude in units of the scale: `scale = absmax / peak`."""
    return (2**spec.bits - 1) / 2 if spec.kind == "int" else PEAKS[spec.kind]


def scale_of(absmax: Any, spec: WeightSpec) -> Any:
    """The scale of a group: `absmax / peak`, 1 for a group of zeros.

    The quotient is the product with the rounded reciprocal, which is what XLA makes of
    a division by a constant. Tables keep the absolute maximum itself, 0 included.

    Args:
      absmax: float32.
      spec: the weight.

    Returns:
      float32.
    """
    if spec.kind == "table":
        return absmax
    scale = absmax * np.float32(1 / np.float32(peak(spec)))
    return jnp.where(absmax > 0, jnp.maximum(scale, TINY), 1.0)


def multiplier(absmax: Any) -> Any:
    """What weights of a table format are multiplied with: `1 / absmax`, 1 for zeros."""
    return 1.0 / jnp.where(absmax > 0, absmax, 1.0)


def steps(table: np.ndarray) -> list[tuple[float, int]]:
    """Midpoints of a table in ascending order, and what each adds to the code.

    Args:
      table: float32 values in code order, not necessarily ascending.

    Returns:
      `(-inf, first code)` and `(bound, difference)` of every later one.
    """
    order = np.argsort(table, kind="stable")
    values = np.asarray(table, np.float32)[order]
    bounds = (values[:-1] + values[1:]) / np.float32(2.0)
    rest = zip(bounds.tolist(), np.diff(order).tolist(), strict=True)
    return [(-float("inf"), int(order[0])), *rest]


def encode_values(u: Any, spec: WeightSpec, table: np.ndarray | None = None) -> Any:
    """Codes of real numbers in units of the scale.

    Args:
      u: finite float32.
      spec: kind, bits and offset.
      table: the values of "table" codes.

    Returns:
      int32: unsigned codes, except that 8-bit integers with offset 0 are signed; bit
      patterns of FP8.

    Raises:
      KernelError: a table is missing.
    """
    if spec.kind == "int":
        return _encode_int(u, spec)
    if spec.kind == "table":
        if table is None:
            raise KernelError("encode: table is None, expected the values of the codes")
        (_, first), *rest = steps(table)
        code = jnp.full(u.shape, first, jnp.int32)
        for bound, add in rest:
            code = code + jnp.where(u > bound, jnp.int32(add), jnp.int32(0))
        return code
    if spec.kind == "e2m1":
        return _encode_e2m1(u)
    return encode_float8(u, spec.kind)


def _encode_int(u, spec):
    if spec.bits == 1:
        return jnp.where(u > 0, jnp.int32(1), jnp.int32(0))
    half = 2 ** (spec.bits - 1)
    code = jnp.clip(jnp.round(u), -half, half - 1).astype(jnp.int32)
    return code if spec.offset == 0 else code + jnp.int32(half)


def _encode_e2m1(u):
    size = jnp.abs(u)
    code = jnp.zeros(u.shape, jnp.int32)
    for i, bound in enumerate(_E2M1_BOUNDS):
        above = size > bound if i % 2 == 0 else size >= bound
        code = code + jnp.where(above, jnp.int32(1), jnp.int32(0))
    sign = lax.shift_right_logical(_bits(u), jnp.int32(28)) & jnp.int32(8)
    return code | sign


def encode_float8(u: Any, kind: str) -> Any:
    """Bit patterns of the nearest FP8 numbers, ties to even, saturating.

    Integer arithmetic on the bits of the float32: normal numbers add half a unit and
    the parity of the kept mantissa; subnormal ones are rounded by adding a power of
    two, whose unit in the last place is theirs.

    Args:
      u: finite float32.
      kind: "e4m3" or "e5m2".

    Returns:
      int32 in 0..255.
    """
    mantissa, bias = _FLOAT8_BITS[kind]
    drop = 23 - mantissa
    bits = _bits(jnp.clip(u, -PEAKS[kind], PEAKS[kind]))
    size = bits & jnp.int32(0x7FFFFFFF)
    odd = (size >> jnp.int32(drop)) & jnp.int32(1)
    rounded = size + jnp.int32(2 ** (drop - 1) - 1) + odd
    normal = (rounded >> jnp.int32(drop)) - jnp.int32((127 - bias) << mantissa)
    magic = float(2.0 ** (1 - bias - mantissa + 23))
    small = lax.bitcast_convert_type(size, jnp.float32) + magic
    small = _bits(small) - _bits(jnp.full(u.shape, magic, jnp.float32))
    least = np.float32(2.0 ** (1 - bias)).view(np.int32)
    code = jnp.where(size < jnp.int32(least), small, normal)
    return code | (lax.shift_right_logical(bits, jnp.int32(24)) & jnp.int32(128))


def _bits(x):
    return lax.bitcast_convert_type(x, jnp.int32)


def pack_rows(rows: Sequence[Any], bits: int) -> list[Any]:
    """The byte rows of one packing unit whose rows of codes are separate arrays.

    Args:
      rows: `unit_rows(bits)` arrays of int32 codes.
      bits: 1 to 7.

    Returns:
      `unit_rows(bits) * bits / 8` arrays of int32 bytes.
    """
    out, shift = [], 0
    for width in FIELDS[bits]:
        per = 8 // width
        for first in range(0, len(rows), per):
            byte = None
            for i, code in enumerate(rows[first : first + per]):
                field = code
                if len(FIELDS[bits]) > 1:
                    field = (code >> jnp.int32(shift)) & jnp.int32(2**width - 1)
                field = field << jnp.int32(i * width) if i else field
                byte = field if byte is None else byte | field
            out.append(byte)
        shift += width
    return out


def stored_dtype(spec: WeightSpec) -> Any:
    """What codes are stored as: uint8, int8 or the FP8 type."""
    if spec.kind in FLOAT8:
        return FLOAT8[spec.kind]
    whole = spec.kind == "int" and spec.bits == 8 and spec.offset == 0
    return jnp.int8 if whole else jnp.uint8
