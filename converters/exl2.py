"""EXL2 checkpoints (exllamav2): groups of inputs with different numbers of bits.

Per linear layer: `q_groups` int16 (for uint16) `[2 groups]`, bits and the first row of
`q_weight` of each group; `q_weight` int32 `[words, out]`, for each group a bit string
along `in`; `q_scale` int32 `[groups, out / 8]`, 4-bit codes `s` along `out`;
`q_scale_max` float16 `[groups]`; `q_invperm` `[in]` (or `q_perm`, its inverse). With
`z = 2**(bits - 1)`,

    w'[k, o] = (code - z) * (s + 1)**2 * q_scale_max / 256,   w[i] = w'[q_invperm[i]].

Groups of equal size and bits behind one another are one `AffineTensor`; several of
those are `RowParts`; around them is `Permuted`. Scales are multiplied out and rounded
to float16, as exllamav2 does.

`out` was padded to a multiple of 32 when the file was written. Nothing in it says by
how much, so layers of other sizes have too many outputs here.

Reference: exllamav2 `conversion/adaptivegptq.py`, `ext.py`,
`exllamav2_ext/cuda/q_matrix.cu`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.converters.affine import affine
from qjax.converters.words import codes_of, stream
from qjax.errors import FormatError, UnsupportedError
from qjax.tensor import QuantizedTensor
from qjax.wrappers import MAX_PARTS, Permuted, RowParts

PARTS = {
    "q_weight": ("int32", 2),
    "q_scale": ("int32", 2),
    "q_scale_max": ("floating", 1),
    "q_groups": ("integer", 1),
    "q_invperm": ("integer", 1),
    "q_perm": ("integer", 1),
}
WIDTHS = (2, 3, 4, 5, 6, 8)


class EXL2:
    """Reads the layers of one checkpoint; see `qjax.converters.gptq.GPTQ`."""

    kind, marks, parts, stated = "exl2", ("q_weight",), PARTS, ()

    def __init__(self, settings: Mapping[str, Any], where: str):
        del settings, where  # every layer says all of itself

    def shape(self, parts: Mapping[str, Any]) -> tuple[int, ...]:
        """`(out, in)`; see `Reader.shape`."""
        order = parts.get("q_invperm", parts.get("q_perm"))
        if order is None:
            raise KeyError("q_invperm")
        return parts["q_weight"].shape[1], order.shape[0]

    def read(self, parts: Mapping[str, np.ndarray], where: str) -> QuantizedTensor:
        """One weight `[in, out]`."""
        words, most = parts["q_weight"], parts["q_scale_max"]
        cols, rows = self.shape(parts)
        groups = _groups(parts["q_groups"], len(words), rows, where)
        if len(most) != len(groups) or parts["q_scale"].shape != (
            len(groups),
            cols / 8,
        ):
            raise FormatError(
                f"{where}: q_scale {list(parts['q_scale'].shape)} and q_scale_max "
                f"{list(most.shape)} do not fit {len(groups)} groups and {cols} outputs"
            )
        codes = np.ascontiguousarray(parts["q_scale"].T)
        codes = codes_of(stream(codes), 4, cols).T.astype(np.float32)
        with np.errstate(over="ignore"):  # what is not finite is found afterwards
            scale = (codes + 1) ** 2 * (most.astype(np.float32)[:, None] / 256)
            scale = scale.astype(np.float16)
        made: list[tuple[int, QuantizedTensor]] = []
        row = group = 0
        for bits, size, count, height in _runs(groups):
            first = groups[group][1]
            last = groups[group + count][1] if group + count < len(groups) else None
            part = affine(
                stream(words[first:last]),
                scale[group : group + count],
                None,
                bits=bits,
                matrix=(height, cols),
                where=where,
                group=size,
            )
            made.append((row, part))
            row, group = row + height, group + count
        if len(made) > MAX_PARTS:
            raise UnsupportedError(
                f"{where}.q_groups: {len(made)} runs of equal groups are not read; "
                f"expected at most {MAX_PARTS}"
            )
        starts, weights = zip(*made, strict=True)
        base: Any = weights[0]
        if len(made) > 1:
            base = RowParts(weights, starts, (rows, cols), "float16")
        order = _order(parts, rows, where)
        return base if order is None else Permuted(base, order)


def _groups(stored: np.ndarray, words: int, rows: int, where: str):
    """`(bits, first word, inputs)` of each group."""
    pairs = stored.astype(np.int64) % 2**16
    widths, starts = pairs[::2].tolist(), pairs[1::2].tolist()
    wide = int(stored.min()) < -(2**15) or int(stored.max()) >= 2**16
    if wide or len(widths) != len(starts) or starts[0] != 0:
        raise FormatError(
            f"{where}.q_groups: expected pairs of bits and first words, from word 0, "
            "in 16 bits"
        )
    made: list[tuple[int, int, int]] = []
    left = rows
    for bits, start, end in zip(widths, starts, [*starts[1:], words], strict=True):
        whole = (end - start) * 32
        last = len(made) + 1 == len(widths)
        size = left if last else whole // max(bits, 1)
        fits = bits in WIDTHS and 0 < size <= left
        if not fits or (whole - size * bits) not in (range(32) if last else (0,)):
            raise FormatError(
                f"{where}.q_groups: group {len(made)} has {end - start} words for "
                f"{left} inputs or some of them with {bits} bits; expected whole codes "
                "of 2, 3, 4, 5, 6 or 8 bits"
            )
        made.append((bits, start, size))
        left -= size
    if left:
        raise FormatError(f"{where}.q_groups: {left} inputs are in no group")
    return made


def _runs(groups: list[tuple[int, int, int]]) -> list[tuple[int, int, int, int]]:
    """`(bits, inputs of a group, groups, inputs)` of equal groups in a row."""
    made: list[tuple[int, int, int, int]] = []
    for i, (bits, _, size) in enumerate(groups):
        if made:
            before, usual, count, height = made[-1]
            short = i + 1 == len(groups) and size <= usual
            if bits == before and (size == usual or short):
                made[-1] = bits, usual, count + 1, height + size
                continue
        made.append((bits, size, 1, size))
    return made


def _order(parts: Mapping[str, np.ndarray], rows: int, where: str):
    """The input that each row of the codes belongs to, None if in order."""
    name = "q_invperm" if "q_invperm" in parts else "q_perm"
    index = parts[name]
    index = index.view(np.uint16) if index.dtype == np.int16 else index
    inverse = np.argsort(index, kind="stable").astype(np.int32)
    if not np.array_equal(index[inverse], np.arange(rows)):
        raise FormatError(f"{where}.{name}: is not a permutation of 0..{rows - 1}")
    order = inverse if name == "q_invperm" else index.astype(np.int32)
    return None if np.array_equal(order, np.arange(rows)) else order
