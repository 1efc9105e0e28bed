"""The bytes of llama.cpp's blocks that hold one code per weight.

Reference: ggml `src/ggml-common.h` (layouts).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from qjax.methods.ggml_bytes import bits_of, half_bytes, joined, stacked

Bytes = UInt8[Array, " b *blocks"]


class Parts(NamedTuple):
    """Blocks of `w = step * scales * (codes - zero) - low * lows`, all as stored.

    Types with a table have its entries in the place of `codes - zero`.

    Attributes:
      codes: from 0 on, held in float32.
      step: value of float16.
      scales: integers of groups, from 0 on or signed; None where `step` is the scale.
      low: value of float16, or None for none.
      lows: integers of groups, or None where `low` is the minimum.
    """

    codes: Float[Array, " e *blocks"]
    step: Float[Array, "*blocks"]
    scales: Any = None
    low: Any = None
    lows: Any = None


def _q2_k(p: Parts) -> Bytes:
    steps = half_bytes(p.step), half_bytes(p.low)
    return stacked(p.scales + 16 * p.lows, joined(p.codes, 2, 32), *steps)


def _q3_k(p: Parts) -> Bytes:
    scales = p.scales + 32
    low = joined(bits_of(scales, 0, 15), 4, 8)
    pairs = joined(bits_of(scales, 4, 3), 2, 4)
    high = joined(bits_of(p.codes, 2, 1), 1, 32)
    codes = joined(bits_of(p.codes, 0, 3), 2, 32)
    return stacked(high, codes, low, pairs, half_bytes(p.step))


def _q4_k(p: Parts) -> Bytes:
    return stacked(*_steps(p), _six_bit_pairs(p), joined(p.codes, 4, 32))


def _q5_k(p: Parts) -> Bytes:
    high = joined(bits_of(p.codes, 4, 1), 1, 32)
    low = joined(bits_of(p.codes, 0, 15), 4, 32)
    return stacked(*_steps(p), _six_bit_pairs(p), high, low)


def _q6_k(p: Parts) -> Bytes:
    signed = p.scales.astype(jnp.int8).view(jnp.uint8)
    low = joined(bits_of(p.codes, 0, 15), 4, 64)
    high = joined(bits_of(p.codes, 4, 3), 2, 32)
    return stacked(low, high, signed, half_bytes(p.step))


def _four_bits(p: Parts) -> Bytes:
    return stacked(*_steps(p), joined(p.codes, 4, 16))


def _five_bits(p: Parts) -> Bytes:
    high = joined(bits_of(p.codes, 4, 1), 1)
    return stacked(*_steps(p), high, joined(bits_of(p.codes, 0, 15), 4, 16))


def _iq4_xs(p: Parts) -> Bytes:
    scales = p.scales + 32
    high, low = joined(bits_of(scales, 4, 3), 2), joined(bits_of(scales, 0, 15), 4)
    return stacked(half_bytes(p.step), high, low, joined(p.codes, 4, 16))


def _q8_0(p: Parts) -> Bytes:
    signed = (p.codes - 128).astype(jnp.int8).view(jnp.uint8)
    return stacked(half_bytes(p.step), signed)


def _steps(p: Parts) -> list[Bytes]:
    """The step and, where there is one, the minimum: of a block's sign for `low`."""
    if p.low is None:
        return [half_bytes(p.step)]
    return [half_bytes(p.step), half_bytes(p.low if p.scales is not None else -p.low)]


def _six_bit_pairs(p: Parts) -> Bytes:
    """Eight scales and eight minima of 6 bits in twelve bytes."""
    pair = p.scales, p.lows
    first = [part[:4] + 64 * jnp.floor(part[4:] / 16) for part in pair]
    rest = bits_of(p.scales[4:], 0, 15) | bits_of(p.lows[4:], 0, 15) << jnp.uint8(4)
    return stacked(*first, rest)


PACK: dict[str, Callable[[Parts], Bytes]] = {
    "q4_0": _four_bits,
    "q4_1": _four_bits,
    "q5_0": _five_bits,
    "q5_1": _five_bits,
    "q8_0": _q8_0,
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
    "iq4_nl": _four_bits,
    "iq4_xs": _iq4_xs,
}
"""How blocks of a type are stored."""
