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

from qjax.converters.words import transposed
from qjax.packing import pack


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
      words: uint8 `[n, cols]`, `cols` a divisor of `in`.
      places: lowest bit of each run.
      bits: code width.
      matrix: `(in, out)`.

    Returns:
      uint8 `[packed(in), out]`, as `qjax.packing` packs them.
    """
    rows, cols = matrix
    if cols % len(places):  # an output lies in two runs
        codes = run_codes(words, places, bits, rows * cols // words.shape[1])
        return np.asarray(_packed(transposed(codes.reshape(cols, rows)), (0,), bits))
    turned = transposed(words.reshape(-1, rows))
    return np.asarray(_packed(turned, tuple(places), bits))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _packed(words, places: tuple[int, ...], bits: int):
    """Packs fields of words `[in, n]`, the places beside one another."""
    mask = jnp.uint8(2**bits - 1)
    fields = [(words >> jnp.uint8(place)) & mask for place in places]
    return jnp.concatenate([pack(field, bits) for field in fields], axis=1)


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
