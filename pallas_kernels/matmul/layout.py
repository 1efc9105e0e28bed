"""The TPU layout of 3-, 5-, 6- and 7-bit codes: bit planes that decode in place.

Canonical bytes of these widths interleave planes every 8 rows, which a TPU cannot take
apart without moving sublanes. Here 256 rows are a block, and a block stores its planes
one after the other, widest first. Read as 32-bit words, 8 word rows of a plane of `w`
bit fields hold `16 / w` tiles of 16 rows: bits `w t` of the halves of word row `i` are
rows `16 t + 2 i` (low half) and `16 t + 2 i + 1` (high half) of the plane's tile `t`.
So one shift and one mask give a register of 16 rows in order, and planes of different
width line up. Widths 1, 2, 4 and 8 stay canonical: they decode as fast as they are.

The stored size is the canonical one with `k` rounded up to 256 rows. `unpack` is the
exact inverse of `prepack`, up to the padding rows, which `prepack` clears.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from ..weights import FIELDS, KernelError, Weight, WeightSpec
from . import reference

TAG = "tpu-planes"
TAGS = (TAG,)
BLOCK = 256
"""Rows of a block: 1-bit planes fill a tile of 8 word rows with 256 codes."""


def packed_rows(spec: WeightSpec) -> int:
    """Byte rows of the codes in this layout."""
    return -(-spec.k // BLOCK) * BLOCK * spec.bits // 8


def _positions(width):
    """Byte row and bit of each of the 256 rows of a block in a plane of `width`."""
    per_tile = 16 // width  # row tiles per tile of 8 word rows
    row = np.arange(BLOCK)
    tile, within = row // 16, row % 16
    word = tile // per_tile * 8 + within // 2
    bit = tile % per_tile * width + within % 2 * 16
    return word * 4 + bit // 8, bit % 8


def prepack(weight: Weight, spec: WeightSpec) -> tuple[Weight, WeightSpec] | None:
    """A canonical weight in this layout.

    Args:
      weight: canonical arrays, with any leading axes.
      spec: what they mean.

    Returns:
      The arrays and their spec, or None where the kernels read the weight as it is.
    """
    if spec.layout != "canonical" or len(FIELDS.get(spec.bits, ())) < 2:
        return None
    code = reference.codes(weight.codes, spec)
    pad = [(0, 0)] * (code.ndim - 2) + [(0, -spec.k % BLOCK), (0, 0)]
    code = jnp.pad(code, pad)
    *lead, rows, n = code.shape
    blocks = code.reshape(*lead, rows // BLOCK, BLOCK, n)
    planes, shift = [], 0
    for width in FIELDS[spec.bits]:
        byte, bit = _positions(width)
        field = (blocks >> jnp.uint8(shift)) & jnp.uint8(2**width - 1)
        field = field << bit.astype(np.uint8)[:, None]
        order = np.lexsort((bit, byte))  # the 8 / width rows of each byte together
        parts = field[..., order, :].reshape(
            *lead, rows // BLOCK, BLOCK * width // 8, 8 // width, n
        )
        planes.append(jnp.sum(parts, axis=-2, dtype=jnp.uint8))
        shift += width
    codes = jnp.concatenate(planes, axis=-2).reshape(*lead, -1, n)
    return weight._replace(codes=codes), dataclasses.replace(spec, layout=TAG)


def unpack(weight: Weight, spec: WeightSpec) -> Weight:
    """Inverse of `prepack`.

    Args:
      weight: arrays as `prepack` returned them.
      spec: the spec it returned.

    Returns:
      The canonical arrays.

    Raises:
      KernelError: the weight is not in this layout.
    """
    if spec.layout != TAG:
        raise KernelError(f"unpack: layout is {spec.layout!r}, expected {TAG!r}")
    *lead, _, n = weight.codes.shape
    blocks = weight.codes.reshape(*lead, -1, BLOCK * spec.bits // 8, n)
    code, first, shift = None, 0, 0
    for width in FIELDS[spec.bits]:
        byte, bit = _positions(width)
        field = blocks[..., first + byte, :] >> bit.astype(np.uint8)[:, None]
        field = (field & jnp.uint8(2**width - 1)) << jnp.uint8(shift)
        code = field if code is None else code | field
        first, shift = first + BLOCK * width // 8, shift + width
    assert code is not None  # every width here has planes
    code = code.reshape(*lead, -1, n)[..., : -(-spec.k // 8) * 8, :]
    return weight._replace(codes=_canonical(code, spec.bits))


def _canonical(code, bits):
    """Packs codes `[..., 8 i, n]` as `..weights` describes."""
    *lead, rows, n = code.shape
    blocks = code.reshape(*lead, rows // 8, 8, n)
    planes, shift = [], 0
    for width in FIELDS[bits]:
        per = 8 // width
        field = (blocks >> jnp.uint8(shift)) & jnp.uint8(2**width - 1)
        field = field.reshape(*lead, rows // 8, width, per, n)
        steps = (np.arange(per) * width).astype(np.uint8)[:, None]
        planes.append(jnp.sum(field << steps, axis=-2, dtype=jnp.uint8))
        shift += width
    return jnp.concatenate(planes, axis=-2).reshape(*lead, rows // 8 * bits, n)
