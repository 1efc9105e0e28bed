"""EXL3 checkpoints (exllamav3): trellis codes between Hadamard transforms.

Per linear layer: `trellis` int16 `[in / 16, out / 16, 16 bits]`, the walk of every
tile; `suh` float16 `[in]` and `svh` float16 `[out]`, which multiply activations and
results (older files: `su` and `sv` int16, a sign per bit, lowest first, 1 for -1); and
`mcg` or `mul1`, one int32 that names the hash of states, neither for `3inst`.

These are the leaves of `TrellisTensor` and `Incoherent` under other names, so nothing
is copied or reordered. The two halves of a state's hash are added in float32 here;
exllamav3's kernels round their sum to float16.

Reference: exllamav3 `modules/quant/exl3.py`, `exllamav3_ext/quant/codebook.cuh`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.errors import FormatError, UnsupportedError
from qjax.formats.trellis import TILE, Trellis
from qjax.tensor import QuantizedTensor
from qjax.trellis import BLOCK, Incoherent, TrellisTensor

PARTS = {
    "trellis": ("int16", 3),
    "suh": ("floating", 1),
    "svh": ("floating", 1),
    "su": ("int16", 1),
    "sv": ("int16", 1),
    "mcg": ("integer", None),
    "mul1": ("integer", None),
}
MULTIPLIERS = {"mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}


class EXL3:
    """Reads the layers of one checkpoint; see `qjax.converters.gptq.GPTQ`."""

    kind, marks, parts, stated = "exl3", ("trellis",), PARTS, ()

    def __init__(self, settings: Mapping[str, Any], where: str):
        del settings, where  # every layer says all of itself

    def shape(self, parts: Mapping[str, Any]) -> tuple[int, ...]:
        """`(out, in)`; see `Reader.shape`."""
        rows, cols, _ = parts["trellis"].shape
        return cols * TILE, rows * TILE

    def read(self, parts: Mapping[str, np.ndarray], where: str) -> QuantizedTensor:
        """One weight `[in, out]`, a `TrellisTensor` in `Incoherent`."""
        trellis = parts["trellis"]
        tall, wide, words = trellis.shape
        rows, cols = tall * TILE, wide * TILE
        bits = words // TILE
        if words % TILE == TILE // 2:
            raise UnsupportedError(
                f"{where}.trellis: {words / TILE} bits per weight are not read; "
                "expected a whole number of bits. Quantize it with exllamav3 to one"
            )
        if words % TILE or not 1 <= bits <= 8:
            raise FormatError(
                f"{where}.trellis: {words} words per tile, expected 16 for each of 1 "
                "to 8 bits"
            )
        if rows % BLOCK or cols % BLOCK:
            raise FormatError(
                f"{where}.trellis: holds [in={rows}, out={cols}], expected multiples "
                f"of {BLOCK}"
            )
        codes = trellis.view(np.uint16).reshape(tall, wide * words)
        fmt = Trellis(bits, _codebook(parts, where))
        base = TrellisTensor(codes, None, fmt, (rows, cols), "float16")
        left, right = _side(parts, "su", rows, where), _side(parts, "sv", cols, where)
        return Incoherent(base, left, right, BLOCK)


def _codebook(parts: Mapping[str, np.ndarray], where: str) -> str:
    named = [name for name in MULTIPLIERS if name in parts]
    if len(named) > 1:
        raise FormatError(f"{where}: has both mcg and mul1, expected one hash")
    for name in named:
        leaf = parts[name]
        value = int(leaf.reshape(-1)[0]) % 2**32
        if leaf.size != 1 or value != MULTIPLIERS[name]:
            raise UnsupportedError(
                f"{where}.{name}: is {value:#x} (of {leaf.size}), expected "
                f"{MULTIPLIERS[name]:#x}"
            )
        return name
    return "3inst"


def _side(parts: Mapping[str, np.ndarray], name: str, size: int, where: str):
    """Scales of an axis, or its signs as `Incoherent` packs them."""
    found = f"{name}h" if f"{name}h" in parts or name not in parts else name
    leaf = parts[found]
    expected = size if found.endswith("h") else size // 16
    if len(leaf) != expected:
        raise FormatError(
            f"{where}.{found}: has {len(leaf)} numbers, expected {expected} for an "
            f"axis of {size}"
        )
    return leaf if leaf.dtype != np.int16 else leaf.astype("<i2").view(np.uint8)
