"""llama.cpp's small blocks: legacy, ternary, 1 and 2 bits, and 4-bit floats.

Reference: ggml `ggml-common.h` (layouts), `ggml-quants.c`, `dequantize_row_*`.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8

from qjax.formats.ggml_parts import (
    AffineParts,
    TableParts,
    cut,
    fields,
    half,
    signed,
)

Blocks = UInt8[Array, "*lead b out"]
E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""E2M1 values doubled, so that they are integers; the scales are halved for it."""


def q4_0(blocks: Blocks) -> AffineParts:
    """`d * (q - 8)`, groups of 32."""
    d, qs = cut(blocks, 2, 16)
    return AffineParts(fields(qs, 4, run=16), half(d), None, 4, 8.0)


def q4_1(blocks: Blocks) -> AffineParts:
    """`d * q + m`, groups of 32."""
    d, m, qs = cut(blocks, 2, 2, 16)
    return AffineParts(fields(qs, 4, run=16), half(d), -half(m), 4)


def q5_0(blocks: Blocks) -> AffineParts:
    """`d * (q - 16)`, groups of 32."""
    d, high, qs = cut(blocks, 2, 4, 16)
    return AffineParts(_five(qs, high), half(d), None, 5, 16.0)


def q5_1(blocks: Blocks) -> AffineParts:
    """`d * q + m`, groups of 32."""
    d, m, high, qs = cut(blocks, 2, 2, 4, 16)
    return AffineParts(_five(qs, high), half(d), -half(m), 5)


def _five(qs, high):
    return fields(qs, 4, run=16) | (fields(high, 1) << 4)


def q8_0(blocks: Blocks) -> AffineParts:
    """`d * q` with signed bytes, groups of 32."""
    d, qs = cut(blocks, 2, 32)
    return AffineParts(signed(qs), half(d), None, 8)


def q1_0(blocks: Blocks) -> AffineParts:
    """Signs: `+d` and `-d`, as twice that around a zero-point of 0.5; groups of 128."""
    d, qs = cut(blocks, 2, 16)
    return AffineParts(fields(qs, 1), 2.0 * half(d), None, 1, 0.5)


def q2_0(blocks: Blocks) -> AffineParts:
    """`d * (q - 1)`: -1, 0, 1 and 2; groups of 64."""
    d, qs = cut(blocks, 2, 16)
    return AffineParts(fields(qs, 2), half(d), None, 2, 1.0)


def tq1_0(blocks: Blocks) -> AffineParts:
    """`d * (t - 1)`, five ternary digits to a byte; groups of 256."""
    wide, narrow, last, d = cut(blocks, 32, 16, 4, 2)
    trits = [_trits(wide, 5), _trits(narrow, 5), _trits(last, 4)]
    return AffineParts(jnp.concatenate(trits, -2), half(d), None, 2, 1.0)


def _trits(x, count):
    """The leading ternary digits of the fractions `byte / 256`."""
    powers = jnp.asarray([3**n for n in range(count)], jnp.uint8)[:, None, None]
    rest = (x[..., None, :, :] * powers).astype(jnp.uint16)
    *lead, rows, out = x.shape
    return ((rest * 3) >> 8).astype(jnp.uint8).reshape(*lead, count * rows, out)


def tq2_0(blocks: Blocks) -> AffineParts:
    """`d * (q - 1)`, two bits each; groups of 256."""
    qs, d = cut(blocks, 64, 2)
    return AffineParts(fields(qs, 2, run=32), half(d), None, 2, 1.0)


def mxfp4(blocks: Blocks) -> TableParts:
    """E2M1 times a power of two, groups of 32."""
    exponent, qs = cut(blocks, 1, 16)
    e = exponent.astype(jnp.uint32)
    bits = jnp.where(e < 2, jnp.uint32(1 << 21) << e, (e - 1) << 23)  # 2**(e - 128)
    scale = lax.bitcast_convert_type(bits, jnp.float32)
    return TableParts(fields(qs, 4, run=16), scale, E2M1, exponents=True)


def nvfp4(blocks: Blocks) -> TableParts:
    """E2M1 times an unsigned E4M3 scale, groups of 16."""
    scales, qs = cut(blocks, 4, 32)
    return TableParts(fields(qs, 4, run=8), _half_ue4m3(scales), E2M1)


def _half_ue4m3(x: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """Half of unsigned E4M3 values; 0x7F, their NaN, is 0 and the top bit unused."""
    bits = x.astype(jnp.uint32)
    exponent, mantissa = (bits >> 3) & 15, bits & 7
    normal = ((exponent + 119) << 23) | (mantissa << 20)
    small = mantissa.astype(jnp.float32) * 2.0**-10
    value = lax.bitcast_convert_type(normal, jnp.float32)
    return jnp.where(x == 0x7F, 0.0, jnp.where(exponent == 0, small, value))
