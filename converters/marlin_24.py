"""compressed-tensors' `marlin-24`: 2:4 sparse integers in the order of tensor cores.

Of four neighbouring inputs two are stored. `weight_packed` int32
`[in / 32, 16 out * bits / 32]` holds tiles of 16 x 16 codes plus `2**(bits - 1)` of the
halved weight `[in / 2, out]`, four neighbouring tiles in one run of 1024, permuted for
the fragments of tensor cores; fields of a word alternate, even places first.
`scale_packed` float16 `[groups, out]`, permuted in runs of 8 unless groups have half
the inputs or more. `meta` int16 `[in / 32, 2 out]`: for each four inputs of an output
four bits, the two places that are stored, in CUTLASS' reordered layout.

Reference: compressed-tensors 0.12 `compressors/sparse_quantized_compressors/marlin_24`,
`utils/semi_structured_conversions.py`, `utils/permutations_24.py`.
"""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.converters.affine import affine, group_of
from qjax.converters.words import codes_of, stream
from qjax.errors import FormatError
from qjax.tensor import QuantizedTensor

_FIELDS = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}


def marlin_24(
    parts: Mapping[str, np.ndarray], weights: Mapping[str, Any], where: str
) -> QuantizedTensor:
    """A weight `[in, out]`, with zeros where nothing is stored.

    Args:
      parts: `weight_packed`, `scale_packed` and `meta`.
      weights: how the settings say it is quantized.
      where: what errors call the layer.

    Raises:
      FormatError: parts do not fit each other or the settings.
    """
    words, scale, meta = (parts[k] for k in ("weight_packed", "scale_packed", "meta"))
    bits = weights.get("num_bits")
    if bits not in _FIELDS or words.dtype != np.int32:
        raise FormatError(
            f"{where}: {words.dtype} words of {bits!r} bits, expected int32 with 4 or 8"
        )
    rows, cols = words.shape[0] * 32, scale.shape[-1]
    if (
        scale.ndim != 2
        or cols % 64
        or words.shape[1] * 32 != cols * 16 * bits
        or meta.dtype != np.int16
        or meta.size * 16 != rows * cols
    ):
        raise FormatError(
            f"{where}: weight_packed {list(words.shape)}, scale_packed "
            f"{list(scale.shape)} and meta {meta.dtype} {list(meta.shape)} do not fit "
            f"{bits} bits; expected [in / 32, out * {bits} / 2], [groups, out] and "
            "int16 [in / 32, 2 out] with out a multiple of 64"
        )
    half = np.ascontiguousarray(_codes(words, bits, cols).T).reshape(cols, -1, 2)
    codes = np.full((cols, rows // 4, 4), 2 ** (bits - 1), np.uint8)
    np.put_along_axis(codes, _places(meta, rows, cols), half, -1)
    group = group_of(weights)
    if group is not None and group < rows // 2:
        runs = scale.reshape(-1, 8)
        made = np.empty_like(runs)
        made[:, [0, 4, 1, 5, 2, 6, 3, 7]] = runs
        scale = made.reshape(scale.shape)
    return affine(
        np.ascontiguousarray(codes.reshape(cols, rows).T),
        scale,
        None,
        bits=bits,
        matrix=(rows, cols),
        where=where,
        group=group,
        dtype=scale.dtype.name,
        unpacked=True,
    )


@functools.cache
def _order(bits: int) -> np.ndarray:
    """Place in four tiles `[4, 16, 16]` of each of 1024 stored codes."""
    lane, tile, part, pair = np.ogrid[:32, :4, :2, :4]
    row = 2 * (lane % 4) + np.array([0, 1, 8, 9])[pair]
    column = 8 * (lane // 4 % 2) + 4 * part + tile
    places = 256 * (lane // 8) + 16 * row + column
    fields = _FIELDS[bits]
    return places.reshape(-1, len(fields))[:, fields].reshape(-1)


def _codes(words: np.ndarray, bits: int, cols: int) -> np.ndarray:
    """Unsigned codes `[in / 2, out]`."""
    fields = codes_of(stream(words.reshape(-1, 1)), bits, words.size * 32 // bits)
    stored = fields.reshape(-1, 1024)
    made = np.empty_like(stored)
    made[:, _order(bits)] = stored
    tiles = made.reshape(len(words), cols // 16, 16, 16).transpose(0, 2, 1, 3)
    return tiles.reshape(-1, cols)


def _places(meta: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """Which two of four inputs are stored, `[out, in / 4, 2]`."""
    width = rows // 16
    row, column = np.mgrid[:cols, :width]
    row = (
        row // 64 * 64
        + row % 2 * 2
        + row % 8 // 4
        + row % 4 // 2 * 32
        + row % 64 // 8 * 4
    )
    shift = (row % 2 == 0) * (column % 2 == 1) * 1 - (row % 2) * (column % 2 == 0)
    row, column = row + shift, column - shift
    source = column // 2 * (2 * cols) + row * 2 + column % 2
    plain = meta.reshape(-1).view(np.uint16)[source]
    quads = plain[..., None] >> np.arange(0, 16, 2, dtype=np.uint16) & np.uint16(3)
    return quads.reshape(cols, rows // 4, 2).astype(np.intp)
