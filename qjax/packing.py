"""Codes <-> packed bytes: the only place in qjax that knows bit order.

Codes are unsigned integers of 1 to 8 bits in an array `[..., in, out]`. They are packed
along `in`, so that one byte row of `[..., packed, out]` holds neighbouring input rows
of the same output column: decoding is a shift and a mask on whole rows, and a split
along `out`, or along `in` at a multiple of 8 rows, never cuts a byte.

* 1, 2, 4, 8 bits: `8 // bits` rows per byte, little-endian fields: for 4 bits
  `byte[i] = code[2 i] | code[2 i + 1] << 4`.
* 3, 5, 6, 7 bits: bit planes per block of 8 rows. A b-bit code is cut into fields of
  4, 2 and 1 bits (3 = 2+1, 5 = 4+1, 6 = 4+2, 7 = 4+2+1), the widest field being the
  low bits. Each block stores its planes one after the other, widest first, each packed
  by the first rule: 8 rows become exactly `bits` byte rows.

`in` is padded with zero codes to whole bytes (whole blocks of 8 for planes).
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, UInt8

from qjax.errors import SpecError

_PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}


def row_multiple(bits: int) -> int:
    """Number of rows that packing treats as one unit: `in` is padded to its multiple.

    Args:
      bits: code width, 1 to 8.

    Returns:
      8, 4, 8, 2, 8, 8, 8, 1 for 1 to 8 bits.

    Raises:
      SpecError: `bits` is not in 1..8.
    """
    if bits not in range(1, 9):
        raise SpecError(f"bits: got {bits}, expected an integer from 1 to 8")
    return 8 if bits in _PLANES else 8 // bits


def packed_rows(size: int, bits: int) -> int:
    """Number of byte rows that `size` rows of `bits`-bit codes occupy.

    Args:
      size: logical rows (the size of `in`).
      bits: code width, 1 to 8.

    Returns:
      `ceil(size / m) * m * bits / 8` with `m = row_multiple(bits)`.
    """
    unit = row_multiple(bits)
    return -(-size // unit) * unit * bits // 8


def pack(codes: UInt8[Array, "*lead in out"], bits: int) -> UInt8[Array, "*lead p out"]:
    """Packs unsigned codes along `in` (axis -2).

    Args:
      codes: values below `2**bits`.
      bits: code width, 1 to 8.

    Returns:
      The packed bytes, `packed_rows(in, bits)` rows.

    Raises:
      SpecError: `bits` is not in 1..8.
    """
    unit = row_multiple(bits)
    if bits == 8:
        return codes
    rows = codes.shape[-2]
    pad = [(0, 0)] * (codes.ndim - 2) + [(0, -rows % unit), (0, 0)]
    codes = jnp.pad(codes, pad)
    if bits not in _PLANES:
        return _pack_fields(codes, bits)
    *lead, rows, out = codes.shape
    blocks = codes.reshape(*lead, rows // 8, 8, out)
    planes, shift = [], 0
    for width in _PLANES[bits]:
        field = (blocks >> jnp.uint8(shift)) & jnp.uint8(2**width - 1)
        planes.append(_pack_fields(field, width))
        shift += width
    return jnp.concatenate(planes, axis=-2).reshape(*lead, rows // 8 * bits, out)


def unpack(
    packed: UInt8[Array, "*lead p out"], bits: int, size: int
) -> UInt8[Array, "*lead in out"]:
    """Inverse of `pack`.

    Args:
      packed: bytes as `pack` made them.
      bits: code width, 1 to 8.
      size: logical rows to return; the padding behind them is dropped.

    Returns:
      Unsigned codes, one per element.

    Raises:
      SpecError: `bits` is not in 1..8.
    """
    row_multiple(bits)
    if bits == 8:
        return packed
    if bits not in _PLANES:
        return _unpack_fields(packed, bits)[..., :size, :]
    *lead, rows, out = packed.shape
    blocks = packed.reshape(*lead, rows // bits, bits, out)
    codes, row, shift = None, 0, 0
    for width in _PLANES[bits]:
        field = _unpack_fields(blocks[..., row : row + width, :], width)
        field = field << jnp.uint8(shift)
        codes = field if codes is None else codes | field
        row, shift = row + width, shift + width
    assert codes is not None  # every entry of _PLANES has a field
    return codes.reshape(*lead, rows // bits * 8, out)[..., :size, :]


def unpack_rows(
    rows: Sequence[UInt8[Array, "*shape"]], bits: int
) -> list[UInt8[Array, "*shape"]]:
    """`unpack` of one packing unit whose byte rows are separate arrays.

    Elementwise, with no reshape or concatenation: a compiler keeps the codes in
    registers.

    Args:
      rows: the `row_multiple(bits) * bits / 8` byte rows of a unit, in order.
      bits: code width, 1 to 8.

    Returns:
      The `row_multiple(bits)` rows of codes.

    Raises:
      SpecError: `bits` is not in 1..8.
    """
    unit = row_multiple(bits)
    if bits == 8:
        return list(rows)
    codes, first, shift = [jnp.zeros_like(rows[0])] * unit, 0, 0
    for width in _PLANES.get(bits, (bits,)):
        for i in range(unit):
            byte, field = divmod(i, 8 // width)
            part = rows[first + byte] >> jnp.uint8(field * width)
            part = (part & jnp.uint8(2**width - 1)) << jnp.uint8(shift)
            codes[i] = part if shift == 0 else codes[i] | part
        first, shift = first + unit * width // 8, shift + width
    return codes


def _pack_fields(codes, bits):
    """Little-endian fields of 1, 2, 4 bits; rows divide by `8 // bits`."""
    per = 8 // bits
    *lead, rows, out = codes.shape
    fields = codes.reshape(*lead, rows // per, per, out)
    packed = fields[..., 0, :]
    for i in range(1, per):
        packed = packed | (fields[..., i, :] << jnp.uint8(i * bits))
    return packed


def _unpack_fields(packed, bits):
    per = 8 // bits
    *lead, rows, out = packed.shape
    shifts = jnp.arange(per, dtype=jnp.uint8)[:, None] * jnp.uint8(bits)
    fields = (packed[..., :, None, :] >> shifts) & jnp.uint8(2**bits - 1)
    return fields.reshape(*lead, rows * per, out)
