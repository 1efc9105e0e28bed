"""GGUF files: writing, with the bytes that reading began with."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qjax.converters.gguf_file import GGUFFile
from qjax.converters.gguf_layout import Value
from qjax.converters.gguf_write import write_gguf
from qjax.errors import QjaxError, SpecError
from qjax.formats.ggml import TYPES
from tests.hostile.gguf_bytes import U32, gguf, key, scalar, tensor

from .gguf_keys import KEYS, put


@pytest.mark.parametrize("align", [1, 32, 64])
def test_what_was_read_is_written_alike(tmp_path: Path, align: int) -> None:
    first, second = bytes(range(72)), bytes(range(12))
    first += bytes(-72 % align)
    infos = [tensor("a", (64, 2), TYPES["q4_0"].id), tensor("b", (3,), 0, len(first))]
    keys = [*KEYS, key("general.alignment", U32, scalar(U32, align))]
    raw = gguf(keys, infos, first + second + bytes(-12 % align), align=align)
    with GGUFFile(put(tmp_path / "x", raw)) as file:
        write_gguf(
            tmp_path / "y",
            file.fields,
            [(n, t.type, t.shape, file.read(n)) for n, t in file.tensors.items()],
        )
    assert (tmp_path / "y").read_bytes() == raw


def test_types_of_python_values(tmp_path: Path) -> None:
    values: dict[str, tuple[Any, str]] = {
        "bool": (True, "bool"),
        "int": (2**32 - 1, "u32"),
        "negative": (-1, "i32"),
        "large": (2**32, "u64"),
        "low": (-(2**40), "i64"),
        "float": (0.1, "f32"),
        "text": ("", "string"),
        "bools": ([True, False], "bool"),
        "ints": ([1, -2], "i32"),
        "larges": ((2**31, -1), "i64"),
        "largest": ([2**64 - 1], "u64"),
        "floats": ([0.5, 2.0], "f32"),
        "texts": (["a", ""], "string"),
        "scalar": (np.uint16(3), "u16"),
        "logical": (np.bool_(True), "bool"),
        "vector": (np.array([1, 2], np.int8), "i8"),
        "double": (np.float64(0.1), "f64"),
        "swapped": (np.array([1, 2], ">i4"), "i32"),
        "words": (np.array(["a", "b"]), "string"),
        "said": (Value("i64", 5), "i64"),
        "whole": (Value("f32", 5), "f32"),
        "nan": (float("nan"), "f32"),
        "infinite": (Value("f32", [float("inf"), -1.0]), "f32"),
    }
    write_gguf(tmp_path / "x", {k: v for k, (v, _) in values.items()}, [])
    with GGUFFile(tmp_path / "x") as file:
        assert [*file.fields] == [*values]
        for name, (value, kind) in values.items():
            value = value.value if isinstance(value, Value) else value
            assert file.fields[name].type == kind, name
            expected = np.float32(value) if kind == "f32" else value
            np.testing.assert_array_equal(file.metadata[name], expected, name)


_F32 = np.ones(3, np.float32)
BAD_VALUES = {
    "none": (None, "cannot tell the type of 'None'"),
    "nothing": ([], "say it with Value"),
    "mixed": ([1, 2.0], "cannot tell"),
    "mixed-bool": ([1, True], "cannot tell"),
    "dict": ({}, "cannot tell"),
    "bytes": (b"a", "cannot tell"),
    "huge": (2**64, "does not fit in 64 bits"),
    "huge-list": ([2**63, -1], "does not fit in 64 bits"),
    "half": (np.float16(1), "float16 is no type of GGUF"),
    "complex": (np.ones(2, complex), "complex128 is no type"),
    "matrix": (np.ones((2, 2)), "2 dimensions, expected a list"),
    "surrogate": ("\ud800", "is not text"),
    "type": (Value("f16", 1), "type 'f16', expected string or one of u8, i8"),
    "range": (Value("u8", 256), "'256' does not fit in u8"),
    "negative": (Value("u32", [1, -1]), "does not fit in u32"),
    "fraction": (Value("i32", 1.0), "does not fit in i32"),
    "true": (Value("i32", True), "does not fit in i32"),
    "one": (Value("bool", 1), "does not fit in bool"),
    "overflow": (1e39, "does not fit in f32"),
    "text-number": (Value("u32", "1"), "does not fit in u32"),
    "number-text": (Value("string", 1), "is not a string"),
    "numbers-text": (Value("string", ["a", 1]), "is not a string"),
    "ragged": (Value("i32", [[1], [1, 2]]), "not a list of numbers"),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_values_without_a_type(tmp_path: Path, name: str) -> None:
    value, message = BAD_VALUES[name]
    with pytest.raises(SpecError, match=message) as caught:
        write_gguf(tmp_path / "x", {"some.key": value}, [])
    assert "x: some.key: " in str(caught.value)
    assert not [*tmp_path.iterdir()]


BAD_TENSORS = {
    "type": (("a", "q4", (32,), _F32), "type 'q4', expected one of f32, f16"),
    "scalar": (("a", "f32", (), _F32), "0 dimensions, expected 1 to 4"),
    "rank": (("a", "f32", (1,) * 5, _F32), "5 dimensions"),
    "zero": (("a", "f32", (0, 3), _F32), "dimensions must be 1 to"),
    "block": (("a", "q8_0", (3, 33), _F32), "rows of 33 numbers, .* 32 in a block"),
    "size": (("a", "f32", (2**61, 2), _F32), "too large"),
    "shape": (("a", "f32", (1, 3), _F32), r"shape \[3\], expected \[1, 3\]"),
    "dtype": (("a", "f32", (3,), np.ones(3)), "data is float64, expected float32"),
    "bytes": (("a", "q8_0", (32,), np.ones(34, "i1")), "int8, expected uint8"),
    "short": (
        ("a", "f32", (9,), [_F32, _F32]),
        r"24 bytes of data, \[9\] of f32 needs",
    ),
    "long": (("a", "f32", (5,), [_F32, _F32]), "more than 20 bytes of data"),
    "name": (("a" * 64, "f32", (3,), _F32), "name of more than 63 bytes"),
    "accents": (("é" * 32, "f32", (3,), _F32), "name of more than 63 bytes"),
    "path": (("../a", "f32", (3,), _F32), "looks like a file path"),
    "empty": (("", "f32", (3,), _F32), "printable characters"),
    "twice": (("ok", "f32", (3,), _F32), "'ok': is given twice"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_tensors_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "x").write_text("before")
    bad, message = BAD_TENSORS[name]
    with pytest.raises(QjaxError, match=message):
        write_gguf(tmp_path / "x", {}, [("ok", "f32", (3,), _F32), bad], overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "before"


@pytest.mark.parametrize("size", [0, 3, 2**32, Value("u64", 32), Value("u32", [32])])
def test_alignment_that_cannot_be_written(tmp_path: Path, size: Any) -> None:
    with pytest.raises(SpecError, match="expected a u32 that is a power of two"):
        write_gguf(tmp_path / "x", {"general.alignment": size}, [])


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 65_536])
def test_keys_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(SpecError, match="1 to 65,535 printable bytes"):
        write_gguf(tmp_path / "x", {name: 1}, [])


def test_data_is_asked_for_in_turn(tmp_path: Path) -> None:
    """One tensor at a time, into a file that is not there before its end."""
    events = []

    def pieces(name: str) -> Iterator[np.ndarray]:
        for i in range(2):
            events.append((name, i, (tmp_path / "x").exists()))
            yield np.full((1, 34), i, np.uint8)

    write_gguf(
        tmp_path / "x", {}, [(n, "q8_0", (2, 32), pieces(n)) for n in ("a", "b")]
    )
    assert events == [(n, i, False) for n in "ab" for i in range(2)]
    with GGUFFile(tmp_path / "x") as file:
        assert file.read("b").tolist() == [[0] * 34, [1] * 34]
    with pytest.raises(SpecError, match="exists"):
        write_gguf(tmp_path / "x", {}, [])


def test_nothing_is_left_of_a_failure(tmp_path: Path) -> None:
    def pieces() -> Iterator[np.ndarray]:
        yield _F32
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_gguf(tmp_path / "x", {}, [("a", "f32", (6,), pieces())])
    assert not [*tmp_path.iterdir()]
