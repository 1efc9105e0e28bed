"""Codes packed in runs of rows, as HQQ and optimum-quanto store them.

A matrix `[rows, cols]` is cut into as many runs of neighbouring rows as a word holds
codes, the last one filled up with zeros. Word `[k, j]` holds code `[k, j]` of every
run; `places` are the lowest bits of the runs in it.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qjax.converters.words import copied, moved, repacked, transposed
from qjax.packing import packed_rows

_MATRICES = 1 << 14
"""Matrices of 8 x 8 bits transposed at once, so that they stay in the cache."""
_SWAPS = (28, 0xF0F0F0F0), (14, 0xCCCC0000CCCC), (7, 0xAA00AA00AA00AA)
"""How far bits are apart that are swapped, and where the lower ones are."""


def run_codes(
    words: np.ndarray, places: Sequence[int], bits: int, rows: int
) -> np.ndarray:
    """The matrix that was packed.

    Args:
      words: integers `[n, cols]`.
      places: lowest bit of each run.
      bits: code width.
      rows: rows to return, at most `n` times the number of runs.

    Returns:
      uint8 `[rows, cols]`.
    """
    made = np.empty((len(places), *words.shape), np.uint8)
    for i, place in enumerate(places):
        np.bitwise_and(words >> place, 2**bits - 1, out=made[i], casting="unsafe")
    return made.reshape(-1, words.shape[1])[:rows]


def run_columns(
    words: np.ndarray, places: Sequence[int], bits: int, matrix: tuple[int, int]
) -> np.ndarray:
    """Codes of a weight whose rows of inputs are whole rows of the packed matrix.

    Args:
      words: integers `[n, cols]`, `cols` a divisor of `in`.
      places: lowest bit of each run.
      bits: code width.
      matrix: `(in, out)`.

    Returns:
      uint8 `[packed(in), out]`, as `qjax.packing` packs them.
    """
    (rows, cols), width = matrix, words.shape[1]
    if words.size * len(places) == rows * cols and cols % len(places) == 0:
        return _packed(words.reshape(-1, rows), places, bits)
    groups = rows * cols // width
    if width % 8:  # blocks of 8 codes lie in several rows
        codes = run_codes(words, places, bits, groups)
        return repacked(transposed(codes.reshape(cols, rows)), bits)
    made = _packed(words, places, bits)[:, :groups]
    made = made.reshape(len(made), cols, -1)  # bytes of a group, outputs, groups
    return copied(made.transpose(2, 0, 1)).reshape(-1, cols)


def _packed(words: np.ndarray, places: Sequence[int], bits: int) -> np.ndarray:
    """Packs fields of words `[n, in]` along `in`, the places beside one another."""
    if words.dtype == np.uint8 and tuple(places) == tuple(range(7, -1, -1)):
        return transposed(_turned(words)).reshape(-1, 8 * len(words))
    return np.asarray(_fields(transposed(words), tuple(places), bits))


def _turned(words: np.ndarray) -> np.ndarray:
    """Bits of bytes `[n, in]`, the highest first, eight bytes transposed at a time.

    Of an 8 x 8 matrix the blocks across its diagonal are swapped: those of 4 x 4 bits,
    then of 2 x 2 inside them, then single bits.
    """
    padded = np.pad(words, [(0, 0), (0, -words.shape[1] % 8)])
    matrices = padded.reshape(-1).view("<u8")
    for i in range(0, len(matrices), _MATRICES):
        part = matrices[i : i + _MATRICES]
        for apart, mask in _SWAPS:
            differ = (part >> np.uint64(apart) ^ part) & np.uint64(mask)
            part ^= differ
            part ^= differ << np.uint64(apart)
        part.byteswap(inplace=True)
    return padded


@functools.partial(jax.jit, static_argnums=(1, 2))
def _fields(words, places: tuple[int, ...], bits: int):
    """`_packed` of words `[in, n]`."""
    fields = words[:, None] >> jnp.asarray(places, words.dtype)[:, None]
    fields = (fields & (2**bits - 1)).astype(jnp.uint8)
    blocks = jnp.pad(fields, [(0, -len(words) % 8), (0, 0), (0, 0)])
    made = moved(blocks, bits, "bytes", "planes", jnp).reshape(-1, blocks[0].size)
    return made[: packed_rows(len(words), bits)]


def run_words(
    codes: np.ndarray, places: Sequence[int], dtype: type[np.integer]
) -> np.ndarray:
    """The inverse of `run_codes`; bits of rows that are missing are 0."""
    padded = np.pad(codes, [(0, -len(codes) % len(places)), (0, 0)])
    runs = np.split(padded, len(places))
    made = np.zeros(runs[0].shape, dtype)
    for run, place in zip(runs, places, strict=True):
        made |= run.astype(dtype) << dtype(place)
    return made
