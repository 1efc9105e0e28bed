"""GGUF files: reading what was packed by hand, and split models."""

import os
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qjax.converters.gguf_file import GGUFFile, open_gguf
from qjax.converters.gguf_layout import Value
from qjax.converters.gguf_write import write_gguf
from qjax.errors import FormatError, QjaxError, SpecError
from qjax.formats.ggml import TYPES
from tests.hostile.gguf_bytes import (
    BOOL,
    CODES,
    F32,
    STRING,
    U8,
    U16,
    U32,
    array,
    gguf,
    key,
    scalar,
    tensor,
    text,
)

from .gguf_keys import KEYS, SCALARS, put


@pytest.mark.parametrize("version", [2, 3])
def test_metadata_of_every_type(tmp_path: Path, version: int) -> None:
    with GGUFFile(put(tmp_path / "x", gguf(KEYS, version=version))) as file:
        assert (file.version, file.alignment, file.tensors) == (version, 32, {})
        assert [*file.metadata] == [raw[8 : 8 + raw[0]].decode() for raw in KEYS]
        for name, code, value in SCALARS:
            one, several = file.metadata[f"one.{name}"], file.metadata[f"all.{name}"]
            assert one == value
            assert type(one) is type(value)
            assert several.tolist() == [value] * 3
            assert several.dtype == np.dtype(CODES[code])
            assert file.fields[f"one.{name}"] == Value(name, value)
            assert file.fields[f"all.{name}"].type == name
        assert file.metadata["one.string"] == "grüße"
        assert file.metadata["all.string"] == ["a", "", "\u2581b"]
        assert file.fields["none.string"] == Value("string", [])
        assert file.metadata["none.f32"].shape == (0,)
        assert file.metadata["none.f32"].dtype == np.float32
        assert file.metadata["empty"] == ""


DTYPES = {
    "f32": np.float32,
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "f64": np.float64,
    "i8": np.int8,
    "i16": np.int16,
    "i32": np.int32,
    "i64": np.int64,
}


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3)])
def test_tensors_of_every_type(tmp_path: Path, lead: tuple[int, ...]) -> None:
    """Shapes are turned, rows of blocks are rows of bytes, data is a view."""
    rng, infos, data, expected = np.random.default_rng(0), [], b"", {}
    for name, block in TYPES.items():
        dims = (2 * block.elements, *lead[::-1])
        infos.append(tensor(name, dims, block.id, len(data)))
        rows = rng.integers(0, 60, (*lead, 2 * block.bytes), np.uint8)
        data += rows.tobytes() + bytes(-rows.nbytes % 32)
        expected[name] = rows.view(DTYPES.get(name, np.uint8))
    path = put(tmp_path / "x", gguf([], infos, data))
    with GGUFFile(path) as file:
        assert [*file.tensors] == [*expected]
        found = {name: file.read(name) for name in expected}
        for name, tensor_ in file.tensors.items():
            shape = (*lead, 2 * TYPES[name].elements)
            assert (tensor_.type, tensor_.shape) == (name, shape)
            assert tensor_.stored == (found[name].dtype, found[name].shape)
            assert tensor_.nbytes == found[name].nbytes
        file.release()
    for name, array_ in found.items():  # views outlive the file
        assert array_.dtype == expected[name].dtype
        assert array_.shape == expected[name].shape
        assert array_.tobytes() == expected[name].tobytes()
        assert not array_.flags.writeable
        assert not array_.flags.owndata


@pytest.mark.parametrize("align", [1, 64])
def test_alignment(tmp_path: Path, align: int) -> None:
    keys = [key("general.alignment", U32, scalar(U32, align))]
    second = -(-12 // align) * align
    infos = [tensor("a", (3,), 0, 0), tensor("b", (3,), 0, second)]
    values = np.arange(6, dtype=np.float32)
    data = values[:3].tobytes().ljust(second, b"\0") + values[3:].tobytes()
    with GGUFFile(put(tmp_path / "x", gguf(keys, infos, data, align=align))) as file:
        assert file.alignment == align
        assert [*file.read("a"), *file.read("b")] == values.tolist()


def test_trailing_bytes_and_missing_padding(tmp_path: Path) -> None:
    """llama.cpp takes both."""
    raw = gguf([], [tensor("a", (1,))], scalar(F32, 2.5))
    for data in (raw, raw + bytes(28), raw + b"x" * 1000):
        with GGUFFile(put(tmp_path / "x", data)) as file:
            assert file.read("a").tolist() == [2.5]


def test_vocabulary_is_fast(tmp_path: Path) -> None:
    words = [f"token{i}" for i in range(1 << 18)]
    keys = [array("tokens", STRING, map(text, words))]
    keys += [array("scores", F32, [bytes(4 << 18)], 1 << 18)]
    path = put(tmp_path / "x", gguf(keys))
    started = time.process_time()
    with GGUFFile(path) as file:
        seconds = time.process_time() - started
        assert file.metadata["tokens"] == words
        assert file.metadata["scores"].shape == (1 << 18,)
    assert seconds < 1


def test_long_headers_need_permission(tmp_path: Path) -> None:
    path = put(tmp_path / "x", gguf([array("a", U8, [bytes(5000)], 5000)]))
    with pytest.raises(FormatError, match="passes the limit of 4,096 bytes"):
        GGUFFile(path, max_header=4096)
    with GGUFFile(path, max_header=8192) as file:
        assert file.metadata["a"].shape == (5000,)


def test_unknown_tensor(tmp_path: Path) -> None:
    with GGUFFile(put(tmp_path / "x", gguf())) as file:
        with pytest.raises(SpecError, match="no tensor 'w'"):
            file.read("w")


def _split(folder: Path, count: int = 3, **changes: Any) -> Path:
    """Write a model of one tensor per part; return the path of the first."""
    for n in range(count):
        keys = {"split.no": n, "split.count": count, "split.tensors.count": count}
        keys = {k: np.int32(v) for k, v in (keys | changes.get(f"part{n}", {})).items()}
        metadata = {"general.name": "x", **keys} if n == 0 else keys
        path = folder / f"m-{n + 1:05d}-of-{count:05d}.gguf"
        name = changes.get("names", "abc")[n]
        write_gguf(path, metadata, [(name, "f32", (3,), np.full(3, n, np.float32))])
    return folder / f"m-00001-of-{count:05d}.gguf"


def test_split_models_open_as_one(tmp_path: Path) -> None:
    with open_gguf(_split(tmp_path)) as file:
        assert file.metadata == {"general.name": "x"}
        assert [*file.fields] == ["general.name"]
        assert [(n, t.part) for n, t in file.tensors.items()] == [
            ("a", 0),
            ("b", 1),
            ("c", 2),
        ]
        assert [file.read(n)[0] for n in "abc"] == [0, 1, 2]
        file.release()


def test_parts_in_the_hub_cache(tmp_path: Path) -> None:
    """Links to blobs of the same repository, from a folder in the snapshot."""
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots" / "1234" / "Q8_0"
    blobs.mkdir()
    folder.mkdir(parents=True)
    first = _split(blobs)
    for path in [*blobs.iterdir()]:
        (folder / path.name).symlink_to(path)
    with open_gguf(folder / first.name) as file:
        assert [*file.tensors] == ["a", "b", "c"]


@pytest.mark.parametrize("count", [0, 1])
def test_unsplit_with_keys_of_parts(tmp_path: Path, count: int) -> None:
    """What `gguf-split --merge` leaves behind."""
    keys = {"split.no": 0, "split.count": count, "split.tensors.count": 7}
    write_gguf(tmp_path / "x", keys, [])
    with open_gguf(tmp_path / "x") as file:
        assert file.metadata == keys


SPLITS: dict[str, tuple[dict[str, Any], str]] = {
    "number": ({"part1": {"split.no": 2}}, "is part 3 of 3, expected 2 of 3"),
    "count": ({"part2": {"split.count": 4}}, "is part 3 of 4, expected 3 of 3"),
    "more": ({"part0": {"split.count": 4}}, "does not end in -00001-of-00004.gguf"),
    "last": ({"part2": {"split.no": 3}}, "is part 4 of 3; split.no must be less"),
    "total": (
        {"part0": {"split.tensors.count": 4}},
        "the 3 parts hold 3 tensors, split.tensors.count is '4'",
    ),
    "name": ({"names": "aba"}, "tensor 'a' is in an earlier part"),
    "negative": ({"part0": {"split.count": -1}}, "split.count is '-1', expected"),
}


@pytest.mark.parametrize("name", SPLITS)
def test_parts_that_do_not_fit(tmp_path: Path, name: str) -> None:
    changes, message = SPLITS[name]
    with pytest.raises(QjaxError, match=message):
        open_gguf(_split(tmp_path, **changes))
    assert _descriptors(tmp_path) == 0


def _descriptors(folder: Path) -> int:
    links = Path("/proc/self/fd")
    found = (os.readlink(p) for p in links.iterdir() if p.is_symlink())
    return sum(target.startswith(str(folder)) for target in found)


def test_parts_that_are_not_there(tmp_path: Path) -> None:
    first = _split(tmp_path)
    with pytest.raises(SpecError, match="is part 2 of 3; open the first, 'm-00001-of"):
        open_gguf(tmp_path / "m-00002-of-00003.gguf")
    (tmp_path / "m-00002-of-00003.gguf").unlink()
    with pytest.raises(SpecError, match=r"no m-00002-of-00003\.gguf"):
        open_gguf(first)
    with pytest.raises(SpecError, match="give them their names back"):
        open_gguf(first.rename(tmp_path / "model.gguf"))
    assert _descriptors(tmp_path) == 0


def test_split_keys_of_other_types(tmp_path: Path) -> None:
    keys = [key("split.count", BOOL, b"\1"), key("split.no", U16, bytes(2))]
    with pytest.raises(FormatError, match=r"split\.count is 'True', expected"):
        open_gguf(put(tmp_path / "x", gguf(keys)))
