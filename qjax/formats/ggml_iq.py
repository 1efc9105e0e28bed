"""llama.cpp's IQ types: codes that number the points of grids, and a 4-bit table.

The grid types decode to signed integers, one per weight, under scales of groups; so
their parts are those of an affine type with 8-bit codes. A point is gathered as one
16-bit word of its coordinates' levels (see `ggml_grids`), from which the values follow
by arithmetic.

Reference: ggml `ggml-common.h` (layouts), `ggml-quants.c`, `dequantize_row_iq*`.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int8, UInt8

from qjax.formats.ggml_grids import GRIDS
from qjax.formats.ggml_grids import words as grid_words
from qjax.formats.ggml_parts import (
    AffineParts,
    TableParts,
    cut,
    fields,
    half,
    words,
)

Blocks = UInt8[Array, "*lead b out"]
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The 16 values of IQ4_NL and IQ4_XS."""


def iq4_nl(blocks: Blocks) -> TableParts:
    """A table of 16 values, groups of 32."""
    d, qs = cut(blocks, 2, 16)
    return TableParts(fields(qs, 4, run=16), half(d), IQ4)


def iq4_xs(blocks: Blocks) -> TableParts:
    """The same table with 6-bit scales, groups of 32."""
    d, high, low, qs = cut(blocks, 2, 2, 4, 128)
    scales = fields(low, 4) | (fields(words(high, 2), 2) << 4)
    scale = half(d) * (scales.astype(jnp.float32) - 32.0)
    return TableParts(fields(qs, 4, run=16), scale, IQ4)


def iq2_xxs(blocks: Blocks) -> AffineParts:
    """Points of 8, seven stored signs each, 4-bit scales of 32."""
    d, qs = cut(blocks, 2, 64)
    *lead, _, out = qs.shape
    records = qs.reshape(*lead, 8, 8, out)
    index = records[..., :4, :].reshape(*lead, 32, out)
    rest = words(records[..., 4:, :].reshape(*lead, 32, out), 4)
    codes = _sign(_points("iq2_xxs", index), _eighth(fields(rest, 7, count=4)))
    return _scaled(codes, _scale(d, 0.5 + _top(rest), 0.25))


def iq2_xs(blocks: Blocks) -> AffineParts:
    """Points of 8, seven stored signs each, 4-bit scales of 16."""
    d, qs, scales = cut(blocks, 2, 64, 8)
    pairs = words(qs, 2)
    signs = _eighth((pairs >> 9).astype(jnp.uint8))
    codes = _sign(_points("iq2_xs", pairs & 511), signs)
    return _scaled(codes, _scale(d, 0.5 + _float(fields(scales, 4)), 0.25))


def iq2_s(blocks: Blocks) -> AffineParts:
    """Points of 8, a sign per weight, 4-bit scales of 16."""
    d, qs, signs, high, scales = cut(blocks, 2, 32, 32, 8, 8)
    codes = _sign(_points("iq2_s", _index(qs, fields(high, 2))), signs)
    return _scaled(codes, _scale(d, 0.5 + _float(fields(scales, 4)), 0.25))


def iq3_xxs(blocks: Blocks) -> AffineParts:
    """Points of 4, seven stored signs per 8, 4-bit scales of 32."""
    d, index, rest = cut(blocks, 2, 64, 32)
    rest = words(rest, 4)
    codes = _sign(_points("iq3_xxs", index), _eighth(fields(rest, 7, count=4)))
    return _scaled(codes, _scale(d, 0.5 + _top(rest), 0.5))


def iq3_s(blocks: Blocks) -> AffineParts:
    """Points of 4, a sign per weight, 4-bit scales of 32."""
    d, qs, high, signs, scales = cut(blocks, 2, 64, 8, 32, 4)
    codes = _sign(_points("iq3_s", _index(qs, fields(high, 1))), signs)
    return _scaled(codes, half(d) * (1.0 + 2.0 * _float(fields(scales, 4))))


def iq1_s(blocks: Blocks) -> AffineParts:
    """Ternary points of 8 moved by an eighth, 3-bit scales and moves of 32."""
    d, qs, high = cut(blocks, 2, 32, 16)
    high = words(high, 2)
    index = _index(qs, fields(high, 3, count=4))
    down = jnp.repeat((high >> 15).astype(jnp.uint8), 4, axis=-2)
    scale = half(d) * (2.0 * _float((high >> 12) & 7) + 1.0)
    return _moved(index, down, scale)


def iq1_m(blocks: Blocks) -> AffineParts:
    """As `iq1_s`, but scales of 16, moves of 8 and the float16 scale in four parts."""
    qs, high, scales = cut(blocks, 32, 16, 8)
    high, scales = fields(high, 4), words(scales, 2)
    shifts = jnp.asarray([0, 4, 8, 12], jnp.uint16)[:, None]
    bits = jnp.sum((scales >> 12) << shifts, -2, keepdims=True, dtype=jnp.uint16)
    d = lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)
    scale = d * (2.0 * _float(fields(scales, 3, count=4)) + 1.0)
    return _moved(_index(qs, high & 7), high >> 3, scale)


def _points(name: str, index) -> Int8[Array, "*lead e out"]:
    """The coordinates of points.

    Levels of all grids are evenly spaced but for the highest, which may lie beyond.
    """
    grid = GRIDS[name]
    first, step = grid.levels[0], grid.levels[1] - grid.levels[0]
    top = len(grid.levels) - 1
    beyond = grid.levels[-1] - first - step * top
    packed = jnp.asarray(grid_words(name)).at[index].get(mode="clip")
    level = fields(packed, grid.digit_bits, count=grid.dims).astype(jnp.int8)
    return first + step * level + jnp.where(level == top, beyond, 0).astype(jnp.int8)


def _index(low, high):
    """Indices whose bits above the eighth are stored apart."""
    return low.astype(jnp.uint16) | (high.astype(jnp.uint16) << 8)


def _eighth(signs):
    """Seven stored signs and the eighth, which makes the number of minuses even."""
    return signs | ((lax.population_count(signs) & 1) << 7)


def _sign(codes, signs):
    return jnp.where(fields(signs, 1) == 1, -codes, codes)


def _moved(index, down, scale):
    """Eighths of ternary points that are moved down or up by one eighth."""
    move = jnp.where(jnp.repeat(down, 8, axis=-2) == 1, -1, 1).astype(jnp.int8)
    return _scaled(_points("iq1", index) * jnp.int8(8) + move, scale * 0.125)


def _scale(d, factor, unit):
    return half(d) * factor * unit


def _float(x):
    return x.astype(jnp.float32)


def _top(words32):
    return _float(words32 >> 28)


def _scaled(codes, scale):
    return AffineParts(codes, scale, None, 8)
