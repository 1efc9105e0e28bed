"""The parts of llama.cpp's blocks, and how bytes are cut into fields.

A decoder splits blocks `[..., bytes, out]` into integer codes, one per weight, and
float32 scales, one per group; these parts are what products work on, and their
`values()` the decoded weights. Every type is of one of two kinds:

    AffineParts: w = scale * (code - offset) - minimum
    TableParts:  w = scale * table[code]

All products are exact in float32 (a float16 scale has 11 bits, what multiplies it at
most 12 together), so that no order of operations and no fused multiply-add changes a
bit of the weights; only the subtraction of a minimum rounds.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped, UInt8

_WORDS = {2: jnp.uint16, 4: jnp.uint32}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scale", "minimum"],
    meta_fields=["bits", "offset"],
)
@dataclasses.dataclass(frozen=True)
class AffineParts:
    """`w = scale * (code - offset) - minimum`.

    Attributes:
      codes: uint8, or int8 for signed codes, `[..., elements, out]`.
      scale: float32 `[..., elements / group, out]`.
      minimum: float32 like `scale`, or None for none.
      bits: width of a code; codes are below `2**bits`, signed ones have 8.
      offset: the zero-point of all codes.
    """

    codes: Shaped[Array, "*lead e out"]
    scale: Float[Array, "*lead g out"]
    minimum: Float[Array, "*lead g out"] | None
    bits: int
    offset: float = 0.0

    @property
    def group(self) -> int:
        """Consecutive weights that share a scale."""
        return self.codes.shape[-2] // self.scale.shape[-2]

    def values(self) -> Float[Array, "*lead e out"]:
        """The weights, float32."""
        codes = self.codes.astype(jnp.float32) - self.offset
        w = _grouped(codes, self.group) * self.scale[..., :, None, :]
        if self.minimum is not None:
            w = w - self.minimum[..., :, None, :]
        return w.reshape(self.codes.shape)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scale"],
    meta_fields=["table", "exponents"],
)
@dataclasses.dataclass(frozen=True)
class TableParts:
    """`w = scale * table[code]`.

    Attributes:
      codes: uint8 `[..., elements, out]`.
      scale: float32 `[..., elements / group, out]`.
      table: the value of each code.
      exponents: whether scales are powers of two, subnormal ones among them.
    """

    codes: UInt8[Array, "*lead e out"]
    scale: Float[Array, "*lead g out"]
    table: tuple[int, ...]
    exponents: bool = False

    @property
    def group(self) -> int:
        """Consecutive weights that share a scale."""
        return self.codes.shape[-2] // self.scale.shape[-2]

    def values(self) -> Float[Array, "*lead e out"]:
        """The weights, float32."""
        table = jnp.asarray(self.table, jnp.float32)
        entries = _grouped(table.at[self.codes].get(mode="clip"), self.group)
        scale = self.scale[..., :, None, :]
        w = times_power(entries, scale) if self.exponents else entries * scale
        return w.reshape(self.codes.shape)


def _grouped(x, group):
    *lead, rows, out = x.shape
    return x.reshape(*lead, rows // group, group, out)


def times_power(
    x: Float[Array, "..."], power: Float[Array, "..."]
) -> Float[Array, "..."]:
    """`x * power` computed on bits, for XLA's CPU and TPU backends flush subnormals.

    Args:
      x: float32 zeros and integers of few bits.
      power: float32 powers of two from `2**-128` on, broadcastable to `x`.

    Returns:
      The product, infinite where it overflows.
    """
    p = lax.bitcast_convert_type(power, jnp.int32)
    p = jnp.where(p >= 1 << 23, p >> 23, (p >> 22) - 1)  # biased; 0 and -1: subnormal
    bits = lax.bitcast_convert_type(x, jnp.int32)
    mantissa = bits & jnp.int32(0x7FFFFF)
    exponent = ((bits >> 23) & jnp.int32(0xFF)) + p - 127
    low = (mantissa | jnp.int32(1 << 23)) >> jnp.clip(1 - exponent, 0, 24)
    size = jnp.where(exponent > 0, (exponent << 23) | mantissa, low)
    size = jnp.where(exponent > 254, jnp.int32(0x7F800000), size)
    size = jnp.where(x == 0, jnp.int32(0), size)
    signed = jnp.where(x < 0, size | jnp.int32(-(1 << 31)), size)
    return lax.bitcast_convert_type(signed, jnp.float32)


def cut(blocks: UInt8[Array, "*lead b out"], *sizes: int) -> list[UInt8[Array, "..."]]:
    """The consecutive fields of `sizes` bytes that blocks consist of."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [blocks[..., e - n : e, :] for e, n in zip(ends, sizes, strict=True)]


def fields(
    x: Shaped[Array, "*lead n out"], bits: int, run: int = 1, count: int | None = None
) -> UInt8[Array, "*lead m out"]:
    """Fields of bits in unsigned integers, the lowest first.

    Args:
      x: unsigned integers along axis -2.
      bits: width of a field, at most 8.
      run: integers whose fields interleave: the first fields of a whole run come
        before the second ones. 1 takes all fields of one integer after the other.
      count: fields of an integer; by default as many as it holds.

    Returns:
      `count * n` codes.
    """
    count = count or x.dtype.itemsize * 8 // bits
    shifts = jnp.arange(count).astype(x.dtype)[:, None, None] * bits
    *lead, rows, out = x.shape
    parts = x.reshape(*lead, rows // run, 1, run, out) >> shifts
    parts = (parts & (2**bits - 1)).astype(jnp.uint8)
    return parts.reshape(*lead, rows * count, out)


def words(x: UInt8[Array, "*lead b out"], width: int) -> Shaped[Array, "*lead n out"]:
    """Little-endian unsigned integers of `width` (2 or 4) bytes."""
    *lead, rows, out = x.shape
    parts = x.reshape(*lead, rows // width, width, out).astype(_WORDS[width])
    total = parts[..., 0, :]
    for i in range(1, width):
        total = total | (parts[..., i, :] << (8 * i))
    return total


def floats(x: UInt8[Array, "*lead b out"], dtype: Any) -> Float[Array, "*lead n out"]:
    """Little-endian floats as float32: float32, float16 or bfloat16."""
    dtype = jnp.dtype(dtype)
    bits = words(x, dtype.itemsize)
    if dtype == jnp.bfloat16:
        bits, dtype = bits.astype(jnp.uint32) << 16, jnp.dtype(jnp.float32)
    return lax.bitcast_convert_type(bits, dtype).astype(jnp.float32)


def half(x: UInt8[Array, "*lead b out"]) -> Float[Array, "*lead n out"]:
    """Float16 scales as float32."""
    return floats(x, jnp.float16)


def signed(x: UInt8[Array, "..."]) -> Shaped[Array, "..."]:
    """Bytes as int8."""
    return lax.bitcast_convert_type(x, jnp.int8)
