"""Marlin's order of 4-bit weights, taken apart.

`B [in / 16, 2 out]` holds tiles of 16 x 16 weights, four neighbouring tiles in one run
of 1024: codes plus 8, permuted for the fragments of tensor cores, eight to a word with
even places first. Scales are permuted in runs of 64, or of 32 when there is one per
output.

Reference: Marlin `marlin/__init__.py`, `Layer.pack`.
"""

import numpy as np

from qjax.converters.halves import halves
from qjax.converters.words import copied
from qjax.errors import FormatError


def marlin_codes(words: np.ndarray, where: str) -> np.ndarray:
    """Unsigned codes of `B` as `qjax.packing` packs them, `[in / 2, out]`.

    The low half of a word holds, of two columns 8 apart, two even rows 8 apart, and the
    high half the odd rows behind these: nibbles of both halves make up packed bytes.

    Raises:
      FormatError: `out` is not a multiple of 64.
    """
    tiles, width = words.shape
    if width % 128:
        raise FormatError(
            f"{where}.B: shape {list(words.shape)}, expected [in / 16, 2 out] with "
            "out a multiple of 64"
        )
    # lane over 4, lane modulo 4, tile, column over 8, row over 8
    fields = halves(words).reshape(tiles, width // 128, 8, 4, 4, 2, 2)
    turned = copied(fields.transpose(0, 6, 3, 1, 4, 5, 2))
    return turned.reshape(tiles * 8, width // 2)


def marlin_scales(scales: np.ndarray, where: str) -> np.ndarray:
    """Scales `[groups, out]` of `s`.

    Raises:
      FormatError: `out` is not a multiple of the run.
    """
    whole = scales.shape[0] > 1
    run = 64 if whole else 32
    if scales.shape[1] % run:
        raise FormatError(
            f"{where}.s: shape {list(scales.shape)}, expected [groups, out] with out a "
            f"multiple of {run}"
        )
    i = np.arange(run)
    order = i % 8 * 8 + i // 8
    if not whole:
        order = 2 * (i // 8) + np.array([0, 1, 8, 9, 16, 17, 24, 25])[i % 8]
    stored = scales.reshape(-1, run)
    made = np.empty_like(stored)
    made[:, order] = stored
    return made.reshape(scales.shape)
