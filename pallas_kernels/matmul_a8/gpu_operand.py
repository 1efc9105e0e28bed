"""Left operands of 8-bit products, made in registers: 4-bit codes, and ones.

A signed nibble in the high half of a byte is the int8 number `16 (code - 8)`, three
operations for eight weights. For float8 a nibble in the low half of a byte is the
subnormal number `code 2**-9`. Rows of other groups are zero.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from .. import hopper, versions
from . import layout

DEEP = 128
"""Rows of a weight per `wgmma` group: 128 bytes, one swizzle."""


def _words_layout():
    return plgpu.Layout.WG_STRIDED((layout.WORDS, 128), vec_size=4)


def _keeps(word, part, parts):
    """Whether a word (16 rows) belongs to one of `parts` groups of 128 rows."""
    return word * parts // layout.WORDS == part


def fragment(words, dtype, part, parts, interpret):
    """The left operand of one group, from 4-bit codes of 64 columns by 128 rows.

    Args:
      words: reference int32 `[8, 128]` in shared memory.
      dtype: "int8" or "float8_e4m3fn".
      part: which group.
      parts: groups in the 128 rows.
      interpret: decode with jnp.

    Returns:
      `[64, 128]` of `dtype` in registers.
    """
    words = versions.load(words, _words_layout())
    if interpret:
        return _fragment_arrays(words, dtype, part, parts)
    shape = plgpu.ShapeDtypeStruct(
        (64, DEEP), jnp.dtype(dtype), layout=plgpu.Layout.WGMMA_8BIT
    )

    @plgpu.inline_mgpu(arg_types=(_words_layout(),), return_type=shape)
    def emit(_, words):
        flat = [
            vector.extract(register, [], [i])
            for register in words.registers.flat
            for i in range(4)
        ]
        halves = []
        for i, word in enumerate(flat):
            pair = (
                _nibbles(word, dtype)
                if _keeps(i, part, parts)
                else [hopper.constant(0)] * 2
            )
            halves += pair
        return _operand(halves, dtype)

    return emit(words)  # pyright: ignore[reportCallIssue] - the context is passed


def _nibbles(word, dtype):
    """Low and high nibbles of a word's bytes, as four numbers each."""
    if dtype == "int8":
        high = hopper.constant(0xF0F0F0F0)
        return [
            arith.andi(arith.shli(word, hopper.constant(4)), high),
            arith.andi(word, high),
        ]
    low = hopper.constant(0x0F0F0F0F)
    word = arith.xori(word, hopper.constant(0x88888888))
    return [
        arith.andi(word, low),
        arith.andi(arith.shrui(word, hopper.constant(4)), low),
    ]


def ones(dtype, part, parts, interpret):
    """The left operand whose products are sums of `x` over one group.

    Args:
      dtype: "int8" or "float8_e4m3fn".
      part: which group.
      parts: groups in the 128 rows.
      interpret: make it with jnp.

    Returns:
      `[64, 128]` of `dtype` in registers.
    """
    if interpret:
        row = lax.broadcasted_iota(jnp.int32, (64, DEEP), 1)
        mine = lax.div(row * parts, jnp.int32(DEEP)) == part
        return jnp.where(mine, jnp.float32(1), jnp.float32(0)).astype(dtype)
    shape = plgpu.ShapeDtypeStruct(
        (64, DEEP), jnp.dtype(dtype), layout=plgpu.Layout.WGMMA_8BIT
    )
    one = 0x01010101 if dtype == "int8" else 0x38383838

    @plgpu.inline_mgpu(arg_types=(), return_type=shape)
    def emit(_):
        kept = [_keeps(i // 2, part, parts) for i in range(2 * layout.WORDS)]
        return _operand([hopper.constant(one if keep else 0) for keep in kept], dtype)

    return emit()  # pyright: ignore[reportCallIssue] - the context is passed


def _operand(halves, dtype):
    """Sixteen registers of four numbers, in the order of `wgmma`'s left operand."""
    i32 = ir.IntegerType.get_signless(32)
    frame = mgpu.WGMMA_LAYOUT_8BIT
    element = mgpu.utils.dtype_to_ir_type(jnp.dtype(dtype))
    registers = np.empty(frame.registers_shape((64, DEEP)), dtype=object)
    flat = np.empty(registers.size, dtype=object)
    for i, half in enumerate(halves):
        value = vector.broadcast(ir.VectorType.get((1,), i32), half)
        flat[i] = vector.bitcast(ir.VectorType.get((4,), element), value)
    signed = True if dtype == "int8" else None
    return mgpu.FragmentedArray(
        _registers=flat.reshape(registers.shape), _layout=frame, _is_signed=signed
    )


def _fragment_arrays(words, dtype, part, parts):
    """`fragment` with arrays: the same numbers, for the interpreter."""
    words = lax.bitcast_convert_type(words, jnp.uint32).reshape(2, 128, 4)
    word = words.transpose(0, 2, 1).reshape(layout.WORDS, 128)
    if dtype == "int8":
        mask = jnp.uint32(0xF0F0F0F0)
        both = [(word << jnp.uint32(4)) & mask, word & mask]
    else:
        mask = jnp.uint32(0x0F0F0F0F)
        word = word ^ jnp.uint32(0x88888888)
        both = [word & mask, (word >> jnp.uint32(4)) & mask]
    index = lax.broadcasted_iota(jnp.int32, (2, layout.WORDS, 128), 1)
    kept = lax.div(index * parts, jnp.int32(layout.WORDS)) == part
    value = jnp.where(kept, jnp.stack(both), jnp.uint32(0))
    number = lax.bitcast_convert_type(value, jnp.dtype(dtype))
    # half, word, warp, g, q, byte: columns are (warp, half, g), rows (word, q, byte)
    number = number.reshape(2, layout.WORDS, 4, 8, 4, 4)
    return number.transpose(2, 0, 3, 1, 4, 5).reshape(64, DEEP)
