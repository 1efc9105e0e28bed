"""Weights whose codes index vectors: the tensor of `Additive` formats.

`AdditiveTensor` is a `LayoutTensor`, so products cut and decode it block by block like
any other; only its decoding differs, rows of codebooks being gathered and added.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from qjax.errors import UnsupportedError
from qjax.formats.additive import Additive
from qjax.tensor import LayoutTensor, pytree_node


@pytree_node
@dataclasses.dataclass(frozen=True, repr=False)
class AdditiveTensor(LayoutTensor):
    """`w[j g + i, o] = scale[o] * sum_c codebooks[c, codes[j C + c, o], i]`.

    AQLM's `codes [out, in / g, C]` are these with the axes turned, and modulo
    `2**bits`; its `codebooks [C, 2**bits, 1, g]` lack the axis of 1 here.

    Attributes:
      codes: uint8 (8 bits) or uint16 `[*lead, in / group * codebooks, out]`.
      scale: float `[*lead, 1, out]`.
      codebooks: float `[*lead, codebooks, 2**bits, group]`.
      format: an `Additive` format.
      matrix: logical `(in, out)`.
      dtype: logical dtype name.
    """

    codes: Any
    scale: Any
    codebooks: Any
    format: Additive = dataclasses.field(metadata={"static": True})
    matrix: tuple[int, int] = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(default="float32", metadata={"static": True})

    @property
    def vector(self) -> tuple[int, int]:
        """See `LayoutTensor.vector`."""
        return self.format.group, self.format.codebooks

    def unpacked(self) -> Shaped[Array, "..."]:
        """Refuses: there is no code per weight."""
        raise UnsupportedError(
            f"{self!r}: one code stands for {self.format.group} weights; use "
            "dequantize(), or the leaf `codes`"
        )

    def dequantize(self, dtype: Any = None) -> Float[Array, "..."]:
        """See `QuantizedTensor.dequantize`."""
        decode = decode_additive
        for _ in self.codes.shape[:-2]:
            decode = jax.vmap(decode)
        values = decode(self.codes, self.codebooks, self.scale)
        return values.astype(dtype or self.dtype)


def decode_additive(
    codes: Shaped[Array, "rows out"],
    codebooks: Float[Array, "c levels g"],
    scale: Float[Array, "1 out"],
) -> Float[Array, "in out"]:
    """The float32 matrix of codes; gathers `in / g` vectors per codebook and column."""
    count, _, group = codebooks.shape
    rows, cols = codes.shape
    at = codes.astype(jnp.int32).reshape(rows // count, count, cols)
    books = jnp.asarray(codebooks).astype(jnp.float32)  # files hold NumPy arrays
    total = books[0].at[at[:, 0]].get(mode="clip")
    for c in range(1, count):
        total = total + books[c].at[at[:, c]].get(mode="clip")
    values = jnp.swapaxes(total, -1, -2).reshape(rows // count * group, cols)
    return values * scale.astype(jnp.float32)
