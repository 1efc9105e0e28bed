"""Weights as llama.cpp's blocks: the tensor of `Ggml` formats.

`GgmlTensor` is a `LayoutTensor`, so products cut and decode it block by block like any
other. `take_apart` gives what kernels multiply by: codes, scales and zero-points as
those of an integer or table format, and `put_together` is its exact inverse. Types
whose codes are wider than their bits in the file (vectors of a grid, trits) are not
taken apart, for they would grow.

Decoding is exact. Products treat numbers below 2^-126 as 0 where the device does, as
XLA's CPU and TPU backends do: weights of MXFP4 blocks with the two smallest scales,
2^-128 and 2^-127, may count as 0, an error of at most 12 * 2^-127 times the input.

A block with a minimum, `w = scale * code - minimum`, gets the zero-point
`minimum / scale`; where the scale is 0, a scale that is 2^22 times smaller than the
minimum stands for it.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from qjax.errors import UnsupportedError
from qjax.formats.ggml import Ggml
from qjax.formats.ggml_parts import AffineParts, TableParts
from qjax.packing import pack, unpack
from qjax.tensor import LayoutTensor, pytree_node


@pytree_node
@dataclasses.dataclass(frozen=True, repr=False)
class GgmlTensor(LayoutTensor):
    """Rows of a GGUF file, turned: one block of bytes after the other along `in`.

    Attributes:
      codes: uint8 `[*lead, in / elements * bytes, out]`; a column holds the bytes of a
        row of the file.
      format: a `Ggml` format.
      matrix: logical `(in, out)`; `in` is a multiple of the block.
      dtype: logical dtype name.
    """

    codes: Any
    format: Ggml = dataclasses.field(metadata={"static": True})
    matrix: tuple[int, int] = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(default="float32", metadata={"static": True})

    @property
    def scale(self) -> None:
        """Scales lie inside of the blocks."""

    @property
    def vector(self) -> tuple[int, int]:
        """See `LayoutTensor.vector`."""
        return self.format.block.elements, self.format.block.bytes

    def unpacked(self) -> Any:
        """Refuses: codes lie inside of the blocks."""
        raise UnsupportedError(
            f"{self!r}: codes and scales lie together in blocks; use dequantize(), or "
            "the leaf `codes`"
        )

    def dequantize(self, dtype: Any = None) -> Float[Array, "..."]:
        """See `QuantizedTensor.dequantize`."""
        *lead, rows, cols = self.codes.shape
        size = self.format.block.bytes
        blocks = self.codes.reshape(*lead, rows // size, size, cols)
        values = self.format.block.decode(blocks)
        return values.reshape(*lead, self.matrix[0], cols).astype(dtype or self.dtype)


class Apart(NamedTuple):
    """Blocks in pieces; leaves as in `qjax.pallas_kernels.weights.Weight`.

    Attributes:
      codes: packed codes, `[*lead, packed(in), out]`.
      scale: float32 `[*lead, in / group, out]`.
      zero: float32 like `scale`, or None.
      rest: uint8, the bytes of the blocks that hold no codes, `[*lead, n, out]`.
    """

    codes: Any
    scale: Any
    zero: Any
    rest: Any


def layout(fmt: Ggml) -> AffineParts | TableParts | None:
    """Bits, group, offset and table of a type; None when it is not taken apart."""
    return _layout(fmt.type)


@functools.cache
def _layout(name: str) -> AffineParts | TableParts | None:
    block = Ggml(name).block
    shape = jax.ShapeDtypeStruct((block.bytes, 1), jnp.uint8)
    assert block.parts is not None  # a `Ggml` format has weights
    found = jax.eval_shape(block.parts, shape)
    wide = getattr(found, "bits", 4) > max(block.bits_per_weight, 1.0)
    return None if wide else found


@jax.jit
def take_apart(q: GgmlTensor) -> Apart:
    """Codes, scales and zero-points of blocks, and what is needed to go back.

    Raises:
      UnsupportedError: the type is not taken apart.
    """
    if layout(q.format) is None:
        raise UnsupportedError(f"{q!r}: its codes would take more bits apart")
    block, (rows, cols) = q.format.block, q.matrix
    lead = q.codes.shape[:-2]
    blocks = jnp.asarray(q.codes).reshape(*lead, -1, block.bytes, cols)
    assert block.parts is not None
    parts = block.parts(blocks)
    scale, zero = parts.scale, None
    if isinstance(parts, AffineParts) and parts.minimum is not None:
        stand_in = parts.minimum * jnp.float32(2.0**-22)
        scale = jnp.where(scale == 0, stand_in, scale)
        zero = parts.minimum / jnp.where(scale == 0, 1.0, scale)
    bits = getattr(parts, "bits", 4)
    codes = parts.codes.reshape(*lead, rows, cols)
    codes = codes if bits == 8 else pack(codes, bits)

    def flat(leaf: Any) -> Any:
        return None if leaf is None else leaf.reshape(*lead, -1, cols)

    rest = blocks[..., _places(q.format.type).rest, :]
    return Apart(codes, flat(scale), flat(zero), flat(rest))


@functools.partial(jax.jit, static_argnames=("fmt", "matrix"))
def put_together(
    fmt: Ggml, codes: Any, rest: Any, matrix: tuple[int, int]
) -> UInt8[Array, "*lead bytes out"]:
    """The bytes of blocks: the inverse of `take_apart`.

    Args:
      fmt: the type.
      codes: packed codes.
      rest: the other bytes.
      matrix: logical `(in, out)`.
    """
    block, (rows, cols) = fmt.block, matrix
    places, bits = _places(fmt.type), getattr(layout(fmt), "bits", 4)
    lead = codes.shape[:-2]
    plain = codes.view(jnp.uint8) if bits == 8 else unpack(codes, bits, rows)
    plain = plain.reshape(*lead, -1, block.elements, cols)
    made = jnp.zeros((*plain.shape[:-2], block.bytes, cols), jnp.uint8)
    total = jnp.zeros((*plain.shape[:-2], len(places.coded), cols), jnp.uint8)
    for bit in range(8):
        own = plain[..., places.element[:, bit], :]
        field = (own >> places.field[:, bit, None]) & jnp.uint8(1)
        total = total | (field << jnp.uint8(bit))
    made = made.at[..., places.coded, :].set(total)
    made = made.at[..., places.rest, :].set(
        rest.reshape(*lead, -1, len(places.rest), cols)
    )
    return made.reshape(*lead, -1, cols)


class _Places(NamedTuple):
    """Where codes lie in a block: `coded` bytes, whose bits are bits of elements."""

    coded: np.ndarray
    element: np.ndarray
    field: np.ndarray
    rest: np.ndarray


@functools.cache
def _places(name: str) -> _Places:
    """Found by decoding blocks of a single bit."""
    block = Ggml(name).block
    size = block.bytes
    single = np.zeros((size, size, 8), np.uint8)
    single[np.arange(size), np.arange(size)] = 1 << np.arange(8)
    tried = np.pad(single.reshape(size, -1), [(0, 0), (0, 1)])  # and none
    assert block.parts is not None
    with jax.ensure_compile_time_eval():
        found = np.asarray(jax.jit(block.parts)(tried).codes).view(np.uint8)
    changed = found[:, :-1] ^ found[:, -1:]
    element = np.argmax(changed != 0, axis=0).reshape(size, 8)
    field = np.max(changed, axis=0).reshape(size, 8)
    coded = np.flatnonzero(field.all(axis=1))
    rest = np.flatnonzero(~field.any(axis=1))
    assert len(coded) + len(rest) == size  # no byte holds both
    bit = np.log2(np.maximum(field[coded], 1)).astype(np.uint8)
    return _Places(coded, element[coded], bit, rest)
