"""Foreign packings restated in NumPy from their formats: what the converters read.

Codes are unsigned integers `[in, out]`, as GPTQ, AWQ and compressed-tensors have them.
"""

import numpy as np


def words(codes: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """int32 words of a little-endian bit string along an axis."""
    codes = np.moveaxis(codes, axis, 0)
    string = [(codes >> b) & 1 for b in range(bits)]
    flat = np.stack(string, 1).reshape(-1, codes.shape[1]).astype(np.uint64)
    flat = np.pad(flat, [(0, -len(flat) % 32), (0, 0)]).reshape(-1, 32, codes.shape[1])
    made = np.sum(flat << np.arange(32, dtype=np.uint64)[:, None], axis=1)
    return np.moveaxis(made.astype(np.uint32).view(np.int32), 0, axis)


def whole_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """int32 words of `32 // bits` codes each along the first axis."""
    per = 32 // bits
    padded = np.pad(codes, [(0, -len(codes) % per), (0, 0)]).astype(np.uint64)
    fields = padded.reshape(-1, per, codes.shape[1])
    shifts = (np.arange(per, dtype=np.uint64) * np.uint64(bits))[:, None]
    return np.sum(fields << shifts, axis=1).astype(np.uint32).view(np.int32)


def awq_words(codes: np.ndarray) -> np.ndarray:
    """int32 `[rows, out / 8]` in AutoAWQ's order."""
    tiles = codes.reshape(len(codes), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]]
    return words(tiles.reshape(codes.shape), 4, 1)


def dense(codes, scales, zeros, index) -> np.ndarray:
    """`(code - zero) * scale` in float32 by the group of each input."""
    wide = codes.astype(np.float32) - zeros[index].astype(np.float32)
    return wide * scales[index].astype(np.float32)


def tiled_words(codes: np.ndarray, tiles: int) -> np.ndarray:
    """int32 `[out / 8, in / (16 tiles), 32, tiles / 2]` of 4-bit codes `[out, in]`.

    As PTX lays out the B operand of `mma.m16n8k16` over lanes: lane `l` holds, of
    column `l // 4`, rows `2 (l % 4)` and the next, and both 8 below. tinygemm puts two
    such operands into a word: first the even rows of all, then the odd ones.
    """
    out, wide = codes.shape
    made = np.zeros((out // 8, wide // (16 * tiles), 32, tiles // 2), np.uint32)
    for a, s, lane, j in np.ndindex(made.shape):
        start = 16 * (tiles * s + 2 * j)
        rows = [
            start + 16 * operand + 8 * below + 2 * (lane % 4) + odd
            for odd in range(2)
            for operand in range(2)
            for below in range(2)
        ]
        for place, row in enumerate(rows):
            code = int(codes[8 * a + lane // 4, row])
            made[a, s, lane, j] |= np.uint32(code << (4 * place))
    return made.view(np.int32)
