"""The header of a GGUF file, read strictly.

Nothing in the file is trusted: integers are Python integers (they cannot wrap), counts
and lengths are compared with the bytes that are left before anything is made of them,
and what can be made is capped (32 MB of header, 65,536 keys and tensors, 1,500,000
strings in arrays). Arrays of numbers are read at once; arrays of strings in one pass.

As in llama.cpp keys and names are unique, names are shorter than 64 bytes, rows are
whole blocks, the alignment is a power of two, and data follows in the order of the
tensors without holes. Bytes after the last tensor are ignored, also as there. Stricter
than there: booleans are 0 or 1, strings are UTF-8, dimensions positive, keys and names
printable, and a name is never like a path.
"""

import struct
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from qjax.converters.gguf_layout import (
    MAGIC,
    MAX_DIMS,
    MAX_KEY,
    MAX_KEYS,
    MAX_NAME,
    MAX_STRINGS,
    MAX_TENSORS,
    NUMBERS,
    VALUE_NAMES,
    VERSIONS,
    Tensor,
    Value,
    check_alignment,
    tensor_bytes,
)
from qjax.errors import FormatError, UnsupportedError
from qjax.formats.ggml import type_of_id
from qjax.io.files import MappedFile, shown
from qjax.io.safetensors_layout import check_names, looks_like

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
# Bytes of the smallest key (a byte) and of the smallest tensor (one dimension).
_LEAST_KEY = 8 + 1 + 4 + 1
_LEAST_TENSOR = 8 + 1 + 4 + 8 + 4 + 8


@dataclass(frozen=True)
class Header:
    """The header of one file; `tensors` are in the order of their data."""

    version: int
    alignment: int
    fields: dict[str, Value]
    tensors: dict[str, Tensor]


class _Cursor:
    """A place in the header.

    Attributes:
      at: Next byte.
      what: What is being read, for messages.
    """

    def __init__(self, file: MappedFile, limit: int):
        self.where = shown(file.path)
        self.size = file.size
        self.end = min(file.size, limit)
        self.data = file.array(0, np.dtype(np.uint8), (self.end,)).data
        self.at = 0
        self.what = "header"
        self._strings = MAX_STRINGS

    def fail(self, why: str) -> NoReturn:
        """Raise `FormatError` for what is being read."""
        raise FormatError(f"{self.where}: {self.what}: {why}")

    def take(self, count: int) -> int:
        """Return the place of the next `count` bytes, and step over them."""
        at = self.at
        if count > self.end - at:
            if count > self.size - at:
                self.fail(
                    f"needs {count:,} bytes from byte {at:,} on, the file has "
                    f"{self.size:,}; it is damaged or truncated"
                )
            self.fail(
                f"the header passes the limit of {self.end:,} bytes; if the file is "
                "what it should be, open it with a larger max_header"
            )
        self.at = at + count
        return at

    def u32(self) -> int:
        """Read a u32."""
        return _U32.unpack_from(self.data, self.take(4))[0]

    def u64(self) -> int:
        """Read a u64."""
        return _U64.unpack_from(self.data, self.take(8))[0]

    def text(self, limit: int | None = None) -> str:
        """Read a string of at most `limit` bytes."""
        size = self.u64()
        if limit is not None and size > limit:
            self.fail(f"{size:,} bytes long, expected at most {limit:,}")
        at = self.take(size)
        try:
            return str(self.data[at : at + size], "utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"not UTF-8 at byte {at + error.start:,}")

    def texts(self, count: int) -> list[str]:
        """Read `count` strings."""
        self._room(count, 8)
        if count > self._strings:
            self.fail(f"more than {MAX_STRINGS:,} strings in the arrays of a file")
        self._strings -= count
        found: list[str] = []
        data, at, end, unpack = self.data, self.at, self.end, _U64.unpack_from
        try:
            for _ in range(count):
                stop = at + 8 + unpack(data, at)[0]
                if stop > end:
                    break
                found.append(str(data[at + 8 : stop], "utf-8"))
                at = stop
        except (struct.error, UnicodeDecodeError):
            pass
        self.at = at
        if len(found) < count:  # read the bad one again, for its message
            self.what += f": string {len(found):,}"
            self.text()
        return found

    def numbers(self, kind: str, count: int) -> np.ndarray:
        """Read `count` numbers of a type of `NUMBERS`."""
        dtype = NUMBERS[kind]
        self._room(count, dtype.itemsize)
        at = self.take(count * dtype.itemsize)
        raw = np.frombuffer(bytes(self.data[at : self.at]), np.uint8)
        if kind == "bool" and raw.size and raw.max() > 1:
            self.fail(f"bool byte {raw.max()}, expected 0 or 1")
        return raw.view(dtype)

    def _room(self, count: int, each: int) -> None:
        """Refuse a count of which the rest of the file is too small."""
        if count > (self.size - self.at) // each:
            self.fail(
                f"{count:,} elements of at least {each} bytes, the file has "
                f"{self.size - self.at:,} left; it is damaged or truncated"
            )


def read_header(file: MappedFile, max_header: int) -> Header:
    """Read and check the header of a GGUF file.

    Args:
      file: The file.
      max_header: Most bytes the header may take.

    Returns:
      What it says.

    Raises:
      FormatError: The file breaks the format.
      UnsupportedError: An older or newer version, big-endian, an array of arrays, or a
        type of tensor that llama.cpp has removed.
    """
    cursor = _Cursor(file, max_header)
    version, tensors, keys = _start(cursor, file)
    fields: dict[str, Value] = {}
    for index in range(keys):
        cursor.what = f"key {index}"
        key = cursor.text(MAX_KEY)
        if not key or not key.isprintable():
            cursor.fail(f"{key[:80]!a}, expected printable characters")
        cursor.what = f"key {key[:80]!a}"
        if key in fields:
            cursor.fail("is given twice")
        fields[key] = _value(cursor)
    alignment = check_alignment(fields, cursor.where)
    return Header(version, alignment, fields, _tensors(cursor, tensors, alignment))


def _start(cursor: _Cursor, file: MappedFile) -> tuple[int, int, int]:
    """Read (version, number of tensors, number of keys)."""
    if bytes(cursor.data[:4]) != MAGIC:
        raise FormatError(
            f"{cursor.where}: does not begin with 'GGUF'; "
            + (looks_like(file) or "damaged or not a GGUF file")
        )
    cursor.take(4)
    version = cursor.u32()
    if version and version & 0xFFFF == 0:
        raise UnsupportedError(
            f"{cursor.where}: is big-endian, which is not read; turn it with "
            "llama.cpp's gguf_convert_endian.py"
        )
    if version not in VERSIONS:
        raise (UnsupportedError if version else FormatError)(
            f"{cursor.where}: GGUF version {version}, expected 2 or 3; convert the "
            "original model again"
        )
    tensors, keys = cursor.u64(), cursor.u64()
    for what, count, least, most in (
        ("tensors", tensors, _LEAST_TENSOR, MAX_TENSORS),
        ("keys", keys, _LEAST_KEY, MAX_KEYS),
    ):
        left = cursor.size - cursor.at
        if count > most or count * least > left:
            cursor.fail(
                f"{count:,} {what}, expected at most {most:,} and what fits into the "
                f"{left:,} bytes that follow; it is damaged or truncated"
            )
    return version, tensors, keys


def _value(cursor: _Cursor) -> Value:
    """Read the type and the value of a key."""
    kind = _kind(cursor)
    if kind == "array":
        kind, count = _kind(cursor), cursor.u64()
        if kind == "array":
            raise UnsupportedError(
                f"{cursor.where}: {cursor.what}: an array of arrays, which is not read "
                "(nor does llama.cpp)"
            )
        if kind == "string":
            return Value(kind, cursor.texts(count))
        return Value(kind, cursor.numbers(kind, count))
    if kind == "string":
        return Value(kind, cursor.text())
    return Value(kind, cursor.numbers(kind, 1)[0].item())


def _kind(cursor: _Cursor) -> str:
    code = cursor.u32()
    if code >= len(VALUE_NAMES):
        cursor.fail(f"type of value {code}, expected 0 to {len(VALUE_NAMES) - 1}")
    return VALUE_NAMES[code]


def _tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, Tensor]:
    """Read the descriptions of the tensors, and check where their data lies."""
    found = []
    for index in range(count):
        cursor.what = f"tensor {index}"
        found.append(_tensor(cursor))
    start = -(-cursor.at // alignment) * alignment
    expected, tensors = 0, {}
    for name, kind, shape, offset, nbytes in found:
        cursor.what = f"tensor {name[:80]!a}"
        if name in tensors:
            cursor.fail("is given twice")
        if offset != expected:
            cursor.fail(
                f"data at offset {offset:,}, expected {expected:,}: one after the "
                f"other, each padded to {alignment:,} bytes"
            )
        if start + offset + nbytes > cursor.size:
            cursor.fail(
                f"data to byte {start + offset + nbytes:,}, the file has "
                f"{cursor.size:,}; it is damaged or truncated"
            )
        tensors[name] = Tensor(name, kind, shape, start + offset, nbytes)
        expected += -(-nbytes // alignment) * alignment
    check_names(tensors, cursor.where)
    return tensors


def _tensor(cursor: _Cursor) -> tuple[str, str, tuple[int, ...], int, int]:
    """Read (name, type, shape, offset, size of the data) of a tensor."""
    name = cursor.text(MAX_NAME)
    cursor.what = f"tensor {name!a}"
    rank = cursor.u32()
    if not 1 <= rank <= MAX_DIMS:
        cursor.fail(f"{rank:,} dimensions, expected 1 to {MAX_DIMS}")
    shape = struct.unpack_from(f"<{rank}Q", cursor.data, cursor.take(8 * rank))[::-1]
    code, offset = cursor.u32(), cursor.u64()
    where = f"{cursor.where}: {cursor.what}"
    kind = type_of_id(code, where).name
    return name, kind, shape, offset, tensor_bytes(kind, shape, where)
