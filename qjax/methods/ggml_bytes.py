"""How codes and scales become the bytes of llama.cpp's blocks.

Arrays hold the elements or bytes of a block on axis 0; all other axes are blocks.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped, UInt8

from qjax.formats.base import divided, rounded

_HALF_MAX = 65504.0


def groups(x: Float[Array, " e *blocks"], size: int) -> Float[Array, "n g *blocks"]:
    """Consecutive elements in groups of `size`, their elements on axis 0."""
    return jnp.moveaxis(x.reshape(-1, size, *x.shape[1:]), 1, 0)


def ungrouped(x: Shaped[Array, "n g *blocks"]) -> Shaped[Array, " e *blocks"]:
    """Inverse of `groups`."""
    return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])


def half(x: Float[Array, "*blocks"]) -> Float[Array, "*blocks"]:
    """The value after storage as float16, within its finite range."""
    return jnp.clip(x, -_HALF_MAX, _HALF_MAX).astype(jnp.float16).astype(jnp.float32)


def half_bytes(x: Float[Array, "*blocks"]) -> UInt8[Array, " two *blocks"]:
    """The two bytes of numbers that `half` returned."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float16), jnp.uint16)
    return jnp.stack([bits.astype(jnp.uint8), (bits >> 8).astype(jnp.uint8)])


def joined(
    codes: Shaped[Array, " e *blocks"], bits: int, run: int = 1
) -> UInt8[Array, " b *blocks"]:
    """Codes joined to bytes, the first in the lowest bits.

    Args:
      codes: values below `2**bits`.
      bits: width of a code: 1, 2 or 4.
      run: distance between codes of one byte; the next byte starts one further, and
        after `run` bytes follow those of the next `8 / bits` runs.
    """
    per = 8 // bits
    parts = codes.astype(jnp.uint8).reshape(-1, per, run, *codes.shape[1:])
    out = parts[:, 0]
    for k in range(1, per):
        out = out | parts[:, k] << jnp.uint8(k * bits)
    return out.reshape(-1, *codes.shape[1:])


def bits_of(codes: Float[Array, "..."], shift: int, mask: int) -> UInt8[Array, "..."]:
    """`(codes >> shift) & mask`."""
    return (codes.astype(jnp.uint8) >> jnp.uint8(shift)) & jnp.uint8(mask)


def stacked(*parts: Shaped[Array, " n *blocks"]) -> UInt8[Array, " b *blocks"]:
    """Fields of a block, one after the other."""
    return jnp.concatenate([p.astype(jnp.uint8) for p in parts])


def half_away(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Rounds to the nearest integer, ties away from zero, as C's `roundf`."""
    x = rounded(x)
    whole = jnp.trunc(x)
    return whole + jnp.where(jnp.abs(x - whole) >= 0.5, jnp.sign(x), 0.0)


def requantized(
    x: Float[Array, " n *groups"],
    step: Float[Array, "*groups"],
    old: Float[Array, " n *groups"],
    low: int,
    high: int,
) -> Float[Array, " n *groups"]:
    """Codes of `x` for steps as stored; where a step is 0 the old codes.

    Args:
      x: values.
      step: of each group.
      old: codes of the search, counted from 0.
      low: least code, which is stored as 0.
      high: greatest code.
    """
    zero = step == 0
    codes = jnp.round(divided(x, jnp.where(zero, 1.0, step)))
    return jnp.where(zero, old, jnp.clip(codes, low, high) - low)
