"""Trellis-coded weights, and the incoherence processing around them.

`TrellisTensor` holds the walk of every tile (`qjax.formats.trellis`). Its values are
close to normal, so a weight is first made to look normal: `Incoherent` states that the
logical weight is the coded one between two blockwise Hadamard transforms, with signs or
scales outside of them. EXL3's `trellis`, `suh` and `svh` are exactly these leaves.

Reference: Tseng et al., QuIP#, arXiv 2402.04396, section 3 (randomized Hadamard
transform).
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped, UInt8, UInt16

from qjax.formats.trellis import TILE, Trellis, join_tiles, words_to_states
from qjax.packing import pack, packed_rows, unpack
from qjax.tensor import LayoutTensor, pytree_node
from qjax.wrappers import Wrapper, hadamard

BLOCK = 128
"""EXL3's Hadamard block."""


@pytree_node
@dataclasses.dataclass(frozen=True, repr=False)
class TrellisTensor(LayoutTensor):
    """`w = value(state) * scale`, for the `Trellis` format.

    Attributes:
      codes: uint16 `[*lead, in / 16, out * bits]`: row after row of tiles, `16 bits`
        words each.
      scale: float `[*lead, 1, 1]`, or None for 1.
      format: the `Trellis` format.
      matrix: logical `(in, out)`, multiples of 16.
      dtype: logical dtype name.
    """

    codes: Any
    scale: Any
    format: Trellis = dataclasses.field(metadata={"static": True})
    matrix: tuple[int, int] = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(default="float32", metadata={"static": True})

    def unpacked(self) -> UInt16[Array, "*lead in out"]:
        """The state behind every weight."""
        bits = self.format.bits
        words = self.codes
        words = words.reshape(*words.shape[:-1], -1, TILE * bits)
        return join_tiles(words_to_states(words, bits))

    def dequantize(self, dtype: Any = None) -> Float[Array, "..."]:
        """See `QuantizedTensor.dequantize`."""
        values = self.format.decode(self.unpacked())
        if self.scale is not None:
            values = values * self.scales()
        return values.astype(dtype or self.dtype)


@pytree_node
@dataclasses.dataclass(frozen=True, repr=False)
class Incoherent(Wrapper):
    """`w = diag(left) H base H diag(right)`, `H` blockwise orthonormal Hadamard.

    A block is the largest power of two that divides the axis, at most `block`. Products
    apply `left` and `H` to activations, `H` and `right` to results.

    Attributes:
      left: of inputs: float `[*lead, in]`, or signs packed in uint8
        `[*lead, in / 8]` (bit 0 of a byte first, 1 for -1); None when inputs are
        not transformed.
      right: the same for outputs.
      block: most rows and columns that are mixed.
    """

    left: Any
    right: Any
    block: int = dataclasses.field(default=BLOCK, metadata={"static": True})

    def compose(self, w: Float[Array, "..."]) -> Float[Array, "..."]:
        """Undoes the transforms."""
        if self.right is not None:
            w = hadamard(w, self.block) * self.factors("right")[..., None, :]
        if self.left is not None:
            w = jnp.swapaxes(hadamard(jnp.swapaxes(w, -1, -2), self.block), -1, -2)
            w = w * self.factors("left")[..., :, None]
        return w

    def factors(self, side: str) -> Float[Array, "*lead n"]:
        """Float32 signs or scales of `left` or `right`.

        Args:
          side: which.
        """
        leaf = getattr(self, side)
        if leaf.dtype == jnp.uint8:
            return unpack_signs(leaf, self.matrix[int(side == "right")])
        return leaf.astype(jnp.float32)

    def enter(
        self, x: Float[Array, "m n"], side: str, item: Any = None
    ) -> Float[Array, "m n"]:
        """`(x * factors) H`: what the base is multiplied by.

        Args:
          x: activations on the `side` of the weight.
          side: `"left"` for `x W`, `"right"` for `x W^T`.
          item: which of stacked weights each row is for.

        Returns:
          Transformed activations in the dtype of `x`.
        """
        if getattr(self, side) is None:
            return x
        factors = self.factors(side) if item is None else self.factors(side)[item]
        return hadamard(x.astype(jnp.float32) * factors, self.block).astype(x.dtype)

    def leave(
        self, y: Float[Array, "m n"], side: str, item: Any = None
    ) -> Float[Array, "m n"]:
        """`(y H) * factors`: the product from that with the base; see `enter`."""
        if getattr(self, side) is None:
            return y
        factors = self.factors(side) if item is None else self.factors(side)[item]
        return (hadamard(y.astype(jnp.float32), self.block) * factors).astype(y.dtype)


def pack_signs(signs: Float[Array, "*lead n"]) -> UInt8[Array, "*lead bytes"]:
    """One bit per sign, 1 for negative numbers."""
    negative = (signs < 0).astype(jnp.uint8)
    return pack(negative[..., None], 1)[..., 0]


def unpack_signs(packed: UInt8[Array, "*lead bytes"], n: int) -> Shaped[Array, "..."]:
    """Inverse of `pack_signs`: float32 +1 and -1."""
    negative = unpack(packed[..., None], 1, n)[..., 0]
    return 1.0 - 2.0 * negative.astype(jnp.float32)


def sign_bytes(n: int) -> int:
    """Bytes that `n` packed signs take."""
    return packed_rows(n, 1)
