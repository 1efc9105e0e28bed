"""Headers of GGUF files that must be refused, and a few that must not."""

import struct
from collections.abc import Callable
from pathlib import Path

from gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    STRING,
    U8,
    U16,
    U32,
    U64,
    array,
    gguf,
    key,
    scalar,
    tensor,
    text,
)
from hostile_case import (
    FOREIGN,
    Case,
    Content,
    Target,
    broken_links,
    file_of,
    files_of,
    special_files,
)

_BLOCK = bytes(32)
_FOREIGN = [data for data in FOREIGN if not data.startswith(b"GGUF")]
GOOD_HEAD = gguf(
    [
        key("general.name", STRING, text("x")),
        key("general.alignment", U32, scalar(U32, 32)),
        key("x.flag", BOOL, b"\1"),
        array("x.words", STRING, [text("a"), text(""), text("\u2581b")]),
        array("x.sizes", U16, [scalar(U16, n) for n in (1, 2, 3)]),
    ],
    [tensor("a", (8,), 0, 0), tensor("b", (32, 2), 2, 32)],
)
GOOD = GOOD_HEAD + bytes(32) + bytes(36)


def case(name: str, raw: Content, message: str = "", **kw) -> Case:
    """A file that `open_gguf` is tried on."""
    return Case(f"gguf-{name}", "gguf", file_of("x.gguf", raw), message=message, **kw)


def _key(name: str, raw: bytes, message: str, **kw) -> Case:
    return case(name, gguf([raw]), message, **kw)


def _start(name: str, version: int, counts: tuple[int, int], message: str, **kw):
    raw = b"GGUF" + struct.pack("<IQQ", version, *counts)
    return case(name, raw, message, **kw)


def _words(count: int) -> bytes:
    return gguf([array("a", STRING, [bytes(8 * count)], count)])


def _sparse(head: bytes, size: int) -> Callable[[Path], Target]:
    def build(folder: Path) -> Target:
        with open(folder / "x.gguf", "wb") as file:
            file.write(head)
            file.truncate(size)
        return folder / "x.gguf"

    return build


START = [
    Case("gguf-foreign", "gguf", files_of(".gguf", _FOREIGN)),
    Case(
        "gguf-truncated",
        "gguf",
        files_of(".gguf", [GOOD[:n] for n in range(len(GOOD))]),
    ),
    Case(
        "gguf-special",
        "gguf",
        lambda folder: special_files(folder, ".gguf"),
        message="expected a regular file",
    ),
    Case(
        "gguf-unopenable",
        "gguf",
        lambda folder: broken_links(folder, ".gguf"),
        error="SpecError",
    ),
    Case("gguf-sparse", "gguf", _sparse(GOOD, 1 << 40), message="cannot map"),
    Case("gguf-shrinks", "gguf-shrinks", file_of("x", GOOD), message="shrank"),
    case("magic", b"GGML" + GOOD[4:], "does not begin with 'GGUF'"),
    case("pointer", b"version https://git-lfs.github.com/spec/v1", "git-lfs pointer"),
    _start("version-0", 0, (0, 0), "version 0, expected 2 or 3"),
    _start("version-1", 1, (0, 0), "version 1, expected", error="UnsupportedError"),
    _start("version-4", 4, (0, 0), "version 4, expected", error="UnsupportedError"),
    _start("big-endian", 3 << 24, (0, 0), "is big-endian", error="UnsupportedError"),
    _start("keys-2^63", 3, (0, 1 << 63), "9,223,372,036,854,775,808 keys"),
    _start("keys-max", 3, (0, (1 << 64) - 1), "keys, expected at most 65,536"),
    _start("tensors-2^63", 3, (1 << 63, 0), "9,223,372,036,854,775,808 tensors"),
    _start("tensors-max", 3, ((1 << 64) - 1, 0), "tensors, expected at most 65,536"),
    _start("one-key", 3, (0, 1), "fits into the 0 bytes"),
    _start("one-tensor", 3, (1, 0), "fits into the 0 bytes"),
    case("keys-more", gguf([key("a", U8, b"\1")], counts=(0, 2)), "key 1: "),
    case("tensors-more", gguf([], [tensor("a")], _BLOCK * 4, counts=(2, 0)), "tensor"),
    case(
        "keys-many",
        lambda: gguf([bytes(2 << 20)], counts=(0, 65_537)),
        "expected at most 65,536",
    ),
]
_STRING_MAX = text(b"", (1 << 64) - 1)
KEYS = [
    case("hang", gguf([array("abc", U8, [], 1 << 63)])[:51], "elements of at least 1"),
    *(
        _key(
            f"array-{kind}-{name}", array("a", kind, [], count), "elements of at least"
        )
        for kind in (U8, F32, STRING, U64)
        for name, count in (("2^62", 1 << 62), ("2^63", 1 << 63), ("max", 2**64 - 1))
    ),
    _key("array-wraps", array("a", U64, [bytes(8)], (1 << 61) + 1), "elements of at"),
    _key("key-length-max", _STRING_MAX + bytes(20), "bytes long, expected at most"),
    _key("key-length-past", text(b"a", 1000) + bytes(20), "needs 1,000 bytes from"),
    _key("string-length-max", key("a", STRING, _STRING_MAX), "'a': needs 18,446"),
    _key("string-length-2^63", key("a", STRING, text("", 1 << 63)), "needs 9,223"),
    _key(
        "word-length-max",
        array("a", STRING, [text("b"), _STRING_MAX]),
        "key 'a': string 1: needs 18,446",
    ),
    _key(
        "word-length-past",
        array("a", STRING, [text("b", 99)]),
        "key 'a': string 0: needs 99 bytes",
    ),
    case(
        "words-more",
        gguf([array("a", STRING, [text("bcdefghi")], 2)], align=1),
        "key 'a': string 1: needs 8 bytes",
    ),
    *(
        _key(
            f"nested-{count}",
            array("a", ARRAY, [struct.pack("<IQ", ARRAY, 1)] * count, 1),
            "an array of arrays",
            error="UnsupportedError",
        )
        for count in (1, 20_000)
    ),
    _key("nested-none", array("a", ARRAY, []), "of arrays", error="UnsupportedError"),
    case("duplicate", gguf([key("a", U8, b"\1")] * 2), "key 'a': is given twice"),
    case(
        "duplicate-type",
        gguf([key("a", U8, b"\1"), array("a", STRING, [])]),
        "key 'a': is given twice",
    ),
    _key("key-empty", key("", U8, b"\1"), "expected printable characters"),
    _key("key-nul", key("a\0b", U8, b"\1"), "expected printable characters"),
    _key("key-newline", key("a\nb", U8, b"\1"), "expected printable characters"),
    _key("key-utf8", key(b"\xff\xfe", U8, b"\1"), "key 0: not UTF-8 at byte 32"),
    _key("key-long", key("a" * 65_536, U8, b"\1"), "expected at most 65,535"),
    _key("text-utf8", key("a", STRING, text(b"ab\xff")), "key 'a': not UTF-8 at"),
    _key("text-surrogate", key("a", STRING, text(b"\xed\xa0\x80")), "not UTF-8 at"),
    _key(
        "word-utf8",
        array("a", STRING, [text("b"), text(b"\xc3")]),
        "key 'a': string 1: not UTF-8 at",
    ),
    *(
        _key(f"type-{kind}", key("a", kind, bytes(64)), f"type of value {kind}, exp")
        for kind in (13, 255, 0xFFFFFFFF)
    ),
    _key("element-type", array("a", 13, [bytes(64)], 1), "type of value 13, expected"),
    _key("bool", key("a", BOOL, b"\2"), "bool byte 2, expected 0 or 1"),
    _key("bools", array("a", BOOL, [b"\1\0\xff"], 3), "bool byte 255, expected"),
    case("words-many", lambda: _words(1_500_001), "more than 1,500,000 strings"),
    case(
        "words-in-two",
        lambda: gguf([array(n, STRING, [bytes(8 << 20)], 1 << 20) for n in "ab"]),
        "key 'b': more than 1,500,000 strings",
    ),
    case(
        "header-long",
        lambda: gguf([array("a", U8, [bytes(33 << 20)], 33 << 20)]),
        "passes the limit of 33,554,432 bytes",
    ),
]
_ALIGNED = "expected a u32 that is a power of two"
ALIGNMENT = [
    *(
        _key(f"align-{n}", key("general.alignment", U32, scalar(U32, n)), _ALIGNED)
        for n in (0, 3, 24, (1 << 32) - 1)
    ),
    _key("align-u64", key("general.alignment", U64, scalar(U64, 32)), _ALIGNED),
    _key("align-bool", key("general.alignment", BOOL, b"\1"), _ALIGNED),
    _key("align-text", key("general.alignment", STRING, text("32")), _ALIGNED),
    _key("align-array", array("general.alignment", U32, [scalar(U32, 32)]), _ALIGNED),
    case(
        "align-2^31",
        gguf(
            [key("general.alignment", U32, scalar(U32, 1 << 31))],
            [tensor("a")],
            bytes(128),
        ),
        "data to byte 2,147,483,776, the file has",
    ),
    case(
        "align-other",
        gguf(
            [key("general.alignment", U32, scalar(U32, 64))],
            [tensor("a", (8,)), tensor("b", (8,), 0, 32)],
            bytes(128),
        ),
        "offset 32, expected 64",
    ),
]
OK = [
    case("ok", GOOD, error=None),
    case("ok-empty", gguf(), error=None),
    case("ok-unpadded", gguf()[:24], error=None),
    case("ok-trailing", GOOD + b"x" * 1000, error=None),
    case("ok-name-63", gguf([], [tensor("a" * 63, (8,))], _BLOCK), error=None),
    case("ok-many-words", lambda: _words(1 << 20), error=None),
]


CASES = [*START, *KEYS, *ALIGNMENT, *OK]
