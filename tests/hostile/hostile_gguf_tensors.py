"""Tensors and parts of GGUF files that do not fit, and a few odd ones that do."""

import os
from collections.abc import Callable
from pathlib import Path

from gguf_bytes import BOOL, STRING, U8, U32, array, gguf, key, scalar, tensor, text
from hostile_case import Case, Target
from hostile_gguf import GOOD, case

_BLOCK = bytes(32)


def _tensor(name: str, message: str, *infos: bytes, data: bytes = _BLOCK, **kw) -> Case:
    return case(name, gguf([], infos, data), message, **kw)


def _many(count: int) -> bytes:
    names = (f"{n:07d}" for n in range(count))
    infos = b"".join(tensor(n, (8,), 0, 32 * i) for i, n in enumerate(names))
    return gguf([], [infos], bytes(32 * count), counts=(count, 0))


_BIG = (1 << 63) - 1
TENSORS = [
    _tensor("rank-0", "0 dimensions, expected 1 to 4", tensor("a", ())),
    _tensor("rank-5", "5 dimensions, expected 1 to 4", tensor("a", (1,) * 5)),
    _tensor("rank-max", "4,294,967,295 dimensions", tensor("a", (1,), rank=2**32 - 1)),
    _tensor("dim-0", "dimensions must be 1 to", tensor("a", (0, 4))),
    _tensor("dim-negative", "dimensions must be 1 to", tensor("a", (4, 2**64 - 1))),
    _tensor("dim-2^63", "dimensions must be 1 to", tensor("a", (1 << 63,))),
    _tensor("dims-wrap-to-0", "too large", tensor("a", (1 << 32, 1 << 32))),
    _tensor("dims-wrap-to-4", "too large", tensor("a", ((1 << 62) + 1,))),
    _tensor("dims-bytes", "too large", tensor("a", (1 << 61, 2), 28)),
    _tensor("dims-blocks", "too large", tensor("a", (1 << 62, 1 << 4), 39)),
    _tensor("dims-big", "data to byte 9,223", tensor("a", (_BIG,), 24)),
    _tensor("dims-terabyte", "data to byte 4,398,046", tensor("a", (1 << 40,))),
    _tensor("rows", "rows of 33 numbers", tensor("a", (33,), 2)),
    _tensor("rows-short", "of the 256 in a block of q4_k", tensor("a", (128, 2), 12)),
    _tensor("type-removed", "(q4_2)", tensor("a", (32,), 4), error="UnsupportedError"),
    *(
        _tensor(f"tensor-type-{n}", "unknown type", tensor("a", (32,), n))
        for n in (43, 9999, 0xFFFFFFFF)
    ),
    _tensor("offset", "offset 32, expected 0", tensor("a", (8,), 0, 32)),
    _tensor("offset-max", "offset 18,446", tensor("a", (8,), 0, 2**64 - 32)),
    _tensor("offset-odd", "offset 1, expected 0", tensor("a", (1,), 0, 1)),
    *(
        _tensor(
            f"second-{name}",
            f"tensor 'b': data at offset {offset}, expected 64",
            tensor("a", (9,)),
            tensor("b", (1,), 0, offset),
            data=bytes(256),
        )
        for name, offset in (("same", 0), ("overlap", 32), ("hole", 96), ("odd", 36))
    ),
    _tensor("short", "tensor 'a': data to byte", tensor("a"), data=bytes(127)),
    _tensor("none", "tensor 'a': data to byte", tensor("a"), data=b""),
    _tensor(
        "names-twice",
        "tensor 'a': is given twice",
        tensor("a", (8,)),
        tensor("a", (8,), 0, 32),
        data=bytes(64),
    ),
    _tensor("name-64", "64 bytes long, expected at most 63", tensor("a" * 64, (8,))),
    _tensor("name-empty", "printable characters", tensor("", (8,))),
    _tensor("name-nul", "printable characters", tensor("a\0b", (8,))),
    _tensor("name-utf8", "not UTF-8", tensor(b"\xff", (8,))),
    _tensor("name-path", "looks like a file path", tensor("../../x", (8,))),
    _tensor("name-long", "bytes long, expected", text(b"", 2**64 - 1) + bytes(32)),
    case("tensors-many", lambda: _many(65_537), "expected at most 65,536"),
    case("ok-many-tensors", lambda: _many(20_000), error=None),
]


def _part(number: int, count: int, total: int, name: str = "") -> bytes:
    """A part of a split model with one tensor."""
    keys = (
        ("split.no", number),
        ("split.count", count),
        ("split.tensors.count", total),
    )
    return gguf(
        [key(k, U32, scalar(U32, n)) for k, n in keys],
        [tensor(name or f"t{number}", (8,))],
        _BLOCK,
    )


def _parts(
    *parts: bytes | str | None, first: str = "m-00001-of-00002.gguf"
) -> Callable[[Path], Target]:
    """Writes parts; text is where a part is a link to, None stands for a FIFO."""

    def build(folder: Path) -> Target:
        (folder / "away").mkdir()
        model = folder / "away" / "model"
        model.mkdir()
        (folder / "away" / "outside.gguf").write_bytes(_part(1, 2, 2))
        for n, part in enumerate(parts):
            path = model / (first if n == 0 else f"m-{n + 1:05d}-of-00002.gguf")
            if part is None:
                os.mkfifo(path)
            elif isinstance(part, str):
                path.symlink_to(part)
            else:
                path.write_bytes(part)
        return model / first

    return build


def _split(name: str, message: str, *parts: bytes | str | None, **kw) -> Case:
    error = kw.pop("error", "FormatError")
    return Case(f"gguf-split-{name}", "gguf", _parts(*parts, **kw), error, message)


_ONE = _part(0, 2, 2)
_FIRST = "does not end in -00001-of-00002.gguf"
SPLIT = [
    Case("gguf-split-ok", "gguf", _parts(_ONE, _part(1, 2, 2)), error=None),
    _split("missing", "no m-00002-of-00002.gguf", _ONE, error="SpecError"),
    _split("truncated", "does not begin with", _ONE, b""),
    _split("no-keys", "is part 1 of 0, expected 2 of 2", _ONE, GOOD),
    _split("number", "is part 1 of 2, expected 2 of 2", _ONE, _part(0, 2, 2)),
    _split("count", "is part 2 of 3, expected 2 of 2", _ONE, _part(1, 3, 2)),
    _split("past", "is part 3 of 2; split.no must be", _ONE, _part(2, 2, 2)),
    _split("name", "is in an earlier part", _ONE, _part(1, 2, 2, "t0")),
    *(
        _split(f"total-{n}", "2 parts hold 2 tensors", _part(0, 2, n), _part(1, 2, 2))
        for n in (0, 1, 3, 2**32 - 1)
    ),
    *(
        _split(f"count-{n}", "does not end in", _part(0, n, 2), error="SpecError")
        for n in (3, 99_999)
    ),
    _split("count-max", "expected an integer from 0 to 99,999", _part(0, 2**32 - 1, 2)),
    _split(
        "second", "is part 2 of 2; open the first", _part(1, 2, 2), error="SpecError"
    ),
    _split("renamed", _FIRST, _ONE, first="model.gguf", error="SpecError"),
    _split("wide", _FIRST, _ONE, first="m-000001-of-2.gguf", error="SpecError"),
    _split("dots", _FIRST, _ONE, first="-00001-of-00002.gguf", error="SpecError"),
    _split("link", "outside the model directory", _ONE, "../outside.gguf"),
    _split("link-absolute", "outside the model directory", _ONE, "/etc/passwd"),
    _split(
        "link-loop",
        "cannot be opened",
        _ONE,
        "m-00002-of-00002.gguf",
        error="SpecError",
    ),
    _split("link-first", "is part 1 of 2, expected 2", _ONE, "m-00001-of-00002.gguf"),
    _split("fifo", "expected a regular file", _ONE, None),
    _split(
        "text", "expected an integer", gguf([key("split.count", STRING, text("2"))])
    ),
    _split("bool", "expected an integer", gguf([key("split.count", BOOL, b"\1")])),
    _split("array", "expected an integer", gguf([array("split.count", U8, [b"\2"])])),
]

CASES = [*TENSORS, *SPLIT]
