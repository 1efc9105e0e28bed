"""GGUF files byte by byte, unchecked: what readers are tried on."""

import struct
from collections.abc import Iterable

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
CODES = "BbHhIif??xQqd"  # struct's, by id; strings and arrays have none


def text(raw: str | bytes, length: int | None = None) -> bytes:
    """A string, of any claimed length."""
    raw = raw.encode() if isinstance(raw, str) else raw
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def scalar(kind: int, value: float) -> bytes:
    """A number or bool without its type."""
    return struct.pack("<" + CODES[kind], value)


def key(name: str | bytes, kind: int, raw: bytes) -> bytes:
    """A key with the bytes of its value."""
    return text(name) + struct.pack("<I", kind) + raw


def array(name: str | bytes, kind: int, items: Iterable[bytes], count=None) -> bytes:
    """A key with an array, of any claimed count."""
    items = list(items)
    count = len(items) if count is None else count
    return key(name, ARRAY, struct.pack("<IQ", kind, count) + b"".join(items))


def tensor(
    name: str | bytes,
    dims: Iterable[int] = (32,),
    kind: int = 0,
    offset: int = 0,
    rank: int | None = None,
) -> bytes:
    """The description of a tensor; `dims` as in the file, the fastest first."""
    dims = tuple(dims)
    rank = len(dims) if rank is None else rank
    raw = text(name) + struct.pack(f"<I{len(dims)}Q", rank, *dims)
    return raw + struct.pack("<IQ", kind, offset)


def gguf(
    keys: Iterable[bytes] = (),
    tensors: Iterable[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    align: int = 32,
) -> bytes:
    """A file; `counts` are the claimed (tensors, keys)."""
    keys, tensors = list(keys), list(tensors)
    head = b"GGUF" + struct.pack("<I", version)
    head += struct.pack("<QQ", *(counts or (len(tensors), len(keys))))
    head += b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % align) + data
