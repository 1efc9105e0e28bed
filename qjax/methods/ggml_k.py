"""Q2_K to Q6_K: searches for the scales of 8 or 16 groups, then codes for those of all.

Encoders take blocks `x [256, *blocks]` and the imatrix's values of their inputs,
`[256, ...]` broadcastable to them, or None; they return bytes `[bytes, *blocks]`. With
an imatrix not only the weights of errors change: block scales are searched for, too.

Reference: ggml `src/ggml-quants.c` (MIT): `quantize_row_q*_K_ref`, `_impl`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from qjax.formats.base import divided, rounded
from qjax.methods.ggml_bytes import groups, half, requantized, ungrouped
from qjax.methods.ggml_exact import extreme, inverse, total
from qjax.methods.ggml_pack import PACK, Parts
from qjax.methods.ggml_search import (
    TINY,
    Grid,
    affine,
    by_sweeps,
    error_weights,
    positive,
    symmetric,
)

Blocks = Float[Array, " e *blocks"]
Importance = Float[Array, "e ..."] | None
Bytes = UInt8[Array, " b *blocks"]


def q2_k(x: Blocks, importance: Importance) -> Bytes:
    """Groups of 16, 2 bits, scales and minima of 4 bits."""
    grid = Grid(3, -0.5, 0.1, 15, absolute=True)
    return PACK["q2_k"](_affine_blocks(x, importance, 16, grid, 15))


def q4_k(x: Blocks, importance: Importance) -> Bytes:
    """Groups of 32, 4 bits, scales and minima of 6 bits."""
    grid = Grid(15, -1.0, 0.1, 20)
    return PACK["q4_k"](_affine_blocks(x, importance, 32, grid, 63))


def q5_k(x: Blocks, importance: Importance) -> Bytes:
    """Groups of 32, 5 bits, scales and minima of 6 bits."""
    grid = Grid(31, -0.5, 0.1, 15)
    return PACK["q5_k"](_affine_blocks(x, importance, 32, grid, 63))


def q3_k(x: Blocks, importance: Importance) -> Bytes:
    """Groups of 16, 3 bits, scales of 6 bits."""
    grouped = groups(x, 16)
    if importance is None:
        fit = by_sweeps(grouped, 4)
        step, scales = _from_extreme(fit.scale, 32)
        scales = jnp.where(step == 0, 0.0, jnp.clip(scales, -32, 31) + 32)
    else:
        weight, mass = _weights(x, importance, 16, 2.0)
        fit = symmetric(grouped, weight, 4)
        step, scales = symmetric(fit.scale, mass, 32)[:2]
    step, scales = half(step), scales - 32
    codes = requantized(grouped, step * scales, fit.codes, -4, 3)
    return PACK["q3_k"](Parts(ungrouped(codes), step, scales))


def q6_k(x: Blocks, importance: Importance) -> Bytes:
    """Groups of 16, 6 bits, scales of 8 bits."""
    grouped = groups(x, 16)
    if importance is None:
        weight = rounded(grouped * grouped)
    else:
        weight = groups(jnp.broadcast_to(importance, x.shape), 16)
    fit = symmetric(grouped, weight, 32)
    zero = jnp.max(jnp.abs(fit.scale), axis=0) < TINY
    step, scales = _from_extreme(jnp.where(zero, 0.0, fit.scale), 128)
    step, scales = half(step), jnp.minimum(scales, 127)
    codes = requantized(grouped, step * scales, fit.codes, -32, 31)
    codes = ungrouped(jnp.where(zero, 0.0, codes))
    return PACK["q6_k"](Parts(codes, step, scales))


def _affine_blocks(x, importance, size: int, grid: Grid, levels: int):
    """The parts of a type with scales and minima.

    Args:
      x: blocks.
      importance: the imatrix's values, or None.
      size: of a group.
      grid: of the search without an imatrix.
      levels: largest code of a scale or minimum.
    """
    grouped = groups(x, size)
    if importance is None:
        weight = jnp.abs(grouped)
        if not grid.absolute:
            square = total(lambda a: a * a, grouped)
            weight = jnp.sqrt(square / size) + weight
        fit = affine(grouped, weight, grid)
        (step, scales), (low, lows) = (
            _from_largest(part, levels) for part in (fit.scale, fit.low)
        )
    else:
        share = 1.0 if size == 16 else 2.0
        weight, mass = _weights(x, importance, size, share)
        fit = affine(grouped, weight, Grid(grid.levels, -0.9, 0.05, 36))
        (step, scales), (low, lows) = (
            positive(part, mass, levels)[:2] for part in (fit.scale, fit.low)
        )
    step, low = half(step), half(low)
    raised = grouped + rounded(low * lows)
    codes = requantized(raised, step * scales, fit.codes, 0, grid.levels)
    return Parts(ungrouped(codes), step, scales, low, lows)


def _weights(x, importance, size: int, share: float):
    """Weights of errors in groups, and their sums."""
    weight = groups(error_weights(x, importance, share), size)
    return weight, total(lambda w: w, weight)


def _from_largest(x: Float[Array, " g *blocks"], levels: int):
    """Step that gives the largest value the highest code, and all codes."""
    top = jnp.max(x, axis=0)
    some = top > 0
    inv = levels / jnp.where(some, top, 1.0)
    codes = jnp.clip(jnp.round(inv * x), 0, levels)
    step = divided(top, jnp.full_like(top, levels))
    return jnp.where(some, step, 0.0), jnp.where(some, codes, 0.0)


def _from_extreme(x: Float[Array, " g *blocks"], levels: int):
    """Step that gives the extreme value the code `-levels`, and all codes."""
    top = extreme(x)
    zero = top == 0
    inv = -levels / jnp.where(zero, 1.0, top)
    codes = jnp.where(zero, 0.0, jnp.round(inv * x))
    return jnp.where(zero, 0.0, inverse(inv)), codes
