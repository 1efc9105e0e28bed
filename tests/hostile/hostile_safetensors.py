"""Safetensors files that must be refused, and a few odd ones that must not."""

import os
import struct
from pathlib import Path

from hostile_case import (
    FOREIGN,
    Case,
    Content,
    Target,
    broken_links,
    entry,
    file_of,
    files_of,
    safetensors_bytes,
    special_files,
)

GOOD = safetensors_bytes(
    {"a": entry([2, 2], 0, 16), "b": entry([2], 16, 20, "BF16")}, b"\0" * 20
)
# Every length short of the whole; cutting inside the data is cutting, too.
TRUNCATED = [GOOD[:n] for n in range(len(GOOD))]


def _one(name: str, header: object, data: bytes = b"", message: str = "", **kw) -> Case:
    raw = safetensors_bytes(header, data)
    return Case(
        name, "safetensors", file_of("x.safetensors", raw), message=message, **kw
    )


def _raw(name: str, raw: Content, message: str, **kw) -> Case:
    return Case(
        name, "safetensors", file_of("x.safetensors", raw), message=message, **kw
    )


def _sparse(header: bytes, size: int):
    def build(folder: Path) -> Target:
        with open(folder / "x.safetensors", "wb") as file:
            file.write(header)
            file.truncate(size)
        return folder / "x.safetensors"

    return build


def _many(count: int) -> bytes:
    one = '"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    return safetensors_bytes("{" + ",".join(one % i for i in range(count)) + "}")


_TB = 1 << 40
_TERABYTE = safetensors_bytes({"a": entry([_TB], 0, _TB, "U8")})

CASES = [
    Case("st-foreign", "safetensors", files_of(".safetensors", FOREIGN)),
    Case("st-truncated", "safetensors", files_of(".safetensors", TRUNCATED)),
    Case(
        "st-special",
        "safetensors",
        lambda folder: special_files(folder, ".safetensors"),
        message="expected a regular file",
    ),
    Case(
        "st-unopenable",
        "safetensors",
        lambda folder: broken_links(folder, ".safetensors"),
        error="SpecError",
    ),
    Case("st-shrinks", "shrinks", file_of("x.safetensors", GOOD), message="shrank"),
    Case("st-sparse", "safetensors", _sparse(b"", _TB), message="does not begin with"),
    Case(
        "st-sparse-valid",
        "safetensors",
        _sparse(_TERABYTE, len(_TERABYTE) + _TB),
        message="cannot map",
    ),
    _raw("st-n-zero", struct.pack("<Q", 0), "does not begin with '{'"),
    _raw("st-n-2^63", struct.pack("<Q", 1 << 63) + b"{}", "exceeds the file"),
    _raw("st-n-max", struct.pack("<Q", (1 << 64) - 1) + b"{}", "exceeds the file"),
    _raw("st-n-past-end", struct.pack("<Q", 100) + b"{}", "exceeds the file"),
    Case(
        "st-header-100mb",
        "safetensors",
        _sparse(struct.pack("<Q", 100 << 20) + b"{", 200 << 20),
        message="or the limit of 33,554,432",
    ),
    _raw("st-million-empty", lambda: _many(1_000_000), "exceeds"),
    _raw("st-many-empty", lambda: _many(200_010), "more than 200,000 tensors"),
    _one("st-not-utf8", b'{"\xff":1}', message="not UTF-8 at byte 2"),
    _one("st-not-json", "{nope", message="not valid JSON"),
    _one("st-json-twice", "{}{}", message="not valid JSON"),
    _one("st-leading-space", " {}", message="does not begin with '{'"),
    _one("st-array-root", "[]", message="does not begin with '{'"),
    _one(
        "st-duplicate-same",
        '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        '"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"\0",
        "key 'a' is given twice",
    ),
    _one(
        "st-duplicate-other",
        '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        '"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
        b"\0\0",
        "key 'a' is given twice",
    ),
    _one(
        "st-duplicate-field",
        '{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"\0",
        "key 'dtype' is given twice",
    ),
    _one(
        "st-overlap",
        {"a": entry([2], 0, 8), "b": entry([2], 4, 12)},
        b"\0" * 12,
        "'b' overlaps the one before: begins at 4, expected 8",
    ),
    _one(
        "st-same-range",
        {"a": entry([2], 0, 8), "b": entry([2], 0, 8)},
        b"\0" * 8,
        "overlaps",
    ),
    _one(
        "st-hole",
        {"a": entry([2], 0, 8), "b": entry([2], 12, 20)},
        b"\0" * 20,
        "'b' leaves a hole: begins at 12, expected 8",
    ),
    _one("st-hole-first", {"a": entry([1], 4, 8)}, b"\0" * 8, "leaves a hole"),
    _one("st-trailing", {"a": entry([1], 0, 4)}, b"\0" * 5, "trailing bytes"),
    _one("st-no-data", {"a": entry([1], 0, 4)}, b"", "the file holds 0"),
    _one("st-shape-range", {"a": entry([3], 0, 8)}, b"\0" * 8, "needs 12 bytes"),
    _one(
        "st-negative-dim", {"a": entry([-1], 0, 4)}, b"\0" * 4, "non-negative integers"
    ),
    _one("st-float-dim", {"a": entry([1.0], 0, 4)}, b"\0" * 4, "non-negative integers"),
    _one("st-bool-dim", {"a": entry([True], 0, 4)}, b"\0" * 4, "non-negative integers"),
    _one(
        "st-string-dim", {"a": entry(["1"], 0, 4)}, b"\0" * 4, "non-negative integers"
    ),
    _one("st-null-shape", {"a": entry(None, 0, 4)}, b"\0" * 4, "non-negative integers"),
    _one("st-2^32x2^32", {"a": entry([1 << 32, 1 << 32], 0, 0)}, b"", "needs"),
    _one("st-wraps-to-4", {"a": entry([(1 << 62) + 1], 0, 4)}, b"\0" * 4, "needs"),
    _one("st-2^62x0", {"a": entry([1 << 62, 0], 0, 0)}, b"", "too large"),
    _one("st-2^63x4x0", {"a": entry([1 << 63, 4, 0], 0, 0)}, b"", "non-negative"),
    _one("st-end-before-begin", {"a": entry([1], 4, 0)}, b"\0" * 4, "give -4"),
    _one(
        "st-offset-2^64", {"a": entry([1], 0, 1 << 64)}, b"\0" * 4, "two non-negative"
    ),
    _one("st-offsets-three", '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1,1]}}'),
    _one("st-offset-float", {"a": entry([1], 0, 4.0)}, b"\0" * 4, "two non-negative"),
    _one("st-dtype-unknown", {"a": entry([1], 0, 4, "F99")}, b"\0" * 4, "'F99'"),
    _one("st-dtype-list", {"a": entry([1], 0, 4, ["F32"])}, b"\0" * 4, "unknown dtype"),
    _one("st-dtype-null", {"a": entry([1], 0, 4, None)}, b"\0" * 4, "unknown dtype"),
    _one(
        "st-f4",
        {"a": entry([2], 0, 1, "F4")},
        b"\0",
        "dtype F4 has no whole-byte",
        error="UnsupportedError",
    ),
    _one("st-metadata-number", {"__metadata__": {"a": 1}}, message="object of strings"),
    _one("st-metadata-list", {"__metadata__": []}, message="object of strings"),
    _one("st-entry-number", {"a": 3}, message="expected exactly dtype"),
    _one(
        "st-extra-field",
        {"a": {**entry([1], 0, 4), "x": 1}},
        b"\0" * 4,
        "expected exactly",
    ),
    _one(
        "st-missing-field", {"a": {"dtype": "U8", "shape": [0]}}, b"", "exactly dtype"
    ),
    _one(
        "st-name-traversal",
        {"../../x": entry([0], 0, 0)},
        b"",
        "looks like a file path",
    ),
    _one(
        "st-name-absolute", {"/etc/x": entry([0], 0, 0)}, b"", "looks like a file path"
    ),
    _one("st-name-windows", {"..\\x": entry([0], 0, 0)}, b"", "looks like a file path"),
    _one("st-name-empty", {"": entry([0], 0, 0)}, b"", "printable characters"),
    _one("st-name-nul", {"a\0b": entry([0], 0, 0)}, b"", "printable characters"),
    _one("st-name-newline", {"a\nb": entry([0], 0, 0)}, b"", "printable characters"),
    _one("st-name-rtl", {"a\u202eb": entry([0], 0, 0)}, b"", "printable characters"),
    _one("st-name-long", {"a" * 513: entry([0], 0, 0)}, b"", "1 to 512"),
    _one("st-name-surrogate", '{"\\ud800":1}', message="surrogate"),
    _one(
        "st-name-normalised",
        {"caf\u00e9": entry([0], 0, 0), "cafe\u0301": entry([0], 0, 0)},
        message="equal after Unicode normalisation",
    ),
    _one(
        "st-name-kelvin",
        {"K": entry([0], 0, 0), "\u212a": entry([0], 0, 0)},
        message="equal after Unicode normalisation",
    ),
    _one("st-deep", '{"a":' + "[" * 100_000, message="nested deeper"),
    _one(
        "st-deep-closed", '{"a":' + "[" * 900 + "]" * 900 + "}", message="nested deeper"
    ),
    _one("st-rank-9", {"a": entry([1] * 9, 0, 4)}, b"\0" * 4, "at most 8"),
    _one("st-rank-65", {"a": entry([1] * 65, 0, 4)}, b"\0" * 4, "at most 8"),
    _one("st-rank-10^5", {"a": entry([1] * 100_000, 0, 4)}, b"\0" * 4, "at most 8"),
    _one(
        "st-huge-integer", '{"a":' + "9" * 100_000 + "}", message="100,000 characters"
    ),
    _one("st-nan", '{"a":NaN}', message="NaN is not JSON"),
    _one("st-infinity", '{"a":-Infinity}', message="-Infinity is not JSON"),
    _one("st-huge-float", '{"a":1e999}', message="out of range"),
    _one("st-bool-bytes", {"a": entry([2], 0, 2, "BOOL")}, b"\1\7", "BOOL byte 7"),
    # Odd, and valid.
    _one("st-ok-no-tensors", {}, error=None),
    _one("st-ok-zero-size", {"a": entry([3, 0, 5], 0, 0)}, error=None),
    _one("st-ok-scalar", {"a": entry([], 0, 4)}, b"\0" * 4, error=None),
    _one("st-ok-unaligned", {"a": entry([1], 0, 4)}, b"\0" * 4, error=None),
    _one(
        "st-ok-padded",
        '{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}   ',
        error=None,
    ),
    Case(
        "st-ok-odd-path",
        "safetensors",
        lambda folder: [
            _odd(folder, name)
            for name in (b"\xff\xfe.safetensors", b"a\nb.safetensors")
        ],
        error=None,
    ),
]


def _odd(folder: Path, name: bytes) -> Target:
    path = os.fsdecode(os.fsencode(folder) + b"/" + name)
    with open(path, "wb") as file:
        file.write(GOOD)
    return path
