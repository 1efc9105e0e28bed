"""Weights in the order in which Hopper's tensor cores take them.

`prepack` rewrites a canonical weight once; `unpack` is its exact inverse.

* codes: int32 `[*layers, n / 64, k / 64 * words]`, blocks of 64 columns by 64 rows as
  `..hopper.pack` orders them. Tables of fewer than 16 entries are stored with 4-bit
  codes; 8-bit integers as signed ones.
* scale, zero: as they were, `[*layers, groups, n]`.

Columns are padded to 256 and rows to 128 with zeros (codes, scales, zero-points), so
that no copy leaves an array. Two tags tell whether 8-bit codes were signed.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax

from .. import hopper
from ..weights import FIELDS, Weight, WeightSpec

TAGS = ("hopper", "hopper-signed")
COLUMNS, ROWS = 256, 128
"""What columns and rows are padded to."""

_FLOAT8 = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}


def codec(spec: WeightSpec) -> hopper.Codec:
    """Where bits lie in a prepacked weight."""
    return hopper.Codec(spec.kind, 4 if spec.kind == "table" else spec.bits)


def padded(spec: WeightSpec) -> tuple[int, int]:
    """Rows and columns of the stored matrix."""
    return -(-spec.k // ROWS) * ROWS, -(-spec.n // COLUMNS) * COLUMNS


def groups(spec: WeightSpec) -> int:
    """Rows of the stored scales."""
    if spec.group >= spec.k:
        return 1
    return -(-padded(spec)[0] // spec.group)


def obstacle(spec: WeightSpec) -> str | None:
    """Why a weight cannot be stored so, or None."""
    if spec.kind == "table" and spec.bits > 4:
        return f"tables of {2**spec.bits} entries do not fit; at most 16"
    if spec.kind in ("int", "table") or spec.bits == (4 if spec.kind == "e2m1" else 8):
        group = spec.group
        if group >= spec.k or group % ROWS == 0 or (ROWS % group == 0 and group >= 8):
            return None
        return f"groups of {group} rows; 8, 16, 32, 64 or a multiple of {ROWS} are done"
    return f"{spec.kind} codes of {spec.bits} bits"


def words(weight: Weight):
    """Codes as `..hopper` has them, `[*layers, n / 64, k / 64 * bits, 128]`."""
    return weight.codes.reshape(*weight.codes.shape[:-1], -1, hopper.THREADS)


def scales(weight: Weight):
    """Scales as kernels read them: 8-bit floats as bytes."""
    if weight.scale.dtype == jnp.float8_e4m3fn:
        return lax.bitcast_convert_type(weight.scale, jnp.uint8)
    return weight.scale


def prepack(weight: Weight, spec: WeightSpec) -> tuple[Weight, WeightSpec] | None:
    """A canonical weight in this layout.

    Args:
      weight: canonical arrays, with any leading axes.
      spec: what they mean.

    Returns:
      The arrays and their spec, or None where `obstacle` has a reason.
    """
    if spec.layout != "canonical" or obstacle(spec) is not None:
        return None
    codes, tag = weight.codes, TAGS[0]
    if spec.bits == 8 and codes.dtype != jnp.uint8:
        tag = TAGS[1] if codes.dtype == jnp.int8 else tag
        codes = lax.bitcast_convert_type(codes, jnp.uint8)
    elif spec.bits == 8 and spec.kind == "int":
        codes = codes ^ jnp.uint8(128)
    elif spec.bits < 8:
        codes = _plain_codes(codes, spec)
    rows, columns = padded(spec)
    codes = hopper.pack(_grow(codes, rows, columns), codec(spec))
    codes = codes.reshape(*codes.shape[:-2], -1)
    scale = _grow(weight.scale, groups(spec), columns)
    zero = weight.zero
    zero = None if zero is None else _grow(zero, groups(spec), columns)
    made = Weight(codes, scale, zero, weight.table)
    return made, dataclasses.replace(spec, layout=tag)


def unpack(weight: Weight, spec: WeightSpec) -> Weight:
    """The canonical weight that `prepack` was given, bit for bit.

    Args:
      weight: prepacked arrays.
      spec: the spec that `prepack` returned.

    Returns:
      Canonical arrays.
    """
    codes = hopper.unpack(words(weight), codec(spec))[..., : spec.n]
    if spec.bits < 8:
        codes = _packed_codes(codes, spec)
    else:
        codes = _bytes(codes[..., : spec.k, :], spec)
    scale = weight.scale[..., : spec.groups, : spec.n]
    zero = weight.zero
    zero = None if zero is None else zero[..., : spec.groups, : spec.n]
    return Weight(codes, scale, zero, weight.table)


def _bytes(codes, spec):
    """8-bit codes as they were."""
    if spec.kind in _FLOAT8:
        return lax.bitcast_convert_type(codes, _FLOAT8[spec.kind])
    if spec.layout == TAGS[1]:
        return lax.bitcast_convert_type(codes, jnp.int8)
    return codes ^ jnp.uint8(128)


def _grow(array, rows, columns):
    """Zeros added below and to the right."""
    *lead, k, n = array.shape
    pad = [(0, 0)] * len(lead) + [(0, rows - k), (0, columns - n)]
    bits = array.dtype.itemsize * 8
    raw = lax.bitcast_convert_type(array, jnp.dtype(f"uint{bits}"))  # NaN and all
    return lax.bitcast_convert_type(jnp.pad(raw, pad), array.dtype)


def _unit(bits):
    """Rows that canonical packing treats as one unit, and their byte rows by plane."""
    fields = FIELDS[bits]
    return (8, fields) if len(fields) > 1 else (8 // bits, fields)


def _plain_codes(packed, spec):
    """Canonical bytes to one code per byte, padding rows included."""
    unit, fields = _unit(spec.bits)
    *lead, rows, n = packed.shape
    stride = unit * spec.bits // 8
    packed = packed.reshape(*lead, rows // stride, stride, n)
    codes = []
    for i in range(unit):
        code, first, shift = None, 0, 0
        for width in fields:
            byte, field = divmod(i, 8 // width)
            part = packed[..., first + byte, :] >> jnp.uint8(field * width)
            part = (part & jnp.uint8(2**width - 1)) << jnp.uint8(shift)
            code = part if code is None else code | part
            first, shift = first + unit * width // 8, shift + width
        codes.append(code)
    return jnp.stack(codes, -2).reshape(*lead, rows // stride * unit, n)


def _packed_codes(codes, spec):
    """Inverse of `_plain_codes`; `codes` has at least the rows of whole units."""
    unit, fields = _unit(spec.bits)
    stride = unit * spec.bits // 8
    count = spec.packed_k // stride
    *lead, k, n = codes.shape
    codes = jnp.pad(
        codes, [(0, 0)] * len(lead) + [(0, max(0, count * unit - k)), (0, 0)]
    )
    codes = codes[..., : count * unit, :].reshape(*lead, count, unit, n)
    out, shift = [], 0
    for width in fields:
        field = (codes >> jnp.uint8(shift)) & jnp.uint8(2**width - 1)
        per = 8 // width
        for byte in range(unit // per):
            total = field[..., byte * per, :]
            for i in range(1, per):
                total |= field[..., byte * per + i, :] << jnp.uint8(i * width)
            out.append(total)
        shift += width
    return jnp.stack(out, -2).reshape(*lead, count * stride, n)
