"""Metadata of every type, packed by hand."""

from pathlib import Path
from typing import Any

from tests.hostile.gguf_bytes import F32, STRING, array, key, scalar, text

SCALARS: list[tuple[str, int, Any]] = [
    ("u8", 0, 200),
    ("i8", 1, -100),
    ("u16", 2, 60_000),
    ("i16", 3, -30_000),
    ("u32", 4, 4_000_000_000),
    ("i32", 5, -2_000_000_000),
    ("f32", 6, 0.5),
    ("bool", 7, True),
    ("u64", 10, 2**64 - 1),
    ("i64", 11, -(2**63)),
    ("f64", 12, 1e300),
]
KEYS = [
    *(key(f"one.{n}", code, scalar(code, x)) for n, code, x in SCALARS),
    key("one.string", STRING, text("grüße")),
    *(array(f"all.{n}", code, [scalar(code, x)] * 3) for n, code, x in SCALARS),
    array("all.string", STRING, [text("a"), text(""), text("\u2581b")]),
    array("none.f32", F32, []),
    array("none.string", STRING, []),
    key("empty", STRING, text("")),
]


def put(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path
