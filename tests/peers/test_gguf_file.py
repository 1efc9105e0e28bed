"""GGUF files of gguf-py are read, and written byte for byte alike."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qjax.converters.gguf_file import GGUFFile, open_gguf
from qjax.converters.gguf_layout import Value
from qjax.converters.gguf_write import write_gguf
from qjax.formats.ggml import TYPES

gguf = pytest.importorskip("gguf")
Kind, Of = gguf.GGMLQuantizationType, gguf.GGUFValueType

QUANTIZED = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "tq1_0", "tq2_0", "mxfp4"]
PLAIN = {
    "f32": np.float32,
    "f16": np.float16,
    "f64": np.float64,
    "i8": np.int8,
    "i16": np.int16,
    "i32": np.int32,
    "i64": np.int64,
}
# Not in gguf-py, or with a size that is not ggml's.
UNKNOWN = {"q2_0", "q8_1"}
VALUES: dict[str, tuple[Any, str]] = {
    "u8": (200, "UINT8"),
    "i8": (-100, "INT8"),
    "u16": (60_000, "UINT16"),
    "i16": (-30_000, "INT16"),
    "u32": (4_000_000_000, "UINT32"),
    "i32": (-2_000_000_000, "INT32"),
    "f32": (0.1, "FLOAT32"),
    "bool": (True, "BOOL"),
    "string": ("grüße\n\0", "STRING"),
    "u64": (2**64 - 1, "UINT64"),
    "i64": (-(2**63), "INT64"),
    "f64": (0.1, "FLOAT64"),
}


def _metadata() -> dict[str, Value]:
    """A value and an array of each type, as `write_gguf` takes them."""
    fields = {"general.architecture": Value("string", "llama")}
    for kind, (value, _) in VALUES.items():
        fields[f"one.{kind}"] = Value(kind, value)
        fields[f"all.{kind}"] = Value(kind, [value] * 3)
    return fields


def _tensors() -> list[tuple[str, str, tuple[int, ...], np.ndarray]]:
    """A tensor of each type that gguf-py knows, as `write_gguf` takes them."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((3, 2, 512), np.float32)
    found: list[Any] = [
        (f"a.{kind}", kind, (2, 3), rng.integers(-9, 9, (2, 3)).astype(dtype))
        for kind, dtype in PLAIN.items()
    ]
    brain = weight[0, :, :5].astype(ml_dtypes.bfloat16)
    found.append(("a.bf16", "bf16", (2, 5), brain))
    for name, block in TYPES.items():
        if name in QUANTIZED:
            data = gguf.quants.quantize(weight, Kind[name.upper()])
        elif block.elements > 1 and name not in UNKNOWN:
            rows = 512 // block.elements * block.bytes
            data = rng.integers(0, 256, (3, 2, rows), np.uint8)
        else:
            continue
        found.append((f"b.{name}", name, weight.shape, data))
    return [*found, ("c", "q8_0", (64,), found[-1][3][0, 0, :68])]


def _write_theirs(path: Path, **options: Any) -> list[Path]:
    writer = gguf.GGUFWriter(path, "llama", **options)
    for kind, (value, theirs) in VALUES.items():
        writer.add_key_value(f"one.{kind}", value, Of[theirs])
        writer.add_key_value(f"all.{kind}", [value] * 3, Of.ARRAY, Of[theirs])
    for name, kind, _, data in _tensors():
        raw = data.view(np.uint8) if kind == "bf16" else data
        writer.add_tensor(name, raw, raw_dtype=Kind[kind.upper()])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return writer.format_shard_names(path)


def _check_ours(file: GGUFFile) -> None:
    expected = _tensors()
    assert [*file.tensors] == [name for name, *_ in expected]
    for name, kind, shape, data in expected:
        tensor, array = file.tensors[name], file.read(name)
        assert (tensor.type, tensor.shape) == (kind, shape)
        assert (array.dtype, array.shape) == (data.dtype, data.shape)
        assert array.tobytes() == data.tobytes()
    fields = _metadata()
    assert [*file.fields] == [*fields]
    for key, (kind, value) in fields.items():
        assert file.fields[key].type == kind
        expected_ = np.float32(value).tolist() if kind == "f32" else value
        found = file.metadata[key]
        assert (found.tolist() if isinstance(found, np.ndarray) else found) == expected_


def test_theirs_is_read(tmp_path: Path) -> None:
    _write_theirs(tmp_path / "x.gguf")
    with GGUFFile(tmp_path / "x.gguf") as file:
        _check_ours(file)


def test_the_bytes_are_theirs(tmp_path: Path) -> None:
    _write_theirs(tmp_path / "theirs.gguf")
    write_gguf(tmp_path / "ours.gguf", _metadata(), _tensors())
    ours = (tmp_path / "ours.gguf").read_bytes()
    assert ours == (tmp_path / "theirs.gguf").read_bytes()


@pytest.mark.parametrize("align", [8, 32, 128])
def test_alignment(tmp_path: Path, align: int) -> None:
    """Theirs pads to what was asked for, in both packages."""
    writer = gguf.GGUFWriter(tmp_path / "theirs", "llama")
    writer.add_custom_alignment(align)
    tensors = [(f"t{n}", "f32", (n,), np.ones(n, np.float32)) for n in (3, 40, 1)]
    for name, *_, data in tensors:
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata = {"general.architecture": "llama", "general.alignment": align}
    write_gguf(tmp_path / "ours", metadata, tensors)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_ours_is_read_by_theirs(tmp_path: Path) -> None:
    """Also what their writer would have dropped."""
    empty = {"none": Value("i32", []), "silent": "", "no": Value("string", [])}
    write_gguf(tmp_path / "x", _metadata() | empty, _tensors())
    reader = gguf.GGUFReader(tmp_path / "x")
    for key, (kind, value) in _metadata().items():
        expected = np.float32(value).tolist() if kind == "f32" else value
        assert reader.get_field(key).contents() == expected, key
    assert reader.get_field("silent").contents() == ""
    for key in ("none", "no"):
        assert reader.get_field(key).types == [Of.ARRAY]
        assert reader.get_field(key).data == []
    theirs = {tensor.name: tensor for tensor in reader.tensors}
    for name, kind, shape, data in _tensors():
        found = theirs.pop(name)
        assert found.tensor_type == Kind[kind.upper()]
        assert tuple(found.shape.tolist()) == shape[::-1]
        assert found.data.tobytes() == data.tobytes()
        if kind in QUANTIZED:
            decoded = gguf.quants.dequantize(found.data, found.tensor_type)
            assert decoded.shape == shape
    assert not theirs


def test_their_split_model_is_one(tmp_path: Path) -> None:
    parts = _write_theirs(tmp_path / "x.gguf", split_max_tensors=7)
    assert len(parts) > 3
    with open_gguf(parts[0]) as file:
        _check_ours(file)
        assert {t.part for t in file.tensors.values()} == set(range(len(parts)))
