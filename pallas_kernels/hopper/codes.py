"""Codes in the order in which a warpgroup's threads need them (plain jnp).

A *block* is 64 columns by 64 rows of a weight: one warpgroup's left operand of four
`wgmma.m64nNk16` steps. Each of the 128 threads owns 32 codes of a block, as 16 pairs;
pair `e = 4 s + 2 h + r` of thread `32 w + 4 g + q` holds, in its low and high half,

    column 16 w + 8 r + g,   rows 16 s + 8 h + 2 q  and  16 s + 8 h + 2 q + 1,

which is register `2 h + r` of step `s` of the tensor core. `Codec` says where the bits
of a pair lie in the thread's words; `pack` and `unpack` move codes there and back.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 64
THREADS = 128
PAIRS = 16


class Part(NamedTuple):
    """Where some bits of both codes of a pair lie.

    Attributes:
      word: which word of the thread.
      source: lowest bit, in the low half of the word; the second code 16 bits higher.
      width: how many bits.
      code: their lowest bit in the code.
    """

    word: int
    source: int
    width: int
    code: int


@dataclasses.dataclass(frozen=True)
class Codec:
    """How codes of a kind lie in a thread's words.

    Attributes:
      kind: as in `WeightSpec.kind`; "table" codes must have 4 bits.
      bits: bits of a code, which is also the number of words of a thread.
    """

    kind: str
    bits: int

    @property
    def vector(self) -> int:
        """Words that a thread loads at once."""
        return 4 if self.bits % 4 == 0 else 2 if self.bits % 2 == 0 else 1

    @property
    def parts(self) -> tuple[tuple[Part, ...], ...]:
        """The parts of each of the 16 pairs."""
        return _parts(self.kind, self.bits)


@functools.cache
def _parts(kind, bits):
    if kind == "e2m1":
        # Magnitude three bits, sign nine bits above: one shift moves both where a
        # bfloat16 has them. The fourth pair takes the bits that remain.
        quad = (
            ((6, 3, 0), (15, 1, 3)),
            ((3, 3, 0), (12, 1, 3)),
            ((0, 3, 0), (9, 1, 3)),
            ((10, 2, 0), (13, 1, 2), (14, 1, 3)),
        )
        return tuple(
            tuple(Part(e // 4, *part) for part in quad[e % 4]) for e in range(PAIRS)
        )
    fields = 16 // bits
    whole = [(Part(w, bits * i, bits, 0),) for w in range(bits) for i in range(fields)]
    # Bits left over at the top of each half make up the last pairs.
    spare = [(w, b) for w in range(bits) for b in range(fields * bits, 16)]
    rest = []
    for first in range(0, len(spare), bits):
        run: list[Part] = []
        for code, (word, bit) in enumerate(spare[first : first + bits]):
            last = run[-1] if run else None
            if last and last.word == word and last.source + last.width == bit:
                run[-1] = last._replace(width=last.width + 1)
            else:
                run.append(Part(word, bit, 1, code))
        rest.append(tuple(run))
    return tuple(whole + rest)


def _to_threads(codes):
    """`[..., k, n]` to `[..., n / 64, k / 64, 128, 16, 2]`."""
    *lead, k, n = codes.shape
    d = len(lead)
    # axes: k: K s h q l; n: N w r g
    x = codes.reshape(*lead, k // 64, 4, 2, 4, 2, n // 64, 4, 2, 8)
    order = [5, 0, 6, 8, 3, 1, 2, 7, 4]
    x = x.transpose(*range(d), *(d + i for i in order))
    return x.reshape(*lead, n // 64, k // 64, THREADS, PAIRS, 2)


def from_threads(x):
    """Inverse of `_to_threads`."""
    *lead, n, k, _, _, _ = x.shape
    d = len(lead)
    x = x.reshape(*lead, n, k, 4, 8, 4, 4, 2, 2, 2)
    order = [1, 5, 6, 4, 8, 0, 2, 7, 3]
    x = x.transpose(*range(d), *(d + i for i in order))
    return x.reshape(*lead, k * 64, n * 64)


def pack(codes: jax.Array, codec: Codec) -> jax.Array:
    """Codes in the order in which a warpgroup's threads need them.

    Args:
      codes: uint8 `[..., k, n]`, multiples of 64.
      codec: where bits go.

    Returns:
      int32 `[..., n / 64, k / 64 * bits, 128]`: the words of a block lie together, and
      a thread's next `codec.vector` words side by side.
    """
    x = _to_threads(codes).astype(jnp.uint32)
    words = [jnp.zeros(x.shape[:-2], jnp.uint32)] * codec.bits
    if codec.kind == "table":
        for e in range(PAIRS):
            both = x[..., e, 0] | (x[..., e, 1] << 4)
            words[e // 4] = words[e // 4] | (both << (8 * (e % 4)))
    else:
        for e, parts in enumerate(codec.parts):
            for word, source, width, code in parts:
                field = (x[..., e, :] >> code) & jnp.uint32(2**width - 1)
                both = field[..., 0] | (field[..., 1] << 16)
                words[word] = words[word] | (both << source)
    w = jnp.stack(words, -1)  # [..., N, K, 128, bits]
    *lead, cols, rows, _, bits = w.shape
    v = codec.vector
    w = jnp.swapaxes(w.reshape(*lead, cols, rows, THREADS, bits // v, v), -2, -3)
    w = w.reshape(*lead, cols, rows * bits, THREADS)
    return lax.bitcast_convert_type(w, jnp.int32)


def thread_words(words, codec: Codec):
    """`[..., bits, 128]` as stored to uint32 `[..., 128, bits]` by thread."""
    *lead, bits, _ = words.shape
    v = codec.vector
    w = lax.bitcast_convert_type(words, jnp.uint32)
    w = w.reshape(*lead, bits // v, THREADS, v)
    return jnp.swapaxes(w, -2, -3).reshape(*lead, THREADS, bits)


def thread_codes(words, codec: Codec):
    """uint32 codes `[..., 128, 16, 2]` of a thread's words `[..., 128, bits]`."""
    pairs = []
    for e in range(PAIRS):
        if codec.kind == "table":
            both = words[..., e // 4] >> jnp.uint32(8 * (e % 4))
            low, high = both & jnp.uint32(15), (both >> 4) & jnp.uint32(15)
        else:
            low = high = jnp.zeros(words.shape[:-1], jnp.uint32)
            for word, source, width, code in codec.parts[e]:
                mask = jnp.uint32(2**width - 1)
                w = words[..., word]
                low |= ((w >> jnp.uint32(source)) & mask) << jnp.uint32(code)
                high |= ((w >> jnp.uint32(source + 16)) & mask) << jnp.uint32(code)
        pairs.append(jnp.stack([low, high], -1))
    return jnp.stack(pairs, -2)


def unpack(words: jax.Array, codec: Codec) -> jax.Array:
    """Inverse of `pack`: uint8 `[..., k, n]`."""
    *lead, cols, rows, _ = words.shape
    w = words.reshape(*lead, cols, rows // codec.bits, codec.bits, THREADS)
    codes = thread_codes(thread_words(w, codec), codec)
    return from_threads(codes).astype(jnp.uint8)
