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
from qjax.methods.ggml_bytes import half, half_away
from qjax.methods.ggml_exact import extreme, inverse
from qjax.methods.ggml_pack import PACK, Parts
from qjax.methods.ggml_search import Grid, affine, symmetric

Blocks = Float[Array, " e *blocks"]
Importance = Float[Array, "e ..."] | None
Square = Float[Array, "..."] | None
Bytes = UInt8[Array, " b *blocks"]


def q4_0(x: Blocks, importance: Importance, square: Square) -> Bytes:
    """4 bits and a scale."""
    return PACK["q4_0"](_scaled(x, importance, square, 8))


def q5_0(x: Blocks, importance: Importance, square: Square) -> Bytes:
    """5 bits and a scale."""
    return PACK["q5_0"](_scaled(x, importance, square, 16))


def q4_1(x: Blocks, importance: Importance, square: Square) -> Bytes:
    """4 bits, a scale and a minimum."""
    return PACK["q4_1"](_shifted(x, importance, square, 15))


def q5_1(x: Blocks, importance: Importance, square: Square) -> Bytes:
    """5 bits, a scale and a minimum."""
    return PACK["q5_1"](_shifted(x, importance, square, 31))


def q8_0(x: Blocks, importance: Importance, square: Square) -> Bytes:
    """8 bits and a scale; llama.cpp uses no imatrix here."""
    del importance, square
    top = jnp.max(jnp.abs(x), axis=0)
    step = divided(top, jnp.full_like(top, 127))
    codes = jnp.clip(half_away(x * inverse(step)), -128, 127)
    return PACK["q8_0"](Parts(codes + 128, half(step)))


def _scaled(x, importance, square, levels: int):
    """`x = step * (code - levels)`."""
    if importance is not None:
        fit = symmetric(x, _weights(x, importance, square), levels)
        return Parts(fit.codes, half(fit.scale))
    step = extreme(x) / -levels  # a power of two: exact
    raised = rounded(x * inverse(step)) + (levels + 0.5)
    return Parts(jnp.clip(jnp.trunc(raised), 0, 2 * levels - 1), half(step))


def _shifted(x, importance, square, levels: int):
    """`x = step * code - low`."""
    if importance is not None:
        grid = Grid(levels, -0.9, 0.05, 36)
        fit = affine(x, _weights(x, importance, square), grid)
        return Parts(fit.codes, half(fit.scale), low=half(fit.low))
    low = jnp.min(x, axis=0)
    span = jnp.max(x, axis=0) - low
    step = divided(span, jnp.full_like(span, levels))
    raised = rounded((x - low) * inverse(step)) + 0.5
    codes = jnp.clip(jnp.trunc(raised), 0, levels)
    return Parts(codes, half(step), low=half(-low))


def _weights(x, importance, square):
    return importance * jnp.sqrt(square + rounded(x * x))
