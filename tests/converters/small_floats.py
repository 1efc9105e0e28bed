"""Small floats restated in NumPy: tables and packings of E2M1, scales in E8M0."""

import numpy as np

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1 = np.concatenate([E2M1, -E2M1])


def nibbles(codes: np.ndarray) -> np.ndarray:
    """Pairs of codes along the last axis, the first in the low nibble."""
    return (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)


def power(exponents: np.ndarray) -> np.ndarray:
    """Scales of E8M0."""
    return np.exp2(exponents.astype(np.float32) - 127)


def spread(scale: np.ndarray, group: int) -> np.ndarray:
    """Scales of groups along the last axis, one for each weight."""
    return np.repeat(scale, group, -1)


def tiled(scale: np.ndarray, shape: tuple[int, int], tile: int = 128) -> np.ndarray:
    """Scales of tiles, one for each weight."""
    wide = np.repeat(np.repeat(scale, tile, 0), tile, 1)
    return wide[: shape[0], : shape[1]].astype(np.float32)
