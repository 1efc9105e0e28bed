"""Q4_0 to Q8_0: 32 weights that share a scale, or a scale and a minimum.

Encoders take blocks `x [32, *blocks]`, the imatrix's values of their inputs
(`[32, ...]` broadcastable to them) or None, and the mean square of the whole row that a
block lies in, which the weights of errors depend on. Without an imatrix a block is
rounded as it is; with one, the scale is searched for.

Reference: ggml `src/ggml-quants.c` (MIT): `quantize_row_q*_ref`, `_impl`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from qjax.formats.base import divided, rounded
from qjax.methods.ggml_bytes import (
    bits_of,
    half,
    half_away,
    half_bytes,
    joined,
    stacked,
)
from qjax.methods.ggml_exact import extreme, inverse
from qjax.methods.ggml_search import Grid, affine, symmetric

Blocks = Float[Array, " e *blocks"]
Importance = Float[Array, "e ..."] | None
Square = Float[Array, "..."] | None
Bytes = UInt8[Array, " b *blocks"]


def q4_0(x: Blocks, importance: Importance, square: Square) -> Bytes:
    """4 bits and a scale."""
    step, codes = _scaled(x, importance, square, 8)
    return stacked(half_bytes(step), joined(codes, 4, 16))


def q5_0(x: Blocks, importance: Importance, square: Square) -> Bytes:
    """5 bits and a scale."""
    step, codes = _scaled(x, importance, square, 16)
    return stacked(half_bytes(step), *_five_bits(codes))


def q4_1(x: Blocks, importance: Importance, square: Square) -> Bytes:
    """4 bits, a scale and a minimum."""
    step, low, codes = _shifted(x, importance, square, 15)
    return stacked(half_bytes(step), half_bytes(low), joined(codes, 4, 16))


def q5_1(x: Blocks, importance: Importance, square: Square) -> Bytes:
    """5 bits, a scale and a minimum."""
    step, low, codes = _shifted(x, importance, square, 31)
    return stacked(half_bytes(step), half_bytes(low), *_five_bits(codes))


def q8_0(x: Blocks, importance: Importance, square: Square) -> Bytes:
    """8 bits and a scale; llama.cpp uses no imatrix here."""
    del importance, square
    top = jnp.max(jnp.abs(x), axis=0)
    step = divided(top, jnp.full_like(top, 127))
    codes = half_away(x * inverse(step))
    signed = jnp.clip(codes, -128, 127).astype(jnp.int8).view(jnp.uint8)
    return stacked(half_bytes(half(step)), signed)


def _scaled(x, importance, square, levels: int):
    """Step as stored, and codes from 0 on, `x = step * (code - levels)`."""
    if importance is not None:
        fit = symmetric(x, _weights(x, importance, square), levels)
        return half(fit.scale), fit.codes
    step = extreme(x) / -levels  # a power of two: exact
    raised = rounded(x * inverse(step)) + (levels + 0.5)
    return half(step), jnp.clip(jnp.trunc(raised), 0, 2 * levels - 1)


def _shifted(x, importance, square, levels: int):
    """Step and minimum as stored, and codes, `x = step * code + minimum`."""
    if importance is not None:
        grid = Grid(levels, -0.9, 0.05, 36)
        fit = affine(x, _weights(x, importance, square), grid)
        return half(fit.scale), half(-fit.low), fit.codes
    low = jnp.min(x, axis=0)
    span = jnp.max(x, axis=0) - low
    step = divided(span, jnp.full_like(span, levels))
    raised = rounded((x - low) * inverse(step)) + 0.5
    return half(step), half(low), jnp.clip(jnp.trunc(raised), 0, levels)


def _weights(x, importance, square):
    return importance * jnp.sqrt(square + rounded(x * x))


def _five_bits(codes):
    """The fifth bits of 32 codes, then their low halves."""
    return joined(bits_of(codes, 4, 1), 1), joined(bits_of(codes, 0, 15), 4, 16)
