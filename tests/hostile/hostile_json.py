"""JSON files and model directories that must be refused."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile_case import (
    Case,
    Target,
    broken_links,
    entry,
    file_of,
    model,
    safetensors_bytes,
    special_files,
)

A = safetensors_bytes({"a": entry([1], 0, 4)}, b"\0" * 4)
B = safetensors_bytes({"b": entry([1], 0, 4)}, b"\0" * 4)
AB = safetensors_bytes({"a": entry([1], 0, 4), "b": entry([1], 4, 8)}, b"\0" * 8)
S1, S2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def _json(name: str, data: bytes, message: str, **kw: Any) -> Case:
    return Case(f"json-{name}", "json", file_of("x.json", data), message=message, **kw)


def _index(weight_map: Any, **files: bytes) -> Callable[[Path], Target]:
    """A model directory with this index and these shards."""

    def build(folder: Path) -> Target:
        raw = weight_map() if callable(weight_map) else weight_map
        if not isinstance(raw, bytes):
            raw = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
        model(folder)
        (folder / INDEX).write_bytes(raw)
        for name, data in files.items():
            (
                folder / {"s1": S1, "s2": S2, "one": "model.safetensors"}[name]
            ).write_bytes(data)
        return folder

    return build


def _dir(name: str, build: Callable[[Path], Target], message: str, **kw: Any) -> Case:
    return Case(f"dir-{name}", "checkpoint", build, message=message, **kw)


def _shard_name(name: str, shard: Any) -> Case:
    message = "is not a plain *.safetensors file name; it was not opened"
    return _dir(f"index-{name}", _index({"a": shard}, s1=A), message)


def _symlink_out(folder: Path) -> Target:
    outside = folder.parent / f"{folder.name}-outside.safetensors"
    outside.write_bytes(A)
    model(folder)
    (folder / "model.safetensors").symlink_to(outside)
    return folder


def _config_symlink(folder: Path) -> Target:
    (folder / "config.json").symlink_to("/etc/hostname")
    return folder


def _tokenizer_symlink(folder: Path) -> Target:
    model(folder, model__safetensors=A)
    (folder / "tokenizer.json").symlink_to("/etc/passwd")
    return folder


def _fake_blobs(folder: Path) -> Target:
    """A snapshot whose link leads to the blobs of another repository."""
    own = folder / "models--me" / "snapshots" / "0"
    other = folder / "models--other" / "blobs"
    own.mkdir(parents=True)
    other.mkdir(parents=True)
    (other / "abc").write_bytes(A)
    model(own)
    (own / "model.safetensors").symlink_to(other / "abc")
    return own


def _hub_cache(folder: Path) -> Target:
    """The layout of the Hub's cache, which is links all through."""
    own = folder / "models--me" / "snapshots" / "0"
    blobs = folder / "models--me" / "blobs"
    own.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1").write_bytes(b'{"model_type": "llama"}')
    (blobs / "2").write_bytes(A)
    (own / "config.json").symlink_to("../../blobs/1")
    (own / "model.safetensors").symlink_to("../../blobs/2")
    return own


def _weights(kind: str) -> Callable[[Path], Target]:
    def build(folder: Path) -> Target:
        model(folder)
        path = folder / "model.safetensors"
        if kind == "directory":
            path.mkdir()
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "loop":
            path.symlink_to(path)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        return folder

    return build


def _config(name: str, raw: bytes, message: str) -> Case:
    build = lambda folder: model(folder, raw, model__safetensors=A)  # noqa: E731
    return _dir(f"config-{name}", build, message)


def _many() -> bytes:
    one = b'"tensor.name.of.a.layer.%d":"m.safetensors"'
    return b'{"weight_map":{' + b",".join(one % i for i in range(10**6)) + b"}}"


CASES = [
    _json("empty", b"", "not valid JSON"),
    _json("bom", b"\xef\xbb\xbf{}", "byte-order mark"),
    _json("utf16", '{"a":1}'.encode("utf-16"), "byte-order mark"),
    _json("utf16-bare", '{"a":1}'.encode("utf-16-le"), "not valid JSON"),
    _json("not-utf8", b'{"a":"\xff"}', "not UTF-8 at byte 6"),
    _json("html", b"<html>404</html>", "not valid JSON"),
    _json("list", b"[]", "the root is a list"),
    _json("number", b"3", "the root is a int"),
    _json("null", b"null", "the root is a NoneType"),
    _json("duplicate", b'{"a":1,"a":2}', "key 'a' is given twice"),
    _json("duplicate-inner", b'{"x":[{"a":1,"a":1}]}', "key 'a' is given twice"),
    _json("nan", b'{"a":NaN}', "NaN is not JSON"),
    _json("infinity", b'{"a":Infinity}', "Infinity is not JSON"),
    _json("overflow", b'{"a":1e400}', "out of range"),
    _json("huge-integer", b'{"a":' + b"7" * 100_000 + b"}", "100,000 characters"),
    _json("long-integer", b'{"a":' + b"7" * 21 + b"}", "at most 64 bits"),
    _json("deep-33", b'{"a":' * 33 + b"1" + b"}" * 33, "deeper than 32"),
    _json("deep-10^5", b'{"a":' * 100_000, "deeper than 32"),
    _json("deep-list", b'{"a":' + b"[" * 50 + b"]" * 50 + b"}", "deeper than 32"),
    _json("surrogate", b'{"a":"\\udc00"}', "surrogate"),
    _json("surrogate-key", b'{"\\udc00":1}', "surrogate"),
    _json("surrogate-list", b'{"a":["\\udc00"]}', "surrogate"),
    _json("large", b'{"a":"' + b"x" * (1 << 20) + b'"}', "larger than the 1,048,576"),
    _json("trailing", b"{} x", "not valid JSON"),
    _json("nul", b'{"a":1}\0', "not valid JSON"),
    _json("ok-deep-32", b'{"a":' * 32 + b"1" + b"}" * 32, "", error=None),
    _json("ok-unicode", '{"ä":"\U0001f600"}'.encode(), "", error=None),
    Case("json-special", "json", lambda folder: special_files(folder, ".json")),
    Case(
        "json-unopenable",
        "json",
        lambda folder: broken_links(folder, ".json"),
        error="SpecError",
    ),
    _shard_name("parent", "../x.safetensors"),
    _shard_name("absolute", "/etc/passwd"),
    _shard_name("absolute-safetensors", "/tmp/x.safetensors"),
    _shard_name("windows", "C:\\x.safetensors"),
    _shard_name("inner-parent", "a/../b.safetensors"),
    _shard_name("subfolder", "a/b.safetensors"),
    _shard_name("percent", "%2e%2e%2fx.safetensors"),
    _shard_name("dot", ".hidden.safetensors"),
    _shard_name("device", "NUL.safetensors"),
    _shard_name("newline", "a\nb.safetensors"),
    _shard_name("nul", "a\0.safetensors"),
    _shard_name("extension", "model.bin"),
    _shard_name("python", "model.py"),
    _shard_name("empty", ""),
    _shard_name("long", "x" * 300 + ".safetensors"),
    _shard_name("number", 3),
    _shard_name("list", [S1]),
    _dir("index-no-map", _index(b"{}"), "weight_map must be an object"),
    _dir("index-empty-map", _index({}), "weight_map must be an object"),
    _dir("index-list-map", _index([S1]), "weight_map must be an object"),
    _dir("index-bom", _index(b"\xef\xbb\xbf{}"), "byte-order mark"),
    _dir(
        "index-duplicate",
        _index(b'{"weight_map":{"a":"%b","a":"%b"}}' % (S1.encode(), S2.encode())),
        "key 'a' is given twice",
    ),
    _dir("index-10^6", _index(_many), "larger than the 33,554,432"),
    _dir(
        "shard-absent",
        _index({"a": S1, "b": S2}, s1=A),
        f"{INDEX} lists {S2}, which is not there",
    ),
    _dir(
        "shard-truncated",
        _index({"a": S1, "b": S2}, s1=A, s2=B[:-2]),
        "truncated",
    ),
    _dir(
        "tensor-twice",
        _index({"a": S1, "b": S2}, s1=A, s2=AB),
        f"tensor 'a' lies in both {S1} and {S2}",
    ),
    _dir(
        "tensor-elsewhere",
        _index({"a": S2, "b": S1}, s1=A, s2=B),
        f"places tensor 'a' in {S2}, but it lies in {S1}",
    ),
    _dir(
        "tensor-absent",
        _index({"a": S1, "b": S2, "c": S2}, s1=A, s2=B),
        f"places tensor 'c' in {S2}, but it is nowhere",
    ),
    _dir("shard-unlisted", _index({"a": S1}, s1=A, s2=B), f"{S2} is not listed"),
    _dir(
        "both-kinds", _index({"a": S1}, s1=A, one=A), "model.safetensors is not listed"
    ),
    _dir("symlink-out", _symlink_out, "outside the model directory; it was not opened"),
    _dir("config-symlink", _config_symlink, "outside the model directory"),
    _dir("tokenizer-symlink", _tokenizer_symlink, "outside the model directory"),
    _dir("blobs-of-another", _fake_blobs, "outside the model directory"),
    _dir("weights-directory", _weights("directory"), "is a directory"),
    _dir("weights-fifo", _weights("fifo"), "FIFO"),
    _dir("weights-device", _weights("device"), "outside the model directory"),
    _dir("weights-loop", _weights("loop"), "cannot be opened", error="SpecError"),
    _dir("no-config", lambda folder: folder, "no config.json", error="SpecError"),
    _dir("no-weights", lambda folder: model(folder), "no weights", error="SpecError"),
    _dir(
        "several-weights",
        lambda folder: model(folder, x__safetensors=A, y__safetensors=B),
        "several weight files and no index",
        error="SpecError",
    ),
    _dir(
        "shards-without-index",
        lambda folder: model(folder, **{S1.replace(".", "__"): A}),
        "several weight files and no index",
        error="SpecError",
    ),
    _config("list", b"[]", "the root is a list"),
    _config("bom", b"\xef\xbb\xbf{}", "byte-order mark"),
    _config("nan", b'{"rms_norm_eps":NaN}', "NaN is not JSON"),
    _config("duplicate", b'{"hidden_size":1,"hidden_size":2}', "given twice"),
    _config("large", b'{"a":"' + b"x" * (1 << 20) + b'"}', "larger than"),
    _config("deep", b'{"a":' * 40 + b"1" + b"}" * 40, "deeper than 32"),
    _dir("ok-hub-cache", _hub_cache, "", error=None),
    _dir("ok-shards", _index({"a": S1, "b": S2}, s1=A, s2=B), "", error=None),
    _dir(
        "ok-remote-code",
        lambda folder: model(
            folder,
            {
                "auto_map": {"AutoModel": "evil.Model"},
                "trust_remote_code": True,
                "_attn_implementation_internal": "someone/kernel",
                "_name_or_path": str(folder),
            },
            model__safetensors=A,
            evil__py=b"open('pwned', 'w')",
        ),
        "",
        error=None,
    ),
]
