"""Pieces of Hopper kernels (Mosaic GPU): weights decoded in registers, a TMA ring.

A *block* is 64 columns by 64 rows of a weight: one warpgroup's left operand of four
`wgmma.m64nNk16` steps. Each of the 128 threads owns 32 codes of a block, as 16 pairs;
pair `e = 4 s + 2 h + r` of thread `32 w + 4 g + q` holds, in its low and high half,

    column 16 w + 8 r + g,   rows 16 s + 8 h + 2 q  and  16 s + 8 h + 2 q + 1,

which is register `2 h + r` of step `s` of the tensor core. `Codec` says where the bits
of a pair lie in the thread's words: `pack` and `unpack` move codes there and back
(plain jnp), `fragment` decodes one block inside a kernel with a few logic operations
and one or two packed floating point operations per pair, and gives the array that
`plgpu.wgmma` takes from registers.

Numbers are decoded exactly: a code is set under the mantissa of a power of two which
is then subtracted (integers), or becomes exponent and mantissa of a subnormal which a
product with a power of two normalizes (minifloats). Scales multiply in the operand's
dtype. NaN and infinity codes of 8-bit floats are not special: they decode as the next
larger numbers would.

Under the interpreter, which knows neither registers nor inline instructions, `fragment`
decodes the same words with jnp.
"""

import abc
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, memref, vector

from . import versions

BLOCK = 64
THREADS = 128
PAIRS = 16
ROWS = plgpu.Layout.WGMMA.reduce(1)
"""Layout of a vector with one entry per column of the weight (row of the tile)."""

_SCALAR = plgpu.Layout.WG_SPLAT(())

MANTISSA = {"bfloat16": 7, "float16": 10}
_BIAS = {"bfloat16": 127, "float16": 15}
_MINIFLOAT = {"e2m1": (2, 1, 1), "e4m3": (4, 3, 7), "e5m2": (5, 2, 15)}
"""Exponent bits, mantissa bits, exponent bias."""


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


# --- Packing (jnp, outside kernels) --------------------------------------------------


def _to_threads(codes):
    """`[..., k, n]` to `[..., n / 64, k / 64, 128, 16, 2]`."""
    *lead, k, n = codes.shape
    d = len(lead)
    # axes: k: K s h q l; n: N w r g
    x = codes.reshape(*lead, k // 64, 4, 2, 4, 2, n // 64, 4, 2, 8)
    order = [5, 0, 6, 8, 3, 1, 2, 7, 4]
    x = x.transpose(*range(d), *(d + i for i in order))
    return x.reshape(*lead, n // 64, k // 64, THREADS, PAIRS, 2)


def _from_threads(x):
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


def _thread_words(words, codec: Codec):
    """`[..., bits, 128]` as stored to uint32 `[..., 128, bits]` by thread."""
    *lead, bits, _ = words.shape
    v = codec.vector
    w = lax.bitcast_convert_type(words, jnp.uint32)
    w = w.reshape(*lead, bits // v, THREADS, v)
    return jnp.swapaxes(w, -2, -3).reshape(*lead, THREADS, bits)


def _thread_codes(words, codec: Codec):
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
    codes = _thread_codes(_thread_words(w, codec), codec)
    return _from_threads(codes).astype(jnp.uint8)


# --- Decoding in registers -----------------------------------------------------------


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


def load_words(ref, codec: Codec):
    """The words of a block, `ref [bits, 128]` int32 in shared memory, in registers."""
    layout = plgpu.Layout.WG_STRIDED((codec.bits, THREADS), vec_size=codec.vector)
    return versions.load(ref, layout)


def load_row(ref):
    """A vector with one entry per column of a block in registers (layout `ROWS`)."""
    return versions.load(ref, ROWS, optimized=False)


def magic_word(decode: Decode, *, interpret=False):
    """The bits that make an integer a float, in a register (call before loops).

    The compiler would otherwise write the constant again for each of the instructions
    that use it, since they have another one. So that it cannot, the size of shared
    memory, of which no bit above the 20th is set, is shifted out and added.
    """
    mantissa = MANTISSA[decode.dtype]
    bits = ((mantissa + _BIAS[decode.dtype]) << mantissa) * 0x00010001
    if interpret:
        return jnp.int32(bits)
    shape = plgpu.ShapeDtypeStruct((), jnp.int32, layout=_SCALAR)

    @plgpu.inline_mgpu(arg_types=(), return_type=shape)
    def emit(_):
        i32 = ir.IntegerType.get_signless(32)
        text = (
            "{ .reg .b32 t; mov.u32 t, %dynamic_smem_size; shr.u32 t, t, 24; "
            f"add.u32 $0, t, {bits}; }}"
        )
        value: Any = llvm.inline_asm(i32, [], text, "=r", has_side_effects=True)
        return mgpu.FragmentedArray.splat(value, (), is_signed=True)

    return emit()  # pyright: ignore[reportCallIssue] - the context is passed


def fragment(
    words, decode: Decode, rows=(), table=None, magic=None, *, interpret=False
):
    """Decodes one block to the left operand of `wgmma`.

        w[j, i] = (value(code) - center[j, p]) scale[j, p] + shift[j, p]

    with `p` the piece of the 64 rows in which `i` lies.

    Args:
      words: int32 `[bits, 128]` from `load_words`.
      decode: what to do.
      rows: vectors `[64]` of `decode.dtype` in layout `ROWS`: scales, then shifts, then
        centers, each one per piece, as far as `decode` names them.
      table: for "table" codes, a reference int32 `[256, 32]` in shared memory from
        `fill_table`.
      magic: from `magic_word`, for integers.
      interpret: decode with jnp.

    Returns:
      `[64, 64]` of `decode.dtype`, columns of the weight by rows.
    """
    if interpret:
        return _fragment_arrays(words, decode, rows, table)
    layout = plgpu.Layout.WG_STRIDED(
        (decode.codec.bits, THREADS), vec_size=decode.codec.vector
    )
    types: list[Any] = [layout, *([ROWS] * len(rows))]
    arguments = [words, *rows]
    if table is not None:
        types.append(plgpu.RefType())
        arguments.append(table)
    elif magic is not None:
        types.append(_SCALAR)
        arguments.append(magic)
    shape = plgpu.ShapeDtypeStruct(
        (BLOCK, BLOCK), jnp.dtype(decode.dtype), layout=plgpu.Layout.WGMMA
    )

    @plgpu.inline_mgpu(arg_types=tuple(types), return_type=shape)
    def emit(_, words, *rest):
        vectors, last = rest[: len(rows)], (*rest[len(rows) :], None)[0]
        return _emit(words, decode, vectors, last)

    return emit(*arguments)


def split_rows(decode: Decode, rows):
    """Scales, shifts and centers of `fragment`'s `rows`."""
    n = max(decode.scales, 1)
    scale, rows = rows[: decode.scales], rows[decode.scales :]
    shift, rows = (rows[:n], rows[n:]) if decode.shifted else ((), rows)
    return scale, shift, rows[:n] if decode.centered else ()


def _fragment_arrays(words, decode, rows, table):
    """`fragment` with arrays: the same instructions on 128 threads at once."""
    codec, dtype = decode.codec, jnp.dtype(decode.dtype)
    machine = _Arrays(decode.dtype, table)

    def spread(vector):
        raw = lax.bitcast_convert_type(vector, jnp.uint16).astype(jnp.uint32)
        raw = (raw | (raw << 16)).reshape(4, 2, 8, 1)
        of_thread = lax.broadcast_in_dim(raw, (4, 2, 8, 4), (0, 1, 2, 3))
        return [of_thread[:, r].reshape(THREADS) for r in range(2)]

    groups = [[spread(v) for v in group] for group in split_rows(decode, rows)]
    words = _thread_words(words, codec)
    pairs = _pairs(machine, [words[:, i] for i in range(codec.bits)], decode, groups)
    value = jnp.stack(pairs, 1)[None, None]
    halves = jnp.stack([value & 0xFFFF, value >> 16], -1).astype(jnp.uint16)
    return lax.bitcast_convert_type(_from_threads(halves).T, dtype)


def _pairs(machine, words, decode, groups):
    """The 16 decoded pairs of a thread.

    Args:
      machine: what executes: `_Registers` or `_Arrays`.
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
    mantissa, bias = MANTISSA[dtype], _BIAS[dtype]
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
    mantissa, bias = MANTISSA[dtype], _BIAS[dtype]
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


class _Machine(abc.ABC):
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


class _Arrays(_Machine):
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
        m, bias = MANTISSA[self.dtype], _BIAS[self.dtype]
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


def _constant(value):
    i32 = ir.IntegerType.get_signless(32)
    value &= 0xFFFFFFFF
    value -= (value >> 31) << 32
    return arith.constant(i32, ir.IntegerAttr.get(i32, value))


class _Word:
    """A 32-bit value of the compiler with Python's bit operators."""

    def __init__(self, value):
        self.value = value

    def __and__(self, other):
        return _Word(arith.andi(self.value, other.value))

    def __or__(self, other):
        return _Word(arith.ori(self.value, other.value))

    def __xor__(self, other):
        return _Word(arith.xori(self.value, other.value))


class _Registers(_Machine):
    """Emits instructions."""

    def __init__(self, dtype):
        super().__init__(dtype)
        self.type = {"bfloat16": "bf16x2", "float16": "f16x2"}[dtype]
        self.base: Any = None  # of the table

    def constant(self, value):
        return self.once(("constant", value), lambda: _Word(_constant(value)))

    def shift(self, word, by):
        if by == 0:
            return word
        shift = arith.shrui if by > 0 else arith.shli
        return _Word(shift(word.value, _constant(abs(by))))

    def op(self, name, *args):
        i32 = ir.IntegerType.get_signless(32)
        places = ", ".join(f"${i}" for i in range(len(args) + 1))
        return _Word(
            llvm.inline_asm(
                i32,
                [a.value for a in args],
                f"{name}.rn.{self.type} {places};",
                ",".join(["=r"] + ["r"] * len(args)),
                has_side_effects=False,
            )
        )

    def raise_power(self, value, power):
        return self.op("mul", value, self.number(2.0**power))

    def look_up(self, word, byte):
        return _Word(_look_up(word.value, byte, self.base))


def _splat(register):
    """A 16-bit row value (vector<1>) in both halves of a word."""
    i16 = ir.IntegerType.get_signless(16)
    i32 = ir.IntegerType.get_signless(32)
    half = vector.bitcast(ir.VectorType.get((1,), i16), register)
    half = arith.extui(i32, vector.extract(half, [], [0]))
    return _Word(arith.muli(half, _constant(0x00010001)))


def _emit(words, decode: Decode, rows, extra):
    """The registers of a decoded block."""
    codec, i32 = decode.codec, ir.IntegerType.get_signless(32)
    flat = [
        _Word(vector.extract(register, [], [i]))
        for register in words.registers.flat
        for i in range(codec.vector)
    ]
    # Row vectors have two registers: columns g and g + 8 of the warp.
    groups = [
        [[_splat(v.registers.flat[r]) for r in range(2)] for v in group]
        for group in split_rows(decode, rows)
    ]
    machine = _Registers(decode.dtype)
    if codec.kind == "table":
        machine.base = _table_base(extra)
    elif extra is not None:
        mantissa = MANTISSA[decode.dtype]
        magic = (mantissa + _BIAS[decode.dtype]) << mantissa
        word = _Word(extra.registers.item())
        machine.once(("constant", magic | magic << 16), lambda: word)
    pairs = _pairs(machine, flat, decode, groups)
    layout = mgpu.WGMMA_LAYOUT
    registers = np.empty(layout.registers_shape((BLOCK, BLOCK)), dtype=object)
    element = mgpu.utils.dtype_to_ir_type(jnp.dtype(decode.dtype))
    for e, pair in enumerate(pairs):
        value = vector.broadcast(ir.VectorType.get((1,), i32), pair.value)
        value = vector.bitcast(ir.VectorType.get((2,), element), value)
        registers[0, e // 2, 0, 0, e % 2, 0, 0, 0, 0] = value
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


# --- Tables --------------------------------------------------------------------------


def _thread():
    """Index of this thread in its warpgroup."""
    i32 = ir.IntegerType.get_signless(32)
    thread = arith.index_cast(i32, gpu.thread_id(gpu.Dimension.x))
    return arith.andi(thread, _constant(THREADS - 1))


def _shared_address(ref):
    """The 32-bit shared address of a reference."""
    i32 = ir.IntegerType.get_signless(32)
    return llvm.ptrtoint(i32, mgpu.utils.memref_ptr(ref))


def _table_base(table):
    """Address of this lane's column of the table."""
    lane = arith.andi(_thread(), _constant(31))
    return arith.addi(_shared_address(table), arith.shli(lane, _constant(2)))


def _look_up(word, byte, base):
    """Both values that a byte (two codes) stands for: one conflict-free load."""
    i32 = ir.IntegerType.get_signless(32)
    by = 8 * byte - 7
    shift = arith.shrui if by > 0 else arith.shli
    row = arith.andi(shift(word, _constant(abs(by))), _constant(0xFF << 7))
    return llvm.inline_asm(
        i32,
        [arith.addi(row, base)],
        "ld.shared.b32 $0, [$1];",
        "=r,r",
        has_side_effects=False,
    )


def table_pairs(table: jax.Array, dtype) -> jax.Array:
    """The 256 pairs of a table's entries.

    Args:
      table: float `[..., 2**bits]`, at most 16 entries.
      dtype: "bfloat16" or "float16".

    Returns:
      int32 `[..., 256]`: entry `i` has the value of code `i % 16` in its low half and
      that of `i // 16` in its high half.
    """
    pad = [(0, 0)] * (table.ndim - 1) + [(0, 16 - table.shape[-1])]
    half = jnp.pad(table.astype(jnp.dtype(dtype)), pad)
    half = lax.bitcast_convert_type(half, jnp.uint16).astype(jnp.uint32)
    index = np.arange(256)
    both = half[..., index % 16] | (half[..., index // 16] << 16)
    return lax.bitcast_convert_type(both, jnp.int32)


def fill_table(pairs, table, *, interpret=False):
    """Copies each of 256 words 32 times, so that every lane reads its own bank.

    Args:
      pairs: reference int32 `[256]` in shared or global memory.
      table: reference int32 `[256, 32]` in shared memory, written by one warpgroup.
      interpret: write with jnp.
    """
    if interpret:
        table[...] = lax.broadcast_in_dim(pairs[...], (256, 32), (0,))
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def emit(_, pairs, table):
        thread, void = _thread(), ir.Type.parse("!llvm.void")
        base = _shared_address(table)
        for row in (thread, arith.addi(thread, _constant(THREADS))):
            index = arith.index_cast(ir.IndexType.get(), row)
            value = memref.load(pairs, [index])
            start = arith.addi(base, arith.shli(row, _constant(7)))
            for chunk in range(8):  # rotated by lane: no two lanes share a bank
                place = arith.addi(thread, _constant(chunk))
                place = arith.shli(arith.andi(place, _constant(7)), _constant(4))
                llvm.inline_asm(
                    void,
                    [arith.addi(start, place), value],
                    "st.shared.v4.b32 [$0], {$1, $1, $1, $1};",
                    "r,r",
                    has_side_effects=True,
                )

    emit(pairs, table)  # pyright: ignore[reportCallIssue] - the context is passed


# --- Calling -------------------------------------------------------------------------


def kernel(body, *, out_type, scratch, grid, threads, name, cost, interpret=False):
    """A Mosaic GPU kernel on a one-dimensional grid ("cta") of warpgroups ("wg").

    Args:
      body: `body(*inputs, *outputs, **scratch)`.
      out_type: shapes of the outputs.
      scratch: allocations by name, shared by the warpgroups of a block.
      grid: number of blocks.
      threads: warpgroups per block.
      name: name of the kernel.
      cost: a `pl.CostEstimate`.
      interpret: False, or parameters of the GPU interpreter.

    Returns:
      A function of the inputs.
    """
    mesh = plgpu.Mesh(
        grid=(grid,), grid_names=("cta",), num_threads=threads, thread_name="wg"
    )

    def scoped(*refs):
        pl.run_scoped(functools.partial(body, *refs), collective_axes="wg", **scratch)

    params = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)
    return pl.kernel(
        scoped,
        out_type=out_type,
        mesh=mesh,
        compiler_params=params,
        interpret=interpret,
        cost_estimate=cost,
        name=name,
    )


def transpose(ref):
    """The transpose of a matrix reference."""
    return versions.transpose_ref(ref)


def tile(shape, dtype, stages=None):
    """Shared memory for operands of `wgmma`: 128-byte swizzled, 64 16-bit columns."""
    lead = () if stages is None else (stages,)
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM((*lead, *shape), dtype, transforms=transforms)


MEMORY_REGISTERS = 40
"""Registers per thread of a warpgroup that only copies."""


def registers(warpgroups: int) -> int:
    """Registers per thread of each compute warpgroup beside one that copies.

    A block starts with as many registers per thread as fit, in steps of 8, and cannot
    have more in total afterwards: one that asks for more waits for ever.
    """
    count = warpgroups + 1
    total = min(65536 // (128 * count), 248) // 8 * 8 * count
    return min(232, (total - MEMORY_REGISTERS) // warpgroups // 8 * 8)
