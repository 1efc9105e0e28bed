"""4-bit codes in the order of tensor cores: neighbours 16 bits apart in a word.

Kernels take a 32-bit word apart with shifts and masks of both halves at once, so that
Marlin and AWQ's GEMV-FAST store two neighbours at the same place of both halves.
"""

import numpy as np

_WORDS = 1 << 16
"""Words that are taken apart at once, so that they stay in the cache."""


def halves(words: np.ndarray) -> np.ndarray:
    """Pairs of 4-bit codes as bytes, from words that hold them 16 bits apart.

    Args:
      words: integers of 32 bits, or pairs of 16.

    Returns:
      uint8 `[4 n]` of `n` words: each a nibble of the low half of a word, and above it
      the same nibble of the high half.
    """
    size = words.dtype.itemsize
    flat = np.ascontiguousarray(words).reshape(-1).astype(f"<i{size}", copy=False)
    flat = flat.view("<u4")
    made = np.empty_like(flat)
    for i in range(0, len(flat), _WORDS):
        part = flat[i : i + _WORDS]
        low, high = (_spread(x) for x in (part & np.uint32(0xFFFF), part >> 16))
        np.bitwise_or(low, high << np.uint32(4), out=made[i : i + _WORDS])
    return made.view(np.uint8)


def _spread(x: np.ndarray) -> np.ndarray:
    """Four nibbles as four bytes."""
    x = (x | x << np.uint32(8)) & np.uint32(0x00FF00FF)
    return (x | x << np.uint32(4)) & np.uint32(0x0F0F0F0F)
