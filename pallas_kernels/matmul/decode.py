"""Packed bytes to matrix-unit operands, in the registers of a TPU.

A `Decoder` says, for a format and a chip generation, how a region of byte rows becomes
a register-shaped `[rows, n]` operand whose entries are `D` with

    value(code) = factor D + delta,

both exact, so that scales, zero-points and `delta` can be applied after the product
with `x`. Operands come out in the row order that costs least; `order` gives it and the
caller permutes `x` alike. What is cheap differs by generation (bundles for 4096 x 1024
codes at M = 16 with groups of 128, from `benchmarks/tpu_aot.py`):

* v5e, v5p have no 16-bit arithmetic. Int fields go straight into the mantissas of
  bfloat16 pairs with a shift, a mask and an exponent (2220; 3320 by integer
  conversion). e4m3 is read as e4m3b11 (`value / 16`, same bits but one: the negative
  zero, which is cleared), which converts in hardware (8170 by conversion of e4m3).
* v6e converts int4, int2 and int8 in hardware (1930), looks 16 entries up with one
  sublane gather of 16-bit lanes (3020; 25600 by selection) and e2m1 with a gather of
  bytes.
* 7x multiplies bfloat16 by float8 directly: int4 and e2m1 become e4m3 (1220; 1750 as
  bfloat16), float8 weights need no decoding at all.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from .. import versions
from ..weights import FIELDS, WeightSpec
from . import layout

FLOAT8 = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}
OLD = ("v5e", "v5p")
"""Generations without 16-bit vector arithmetic."""


@dataclasses.dataclass(frozen=True)
class Decoder:
    """How codes of a format become operands on a chip.

    Attributes:
      method: name of the routine.
      unit: rows that decode together.
      factor: power of two, see the module.
      delta: see the module, in units of codes (0 except for "int").
      axes: a unit's rows as nested axes `((size, stride), ...)`, outermost first: the
        order of the decoded rows. Sizes hold for one unit.
      dtype: of the operand.
    """

    method: str
    unit: int
    factor: float = 1.0
    delta: float = 0.0
    axes: tuple[tuple[int, int], ...] = ()
    dtype: Any = jnp.bfloat16

    @property
    def natural(self) -> bool:
        """Whether rows come out in order."""
        return not self.axes

    def order(self, rows: int) -> np.ndarray:
        """Row of the region that decoded row `i` is, for a region of `rows`.

        The axis of words is the one of the largest stride; a region of several units
        has more words, all else alike.
        """
        if self.natural:
            return np.arange(rows)
        word = max(stride for _, stride in self.axes)
        index = np.zeros((), np.int64)
        for size, stride in self.axes:
            size = size * (rows // self.unit) if stride == word else size
            index = index[..., None] + np.arange(size) * stride
        return index.reshape(-1)


def decoder(spec: WeightSpec, chip: str, *, natural: bool, mixed: bool) -> Decoder:
    """The decoder of a format on a chip generation.

    Args:
      spec: the weight.
      chip: "v5e", "v5p", "v6e" or "7x".
      natural: prefer rows in order to fewer instructions.
      mixed: whether the operand may be float8 on chips that multiply it by bfloat16.

    Returns:
      The decoder.
    """
    bits, kind, old = spec.bits, spec.kind, chip in OLD
    mixed = mixed and chip == "7x"
    if spec.layout == layout.TAG:
        if kind == "table":
            return Decoder("planes-table", layout.BLOCK)
        return Decoder("planes", layout.BLOCK, delta=-(2.0**bits) - spec.offset)
    if kind in FLOAT8:
        if mixed:
            return Decoder("float8", 32, dtype=FLOAT8[kind])
        if kind == "e4m3" and chip != "7x":
            return Decoder("e4m3b11", 32, factor=16.0)
        return Decoder("convert", 32)
    if kind == "e2m1":
        if chip == "7x":
            dtype = jnp.float8_e4m3fn if mixed else jnp.bfloat16
            return Decoder("e2m1", 64, dtype=dtype)
        axes = ((2, 1), (8, 8), (4, 2))
        if old:
            return Decoder("e2m1-e5m2", 64, factor=2.0**14, axes=axes)
        return Decoder("e2m1-gather", 64, factor=0.5, axes=axes)
    per = 16 // bits
    pairs = ((per, 1), (8, 2 * per), (2, per))
    if kind == "table":
        if old:
            axes = ((2 * per, 1), (8, 2 * per))
            return Decoder("table-select", 16 * per, axes=axes)
        return Decoder("table-gather", 16 * per, axes=pairs)
    if bits == 8:
        return Decoder("convert", 32, delta=-spec.offset)
    if bits == 1 or (old and not natural):
        return Decoder("pairs", 16 * per, delta=-(2.0**bits) - spec.offset, axes=pairs)
    dtype = jnp.float8_e4m3fn if mixed and bits == 4 else jnp.bfloat16
    delta = 2.0 ** (bits - 1) - spec.offset
    return Decoder("signed", 256 // bits, delta=delta, dtype=dtype)


def region(spec: WeightSpec, dec: Decoder, target: int) -> int:
    """Rows that are multiplied at once: whole groups, or a whole part of one.

    Args:
      spec: the weight.
      dec: its decoder.
      target: rows to aim at, the depth of the matrix unit.

    Returns:
      A multiple of `dec.unit` that is a multiple of the group or divides it, or any
      multiple when there is one group. It divides `k` where such a number exists.
    """
    group, unit = spec.group, dec.unit
    if spec.groups == 1 or (group % unit == 0 and group >= target):
        whole = spec.k if spec.groups == 1 else group
        parts, widest = -(-whole // unit), max(1, 512 // unit)
        if whole % unit:
            return unit * min(parts, widest)
        return unit * max(d for d in range(1, widest + 1) if parts % d == 0)
    rows = math.lcm(group, unit)
    while rows < target and spec.k % (2 * rows) == 0:
        rows *= 2
    return rows


def code_rows(spec: WeightSpec) -> int:
    """Byte rows of the codes in the spec's layout."""
    return layout.packed_rows(spec) if spec.layout == layout.TAG else spec.packed_k


def decode(dec: Decoder, spec: WeightSpec, packed, table):
    """Decodes a region.

    Args:
      dec: the decoder.
      spec: the weight.
      packed: byte rows of the region `[rows bits / 8, n]`, a multiple of `dec.unit`
        rows of codes.
      table: what `table_operand` made, or None.

    Returns:
      `D [rows, n]` in `dec.dtype`, rows in `dec.order`.
    """
    return _METHODS[dec.method](dec, spec, packed, table)


def _words(packed):
    return pltpu.bitcast(packed, jnp.int32)


def _shifted(words, left):
    """Shift left by `left`, which may be negative (no sign comes in)."""
    if left == 0:
        return words
    if left > 0:
        return words << jnp.int32(left)
    return lax.shift_right_logical(words, jnp.int32(-left))


def _pattern(mask):
    """The 32-bit constant with a 16-bit pattern in both halves."""
    return jnp.int32(np.uint32(mask * 0x10001).astype(np.int32))


def _convert(dec, spec, packed, table):
    return packed.astype(jnp.bfloat16)


def _float8(dec, spec, packed, table):
    return packed


def _e4m3b11(dec, spec, packed, table):
    """Clears the sign of zeros, which e4m3b11 reads as NaN, and converts."""
    u = _words(packed)
    low = jnp.int32(0x7F7F7F7F)
    positive = (u & low) + low  # the top bit of a byte says that it is not zero
    u = u & (positive | low)
    return pltpu.bitcast(u, jnp.float8_e4m3b11fnuz).astype(jnp.bfloat16)


def _signed(dec, spec, packed, table):
    """Flips the top bit of each code: two's complement, `code - 2**(bits - 1)`."""
    flip = {4: 0x8888, 2: 0xAAAA}[spec.bits]
    dtype = {4: jnp.int4, 2: jnp.int2}[spec.bits]
    return pltpu.bitcast(_words(packed) ^ _pattern(flip), dtype).astype(dec.dtype)


def _pairs(dec, spec, packed, table):
    """Fields into the mantissas of bfloat16 pairs: `2**bits + code`, exactly."""
    bits, u = spec.bits, _words(packed)
    mask = _pattern((2**bits - 1) << (7 - bits))
    one = _pattern((127 + bits) << 7)
    parts = []
    for j in range(16 // bits):
        field = (_shifted(u, 7 - bits - bits * j) & mask) | one
        parts.append(pltpu.bitcast(field, jnp.bfloat16))
    return jnp.concatenate(parts, axis=0)


def _fields(spec, packed, left):
    """Codes of the planes layout, 16 rows per register, shifted left by `left`."""
    tiles = []
    for first in range(0, packed.shape[0], 32 * spec.bits):
        start, planes, shift = first, [], 0
        for width in FIELDS[spec.bits]:
            rows = 32 * width
            planes.append((width, shift, _words(packed[start : start + rows])))
            start, shift = start + rows, shift + width
        for tile in range(16):
            total = None
            for width, shift, words in planes:
                per = 16 // width
                row = tile // per * 8
                part = _shifted(words[row : row + 8], left + shift - tile % per * width)
                part = part & _pattern(2**width - 1 << left + shift)
                total = part if total is None else total | part
            tiles.append(total)
    return tiles


def _planes(dec, spec, packed, table):
    one = _pattern((127 + spec.bits) << 7)
    tiles = _fields(spec, packed, 7 - spec.bits)
    return jnp.concatenate(
        [pltpu.bitcast(tile | one, jnp.bfloat16) for tile in tiles], axis=0
    )


def _gather(table, index):
    """Looks register tiles of `index` up in the rows of `table`."""
    rows, n = table.shape[0], index.shape[1]
    out = []
    for a in range(0, index.shape[0], rows):
        tiles = (index[a : a + rows, b : b + 128] for b in range(0, n, 128))
        parts = [versions.lookup(table, tile, 0) for tile in tiles]
        out.append(jnp.concatenate(parts, axis=1))
    return jnp.concatenate(out, axis=0)


def _table_gather(dec, spec, packed, table):
    """16-bit lanes: one gather finds both codes of a pair."""
    bits, u = spec.bits, _words(packed)
    mask = _pattern(2**bits - 1)
    parts = []
    for j in range(16 // bits):
        index = pltpu.bitcast(_shifted(u, -bits * j) & mask, jnp.int16)
        parts.append(pltpu.bitcast(_gather(table, index), jnp.bfloat16))
    return jnp.concatenate(parts, axis=0)


def _select(table, code, bits):
    """Float32 entries: two gathers of 8 and a choice by the top bit."""
    index = code & jnp.int32(7)
    low = _gather(table[:8], index)
    if bits < 4:
        return low.astype(jnp.bfloat16)
    high = _gather(table[8:], index)
    return jnp.where((code & jnp.int32(8)) != 0, high, low).astype(jnp.bfloat16)


def _table_select(dec, spec, packed, table):
    bits, u = spec.bits, _words(packed)
    mask = jnp.int32(2**bits - 1)
    parts = [
        _select(table, _shifted(u, -bits * j) & mask, bits) for j in range(32 // bits)
    ]
    return jnp.concatenate(parts, axis=0)


def _planes_table(dec, spec, packed, table):
    if table.dtype == jnp.int16:
        found = [
            pltpu.bitcast(_gather(table, pltpu.bitcast(t, jnp.int16)), jnp.bfloat16)
            for t in _fields(spec, packed, 0)
        ]
        return jnp.concatenate(found, axis=0)
    found = []
    for tile in _fields(spec, packed, 0):
        low = _gather(table[:8], tile & jnp.int32(7))
        high = _gather(table[:8], _shifted(tile, -16) & jnp.int32(7))
        pair = (_bits(low) & jnp.int32(0xFFFF)) | (_bits(high) << jnp.int32(16))
        found.append(pltpu.bitcast(pair, jnp.bfloat16))
    return jnp.concatenate(found, axis=0)


def _bits(x):
    """Bits of bfloat16-valued float32 lanes, in the low half."""
    return _shifted(pltpu.bitcast(x, jnp.int32), -16)


def _e2m1(dec, spec, packed, table):
    return pltpu.bitcast(packed, jnp.float4_e2m1fn).astype(dec.dtype)


def _nibbles(packed):
    u, mask = _words(packed), jnp.int32(0x0F0F0F0F)
    return [u & mask, _shifted(u, -4) & mask]


def _e2m1_e5m2(dec, spec, packed, table):
    """The bits of e2m1 as sign, low exponent bits and mantissa of e5m2."""
    parts = []
    for nibble in _nibbles(packed):
        sign = (nibble & jnp.int32(0x08080808)) << jnp.int32(4)
        size = (nibble & jnp.int32(0x07070707)) << jnp.int32(1)
        parts.append(pltpu.bitcast(sign | size, jnp.float8_e5m2).astype(jnp.bfloat16))
    return jnp.concatenate(parts, axis=0)


def _e2m1_gather(dec, spec, packed, table):
    """Twice the value as int8, found in a table of 32 byte rows."""
    parts = []
    for nibble in _nibbles(packed):
        found = _gather(table, pltpu.bitcast(nibble, jnp.int8))
        parts.append(found.astype(jnp.bfloat16))
    return jnp.concatenate(parts, axis=0)


_METHODS = {
    "convert": _convert,
    "float8": _float8,
    "e4m3b11": _e4m3b11,
    "signed": _signed,
    "pairs": _pairs,
    "planes": _planes,
    "planes-table": _planes_table,
    "table-gather": _table_gather,
    "table-select": _table_select,
    "e2m1": _e2m1,
    "e2m1-e5m2": _e2m1_e5m2,
    "e2m1-gather": _e2m1_gather,
}


def table_operand(dec: Decoder, spec: WeightSpec, chip: str, terms):
    """The table as the kernel wants it, entries along sublanes.

    Args:
      dec: the decoder.
      spec: the weight.
      chip: the generation.
      terms: bfloat16 `[terms, *layers, 2**bits]` that sum to a "table" weight's
        entries, else None.

    Returns:
      `[*layers, terms, rows, 128]`, or None where the decoder needs no table.
    """
    if dec.method == "e2m1-gather":
        twice = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.int8)
        twice = np.concatenate([twice, -twice, np.zeros(16, np.int8)])
        return jnp.asarray(np.broadcast_to(twice[:, None], (1, 32, 128)))
    if spec.kind != "table":
        return None
    entries = jnp.moveaxis(terms, 0, -2)
    pad = [(0, 0)] * (entries.ndim - 1) + [(0, 16 - entries.shape[-1])]
    entries = jnp.pad(entries, pad)[..., None]
    entries = jnp.broadcast_to(entries, (*entries.shape[:-1], 128))
    if chip in OLD:
        return entries.astype(jnp.float32)
    return lax.bitcast_convert_type(entries, jnp.int16)


def permutation(order: np.ndarray, per: int, group: int) -> np.ndarray:
    """Exact 0/1 matrix `[rows, per, rows]`: decoded rows, split by group.

    Entry `[i, a, j]` is 1 when decoded row `j` is row `i` of the region and lies in its
    group `a`; with `per` 1 groups do not matter.
    """
    rows = len(order)
    matrix = np.zeros((rows, per, rows), np.float32)
    which = order // group if per > 1 else np.zeros_like(order)
    matrix[order, which, np.arange(rows)] = 1
    return matrix
