"""What a thread does to decode its pairs of a block, on registers or on arrays.

Numbers are decoded exactly: a code is set under the mantissa of a power of two which
is then subtracted (integers), or becomes exponent and mantissa of a subnormal which a
product with a power of two normalizes (minifloats). Scales multiply in the operand's
dtype. NaN and infinity codes of 8-bit floats are not special: they decode as the next
larger numbers would.

`decoded_pairs` is the sequence of instructions; a `Machine` executes or emits them. The
one here executes on arrays, for the interpreter; `operand` has the one for kernels.
"""

import abc
import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from .codes import PAIRS, THREADS, Codec, from_threads, thread_words

MANTISSA = {"bfloat16": 7, "float16": 10}
BIAS = {"bfloat16": 127, "float16": 15}
_MINIFLOAT = {"e2m1": (2, 1, 1), "e4m3": (4, 3, 7), "e5m2": (5, 2, 15)}
"""Exponent bits, mantissa bits, exponent bias."""


@dataclasses.dataclass(frozen=True)
class Decode:
    """What `fragment` makes of a block.

    Attributes:
      codec: where the bits lie.
      dtype: "bfloat16" or "float16".
      offset: subtracted from integer codes (8-bit codes are signed); `dtype` holds it.
      scales: scaled pieces of the 64 rows: 0 (none), 1, 2, 4 or 8.
      shifted: a term is added after the scale.
      centered: an integer of each column and piece, at most 127 (1023 in float16),
        is subtracted before.
    """

    codec: Codec
    dtype: str = "bfloat16"
    offset: float = 0.0
    scales: int = 0
    shifted: bool = False
    centered: bool = False


def split_rows(decode: Decode, rows):
    """Scales, shifts and centers of `fragment`'s `rows`."""
    n = max(decode.scales, 1)
    scale, rows = rows[: decode.scales], rows[decode.scales :]
    shift, rows = (rows[:n], rows[n:]) if decode.shifted else ((), rows)
    return scale, shift, rows[:n] if decode.centered else ()


def decoded_pairs(machine, words, decode, groups):
    """The 16 decoded pairs of a thread.

    Args:
      machine: a `Machine`.
      words: the thread's words.
      decode: what to do.
      groups: scales, shifts and centers; of each piece two words, for registers of
        columns `g` and `g + 8`, with a value in both halves.
    """
    scale, shift, center = groups
    pairs = []
    for e in range(PAIRS):
        s, h, r = e // 4, e // 2 % 2, e % 2
        piece = (2 * s + h) * max(decode.scales, 1) // 8
        value = _value(machine, words, decode, e, center[piece][r] if center else None)
        if scale and shift:
            value = machine.op("fma", value, scale[piece][r], shift[piece][r])
        elif scale:
            value = machine.op("mul", value, scale[piece][r])
        elif shift:
            value = machine.op("add", value, shift[piece][r])
        pairs.append(value)
    return pairs


def _value(machine, words, decode, e, middle):
    """Both values of pair `e`, less offset and `middle`."""
    codec, dtype = decode.codec, decode.dtype
    mantissa, bias = MANTISSA[dtype], BIAS[dtype]
    if codec.kind == "int":
        value, middle = _integer(machine, words, decode, e, middle)
    elif codec.kind == "table":
        value = machine.look_up(words[e // 4], e % 4)
    else:
        exponent, small, small_bias = _MINIFLOAT[codec.kind]
        sign = exponent + small
        moves = []
        for word, source, width, code in codec.parts[e]:
            below = min(width, sign - code)
            if below > 0:
                moves.append((word, source, below, code + mantissa - small))
            if below < width:
                moves.append((word, source + below, 1, 15))
        value = machine.gather(words, moves)
        if bias != small_bias:
            value = machine.raise_power(value, bias - small_bias)
    return value if middle is None else machine.op("sub", value, middle)


def _integer(machine, words, decode, e, middle):
    """An integer pair less its offset, and what is left to subtract."""
    codec, dtype, offset = decode.codec, decode.dtype, decode.offset
    mantissa, bias = MANTISSA[dtype], BIAS[dtype]
    one = 2.0**mantissa
    magic = (mantissa + bias) << mantissa  # the bits of `one`
    parts = codec.parts[e]
    if codec.bits > mantissa:
        # Signed 8-bit codes in bfloat16: the sign bit is the lowest exponent bit of
        # what is subtracted, 128 or 256.
        ((word, source, _, _),) = parts
        low = machine.gather(words, [(word, source, 7, 0)], magic)
        high = machine.gather(words, [(word, source + 7, 1, 7)], magic)
        value = machine.op("sub", low, high)
        if offset:
            value = machine.op("sub", value, machine.number(offset))
        return value, middle
    if codec.bits == 8:  # signed, in float16: 1024 + (code ^ 128) - 1152
        ((word, source, _, _),) = parts
        raw = machine.gather(words, [(word, source, 8, 0)])
        raw = machine.xor(raw, (magic | 128) * 0x00010001)
        value = machine.op("sub", raw, machine.number(one + 128))
        if offset:
            value = machine.op("sub", value, machine.number(offset))
        return value, middle
    place = 0
    if len(parts) == 1:  # a shift serves all fields that fit under the mantissa
        starts = [0]
        for i in range(16 // codec.bits):
            if codec.bits * (i + 1) - starts[-1] > mantissa:
                starts.append(codec.bits * i)
        place = parts[0].source - max(s for s in starts if s <= parts[0].source)
    moves = [(w, source, width, code + place) for w, source, width, code in parts]
    raw = machine.gather(words, moves, magic)
    if place == 0 and middle is not None and not offset:
        # The sum is exact for integers below `one`, which 127 is in bfloat16.
        return raw, machine.op("add", middle, machine.number(one))
    start = one * 2.0**-place
    whole = holds(start + offset, dtype)
    last = start + offset if whole else start
    if place:
        factor = machine.number(2.0**-place)
        value = machine.op("fma", raw, factor, machine.number(-last))
    else:
        value = machine.op("sub", raw, machine.number(last))
    if offset and not whole:
        value = machine.op("sub", value, machine.number(offset))
    return value, middle


def holds(value: float, dtype) -> bool:
    """Whether a dtype represents a number."""
    return float(np.asarray(value, jnp.dtype(dtype))) == value


class Machine(abc.ABC):
    """Instructions on 32-bit words that hold two 16-bit floats; each is made once."""

    def __init__(self, dtype):
        self.dtype = dtype
        self._made: dict[Any, Any] = {}

    def once(self, key, make):
        """The value made for a key before, or now."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def number(self, value):
        """A float in both halves."""
        bits = int(np.asarray(value, jnp.dtype(self.dtype)).view(np.uint16))
        return self.constant(bits | bits << 16)

    def gather(self, words, moves, start=None):
        """ORs the fields `(word, source, width, target)` of both halves."""
        masks: dict[tuple[int, int], int] = {}
        for word, source, width, target in moves:
            key = (word, source - target)
            masks[key] = masks.get(key, 0) | ((2**width - 1) << target)
        total = None if start is None else self.constant(start | start << 16)
        for (word, by), mask in masks.items():
            field = self.once((word, by), lambda w=word, b=by: self.shift(words[w], b))
            field = field & self.constant(mask | mask << 16)
            total = field if total is None else field | total
        return total

    def xor(self, word, mask):
        """Flips bits."""
        return word ^ self.constant(mask)

    @abc.abstractmethod
    def constant(self, value):
        """A word."""

    @abc.abstractmethod
    def shift(self, word, by):
        """A word moved `by` bits to the right (left if negative)."""

    @abc.abstractmethod
    def op(self, name, *args):
        """A rounded "add", "sub", "mul" or "fma" of both halves."""

    @abc.abstractmethod
    def raise_power(self, value, power):
        """`value 2**power`, also of subnormals."""

    @abc.abstractmethod
    def look_up(self, word, byte):
        """The pair of table entries that a byte stands for."""


class _Arrays(Machine):
    """Executes on uint32 arrays, one entry per thread."""

    def __init__(self, dtype, table=None):
        super().__init__(dtype)
        self.table: Any = table

    def constant(self, value):
        return jnp.full((1,), value, jnp.uint32)

    def shift(self, word, by):
        return word >> jnp.uint32(by) if by >= 0 else word << jnp.uint32(-by)

    def _floats(self, word):
        halves = jnp.stack([word & 0xFFFF, word >> 16]).astype(jnp.uint16)
        halves = lax.bitcast_convert_type(halves, jnp.dtype(self.dtype))
        return halves.astype(jnp.float32)

    def _word(self, floats):
        raw = lax.bitcast_convert_type(floats.astype(jnp.dtype(self.dtype)), jnp.uint16)
        low, high = raw.astype(jnp.uint32)
        return low | (high << 16)

    def op(self, name, *args):
        first, second, *third = (self._floats(a) for a in args)
        if name in ("mul", "fma"):
            value = first * second
            return self._word(value + third[0] if third else value)
        return self._word(first + second if name == "add" else first - second)

    def raise_power(self, value, power):
        # In integers: a CPU may take subnormals for zero.
        m, bias = MANTISSA[self.dtype], BIAS[self.dtype]
        raw = jnp.stack([value & 0xFFFF, value >> 16]).astype(jnp.int32)
        exponent = (raw >> m) & (2 ** (15 - m) - 1)
        part = raw & (2**m - 1)
        part = jnp.where(exponent > 0, part + 2**m, part).astype(jnp.float32)
        size = jnp.ldexp(part, jnp.maximum(exponent, 1) - (bias + m - power))
        return self._word(jnp.where(raw >> 15 > 0, -size, size))

    def look_up(self, word, byte):
        index = (word >> jnp.uint32(8 * byte)) & jnp.uint32(255)
        found = jnp.take(self.table[:, 0], index.astype(jnp.int32), axis=0)
        return lax.bitcast_convert_type(found, jnp.uint32)


def decoded_block(words, decode, rows, table):
    """`fragment` on arrays: the same instructions on 128 threads at once."""
    codec, dtype = decode.codec, jnp.dtype(decode.dtype)
    machine = _Arrays(decode.dtype, table)

    def spread(vector):
        raw = lax.bitcast_convert_type(vector, jnp.uint16).astype(jnp.uint32)
        raw = (raw | (raw << 16)).reshape(4, 2, 8, 1)
        of_thread = lax.broadcast_in_dim(raw, (4, 2, 8, 4), (0, 1, 2, 3))
        return [of_thread[:, r].reshape(THREADS) for r in range(2)]

    groups = [[spread(v) for v in group] for group in split_rows(decode, rows)]
    words = thread_words(words, codec)
    pairs = decoded_pairs(
        machine, [words[:, i] for i in range(codec.bits)], decode, groups
    )
    value = jnp.stack(pairs, 1)[None, None]
    halves = jnp.stack([value & 0xFFFF, value >> 16], -1).astype(jnp.uint16)
    return lax.bitcast_convert_type(from_threads(halves).T, dtype)
