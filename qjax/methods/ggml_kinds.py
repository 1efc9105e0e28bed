"""llama.cpp's types of one code per weight, as numbers that can be chosen.

    w = step * scale * value(code) - low * minimum

with `step` and `low` float16 numbers of a block and `scale` and `minimum` integers of
its groups. `value(code)` is `code - zero`, or an entry of the type's table. Arrays hold
the elements of a group, groups, or bytes on their first axes; all others are blocks.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from qjax.formats.ggml import TYPES
from qjax.formats.ggml_iq import IQ4
from qjax.formats.ggml_parts import AffineParts
from qjax.formats.ggml_parts import half as half_of
from qjax.formats.kmeans import nearest
from qjax.methods.ggml_bytes import half, half_bytes
from qjax.methods.ggml_pack import PACK, Parts

Bytes = UInt8[Array, " b *blocks"]


class Kind(NamedTuple):
    """What a type can store.

    Attributes:
      group: weights that share integers.
      codes: number of codes.
      zero: the code of zero, or of the minimum.
      step, low: bytes where the step and the minimum's step begin.
      scales: least and greatest integer of a group's scale, none with one group.
      lows: greatest integer of a group's minimum.
      table: the values of codes where they are not evenly spaced.
    """

    group: int
    codes: int
    zero: int
    step: int
    low: int | None = None
    scales: tuple[int, int] = (1, 1)
    lows: int = 1
    table: tuple[int, ...] | None = None

    @property
    def integers(self) -> bool:
        """Whether groups have integers."""
        return self.scales != (1, 1)

    def codes_of(self, u: Float[Array, "..."]) -> Float[Array, "..."]:
        """The nearest codes of values in units of the scale, from 0 on."""
        if self.table is not None:
            return nearest(u, jnp.asarray(self.table, jnp.float32)).astype(jnp.float32)
        return jnp.clip(jnp.round(u) + self.zero, 0, self.codes - 1)

    def values(self, codes: Float[Array, "..."]) -> Float[Array, "..."]:
        """What codes stand for, in units of the scale."""
        if self.table is None:
            return codes - self.zero
        steps = np.diff(np.asarray(self.table, np.float32))
        above = (jnp.where(codes > i, float(s), 0.0) for i, s in enumerate(steps))
        return sum(above, jnp.full_like(codes, float(self.table[0])))

    def bounded(self, step, scales, low, lows) -> "State":
        """What can be stored of steps and real-valued integers."""
        scales = jnp.clip(jnp.round(scales), *self.scales)
        least = 0 if self.integers else 1
        lows = jnp.clip(jnp.round(lows), least, self.lows)
        return State(half(step), scales, half(low), lows)


class State(NamedTuple):
    """Steps `[*blocks]` and integers `[groups, *blocks]`."""

    step: Array
    scales: Array
    low: Array
    lows: Array

    @property
    def scale(self) -> Array:
        """Of groups, `[groups, *blocks]`."""
        return self.step * self.scales

    @property
    def minimum(self) -> Array:
        """Of groups, `[groups, *blocks]`."""
        return self.low * self.lows


KINDS = {
    "q4_0": Kind(32, 16, 8, 0),
    "q4_1": Kind(32, 16, 0, 0, 2),
    "q5_0": Kind(32, 32, 16, 0),
    "q5_1": Kind(32, 32, 0, 0, 2),
    "q8_0": Kind(32, 256, 128, 0),
    "q2_k": Kind(16, 4, 0, 80, 82, (0, 15), 15),
    "q3_k": Kind(16, 8, 4, 108, None, (-32, 31)),
    "q4_k": Kind(32, 16, 0, 0, 2, (0, 63), 63),
    "q5_k": Kind(32, 32, 0, 0, 2, (0, 63), 63),
    "q6_k": Kind(16, 64, 32, 208, None, (-128, 127)),
    "iq4_nl": Kind(32, 16, 0, 0, table=IQ4),
    "iq4_xs": Kind(32, 16, 0, 0, None, (-32, 31), table=IQ4),
}
"""By the name of the type."""

POINTS = {"iq1_s": 32, "iq2_xxs": 32, "iq2_xs": 16, "iq2_s": 16}
POINTS |= {"iq3_xxs": 32, "iq3_s": 32}
"""Weights that share a scale, by types of several weights to a code.

Their weights are multiples of a step, the first two bytes of a block.
"""

BETTER = frozenset({*KINDS, *POINTS})
"""Types that have a better encoder."""


def read(name: str, blocks: Bytes) -> State:
    """The state of stored blocks."""
    kind, split = KINDS[name], TYPES[name].parts
    assert split is not None
    parts = split(jnp.moveaxis(blocks, 0, -1)[..., None])
    scale = jnp.moveaxis(parts.scale[..., 0], -1, 0)
    step = half_at(blocks, kind.step)
    low, lows = jnp.zeros_like(step), jnp.zeros_like(scale)
    if kind.low is not None:
        assert isinstance(parts, AffineParts)
        assert parts.minimum is not None
        minimum = jnp.moveaxis(parts.minimum[..., 0], -1, 0)
        low = half_at(blocks, kind.low)
        low = low if kind.integers else -low
        lows = quotient(minimum, low)
    return kind.bounded(step, quotient(scale, step), low, lows)


def stored(name: str, state: State, codes: Float[Array, " e *blocks"]) -> Bytes:
    """The bytes of blocks."""
    kind = KINDS[name]
    parts = Parts(
        codes,
        state.step,
        state.scales if kind.integers else None,
        None if kind.low is None else state.low,
        state.lows if kind.integers else None,
    )
    return PACK[name](parts)


def decoded(name: str, blocks: Bytes) -> Float[Array, " e *blocks"]:
    """The weights of blocks."""
    w = TYPES[name].decode(jnp.moveaxis(blocks, 0, -1)[..., None])
    return jnp.moveaxis(w[..., 0], -1, 0)


def with_step(blocks: Bytes, step: Float[Array, "*blocks"]) -> Bytes:
    """Blocks of one of `POINTS` with another step, as stored."""
    return jnp.concatenate([half_bytes(half(step)), blocks[2:]])


def quotient(top: Array, bottom: Array) -> Array:
    """`top / bottom`, 0 for no bottom."""
    some = bottom != 0
    return jnp.where(some, top / jnp.where(some, bottom, 1.0), 0.0)


def half_at(blocks: Bytes, place: int) -> Float[Array, "*blocks"]:
    """The float16 number that begins at a byte."""
    pair = jnp.moveaxis(blocks[place : place + 2], 0, -1)[..., None]
    return half_of(pair)[..., 0, 0]
