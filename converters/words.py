"""Codes of foreign packings, as `qjax.packing` packs them.

Most formats store codes as a little-endian bit string inside words: code `k` occupies
bits `k b .. k b + b - 1`, words filled from bit 0. For 1, 2, 4 and 8 bits that is the
order of `qjax.packing`, so bytes are only re-labelled; codes of other widths are moved
bit by bit, eight codes at a time, between three layouts: `bytes`, one code each;
`string`; and `planes`, those of `qjax.packing`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import FormatError
from qjax.packing import packed_rows

_CODES = 1024
"""Codes per column that are moved at once, so that few shapes are compiled."""
_COLUMNS = 4096
"""Columns whose codes are unpacked at once."""


@functools.cache
def _host() -> Any:
    """A CPU as jax knows it; None, for the default device, where it knows none."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def copied(view: np.ndarray) -> np.ndarray:
    """A contiguous array: XLA copies strided ones several times faster than NumPy."""
    return np.asarray(jax.device_put(view, _host()))


def transposed(array: np.ndarray) -> np.ndarray:
    """`array.T`, contiguous and not to be written."""
    if array.dtype.itemsize > 4:  # jax has no such numbers
        return np.ascontiguousarray(array.T)
    raw = array.view(f"u{array.dtype.itemsize}")
    return copied(raw.T).view(array.dtype)


def stream(words: np.ndarray) -> np.ndarray:
    """Bytes of little-endian words along the first axis.

    Args:
      words: integers `[n, cols]` of any width.

    Returns:
      uint8 `[n * itemsize, cols]`, not to be written.
    """
    size = words.dtype.itemsize
    little = words.astype(words.dtype.newbyteorder("<"), copy=False)
    parts = np.ascontiguousarray(little).view(np.uint8).reshape(*words.shape, size)
    return copied(parts.transpose(0, 2, 1)).reshape(-1, words.shape[1])


def codes_of(
    data: np.ndarray, bits: int, count: int, layout: str = "string"
) -> np.ndarray:
    """Codes of a bit string along the first axis.

    Args:
      data: uint8 `[n, cols]`, at least `count * bits / 8` rows.
      bits: code width, 1 to 8.
      count: number of codes.
      layout: `string`, or `planes` as `qjax.packing` packs them.

    Returns:
      uint8 `[count, cols]`.
    """
    if bits == 8:
        return data[:count]
    if 8 % bits == 0:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
        fields = (data[:, None] >> shifts) & np.uint8(2**bits - 1)
        return fields.reshape(-1, data.shape[1])[:count]
    blocks = _blocks(data, bits, count) if layout == "string" else data
    return moved(blocks, bits, layout, "bytes", np)[:count]


def _blocks(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The bytes of `count` codes, filled up with zeros to whole blocks of 8 codes."""
    if count % 8 == 0:
        return data[: count // 8 * bits]
    used, spare = -(-count * bits // 8), -count * bits % 8
    made = np.pad(data[:used], [(0, -(-count // 8) * bits - used), (0, 0)])
    made[used - 1] &= np.uint8(2 ** (8 - spare) - 1)
    return made


def _widths(bits: int) -> list[int]:
    """Widths of the planes of a code, low bits first."""
    return [width for width in (8, 4, 2, 1) if bits & width]


def _place(layout: str, bits: int, code: int, bit: int) -> int:
    """Where a bit of one of 8 codes lies."""
    if layout == "bytes":
        return 8 * code + bit
    if layout == "string":
        return bits * code + bit
    low = 0  # of a plane
    for width in _widths(bits):
        if bit < low + width:
            return 8 * low + width * code + bit - low
        low += width
    raise AssertionError("no such bit")


@functools.cache
def _moves(bits: int, source: str, target: str) -> list[tuple[int, int, int, int]]:
    """Target byte, source byte, shift to the left and mask of bits that move alike."""
    made: dict[tuple[int, int, int], int] = {}
    for code in range(8):
        for bit in range(bits):
            start, end = (_place(x, bits, code, bit) for x in (source, target))
            move = end // 8, start // 8, end % 8 - start % 8
            made[move] = made.get(move, 0) | 1 << end % 8
    return [(*move, mask) for move, mask in sorted(made.items())]


def moved(data: Any, bits: int, source: str, target: str, xp: Any) -> Any:
    """Blocks of 8 codes in another layout.

    Args:
      data: uint8 `[n, ...]`, `n` a multiple of `bits`, or of 8 for `bytes`.
      bits: code width.
      source: the layout of `data`.
      target: the layout to return.
      xp: NumPy or `jax.numpy`.
    """
    blocks = data.reshape(-1, 8 if source == "bytes" else bits, *data.shape[1:])
    made: dict[int, Any] = {}
    for end, start, shift, mask in _moves(bits, source, target):
        field = blocks[:, start]
        field = field << xp.uint8(shift) if shift > 0 else field >> xp.uint8(-shift)
        field = field & xp.uint8(mask)
        made[end] = made[end] | field if end in made else field
    done = xp.stack([made[end] for end in sorted(made)], 1)
    return done.reshape(-1, *data.shape[1:])


_compiled = jax.jit(functools.partial(moved, xp=jnp), static_argnums=(1, 2, 3))


def _planes(
    data: np.ndarray,
    bits: int,
    count: int,
    source: str,
    order: np.ndarray | None = None,
) -> np.ndarray:
    """Codes, in order or those at `order`, as `qjax.packing` packs them."""
    width = 8 if source == "bytes" else bits  # bytes of 8 codes
    made = np.empty((packed_rows(count, bits), data.shape[1]), np.uint8)
    for start in range(0, count, _CODES):
        first, size = start // 8 * width, _CODES // 8 * width
        if order is None:
            part = data[first : first + size]
        else:
            part = data[order[start : start + _CODES]]
        if len(part) < size:
            part = np.pad(part, [(0, size - len(part)), (0, 0)])
        done = _compiled(jax.device_put(part, _host()), bits, source, "planes")
        rows = made[start // 8 * bits :][: _CODES // 8 * bits]
        rows[:] = np.asarray(done)[: len(rows)]
    return made


def words_of(codes: np.ndarray, bits: int) -> np.ndarray:
    """int32 words of a little-endian bit string along the first axis.

    Args:
      codes: uint8 `[n, cols]` below `2**bits`.
      bits: code width, 1 to 8.

    Returns:
      int32 `[ceil(n * bits / 32), cols]`; bits behind the last code are 0.
    """
    cols = codes.shape[1]
    blocks = np.pad(codes, [(0, -len(codes) % 8), (0, 0)])
    made = moved(blocks, bits, "bytes", "string", np)
    made = made[: -(-len(codes) * bits // 8)]
    made = np.pad(made, [(0, -len(made) % 4), (0, 0)])
    words = np.ascontiguousarray(made.reshape(-1, 4, cols).transpose(0, 2, 1))
    return np.array(words.view("<i4")[..., 0], np.int32, order="C")


def planar(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes of GPTQ's planar words as `qjax.packing` packs them.

    Args:
      words: int32 `[n / 32 * bits, cols]`: 32 codes' fields of 4, 2 and 1 bits, each
        a bit string; these are the planes of four blocks of `qjax.packing`.
      bits: code width, 1 to 8.

    Returns:
      uint8 `[n / 8 * bits, cols]`.
    """
    cols, low = words.shape[1], 0
    stored = stream(words).reshape(-1, 4 * bits, cols)
    made = np.empty((len(stored), 4, bits, cols), np.uint8)
    for width in _widths(bits):
        plane = stored[:, 4 * low : 4 * (low + width)]
        made[:, :, low : low + width] = plane.reshape(-1, 4, width, cols)
        low += width
    return made.reshape(-1, cols)


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
    return _planes(_blocks(data, bits, count), bits, count, "string")


def reordered(
    data: np.ndarray, bits: int, order: np.ndarray, layout: str = "string"
) -> np.ndarray:
    """The codes at `order`, packed as `qjax.packing` packs them; see `codes_of`."""
    made = np.empty((packed_rows(len(order), bits), data.shape[1]), np.uint8)
    for start in range(0, data.shape[1], _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        codes = codes_of(data[:, columns], bits, len(order), layout)
        made[:, columns] = repacked(codes, bits, order)
    return made


def repacked(
    codes: np.ndarray, bits: int, order: np.ndarray | None = None
) -> np.ndarray:
    """Unpacked codes `[in, out]`, or those at `order`, as `qjax.packing` packs them."""
    if bits == 8:
        return codes if order is None else codes[order]
    return _planes(codes, bits, len(codes), "bytes", order)


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
