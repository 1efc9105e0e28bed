"""Blocks of a weight decoded in registers: the left operand of `wgmma`.

`fragment` decodes one block inside a kernel with a few logic operations and one or two
packed floating point operations per pair (see `decode`). Codes of a table are looked up
in shared memory, two at a time; `fill_table` writes it so that no two lanes share a
bank. Under the interpreter, which knows neither registers nor inline instructions, both
work with jnp.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, memref, vector

from .. import versions
from .codes import BLOCK, THREADS, Codec
from .decode import (
    BIAS,
    MANTISSA,
    Decode,
    Machine,
    decoded_block,
    decoded_pairs,
    split_rows,
)

ROWS = plgpu.Layout.WGMMA.reduce(1)
"""Layout of a vector with one entry per column of the weight (row of the tile)."""

_SCALAR = plgpu.Layout.WG_SPLAT(())


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
    bits = ((mantissa + BIAS[decode.dtype]) << mantissa) * 0x00010001
    if interpret:
        return jnp.int32(bits)
    shape = plgpu.ShapeDtypeStruct((), jnp.dtype("int32"), layout=_SCALAR)

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
        return decoded_block(words, decode, rows, table)
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


def constant(value):
    """A 32-bit word, from its bits."""
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


class _Registers(Machine):
    """Emits instructions."""

    def __init__(self, dtype):
        super().__init__(dtype)
        self.type = {"bfloat16": "bf16x2", "float16": "f16x2"}[dtype]
        self.base: Any = None  # of the table

    def constant(self, value):
        return self.once(("constant", value), lambda: _Word(constant(value)))

    def shift(self, word, by):
        if by == 0:
            return word
        shift = arith.shrui if by > 0 else arith.shli
        return _Word(shift(word.value, constant(abs(by))))

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
    return _Word(arith.muli(half, constant(0x00010001)))


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
        magic = (mantissa + BIAS[decode.dtype]) << mantissa
        word = _Word(extra.registers.item())
        machine.once(("constant", magic | magic << 16), lambda: word)
    pairs = decoded_pairs(machine, flat, decode, groups)
    layout = mgpu.WGMMA_LAYOUT
    registers = np.empty(layout.registers_shape((BLOCK, BLOCK)), dtype=object)
    element = mgpu.utils.dtype_to_ir_type(jnp.dtype(decode.dtype))
    for e, pair in enumerate(pairs):
        value = vector.broadcast(ir.VectorType.get((1,), i32), pair.value)
        value = vector.bitcast(ir.VectorType.get((2,), element), value)
        registers[0, e // 2, 0, 0, e % 2, 0, 0, 0, 0] = value
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _thread():
    """Index of this thread in its warpgroup."""
    i32 = ir.IntegerType.get_signless(32)
    thread = arith.index_cast(i32, gpu.thread_id(gpu.Dimension.x))
    return arith.andi(thread, constant(THREADS - 1))


def _shared_address(ref):
    """The 32-bit shared address of a reference."""
    i32 = ir.IntegerType.get_signless(32)
    return llvm.ptrtoint(i32, mgpu.utils.memref_ptr(ref))


def _table_base(table):
    """Address of this lane's column of the table."""
    lane = arith.andi(_thread(), constant(31))
    return arith.addi(_shared_address(table), arith.shli(lane, constant(2)))


def _look_up(word, byte, base):
    """Both values that a byte (two codes) stands for: one conflict-free load."""
    i32 = ir.IntegerType.get_signless(32)
    by = 8 * byte - 7
    shift = arith.shrui if by > 0 else arith.shli
    row = arith.andi(shift(word, constant(abs(by))), constant(0xFF << 7))
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
        for row in (thread, arith.addi(thread, constant(THREADS))):
            index = arith.index_cast(ir.IndexType.get(), row)
            value = memref.load(pairs, [index])
            start = arith.addi(base, arith.shli(row, constant(7)))
            for chunk in range(8):  # rotated by lane: no two lanes share a bank
                place = arith.addi(thread, constant(chunk))
                place = arith.shli(arith.andi(place, constant(7)), constant(4))
                llvm.inline_asm(
                    void,
                    [arith.addi(start, place), value],
                    "st.shared.v4.b32 [$0], {$1, $1, $1, $1};",
                    "r,r",
                    has_side_effects=True,
                )

    emit(pairs, table)  # pyright: ignore[reportCallIssue] - the context is passed
