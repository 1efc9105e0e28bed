"""Writing GGUF files: streamed, and whole or not at all.

The header is written first, from types and shapes alone; then the data of the tensors,
one at a time and in their order, so that never more than one (or one piece of one) is
in memory. The bytes are those of gguf-py's `GGUFWriter` for the same content, which
leaves out empty strings and arrays; here they are written.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from qjax.converters.gguf_layout import (
    MAGIC,
    MAX_KEY,
    MAX_NAME,
    NUMBERS,
    VALUE_IDS,
    VERSIONS,
    Value,
    check_alignment,
    stored,
    tensor_bytes,
)
from qjax.errors import SpecError
from qjax.formats.ggml import TYPES
from qjax.io.atomic import atomic_file
from qjax.io.files import shown
from qjax.io.safetensors_layout import check_names

_KINDS = {dtype: name for name, dtype in NUMBERS.items()}


def write_gguf(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    tensors: Iterable[tuple[str, str, tuple[int, ...], Any]],
    *,
    overwrite: bool = False,
) -> None:
    """Write a GGUF file, atomically.

    Args:
      path: Target file.
      metadata: Key to value, in the order to write. A `Value` says its type; so do
        NumPy's scalars and vectors. Other integers become u32 (or i32, u64, i64, the
        first that holds them), floats f32; lists of integers i32 (or i64), of floats
        f32. `general.alignment` is obeyed.
      tensors: (name, type, shape, data) each: the name of a type such as "q4_k"; the
        logical shape, rows along the last dimension; and an array as
        `gguf_layout.stored` describes it, or an iterable that yields its bytes as
        arrays, piece by piece. An iterable is first asked when its turn has come.
      overwrite: Whether an existing file may be replaced.

    Raises:
      SpecError: The file exists, a value has no type of GGUF or does not fit its type,
        a shape does not suit the type, or data is not what was declared.
      FormatError: A tensor's name is not allowed.
      QjaxError: The disk is full; nothing changed.
    """
    where = shown(path)
    fields = {key: _typed(value, f"{where}: {key}") for key, value in metadata.items()}
    alignment = check_alignment(fields, where, SpecError)
    tensors = [(name, kind, tuple(shape), data) for name, kind, shape, data in tensors]
    sizes = _sizes(tensors, where)
    header = bytearray(MAGIC + _u32(VERSIONS[-1]) + _u64(len(tensors), len(fields)))
    for key, value in fields.items():
        header += _key(key, where) + _encoded(value, f"{where}: {key}")
    offset = 0
    for (name, kind, shape, _), size in zip(tensors, sizes, strict=True):
        header += _text(name, where) + _u32(len(shape)) + _u64(*shape[::-1])
        header += _u32(TYPES[kind].id) + _u64(offset)
        offset += size + -size % alignment
    with atomic_file(path, overwrite=overwrite) as file:
        file.write(header + bytes(-len(header) % alignment))
        for (name, kind, shape, data), size in zip(tensors, sizes, strict=True):
            _write_data(file, data, kind, shape, size, f"{where}: tensor {name!r}")
            file.write(bytes(-size % alignment))


def _typed(value: Any, where: str) -> Value:
    """Return a value of metadata with its type."""
    if isinstance(value, Value):
        return value
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind != "U":
        kind = _KINDS.get(value.dtype.newbyteorder("<"))
        if kind is None:
            raise SpecError(f"{where}: {value.dtype} is no type of GGUF's metadata")
        return Value(kind, value if value.ndim else value.item())
    several = isinstance(value, list | tuple | np.ndarray)
    items: list[Any] = list(value) if several else [value]
    for kind, python in (("bool", bool), ("f32", float), ("string", str)):
        if items and all(isinstance(item, python) for item in items):
            return Value(kind, value)
    if not items or not all(type(item) is int for item in items):
        raise SpecError(
            f"{where}: cannot tell the type of {repr(value)[:80]!a}; expected bool, "
            "int, float, str or a list of one of them; say it with Value(type, value)"
        )
    for kind in ("i32", "i64", "u64") if several else ("u32", "i32", "u64", "i64"):
        limits = np.iinfo(NUMBERS[kind])
        if limits.min <= min(items) and max(items) <= limits.max:
            return Value(kind, value)
    raise SpecError(f"{where}: {max(items, key=abs)} does not fit in 64 bits")


def _encoded(value: Value, where: str) -> bytes:
    """Return the type and the bytes of a value."""
    kind, content = value
    if kind not in NUMBERS and kind != "string":
        raise SpecError(
            f"{where}: type {kind!a}, expected string or one of {', '.join(NUMBERS)}"
        )
    several = isinstance(content, list | tuple | np.ndarray)
    if kind == "string":
        items = list(content) if several else [content]
        raw = b"".join(_text(item, where) for item in items)
    else:
        items, raw = _numbers(kind, content, several, where)
    if several:
        return _u32(VALUE_IDS["array"], VALUE_IDS[kind]) + _u64(len(items)) + raw
    return _u32(VALUE_IDS[kind]) + raw


def _numbers(
    kind: str, content: Any, several: bool, where: str
) -> tuple[np.ndarray, bytes]:
    """Return numbers as an array and as bytes of a type that holds them."""
    try:
        array = np.asarray(content)
    except ValueError:
        raise SpecError(f"{where}: not a list of numbers") from None
    if array.ndim != several:
        raise SpecError(f"{where}: {array.ndim} dimensions, expected a list of {kind}")
    dtype, found = NUMBERS[kind], array.dtype
    if dtype.kind == "b":
        fits = found.kind == "b"
    elif dtype.kind == "f":
        fits = found.kind in "iuf"
    else:
        fits = found.kind in "iu"
    if array.size and fits and dtype.kind in "iu":
        limits = np.iinfo(dtype)
        fits = limits.min <= int(array.min()) and int(array.max()) <= limits.max
    if array.size and fits and dtype.kind == "f":
        largest = np.finfo(dtype).max
        fits = not bool(np.any(np.isfinite(array) & (np.abs(array) > largest)))
    if array.size and not fits:
        raise SpecError(f"{where}: {repr(content)[:80]!a} does not fit in {kind}")
    return array, array.astype(dtype).tobytes()


def _sizes(tensors: list[tuple[str, str, tuple[int, ...], Any]], where: str) -> list:
    """Check names, types and shapes; return the sizes of the data in bytes."""
    seen, sizes = set(), []
    check_names([name for name, *_ in tensors], where)
    for name, kind, shape, _ in tensors:
        here = f"{where}: tensor {name!r}"
        if name in seen:
            raise SpecError(f"{here}: is given twice")
        if len(name.encode()) > MAX_NAME:
            raise SpecError(f"{here}: name of more than {MAX_NAME} bytes")
        if kind not in TYPES:
            raise SpecError(
                f"{here}: type {kind!a}, expected one of {', '.join(TYPES)}"
            )
        seen.add(name)
        sizes.append(tensor_bytes(kind, shape, here, SpecError))
    return sizes


def _write_data(
    file: BinaryIO, data: Any, kind: str, shape: tuple[int, ...], size: int, where: str
) -> None:
    """Write the data of one tensor, and check that it is as declared."""
    dtype, expected = stored(kind, shape)
    written = 0
    for piece in _pieces(data, expected, where):
        if piece.dtype.newbyteorder("<") != dtype:
            raise SpecError(f"{where}: data is {piece.dtype}, expected {dtype}")
        written += piece.nbytes
        if written > size:
            break
        file.write(np.ascontiguousarray(piece, dtype).reshape(-1).view(np.uint8).data)
    if written != size:
        raise SpecError(
            f"{where}: {'more than ' if written > size else ''}"
            f"{min(written, size):,} bytes of data, {list(shape)} of {kind} needs "
            f"{size:,}"
        )


def _pieces(data: Any, expected: tuple[int, ...], where: str) -> Iterator[np.ndarray]:
    """Yield data as arrays; a whole array must have the shape."""
    if hasattr(data, "dtype"):
        if tuple(data.shape) != expected:
            raise SpecError(
                f"{where}: data of shape {list(data.shape)}, expected {list(expected)}"
            )
        yield np.asarray(data)
    else:
        yield from map(np.asarray, data)


def _key(key: str, where: str) -> bytes:
    if not key or not key.isprintable() or len(key.encode()) > MAX_KEY:
        raise SpecError(
            f"{where}: key {key[:80]!a} must be 1 to {MAX_KEY:,} printable bytes"
        )
    return _text(key, where)


def _text(text: Any, where: str) -> bytes:
    if not isinstance(text, str):
        raise SpecError(f"{where}: {repr(text)[:80]!a} is not a string")
    try:
        raw = text.encode()
    except UnicodeEncodeError as error:
        raise SpecError(f"{where}: {text[:80]!a} is not text: {error.reason}") from None
    return _u64(len(raw)) + raw


def _u32(*numbers: int) -> bytes:
    return np.array(numbers, "<u4").tobytes()


def _u64(*numbers: int) -> bytes:
    return np.array(numbers, "<u8").tobytes()
