"""bitsandbytes' 8-bit dynamic maps by arithmetic: no table, no look-up in memory.

A magnitude of the map is a cell centre of a decade: decade `i` (0 to 6) cuts
`[0.1, 1] * 10**(i - 6)` into `cells` equal parts, `2**i` when signed and `2**(i + 1)`
when not; 0 and 1 complete the map. With `number` the rank of a magnitude (signed) or
the rank plus one (unsigned), `number = cells + j` for cell `j`: its float32 exponent is
the decade and its mantissa is `j / cells`.

Decoding gives the float32 values of bitsandbytes' tables exactly: it repeats, in 32-bit
integers, the roundings with which PyTorch makes them. Encoding picks the nearest value,
the lower one at a midpoint; within 4 units in the last place of a midpoint the other
neighbour may win, so that one multiplication can find the cell.

Reference: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv
2110.02861, section 2.1; bitsandbytes `functional.create_dynamic_map`.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

ZERO = {True: 127, False: 0}
"""The code of 0 by `signed`."""
_POWERS = tuple(float(np.float32(10.0 ** (i - 6))) for i in range(7))
_NINE = round(float(np.float32(1) - np.float32(0.1)) * 2**24)  # 0.9, in 2**-24
_LOW = round(float(np.float32(0.1)) * 2**31)  # the first edge, in 2**-31
_HIGH = 2**31 - 128 * _NINE  # ... as PyTorch counts it down from 1


def decode(codes: Any, *, signed: bool) -> Any:
    """Values of codes: those of `qjax.formats.codebook.dynamic_map`, bit for bit.

    Args:
      codes: int32 in 0..255.
      signed: which map.

    Returns:
      float32 in [-1, 1] or [0, 1].
    """
    if signed:
        number = jnp.abs(codes - jnp.int32(127))
        top = 128
    else:
        number = codes + jnp.int32(1)
        top = 256
    bits = lax.bitcast_convert_type(number.astype(jnp.float32), jnp.int32)
    cell = (bits >> jnp.int32(16)) & jnp.int32(127)  # j / cells, in 128ths
    first = 0 if signed else 1
    power = jnp.full(codes.shape, _POWERS[0] * 2.0**-32, jnp.float32)
    width = jnp.full(codes.shape, 128 >> first, jnp.int32)
    for i in range(1, 7):
        above = number >= jnp.int32(2 ** (i + first))
        power = jnp.where(above, jnp.float32(_POWERS[i] * 2.0**-32), power)
        width = jnp.where(above, jnp.int32(128 >> (i + first)), width)
    value = (_edge(cell) + _edge(cell + width)) * power
    value = jnp.where(number == top, 1.0, value)
    value = jnp.where(number == first, value if first == 0 else 0.0, value)
    if not signed:
        return value
    value = jnp.where(number == 0, 0.0, value)
    return jnp.where(codes < 127, -value, value)


@functools.cache
def table(signed: bool) -> np.ndarray:
    """The 256 values of a map, ascending."""
    with jax.ensure_compile_time_eval():
        codes = jnp.arange(256, dtype=jnp.int32)
        return np.asarray(decode(codes, signed=signed))


def _edge(cell):
    """Edge of a decade after `cell` 128ths of it, in 2**-31, rounded to float32."""
    start = jnp.where(cell < 64, jnp.int32(_LOW), jnp.int32(_HIGH))
    # The last edge, 1, is 2**31 and wraps to its negative.
    return jnp.abs((cell * jnp.int32(_NINE) + start).astype(jnp.float32))


def encode(u: Any, *, signed: bool) -> Any:
    """Codes of the nearest values.

    Args:
      u: float32; magnitudes above 1 get the code of 1. NaN is undefined.
      signed: which map.

    Returns:
      int32 in 0..255.
    """
    size = jnp.abs(u) if signed else u
    least, *bounds, greatest = _bounds(signed)
    first = 1.0 if signed else 2.0
    power = jnp.full(u.shape, 1e6, jnp.float32)
    cells = jnp.full(u.shape, first, jnp.float32)
    for i, bound in enumerate(bounds, 1):
        above = size > bound
        power = jnp.where(above, jnp.float32(10.0 ** (6 - i)), power)
        cells = jnp.where(above, jnp.float32(first * 2.0**i), cells)
    inside = (size * power - _TENTH) * _NINTH * cells
    cell = inside.astype(jnp.int32)  # rounded up by hand: GPUs' kernels have no ceil
    up = jnp.where(inside > cell.astype(jnp.float32), jnp.int32(1), jnp.int32(0))
    cells = cells.astype(jnp.int32)
    number = cells + jnp.minimum(cell + up, cells)
    # `number` is 1 above the rank of a signed magnitude, 2 above an unsigned code.
    rank = number - jnp.int32(1 if signed else 2)
    rank = jnp.where(size > greatest, jnp.int32(128 if signed else 255), rank)
    rank = jnp.where(size > least, rank, jnp.int32(0))
    if not signed:
        return rank
    return jnp.int32(127) + jnp.where(u < 0, -jnp.minimum(rank, 127), rank)


_TENTH = float(np.float32(0.1))
_NINTH = float(np.float32(1 / 0.9))


@functools.cache
def _bounds(signed: bool) -> tuple[float, ...]:
    """Midpoints below each decade's first value, and that below 1."""
    first = 1 if signed else 2
    firsts, lasts = [], [np.float32(0.0)]
    for i in range(7):
        cells = first * 2**i
        edges = [float(np.float32(x)) for x in np.linspace(0.1, 1, cells + 1)]
        centres = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
        firsts.append(np.float32(_POWERS[i]) * np.float32(centres[0]))
        lasts.append(np.float32(_POWERS[i]) * np.float32(centres[-1]))
    firsts.append(np.float32(1.0))
    pairs = zip(lasts, firsts, strict=True)
    return tuple(float((a + b) * np.float32(0.5)) for a, b in pairs)
