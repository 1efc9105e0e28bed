"""Codes of foreign packings, in NumPy.

Most formats store codes as a little-endian bit string inside words: code `k` occupies
bits `k b .. k b + b - 1`, words filled from bit 0. For 1, 2, 4 and 8 bits that is the
order of `qjax.packing`, so bytes are only re-labelled; other widths are re-packed.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import FormatError
from qjax.packing import pack, packed_rows


def stream(words: np.ndarray) -> np.ndarray:
    """Bytes of little-endian words along the first axis.

    Args:
      words: integers `[n, cols]` of any width.

    Returns:
      uint8 `[n * itemsize, cols]`.
    """
    size = words.dtype.itemsize
    little = words.astype(words.dtype.newbyteorder("<"), copy=False)
    parts = np.ascontiguousarray(little).view(np.uint8).reshape(*words.shape, size)
    return parts.transpose(0, 2, 1).reshape(words.shape[0] * size, words.shape[1])


def codes_of(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Codes of a bit string along the first axis.

    Args:
      data: uint8 `[n, cols]`, at least `count * bits / 8` rows.
      bits: code width, 1 to 8.
      count: number of codes.

    Returns:
      uint8 `[count, cols]`.
    """
    if bits == 8:
        return data[:count]
    if 8 % bits == 0:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
        fields = (data[:, None] >> shifts) & np.uint8(2**bits - 1)
        return fields.reshape(-1, data.shape[1])[:count]
    return _fields(_blocks(data, bits, count), bits, np)[:count]


def _blocks(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The bytes of `count` codes, filled up to whole blocks of 8 codes."""
    rows = -(-count // 8) * bits
    return np.pad(data[:rows], [(0, max(rows - len(data), 0)), (0, 0)])


def _fields(data: Any, bits: int, xp: Any) -> Any:
    """Codes of a bit string in blocks of 8, which are `bits` bytes; NumPy or JAX."""
    blocks = data.reshape(-1, bits, data.shape[1])
    fields = []
    for k in range(8):
        at, skip = divmod(k * bits, 8)
        field = blocks[:, at] >> np.uint8(skip)
        if skip + bits > 8:
            field = field | (blocks[:, at + 1] << np.uint8(8 - skip))
        fields.append(field & np.uint8(2**bits - 1))
    return xp.stack(fields, 1).reshape(-1, data.shape[1])


_packed = jax.jit(pack, static_argnums=1)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _repacked(data: Any, bits: int, count: int) -> Any:
    return pack(_fields(data, bits, jnp)[:count], bits)


def transposed(array: np.ndarray) -> np.ndarray:
    """`array.T`, contiguous: in strips, which is several times faster than at once."""
    raw = array.view(f"u{array.dtype.itemsize}")  # float8 copies value by value
    made = np.empty(array.shape[::-1], raw.dtype)
    for i in range(0, len(array), 16):
        made[:, i : i + 16] = raw[i : i + 16].T
    return made.view(array.dtype)


def words_of(codes: np.ndarray, bits: int) -> np.ndarray:
    """int32 words of a little-endian bit string along the first axis.

    Args:
      codes: uint8 `[n, cols]` below `2**bits`.
      bits: code width, 1 to 8.

    Returns:
      int32 `[ceil(n * bits / 32), cols]`; bits behind the last code are 0.
    """
    cols = codes.shape[1]
    if 8 % bits == 0:
        made = repacked(codes, bits)
    else:
        blocks = np.pad(codes, [(0, -len(codes) % 8), (0, 0)]).reshape(-1, 8, cols)
        string = np.zeros((len(blocks), bits, cols), np.uint8)
        for k in range(8):
            at, skip = divmod(k * bits, 8)
            string[:, at] |= blocks[:, k] << np.uint8(skip)
            if skip + bits > 8:
                string[:, at + 1] |= blocks[:, k] >> np.uint8(8 - skip)
        made = string.reshape(-1, cols)[: -(-len(codes) * bits // 8)]
    made = np.pad(made, [(0, -len(made) % 4), (0, 0)])
    words = np.ascontiguousarray(made.reshape(-1, 4, cols).transpose(0, 2, 1))
    return np.array(words.view("<i4")[..., 0], np.int32, order="C")


def planar_codes(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Codes of GPTQ's planar words: fields of 4, 2 and 1 bits, each a bit string.

    Args:
      words: int32 `[n / 32 * bits, cols]`.
      bits: 3, 5, 6 or 7.
      count: number of codes.

    Returns:
      uint8 `[count, cols]`.
    """
    blocks = words.reshape(-1, bits, words.shape[1])
    made = np.zeros((len(blocks) * 32, words.shape[1]), np.uint8)
    done = 0
    for width in (w for w in (4, 2, 1) if bits & w):
        plane = blocks[:, done : done + width].reshape(-1, words.shape[1])
        made |= codes_of(stream(plane), width, len(made)) << np.uint8(done)
        done += width
    return made[:count]


def packed_codes(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The same codes as `qjax.packing` packs them, `[packed_rows(count), cols]`."""
    if 8 % bits == 0:
        made = data[: packed_rows(count, bits)]
        spare = -count % (8 // bits)
        if not spare:
            return made
        made = made.copy()  # bits behind the last code need not be zero
        made[-1] &= np.uint8(2 ** (8 - spare * bits) - 1)
        return made
    return np.asarray(_repacked(_blocks(data, bits, count), bits, count))


def reordered(data: np.ndarray, bits: int, order: np.ndarray) -> np.ndarray:
    """The codes at `order` of a bit string, packed as `qjax.packing` packs them."""
    per, spare = 8 // bits, -len(order) % (8 // bits)
    if 8 % bits or spare:
        return repacked(codes_of(data, bits, len(order))[order], bits)
    made = np.zeros((len(order) // per, data.shape[1]), np.uint8)
    for field in range(per):
        row, place = np.divmod(order[field::per], per)
        codes = data[row] >> (bits * place).astype(np.uint8)[:, None]
        codes &= np.uint8(2**bits - 1)
        made |= codes << np.uint8(bits * field)
    return made


def repacked(codes: np.ndarray, bits: int) -> np.ndarray:
    """Unpacked codes `[in, out]` as `qjax.packing` packs them."""
    return np.asarray(_packed(codes, bits))


def group_order(index: np.ndarray, group: int, where: str) -> np.ndarray | None:
    """The order that makes groups of inputs contiguous.

    Args:
      index: group of each input, `[in]`; negative numbers count from the end.
      group: inputs in each group.
      where: what errors call the tensor.

    Returns:
      int32 `[in]`, the input that each row of the reordered weight belongs to; None
      when groups are contiguous already.

    Raises:
      FormatError: a group has more or fewer inputs than `group`; the last may be short.
    """
    size = len(index)
    count = -(-size // group)
    index = np.where(index < 0, index + count, index)
    if np.array_equal(index, np.arange(size) // group):
        return None
    order = np.argsort(index, kind="stable").astype(np.int32)
    if not np.array_equal(index[order], np.arange(size) // group):
        raise FormatError(
            f"{where}: expected {count} groups of {group} inputs, got groups of "
            f"{sorted(set(np.unique(index, return_counts=True)[1].tolist()))[:8]}"
        )
    return order
