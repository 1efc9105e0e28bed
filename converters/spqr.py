"""SpQR checkpoints: 3-bit weights in groups of 16, quantized statistics, outliers.

Per linear layer:

* `dense_weights` int64: 16 words for each 16 x 16 tile, one per output, tiles along
  `in` first. Bits 0 to 2 are the group's scale code `w_s`, 3 to 5 its zero-point code
  `w_z`, then 16 codes of 3 bits; bits 54 to 61 are a piece of the tile's statistics.
  Byte `b` of those is the piece of outputs `2 b` and `2 b + 1`, or-ed; as four float16
  they are the scale of `w_s`, the scale of `w_z`, and their zero-points.
* `row_offsets` int32 and `col_vals` int32, a float16 outlier in the high half of a word
  and its input in the low half. With `out + 1` offsets they tell where each output
  begins. With `out / 16 + 1` they tell where 16 outputs begin, whose outliers take
  turns; shorter rows are filled up with zeros.
* `in_perm` int32, two uint16 per word, the low half first: column `j` of the tiles
  belongs to input `in_perm[j]`. Empty for the order of the inputs.

That is `Int(3, 16)` with zero-points whose scales and zero-points are `Int(3, 16)`
along `out`, in `WithOutliers`, in `Permuted`. The size of a layer is not stored: it
follows from the number of words and of offsets, and from `in_perm`.

Here weights are computed in float32; the peer rounds every step to float16.

Reference: SpQR `inference_lib/src/spqr_quant/inference.py`, `sparse_util.py`,
`inference_kernels/spqr_cuda.cpp`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.converters.outliers import csr_rows, with_outliers
from qjax.converters.words import packed_codes, repacked, stream
from qjax.errors import FormatError, UnsupportedError
from qjax.formats import Int
from qjax.tensor import AffineTensor, QuantizedTensor
from qjax.wrappers import Permuted

PARTS = {
    "dense_weights": ("int64", 1),
    "row_offsets": ("integer", 1),
    "col_vals": ("any", 1),  # float32 where a layer has no outliers
    "in_perm": ("integer", 1),
}
BITS, TILE = 3, 16
INNER = Int(
    BITS, TILE, symmetric=False, axis="out", scale_dtype="float16", zero_dtype="float16"
)
OUTER = Int(BITS, TILE, symmetric=False)


class SpQR:
    """Reads the layers of one checkpoint; see `qjax.converters.gptq.GPTQ`.

    Attributes:
      empty: parts that may have no elements.
    """

    kind, marks, parts, stated = "spqr", ("dense_weights",), PARTS, ("row_offsets",)
    empty = ("col_vals", "in_perm")

    def __init__(self, settings: Mapping[str, Any], where: str):
        for name, only in (("bits", BITS), ("beta1", TILE), ("beta2", TILE)):
            if settings.get(name, only) != only:
                raise UnsupportedError(
                    f"{where}: SpQR with {name} {settings[name]!r:.200} is not read; "
                    f"expected {only}"
                )

    def shape(self, parts: Mapping[str, Any]) -> tuple[int, ...]:
        """`(out, in)`; see `Reader.shape`."""
        return _sizes(parts)[:2]

    def read(self, parts: Mapping[str, np.ndarray], where: str) -> QuantizedTensor:
        """One weight `[in, out]`."""
        cols, rows, interleaved = _sizes(parts)
        words = parts["dense_weights"]
        tall, wide = -(-cols // TILE), -(-rows // TILE)
        if not cols or not rows or len(words) != tall * wide * TILE:
            raise FormatError(
                f"{where}: {len(words)} words are not the tiles of a layer with "
                f"{len(parts['row_offsets'])} row_offsets and {len(parts['in_perm'])} "
                "words of in_perm"
            )
        made: Any = _dense(words.view(np.uint64).reshape(tall, wide, TILE), rows, cols)
        values, inputs, outputs = _outliers(parts, cols, interleaved, where)
        made = with_outliers(made, values, inputs, outputs, where)
        if not len(parts["in_perm"]):
            return made
        order = _halves(parts["in_perm"]).astype(np.int32)
        if not np.array_equal(np.sort(order), np.arange(rows)):
            raise FormatError(f"{where}.in_perm: is not a permutation of 0..{rows - 1}")
        return Permuted(made, order)


def _sizes(parts: Mapping[str, Any]) -> tuple[int, int, bool]:
    """`(out, in)`, and whether outliers of 16 outputs take turns."""
    tiles = parts["dense_weights"].shape[0] // TILE
    offsets, rows = parts["row_offsets"], 2 * parts["in_perm"].shape[0]
    count = len(offsets) - 1
    across = -(-rows // TILE)
    if rows:
        interleaved = count * across == tiles
    else:
        aligned = not (np.asarray(offsets) % TILE).any() and offsets[-1] > 0
        interleaved = count > 0 and (aligned or tiles % -(-count // TILE) > 0)
    cols = count * TILE if interleaved else count
    return cols, rows or tiles // max(-(-cols // TILE), 1) * TILE, bool(interleaved)


def _dense(words: np.ndarray, rows: int, cols: int) -> AffineTensor:
    """The weight without outliers, of tiles `[out / 16, in / 16, 16]`."""
    tall, wide, _ = words.shape
    turned = np.ascontiguousarray(words.transpose(1, 0, 2)).reshape(wide, -1)
    # Rotated by 6 bits: bytes of 16 codes, of the statistics, and the codes of these.
    rotated = turned >> np.uint64(6)
    rotated |= turned << np.uint64(58)
    octets = stream(rotated).reshape(wide, 8, -1)
    pieces = octets[:, 6].reshape(wide, tall, TILE)
    pieces = np.ascontiguousarray(pieces[..., 0::2] | pieces[..., 1::2])
    halves = pieces.view("<f2").astype(np.float16, copy=False)
    statistics: list[AffineTensor] = []
    for i in range(2):
        codes = octets[:, 7, :cols] >> np.uint8(2 + BITS * i) & np.uint8(7)
        scale, zero = (np.ascontiguousarray(halves[..., k]) for k in (i, i + 2))
        inner = (wide, cols)
        statistics.append(
            AffineTensor(repacked(codes, BITS), scale, zero, INNER, inner, "float32")
        )
    data = octets[:, :6].reshape(wide * 6, -1)[:, :cols]
    codes, (scale, zero) = packed_codes(data, BITS, rows), statistics
    return AffineTensor(codes, scale, zero, OUTER, (rows, cols), "float16")


def _outliers(parts, cols: int, interleaved: bool, where: str):
    """Values, inputs and outputs."""
    entries = parts["col_vals"]
    if len(entries) and entries.dtype != np.int32:
        raise FormatError(f"{where}.col_vals: is {entries.dtype}, expected int32")
    count = len(entries)
    lows, highs = _halves(entries.astype(np.int32)).reshape(-1, 2).T
    values = highs.copy().view(np.float16)
    offsets, name = parts["row_offsets"], f"{where}.row_offsets"
    if not interleaved:
        return values, lows, csr_rows(offsets, cols, count, name)
    outputs = csr_rows(offsets, cols // TILE, count, name) * TILE
    outputs = outputs + np.arange(count) % TILE
    there = values != 0
    return values[there], lows[there], outputs[there]


def _halves(words: np.ndarray) -> np.ndarray:
    """uint16 halves of 32-bit words, the low half first."""
    return np.ascontiguousarray(words).astype("<i4", copy=False).view("<u2")
