"""Weights in the order in which Hopper's 8-bit tensor cores take them.

`prepack` rewrites a canonical weight once; `unpack` is its exact inverse. The tensor
core reads 8-bit operands along `k` only, so matrices are stored transposed.

* 8 bits: int8 or float8_e4m3fn `[*layers, n, k]`; unsigned codes less 128.
* 4 bits: int32 `[*layers, n / 64, k / 128 * 8, 128]`: a block is 64 columns by 128
  rows, thread `32 w + 4 g + q` of a warpgroup owns 64 codes of it, eight words, stored
  as two runs of `[128 threads, 4 words]`. Word `2 s + h` holds, in byte `b`,

      rows 32 s + 16 h + 4 q + b of columns 16 w + g (low) and 16 w + g + 8 (high),

  as signed nibbles, `code - 8`: what the registers of one `wgmma.m64nNk32` want after
  a mask, times 16.
* scale, zero: as they were.

Columns and rows are padded to 128 with zeros, groups to whole ones. Two tags tell
whether 8-bit codes were signed.
"""

import dataclasses

import jax.numpy as jnp

from ..weights import Weight, WeightSpec
from . import reference

TAGS = ("hopper-a8", "hopper-a8-signed")
UNIT = 128
"""What columns and rows are padded to."""
WORDS = 8
"""Words of a thread per block of 64 columns by 128 rows."""


def padded(spec: WeightSpec) -> tuple[int, int]:
    """Rows and columns of the stored matrix."""
    return -(-spec.k // UNIT) * UNIT, -(-spec.n // UNIT) * UNIT


def groups(spec: WeightSpec) -> int:
    """Rows of the stored scales."""
    return 1 if spec.group >= spec.k else -(-padded(spec)[0] // spec.group)


def obstacle(spec: WeightSpec) -> str | None:
    """Why a weight cannot be stored so, or None."""
    if (spec.kind, spec.bits) not in (("int", 4), ("int", 8), ("e4m3", 8)):
        return f"{spec.kind} codes of {spec.bits} bits are not stored for 8-bit units"
    whole = spec.group >= spec.k or spec.group % UNIT == 0
    if whole or (spec.bits == 4 and spec.group in (32, 64)):
        return None
    return f"groups of {spec.group} rows: multiples of {UNIT} are done" + (
        ", 32 and 64" if spec.bits == 4 else ""
    )


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
    codes, tag = weight.codes, TAGS[codes_signed(weight)]
    rows, columns = padded(spec)
    if spec.bits == 4:
        codes = _unpacked(codes, spec) ^ jnp.uint8(8)
        codes = _words(_grow(codes, rows, columns))
    else:
        if codes.dtype == jnp.uint8:
            codes = (codes ^ jnp.uint8(128)).view(jnp.int8)
        codes = jnp.swapaxes(_grow(codes, rows, columns), -1, -2)
    scale = _grow(weight.scale, groups(spec), columns)
    zero = weight.zero
    zero = None if zero is None else _grow(zero, groups(spec), columns)
    made = Weight(codes, scale, zero, weight.table)
    return made, dataclasses.replace(spec, layout=tag)


def codes_signed(weight: Weight) -> bool:
    """Whether codes are stored signed."""
    return weight.codes.dtype == jnp.int8


def unpack(weight: Weight, spec: WeightSpec) -> Weight:
    """The canonical weight that `prepack` was given, bit for bit.

    Args:
      weight: prepacked arrays.
      spec: the spec that `prepack` returned.

    Returns:
      Canonical arrays.
    """
    codes = weight.codes
    if spec.bits == 4:
        codes = _codes(codes)[..., : spec.k, : spec.n] ^ jnp.uint8(8)
        codes = jnp.pad(codes, _pads(codes, spec.k + spec.k % 2, spec.n))
        codes = codes[..., 0::2, :] | (codes[..., 1::2, :] << jnp.uint8(4))
    else:
        codes = jnp.swapaxes(codes, -1, -2)[..., : spec.k, : spec.n]
        if spec.kind == "int" and spec.layout == TAGS[0]:
            codes = codes.view(jnp.uint8) ^ jnp.uint8(128)
    scale = weight.scale[..., : spec.groups, : spec.n]
    zero = weight.zero
    zero = None if zero is None else zero[..., : spec.groups, : spec.n]
    return Weight(codes, scale, zero, weight.table)


def _pads(array, rows, columns):
    *lead, have, wide = array.shape
    return [(0, 0)] * len(lead) + [(0, rows - have), (0, columns - wide)]


def _grow(array, rows, columns):
    """Zeros behind the last two axes."""
    return jnp.pad(array, _pads(array, rows, columns))


def _unpacked(codes, spec):
    return reference.unpack(codes, 4, spec.k)


def _words(codes):
    """Nibbles `[..., k, n]` as words of threads."""
    *lead, k, n = codes.shape
    a = len(lead)
    split = codes.reshape(*lead, k // 128, 2, 2, 2, 4, 4, n // 64, 4, 2, 8)
    # block of rows, run, word of the run (2), q, byte, block of columns, w, half, g
    order = [a + i for i in (6, 0, 1, 7, 9, 4, 2, 3, 5, 8)]
    split = split.transpose(*range(a), *order)
    byte = split[..., 0] | (split[..., 1] << jnp.uint8(4))
    return byte.view(jnp.int32).reshape(*lead, n // 64, k // 128 * WORDS, 128)


def _codes(words):
    """Inverse of `_words`."""
    *lead, blocks, rows, _ = words.shape
    a = len(lead)
    byte = words.reshape(*lead, blocks, rows // WORDS, 2, 4, 8, 4, 2, 2, 1)
    byte = byte.view(jnp.uint8)
    halves = jnp.stack([byte & jnp.uint8(15), byte >> jnp.uint8(4)], -1)
    # axes: n/64, k/128, run, w, g, q, s-low, h, byte, half
    order = [a + i for i in (1, 2, 6, 7, 5, 8, 0, 3, 9, 4)]
    codes = halves.transpose(*range(a), *order)
    return codes.reshape(*lead, rows // WORDS * 128, blocks * 64)
