"""torchao's 4-bit integers in the order of tensor cores (tinygemm), read.

`Int4TilePackedTo4dTensor` has `qdata` int32 `[n / 8, k / (16 t), 32, t / 2]`, with
`t` of 2, 4 or 8, and `scale_and_zero` `[k / group, n, 2]`; `n` and `k` are outputs and
inputs, filled up to whole tiles. A weight is `(code - 8) * scale + zero`.

Word `j` of lane `l` of the tiles `a, s` holds 8 codes of output `8 a + l // 4`. Its
nibble `4 e + p`, counted from bit 0, is input `16 (t s + 2 j) + 8 p + 2 (l % 4) + e`:
the B operand of two `mma.m16n8k16`, even inputs in the low half.

How many outputs and inputs are filling is not in the tensors, but in the model. AMD's
kernels order tiles of one shape otherwise; files tell it only by their settings.

Reference: PyTorch `aten/src/ATen/native/cuda/int4mm.cu`; torchao 0.18
`quantization/quantize_/workflows/int4`; PTX, "Matrix Fragments for mma.m16n8k16".
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.converters.biases import affine_of_bias
from qjax.errors import FormatError
from qjax.formats.base import FLOAT_SCALES
from qjax.tensor import QuantizedTensor

SCALES = "scale_and_zero"
FILLED = 16, 1024
"""Multiples that outputs and inputs are filled up to, at most."""


def tile_shape(parts: Mapping[str, Any], where: str) -> tuple[int, int]:
    """`(out, in)` of a layer, without the filling where the model's own is told.

    Args:
      parts: tensors by name or their headers, and maybe `expected_shape`.
      where: what errors call the layer.

    Raises:
      FormatError: the tensors are not those of such a layer.
    """
    data, scale = parts["qdata"], parts[SCALES]
    if (
        np.dtype(data.dtype) != np.int32
        or len(data.shape) != 4
        or data.shape[2] != 32
        or data.shape[3] not in (1, 2, 4)
    ):
        raise FormatError(
            f"{where}: qdata is {data.dtype} {list(data.shape)}, expected int32 "
            "[out / 8, in / (16 t), 32, t / 2] for a t of 2, 4 or 8"
        )
    cols, rows = data.shape[0] * 8, data.shape[1] * data.shape[3] * 32
    if (
        len(scale.shape) != 3
        or scale.shape[1:] != (cols, 2)
        or not scale.shape[0]
        or rows % scale.shape[0]
        or np.dtype(scale.dtype).name not in FLOAT_SCALES
    ):
        raise FormatError(
            f"{where}: {SCALES} is {scale.dtype} {list(scale.shape)}, expected floats "
            f"[groups, {cols}, 2] with groups that divide {rows} inputs"
        )
    told = tuple(int(size) for size in parts.get("expected_shape", ()))
    fits = len(told) == 2 and all(
        size <= whole < size + step
        for size, whole, step in zip(told, (cols, rows), FILLED, strict=True)
    )
    return (told[0], told[1]) if fits else (cols, rows)


def tiled(parts: Mapping[str, np.ndarray], where: str) -> QuantizedTensor:
    """The weight `[in, out]` of a layer, packed.

    Args:
      parts: tensors by name, and maybe `expected_shape`.
      where: what errors call the layer.

    Raises:
      FormatError: the tensors are not those of such a layer.
    """
    cols, rows = tile_shape(parts, where)
    data, both = parts["qdata"], parts[SCALES]
    group = data.shape[1] * data.shape[3] * 32 // len(both)
    both = both[: -(-rows // group), :cols]
    scale = np.ascontiguousarray(both[..., 0])
    shift = both[..., 1].astype(np.float32) - 8 * scale.astype(np.float32)
    return affine_of_bias(
        _bytes(data)[: -(-rows // 2), :cols],
        scale,
        shift,
        bits=4,
        matrix=(rows, cols),
        where=where,
        group=group,
    )


def _bytes(data: np.ndarray) -> np.ndarray:
    """uint8 `[k / 2, n]`: the codes of inputs `2 i` and `2 i + 1`, the first low."""
    n, s, _, j = data.shape
    raw = np.ascontiguousarray(data).astype("<i4", copy=False).view(np.uint8)
    halves = raw.reshape(n, s, 8, 4, j, 2, 2)  # output, lane % 4, word, input % 2, byte
    even, odd = halves[..., 0, :], halves[..., 1, :]
    low = (even & np.uint8(15)) | (odd << np.uint8(4))
    high = (even >> np.uint8(4)) | (odd & np.uint8(240))
    pairs = np.stack([low, high], -1)  # [n, s, 8, 4, j, byte, nibble]
    return pairs.transpose(1, 4, 5, 6, 3, 0, 2).reshape(s * j * 16, n * 8)
