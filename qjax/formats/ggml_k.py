"""llama.cpp's k-quants: blocks of 256 whose groups' scales are integers themselves.

Reference: ggml `ggml-common.h` (layouts), `ggml-quants.c`, `dequantize_row_q*_K`.
"""

import jax.numpy as jnp
from jaxtyping import Array, UInt8

from qjax.formats.ggml_parts import AffineParts, cut, fields, half, signed

Blocks = UInt8[Array, "*lead b out"]


def q2_k(blocks: Blocks) -> AffineParts:
    """`d * s * q - dmin * m` with 4-bit `s` and `m`, groups of 16."""
    scales, qs, d, dmin = cut(blocks, 16, 64, 2, 2)
    scale, minimum = _times(d, scales & 15), _times(dmin, scales >> 4)
    return AffineParts(fields(qs, 2, run=32), scale, minimum, 2)


def q3_k(blocks: Blocks) -> AffineParts:
    """`d * (s - 32) * (q - 4)` with 6-bit `s`, groups of 16."""
    high, qs, low, top, d = cut(blocks, 32, 64, 8, 4, 2)
    scales = fields(low, 4, run=8) | (fields(top, 2, run=4) << 4)
    codes = fields(qs, 2, run=32) | (fields(high, 1, run=32) << 2)
    scale = half(d) * (scales.astype(jnp.float32) - 32.0)
    return AffineParts(codes, scale, None, 3, 4.0)


def q4_k(blocks: Blocks) -> AffineParts:
    """`d * s * q - dmin * m` with 6-bit `s` and `m`, groups of 32."""
    d, dmin, packed, qs = cut(blocks, 2, 2, 12, 128)
    s, m = _pairs(packed)
    return AffineParts(fields(qs, 4, run=32), _times(d, s), _times(dmin, m), 4)


def q5_k(blocks: Blocks) -> AffineParts:
    """As `q4_k`, with a fifth bit."""
    d, dmin, packed, high, qs = cut(blocks, 2, 2, 12, 32, 128)
    s, m = _pairs(packed)
    codes = fields(qs, 4, run=32) | (fields(high, 1, run=32) << 4)
    return AffineParts(codes, _times(d, s), _times(dmin, m), 5)


def q6_k(blocks: Blocks) -> AffineParts:
    """`d * s * (q - 32)` with signed bytes `s`, groups of 16."""
    low, high, scales, d = cut(blocks, 128, 64, 16, 2)
    codes = fields(low, 4, run=64) | (fields(high, 2, run=32) << 4)
    return AffineParts(codes, _times(d, signed(scales)), None, 6, 32.0)


def _times(d, integers):
    return half(d) * integers.astype(jnp.float32)


def _pairs(packed):
    """Eight 6-bit scales and minima of 12 bytes.

    The first eight bytes hold scales and minima 0 to 3 in their low 6 bits and the top
    2 bits of 4 to 7 above them; the last four hold the low 4 bits of both.
    """
    a, b, c = cut(packed, 4, 4, 4)
    scales = jnp.concatenate([a & 63, (c & 15) | ((a >> 6) << 4)], -2)
    minima = jnp.concatenate([b & 63, (c >> 4) | ((b >> 6) << 4)], -2)
    return scales, minima
