"""Marlin's order of 4-bit weights, taken apart.

`B [in / 16, 2 out]` holds tiles of 16 x 16 weights, four neighbouring tiles in one run
of 1024: codes plus 8, permuted for the fragments of tensor cores, eight to a word with
even places first. Scales are permuted in runs of 64, or of 32 when there is one per
output.

Reference: Marlin `marlin/__init__.py`, `Layer.pack`.
"""

import functools

import numpy as np

from qjax.converters.words import codes_of, stream
from qjax.errors import FormatError


@functools.cache
def _order() -> np.ndarray:
    """Place in four tiles `[4, 16, 16]` of each of 1024 stored codes."""
    lane, tile, half, pair = np.ogrid[:32, :4, :2, :4]
    column = lane // 4 + 8 * half
    row = 2 * (lane % 4) + np.array([0, 1, 8, 9])[pair]
    places = (256 * tile + 16 * row + column).reshape(-1, 8)
    return places[:, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(-1)


def marlin_codes(words: np.ndarray, where: str) -> np.ndarray:
    """Unsigned codes `[in, out]` of `B`.

    Raises:
      FormatError: `out` is not a multiple of 64.
    """
    tiles, width = words.shape
    if width % 128:
        raise FormatError(
            f"{where}.B: shape {list(words.shape)}, expected [in / 16, 2 out] with "
            "out a multiple of 64"
        )
    fields = codes_of(stream(words.reshape(-1, 1)), 4, words.size * 8)
    stored = fields.reshape(-1, 1024)
    made = np.empty_like(stored)
    made[:, _order()] = stored
    made = made.reshape(tiles, width // 32, 16, 16).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(made.reshape(tiles * 16, width // 2))


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
