"""PyTorch checkpoints that must be refused without executing anything."""

import io
import os
import pickle
import pkgutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

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

# Opcodes, assembled by hand.


def glob(module: str, name: str) -> bytes:
    return b"c" + f"{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def integer(value: int) -> bytes:
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def tup(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def storage(
    count: int = 4, key: str = "0", kind: str = "FloatStorage", module: str = "torch"
) -> bytes:
    entry = tup(
        text("storage"), glob(module, kind), text(key), text("cpu"), integer(count)
    )
    return entry + b"Q"


ORDERED = glob("collections", "OrderedDict") + b")R"


def tensor(
    shape: tuple[int, ...] = (4,),
    strides: tuple[int, ...] = (1,),
    offset: int = 0,
    source: bytes | None = None,
    extra: bytes = b"",
) -> bytes:
    args = tup(
        source or storage(),
        integer(offset),
        tup(*map(integer, shape)),
        tup(*map(integer, strides)),
        b"\x89",
        ORDERED,
        extra,
    )
    return glob("torch._utils", "_rebuild_tensor_v2") + args + b"R"


def state(*items: tuple[str, bytes]) -> bytes:
    body = b"".join(text(name) + value for name, value in items)
    return b"\x80\x02" + ORDERED + b"(" + body + b"u."


# Archives.


def archive(
    data_pkl: bytes, members: dict[str, bytes] | None = None, **kw: Any
) -> bytes:
    """A checkpoint: stored members, as PyTorch writes them."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kw.get("method", zipfile.ZIP_STORED)) as out:
        out.writestr("m/data.pkl", data_pkl)
        out.writestr("m/byteorder", kw.get("order", b"little"))
        for name, data in ({"m/data/0": b"\0" * 16} | (members or {})).items():
            out.writestr(name, data)
        out.writestr("m/version", b"3\n")
    return buffer.getvalue()


GOOD = archive(state(("a", tensor())))


def patched(name: bytes, change: Callable[[bytearray, int, int], None]) -> bytes:
    """`GOOD` with the local (first) and central (last) record of a member changed."""
    raw = bytearray(GOOD)
    local = raw.index(name) - 30
    central = raw.rindex(name) - 46
    assert raw[local : local + 4] == b"PK\x03\x04"
    assert raw[central : central + 4] == b"PK\x01\x02"
    change(raw, local, central)
    return bytes(raw)


def _put(raw: bytearray, at: int, layout: str, value: int) -> None:
    struct.pack_into(layout, raw, at, value)


def _encrypted(raw: bytearray, local: int, central: int) -> None:
    _put(raw, local + 6, "<H", 1)
    _put(raw, central + 8, "<H", 1)


def _flag_local(raw: bytearray, local: int, central: int) -> None:
    _put(raw, local + 6, "<H", 1)


def _strange_flag(raw: bytearray, local: int, central: int) -> None:
    _put(raw, local + 6, "<H", 0x10)
    _put(raw, central + 8, "<H", 0x10)


def _other_name(raw: bytearray, local: int, central: int) -> None:
    raw[local + 30] = ord("x")


def _payload(raw: bytearray, local: int, central: int) -> None:
    raw[local + 30 + len("m/data/0")] ^= 1


def _far_offset(raw: bytearray, local: int, central: int) -> None:
    _put(raw, central + 42, "<I", 0xFFFFFFF0)


def _zip64_missing(raw: bytearray, local: int, central: int) -> None:
    _put(raw, central + 24, "<I", 0xFFFFFFFF)


def _long_member(raw: bytearray, local: int, central: int) -> None:
    for at in (local + 18, local + 22, central + 20, central + 24):
        _put(raw, at, "<I", 1 << 30)


def _overlapping(raw: bytearray, local: int, central: int) -> None:
    for at in (local + 18, local + 22, central + 20, central + 24):
        _put(raw, at, "<I", 60)


def _duplicate() -> bytes:
    buffer = io.BytesIO(GOOD)
    import warnings

    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "a") as out:
        warnings.simplefilter("ignore")
        out.writestr("m/data/0", b"\1" * 16)
    return buffer.getvalue()


def _count(value: int) -> bytes:
    raw = bytearray(GOOD)
    struct.pack_into("<HH", raw, len(raw) - 14, value, value)
    return bytes(raw)


class _Call:
    """Pickles to a call of `function(*args)`."""

    def __init__(self, function: Any, *args: Any):
        self._call = function, args

    def __reduce__(self) -> Any:
        return self._call


def _calls(function: Any, *args: Any, protocol: int = 2) -> bytes:
    """A checkpoint whose pickle calls `function` on loading."""
    return archive(pickle.dumps({"a": _Call(function, *args)}, protocol=protocol))


def _raw(name: str, data: Content, message: str, **kw: Any) -> Case:
    return Case(f"pt-{name}", "torch", file_of("x.bin", data), message=message, **kw)


def _pkl(name: str, data: Content, message: str, **kw: Any) -> Case:
    made = lambda: archive(data() if callable(data) else data)  # noqa: E731
    return _raw(name, made, message, **kw)


def _evil(name: str, data: bytes, asks: str) -> Case:
    message = f"the pickle asks for {asks}, which is not part of a plain state dict"
    return _raw(f"evil-{name}", data, message)


def _memo_bomb() -> bytes:
    """Nested pairs of one another: 2^60 leaves when walked, hashed or printed."""
    body = b"\x80\x02}(" + text("a") + b")"
    for _ in range(60):
        body += b"q\0h\0\x86"
    return body + b"u."


def _hash_bomb() -> bytes:
    body = b"\x80\x02})"
    for _ in range(60):
        body += b"q\0h\0\x86"
    return body + b"Ns."


def _in_model(folder: Path) -> Target:
    (folder / "config.json").write_bytes(b"{}")
    (folder / "pytorch_model.bin").write_bytes(_calls(os.system, "touch pwned"))
    return folder


_LIES = {
    "as-safetensors": (
        "safetensors",
        "model.safetensors",
        GOOD,
        "this is a zip archive",
    ),
    "raw-pickle": ("torch", "x.bin", pickle.dumps({"a": 1}), "before PyTorch 1.6"),
    "tar": (
        "torch",
        "x.pt",
        b"\0" * 257 + b"ustar" + b"\0" * 250,
        "before PyTorch 1.6",
    ),
}

CASES = [
    Case(
        "pt-foreign",
        "torch",
        files_of(".bin", [f for f in FOREIGN if f[:1] != b"\x80"]),
    ),
    Case(
        "pt-truncated", "torch", files_of(".bin", [GOOD[:n] for n in range(len(GOOD))])
    ),
    Case(
        "pt-pickle-truncated",
        "torch",
        files_of(
            ".bin",
            [archive(p[:n]) for p in [state(("a", tensor()))] for n in range(len(p))],
        ),
    ),
    Case("pt-special", "torch", lambda folder: special_files(folder, ".bin")),
    Case(
        "pt-unopenable",
        "torch",
        lambda folder: broken_links(folder, ".bin"),
        error="SpecError",
    ),
    *(
        Case(
            f"pt-lies-{name}",
            opener,
            file_of(file, data),
            error="UnsupportedError" if "1.6" in message else "FormatError",
            message=message,
        )
        for name, (opener, file, data, message) in _LIES.items()
    ),
    # Pickles that would run code.
    _evil("system", _calls(os.system, "touch pwned"), f"{os.system.__module__}.system"),
    _evil(
        "system-4",
        _calls(os.system, "touch pwned", protocol=4),
        f"{os.system.__module__}.system",
    ),
    _evil("eval", _calls(eval, "open('pwned','w')"), "__builtin__.eval"),
    _evil("exec-4", _calls(exec, "open('pwned','w')", protocol=4), "builtins.exec"),
    _evil("resolve", _calls(pkgutil.resolve_name, "os:system"), "pkgutil.resolve_name"),
    _evil("pip", archive(b"\x80\x02" + glob("pip", "main") + b")R."), "pip.main"),
    _evil(
        "dotted",
        archive(
            b"\x80\x04" + text("torch") + text("serialization.os.system") + b"\x93."
        ),
        "torch.serialization.os.system",
    ),
    _evil(
        "load",
        archive(b"\x80\x02" + glob("torch", "load") + tup(text("x")) + b"R."),
        "torch.load",
    ),
    _evil(
        "sparse",
        archive(state(("a", glob("torch._utils", "_rebuild_sparse_tensor") + b")R"))),
        "torch._utils._rebuild_sparse_tensor",
    ),
    _evil(
        "quantized",
        archive(state(("a", glob("torch._utils", "_rebuild_qtensor") + b")R"))),
        "torch._utils._rebuild_qtensor",
    ),
    _evil(
        "meta",
        archive(state(("a", glob("torch._utils", "_rebuild_meta_tensor_no_storage")))),
        "torch._utils._rebuild_meta_tensor_no_storage",
    ),
    _evil(
        "module",
        archive(b"\x80\x02" + glob("torch.nn.modules.linear", "Linear") + b")\x81."),
        "torch.nn.modules.linear.Linear",
    ),
    Case("pt-evil-in-model", "checkpoint", _in_model, message="system"),
    _pkl("inst", b"\x80\x02(ios\nsystem\n.", "pickle operation b'i'"),
    _pkl("obj", b"\x80\x02(" + ORDERED + b"o.", "pickle operation b'o'"),
    _pkl("newobj", b"\x80\x02" + ORDERED + b")\x81.", "pickle operation b'\\x81'"),
    _pkl("extension", b"\x80\x02\x82\x01.", "pickle operation b'\\x82'"),
    _pkl("old-string", b"S'x'\n.", "pickle operation b'S'"),
    _pkl("buffer", b"\x80\x05\x97.", "pickle operation b'\\x97'"),
    _pkl("protocol-9", b"\x80\x09.", "protocol 9"),
    _pkl(
        "call-dtype", b"\x80\x02" + glob("torch", "float32") + b")R.", "not a function"
    ),
    _pkl("call-text", b"\x80\x02" + text("os.system") + b")R.", "not a function"),
    _pkl(
        "build-tensor", b"\x80\x02" + tensor() + b"}b.", "changes something that is not"
    ),
    _pkl(
        "ordered-args",
        b"\x80\x02" + glob("collections", "OrderedDict") + tup(b"]") + b"R.",
        "OrderedDict is called with unexpected arguments",
    ),
    # Pickles that would hang or fill the memory.
    _pkl("memo-bomb", _memo_bomb(), "entry 'a' is a tuple, expected a tensor"),
    _pkl("hash-bomb", _hash_bomb(), "a dict key is a tuple"),
    _pkl("memo-index", b"\x80\x02Nr\xff\xff\xff\xff.", "holds a NoneType"),
    _pkl("memo-unknown", b"\x80\x02h\x07.", "entry 7 it never stored"),
    _pkl("operations", lambda: b"N" * (7 << 20) + b".", "1,000,000 operations"),
    _pkl("marks", lambda: b"(" * 900_000 + b"ttttt.", "unbalanced stack"),
    _pkl("long-text", b"\x80\x02X\xff\xff\xff\xffabc.", "truncated"),
    _pkl("long-integer", b"\x80\x02\x8a\xff" + b"\x7f" * 255 + b".", "integer of 255"),
    _pkl("large", lambda: b" " * (9 << 20), "at most 8,388,608 allowed"),
    _pkl("nested", lambda: b")\x85" * 400_000 + b".", "unbalanced stack"),
    _pkl("self-list", b"\x80\x02]q\0h\0a.", "holds a list, expected a dict"),
    _pkl("empty-stack", b"\x80\x02.", "unbalanced stack"),
    _pkl("pop-mark", b"\x80\x02(R.", "takes from an empty stack"),
    _pkl("no-mark", b"\x80\x02Nt.", "lacks a mark"),
    _pkl("odd-items", b"\x80\x02}(Nu.", "key without a value"),
    # State dicts that are not.
    _pkl("not-a-dict", b"\x80\x02K\x01.", "holds a int, expected a dict of tensors"),
    _pkl("entry-int", state(("step", b"K\x05")), "entry 'step' is a int"),
    _pkl("entry-dict", state(("model", b"}")), "entry 'model' is a dict"),
    _pkl(
        "duplicate-key", state(("a", tensor()), ("a", tensor())), "'a' is given twice"
    ),
    _pkl("name-traversal", state(("../a", tensor())), "looks like a file path"),
    _pkl("name-nul", state(("a\0", tensor())), "printable"),
    _pkl("int-key", b"\x80\x02}K\x01" + tensor() + b"s.", "entry '1' is a TensorRef"),
    # Tensors outside their storage.
    _pkl("shape-long", state(("a", tensor((5,)))), "pass the 4 elements"),
    _pkl("offset-long", state(("a", tensor((4,), (1,), 1))), "pass the 4 elements"),
    _pkl(
        "offset-2^62", state(("a", tensor((1,), (1,), 1 << 62))), "pass the 4 elements"
    ),
    _pkl("offset-2^64", state(("a", tensor((1,), (1,), 1 << 64))), "non-negative"),
    _pkl("offset-negative", state(("a", tensor((1,), (1,), -1))), "non-negative"),
    _pkl("stride-negative", state(("a", tensor((2,), (-1,), 1))), "non-negative"),
    _pkl("stride-long", state(("a", tensor((2, 2), (3, 1)))), "pass the 4 elements"),
    _pkl("stride-2^62", state(("a", tensor((2,), (1 << 62,)))), "pass the 4 elements"),
    _pkl("stride-zero", state(("a", tensor((1 << 40,), (0,)))), "pass the 4 elements"),
    _pkl("shape-empty", state(("a", tensor((1 << 62, 0), (1, 1)))), "too large"),
    _pkl("shape-2^63", state(("a", tensor((1 << 63,), (1,)))), "non-negative"),
    _pkl("ranks", state(("a", tensor((2, 2), (1,)))), "one rank"),
    _pkl("rank-9", state(("a", tensor((1,) * 9, (1,) * 9))), "at most 8"),
    _pkl("count", state(("a", tensor(source=storage(5)))), "the pickle declares 20"),
    _pkl("count-short", state(("a", tensor(source=storage(3)))), "declares 12"),
    _pkl(
        "no-member",
        state(("a", tensor(source=storage(4, "7")))),
        "no member 'm/data/7'",
    ),
    _pkl("key-path", state(("a", tensor(source=storage(4, "../../x")))), "no member"),
    _pkl(
        "complex",
        state(("a", tensor(source=storage(kind="ComplexFloatStorage")))),
        "torch.ComplexFloatStorage",
    ),
    _pkl(
        "untyped-v2",
        state(("a", tensor(source=storage(16, kind="UntypedStorage")))),
        "lacks its dtype",
    ),
    _pkl(
        "other-dtype",
        state(("a", tensor(extra=glob("torch", "int8")))),
        "int8 tensor over a storage of float32",
    ),
    _pkl(
        "conjugate",
        state(("a", tensor(extra=b"}(" + text("conj") + b"\x88u"))),
        "conjugate",
    ),
    _pkl("storage-text", state(("a", text("storage") + b"Q")), "external reference"),
    _pkl("bool-count", state(("a", storage()[:-7] + b"\x88tQ")), "external reference"),
    _raw(
        "bool-bytes",
        archive(
            state(("a", tensor(source=storage(4, "b", "BoolStorage")))),
            {"m/data/b": b"\0\1\2\0"},
        ),
        "bool byte 2",
    ),
    # Archives.
    _raw(
        "crc",
        patched(b"m/data/0", _payload),
        "is damaged: CRC-32",
        error="IntegrityError",
    ),
    _raw("encrypted", patched(b"m/data/0", _encrypted), "is encrypted"),
    _raw("flag-local", patched(b"m/data/0", _flag_local), "local header differs"),
    _raw("flag-strange", patched(b"m/data/0", _strange_flag), "has flags 0x0010"),
    _raw("name-local", patched(b"m/data/0", _other_name), "local header differs"),
    _raw("offset-far", patched(b"m/data/0", _far_offset), "outside the file"),
    _raw(
        "zip64-missing", patched(b"m/data/0", _zip64_missing), "lacks its 64-bit sizes"
    ),
    _raw("member-long", patched(b"m/data/0", _long_member), "passes the end"),
    _raw("member-overlaps", patched(b"m/data/0", _overlapping), "overlaps"),
    _raw("member-twice", _duplicate(), "'m/data/0' is given twice"),
    _raw("count-more", _count(60), "zip directory is truncated"),
    _raw("count-less", _count(1), "bytes after its last member"),
    _raw("prefix", b"PK\x03\x04" + GOOD, "zip directory"),
    _raw("suffix", GOOD + b"\0", "zip end record is missing"),
    _raw("comment", GOOD[:-2] + b"\3\0abc", "zip end record is missing"),
    _raw(
        "deflate-bomb",
        lambda: archive(b"\0" * (50 << 20), method=zipfile.ZIP_DEFLATED),
        "is compressed (method 8)",
    ),
    _raw("nested-zip", archive(GOOD), "pickle operation b'P'"),
    _raw(
        "absolute-member", archive(b"N.", {"/etc/x": b""}), "not a plain relative path"
    ),
    _raw("parent-member", archive(b"N.", {"m/../x": b""}), "not a plain relative path"),
    _raw("folder-member", archive(b"N.", {"m/x/": b""}), "not a plain relative path"),
    _raw("two-roots", archive(b"N.", {"n/x": b""}), "expected one folder, found 2"),
    _raw(
        "big-endian",
        archive(b"N.", order=b"big"),
        "not little-endian",
        error="UnsupportedError",
    ),
    # Odd, and valid.
    _raw("ok", GOOD, "", error=None),
    _pkl(
        "ok-shared",
        state(("a", tensor()), ("b", tensor((2, 2), (1, 2)))),
        "",
        error=None,
    ),
    _pkl("ok-empty", state(("a", tensor((0, 3), (3, 1)))), "", error=None),
    _pkl(
        "ok-state-dict",
        b"\x80\x02}" + text("state_dict") + state(("a", tensor()))[2:-1] + b"s.",
        "",
        error=None,
    ),
]
