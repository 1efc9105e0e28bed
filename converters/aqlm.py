"""AQLM checkpoints: weights as sums of vectors from learned codebooks.

Per linear layer: `codes` int8 or int16 `[out, in / group, codebooks]`, indices modulo
`2**bits` (the upper half is stored as negative numbers); `codebooks` float
`[codebooks, 2**bits, 1, group]`; `scales` float `[out, 1, 1, 1]`. Then

    w[o, j group + i] = scales[o] * sum_c codebooks[c, codes[o, j, c], 0, i].

`AdditiveTensor` has the same codes with the axes turned. A codebook of less than 256
vectors is filled up with zeros.

Vectors that span several outputs (`out_group_size`) are not read.

Reference: AQLM `inference_lib/src/aqlm/utils.py`, `inference.py`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.additive import AdditiveTensor
from qjax.converters.words import transposed
from qjax.errors import FormatError, UnsupportedError
from qjax.formats import Additive
from qjax.formats.additive import MAX_CODEBOOKS, TABLES
from qjax.formats.base import FLOAT_SCALES
from qjax.tensor import QuantizedTensor

PARTS = {
    "codes": ("integer", 3),
    "codebooks": ("floating", 4),
    "scales": ("floating", 4),
}


class AQLM:
    """Reads the layers of one checkpoint; see `qjax.converters.gptq.GPTQ`."""

    kind, marks, parts, stated = "aqlm", ("codebooks",), PARTS, ()

    def __init__(self, settings: Mapping[str, Any], where: str):
        del settings, where  # the shapes of a layer say all of it

    def shape(self, parts: Mapping[str, Any]) -> tuple[int, ...]:
        """`(out, in)`; see `Reader.shape`."""
        (cols, rows, _), books = parts["codes"].shape, parts["codebooks"].shape
        return cols * books[2], rows * books[3]

    def read(self, parts: Mapping[str, np.ndarray], where: str) -> QuantizedTensor:
        """One weight `[in, out]`, an `AdditiveTensor`."""
        codes, books, scales = (parts[name] for name in PARTS)
        count, levels, tall, group = books.shape
        if tall != 1:
            raise UnsupportedError(
                f"{where}.codebooks: vectors of {tall} outputs are not read; expected "
                "out_group_size 1"
            )
        cols, vectors, stages = codes.shape
        if stages != count or scales.shape != (cols, 1, 1, 1):
            raise FormatError(
                f"{where}: codes {list(codes.shape)} and scales {list(scales.shape)} "
                f"do not fit {count} codebooks; expected [out, in / {group}, {count}] "
                "and [out, 1, 1, 1]"
            )
        if count > MAX_CODEBOOKS:
            raise UnsupportedError(
                f"{where}.codebooks: {count} codebooks are not read; expected at most "
                f"{MAX_CODEBOOKS}"
            )
        check_levels(levels, f"{where}.codebooks")
        width = np.dtype(f"u{codes.dtype.itemsize}")
        index = transposed(codes.view(width).reshape(cols, -1))
        if levels <= np.iinfo(width).max:
            index = index & width.type(levels - 1)
        return additive(
            index,
            books[:, :, 0],
            scales.reshape(1, cols),
            (vectors * group, cols),
            where,
        )


def check_levels(levels: int, where: str) -> None:
    """Raises UnsupportedError unless indices of a codebook fit 16 bits exactly."""
    if levels & (levels - 1) or not 2 <= levels <= 2**16:
        raise UnsupportedError(
            f"{where}: {levels} vectors per codebook are not read; expected a power of "
            "two up to 65536"
        )


def additive(
    codes: np.ndarray,
    books: np.ndarray,
    scale: np.ndarray,
    matrix: tuple[int, int],
    where: str,
    dtype: str = "float16",
) -> AdditiveTensor:
    """Vector codes as `AdditiveTensor` has them.

    Args:
      codes: unsigned integers `[in / group * codebooks, out]`, below `levels`.
      books: float `[codebooks, levels, group]`, `levels` as `check_levels` wants it.
      scale: float `[1, out]`.
      matrix: `(in, out)`.
      where: what errors call the tensor.
      dtype: logical dtype; that of the codebooks if they have 16 bits.

    Raises:
      UnsupportedError: floats of another kind.
    """
    count, levels, group = books.shape
    if books.dtype.name not in TABLES or scale.dtype.name not in FLOAT_SCALES:
        raise UnsupportedError(
            f"{where}: codebooks of {books.dtype} and scales of {scale.dtype} are not "
            "read; expected float16, bfloat16 or float32"
        )
    if levels < 256:
        books = np.pad(books, [(0, 0), (0, 256 - levels), (0, 0)])
    bits = max(levels.bit_length() - 1, 8)
    fmt = Additive(
        count,
        bits,
        group,
        scale_dtype=scale.dtype.name,
        table_dtype=books.dtype.name,
    )
    stored = np.uint8 if bits == 8 else np.uint16
    dtype = books.dtype.name if books.dtype.itemsize == 2 else dtype
    return AdditiveTensor(
        np.ascontiguousarray(codes, stored), scale, books, fmt, matrix, dtype
    )
