"""The header of a safetensors file: types, caps and strict validation.

Everything here works on the header alone and trusts nothing: integers are Python
integers (they cannot wrap), and every range is compared with the true file size.
"""

import math
import struct
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from qjax.errors import FormatError, UnsupportedError
from qjax.io.files import MappedFile, shown
from qjax.io.json import parse_object

MAX_HEADER = 32 << 20
MAX_TENSORS = 200_000
MAX_RANK = 8
MAX_NAME = 512

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_UNSUPPORTED = frozenset(
    ("F4", "F6_E2M3", "F6_E3M2", "C64", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
)
_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies in a file: `start` is the absolute first byte."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_layout(
    file: MappedFile, max_header: int = MAX_HEADER
) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """Return (metadata, tensors in data order) of a safetensors file.

    Raises:
      FormatError: The file breaks the format.
      UnsupportedError: A tensor has a sub-byte or complex type.
    """
    header, data_start = _read_header(file, max_header)
    metadata = _metadata(header.pop("__metadata__", {}), file)
    return metadata, _layout(header, data_start, file)


def _read_header(file: MappedFile, max_header: int) -> tuple[dict[str, Any], int]:
    where = shown(file.path)
    if file.size < 8:
        raise FormatError(
            f"{where}: {file.size} bytes is too short for a safetensors file"
        )
    start = file.read(0, 8)
    (length,) = struct.unpack("<Q", start)
    if length > file.size - 8 or length > max_header:
        looks = looks_like(file)
        raise FormatError(
            f"{where}: header length {length:,} exceeds the file of {file.size:,} "
            f"bytes or the limit of {max_header:,}; "
            + (looks or "damaged or not safetensors")
        )
    data = file.read(8, 8 + length)
    if not data.startswith(b"{"):
        raise FormatError(
            f"{where}: the header does not begin with '{{'; "
            + (looks_like(file) or "damaged or not safetensors")
        )
    if data.count(b"{") > MAX_TENSORS + 2:
        raise FormatError(f"{where}: more than {MAX_TENSORS:,} tensors in the header")
    header = parse_object(data, f"{where}: header", max_bytes=max_header, max_depth=3)
    return header, 8 + length


def looks_like(file: MappedFile) -> str:
    """Say what a file of another format looks like; empty when unknown."""
    head = file.read(0, min(file.size, 64)).lstrip()
    for magic, kind in (
        (b"PK\x03\x04", "this is a zip archive (a PyTorch .bin or .pt?)"),
        (b"\x80", "this is a pickle"),
        (b"version https://git-lfs", "this is a git-lfs pointer; fetch the real file"),
        (b"<", "this is an HTML or XML page, not a model file"),
        (b"\x1f\x8b", "this is gzip data"),
        (b"GGUF", "this is a GGUF file"),
    ):
        if head.startswith(magic):
            return kind
    return ""


def _metadata(value: Any, file: MappedFile) -> dict[str, str]:
    if value is None:  # as MLX writes, and the reference reader takes, no metadata
        return {}
    if not isinstance(value, dict) or not all(
        isinstance(v, str) for v in value.values()
    ):
        raise FormatError(
            f"{shown(file.path)}: __metadata__ must be an object of strings"
        )
    return value


def _layout(
    header: dict[str, Any], data_start: int, file: MappedFile
) -> dict[str, TensorInfo]:
    """Turn header entries into `TensorInfo`, checking that they tile the data."""
    where = shown(file.path)
    if len(header) > MAX_TENSORS:
        raise FormatError(f"{where}: more than {MAX_TENSORS:,} tensors in the header")
    check_names(header, where)
    spans = []
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(entry, f"{where}: tensor {name!r}")
        spans.append((begin, end, name, dtype, shape))
    spans.sort(key=lambda span: span[:2])
    expected, tensors = 0, {}
    for begin, end, name, dtype, shape in spans:
        if begin != expected:
            kind = "overlaps the one before" if begin < expected else "leaves a hole"
            raise FormatError(
                f"{where}: tensor {name!r} {kind}: begins at {begin}, "
                f"expected {expected}"
            )
        tensors[name] = TensorInfo(dtype, shape, data_start + begin)
        expected = end
    if expected != file.size - data_start:
        raise FormatError(
            f"{where}: tensors cover {expected:,} bytes of data, the file holds "
            f"{file.size - data_start:,}; it is truncated or has trailing bytes"
        )
    return tensors


def check_names(names: Iterable[str], where: str) -> None:
    """Refuse tensor names that are empty, unprintable, too long or path-like.

    Raises:
      FormatError: Naming the first offender, and `where`.
    """
    names = list(names)
    folded: dict[str, str] = {}
    foreign = not all(name.isascii() for name in names)
    for name in names:
        if not name or len(name) > MAX_NAME or not name.isprintable():
            raise FormatError(
                f"{where}: tensor name {name[:80]!a} must be 1 to {MAX_NAME} "
                "printable characters"
            )
        if name.startswith("/") or "\\" in name or ".." in name.split("/"):
            raise FormatError(f"{where}: tensor name {name!r} looks like a file path")
        if foreign:
            same = folded.setdefault(unicodedata.normalize("NFKC", name), name)
            if same != name:
                raise FormatError(
                    f"{where}: tensor names {same!a} and {name!a} are equal "
                    "after Unicode normalisation"
                )


def _entry(entry: Any, where: str) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """Return (dtype, shape, begin, end) of one header entry."""
    if not isinstance(entry, dict) or set(entry) != _FIELDS:
        raise FormatError(f"{where}: expected exactly dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        if isinstance(code, str) and code in _UNSUPPORTED:
            raise UnsupportedError(
                f"{where}: dtype {code} has no whole-byte NumPy type; store the packed "
                "bytes as U8 instead"
            )
        raise FormatError(f"{where}: unknown dtype {str(code)[:40]!r}")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not _natural(shape):
        raise FormatError(
            f"{where}: shape must be at most {MAX_RANK} non-negative integers"
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not _natural(offsets):
        raise FormatError(f"{where}: data_offsets must be two non-negative integers")
    dtype, (begin, end) = DTYPES[code], offsets
    if math.prod(max(n, 1) for n in shape) * dtype.itemsize >= 1 << 63:
        raise FormatError(f"{where}: shape {shape} is too large; it needs 2^63 bytes")
    needed = math.prod(shape) * dtype.itemsize
    if end - begin != needed:
        raise FormatError(
            f"{where}: shape {shape} of {code} needs {needed} bytes, data_offsets "
            f"give {end - begin}"
        )
    return dtype, tuple(shape), begin, end


def _natural(values: list[Any]) -> bool:
    """Whether all values are integers in 0..2^63-1 (bool is not an integer here)."""
    return all(type(v) is int and 0 <= v < 1 << 63 for v in values)
