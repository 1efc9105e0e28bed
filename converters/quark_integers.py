"""Integers of Quark checkpoints: 4 bits in words, and 8 bits with groups.

* One scale per group of inputs: `weight` is `[in, out]`, `weight_scale` and
  `weight_zero_point` `[groups, out]`.
* One per output or tensor: `weight` is `[out, in]`, the others `[out]` or one number.

8 codes of 4 bits fill an int32 along the last axis, that of zero-points as well, filled
up to whole words. Code `ORDERS[pack_method][i]` of a word is its nibble `i`, counted
from bit 0. int4 and int8 are two's complements. A weight is `(code - zero) * scale`;
zero-points that are floats are not packed.

Reference: AMD Quark 0.13 `quark/torch/utils/pack.py`,
`export/nn/modules/realquantizer.py`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.converters.affine import affine
from qjax.converters.words import transposed
from qjax.errors import FormatError
from qjax.formats.base import FLOAT_SCALES
from qjax.tensor import QuantizedTensor

ORDERS = {"reorder": [0, 2, 4, 6, 1, 3, 5, 7], "order": [*range(8)]}
KINDS = ("int4", "uint4", "int4 per group", "uint4 per group")
KINDS += ("uint8", "int8 per group", "uint8 per group")


def integer_shape(weight: Any, scale: Any) -> tuple[int, int] | None:
    """`(out, in)` of a layer; None where `weight` is `[out, in]` or no integers.

    Args:
      weight: the tensor or its header.
      scale: likewise.
    """
    rows, width = weight.shape
    kind = np.dtype(weight.dtype).name
    groups = len(scale.shape) == 2 and np.dtype(scale.dtype).name in FLOAT_SCALES
    if kind == "int32":
        return (scale.shape[1], rows) if groups else (rows, width * 8)
    grouped = groups and scale.shape[1] == width > 1 and kind in ("int8", "uint8")
    return (width, rows) if grouped else None


def read_integers(
    parts: Mapping[str, np.ndarray], kind: str, order: str, where: str
) -> QuantizedTensor:
    """One weight `[in, out]`.

    Args:
      parts: `weight`, `weight_scale` and maybe `weight_zero_point`.
      kind: one of `KINDS`.
      order: `pack_method`, one of `ORDERS`.
      where: what errors call the layer.

    Raises:
      FormatError: the parts do not fit each other.
    """
    weight, scale = parts["weight"], parts["weight_scale"]
    name, _, grouped = kind.partition(" ")
    bits, flip = int(name[-1]), 0
    if not name.startswith("u"):
        flip = 2 ** (bits - 1)
    cols, rows = integer_shape(weight, scale) or weight.shape
    last = cols if grouped else rows
    if (
        weight.dtype.name != ("int32" if bits == 4 else name)
        or weight.shape[1] != (-(-last // 8) if bits == 4 else last)
        or scale.dtype.name not in FLOAT_SCALES
        or not (scale.ndim == 2 if grouped else scale.shape in ((), (1,), (cols,)))
        or (grouped and rows % len(scale))
    ):
        raise FormatError(
            f"{where}: {kind} in {weight.dtype} {list(weight.shape)} with scales "
            f"{scale.dtype} {list(scale.shape)}, which Quark does not write"
        )
    codes = _nibbles(weight, order) if bits == 4 else weight.view(np.uint8)
    codes = codes[:, :cols] if grouped else transposed(np.ascontiguousarray(codes))
    scale = np.atleast_2d(scale)
    zero = parts.get("weight_zero_point", np.zeros((), np.int32))
    words = bits == 4 and zero.ndim and np.issubdtype(zero.dtype, np.integer)
    if words and zero.dtype != np.int32:
        raise FormatError(f"{where}.weight_zero_point: is {zero.dtype}, expected int32")
    if words:
        zero = _nibbles(np.atleast_2d(zero), order)[:, :cols] ^ np.uint8(flip)
    else:
        zero = zero.astype(np.float32) + np.float32(flip)
    return affine(
        np.ascontiguousarray(codes) ^ np.uint8(flip),
        np.ascontiguousarray(scale),
        np.atleast_2d(zero) if zero.ndim else np.full(scale.shape, zero),
        bits=bits,
        matrix=(rows, cols),
        where=where,
        unpacked=True,
        group=rows // len(scale),
        dtype=scale.dtype.name,
    )


def _nibbles(words: np.ndarray, order: str) -> np.ndarray:
    """uint8 `[n, 8 m]`, the codes of int32 words `[n, m]`."""
    made = np.empty((*words.shape, 8), np.uint8)
    for nibble, place in enumerate(ORDERS[order]):
        made[..., place] = (words >> (4 * nibble)) & 15
    return made.reshape(len(words), -1)
