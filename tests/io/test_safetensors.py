"""Reading and writing safetensors, against the package of that name both ways."""

import hashlib
import io
import json
import struct
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import save_file

from qjax.errors import FormatError, SpecError, UnsupportedError
from qjax.io.safetensors import SafetensorsFile, SafetensorsWriter, write_safetensors
from qjax.io.safetensors_layout import DTYPES


def _tensors(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One tensor of every dtype, of odd sizes."""
    made = {}
    for i, (code, dtype) in enumerate(DTYPES.items()):
        shape = [(3, 5), (7,), (), (2, 0, 3), (1, 1, 9)][i % 5]
        raw = rng.integers(0, 2 if code == "BOOL" else 120, shape)
        made[f"layer.{code}.weight"] = raw.astype(dtype)
    return made


def test_reads_what_the_package_writes(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors = {n: a for n, a in _tensors(rng).items() if a.dtype.num < 256}
    assert len(tensors) == 12
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, {"format": "pt"})
    with SafetensorsFile(path) as file:
        assert file.metadata == {"format": "pt"}
        assert sorted(file.names()) == sorted(tensors)
        for name, expected in tensors.items():
            array = file.read(name)
            assert file.shape(name) == array.shape == expected.shape
            assert file.dtype(name) == array.dtype == expected.dtype
            assert array.tobytes() == expected.tobytes()
            assert not array.flags.writeable


def test_the_package_reads_what_we_write(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors = _tensors(rng)
    path = tmp_path / "x.safetensors"
    digests = write_safetensors(path, tensors, metadata={"k": "v"})
    found = dict(safetensors.deserialize(path.read_bytes()))
    assert sorted(found) == sorted(tensors)
    for name, expected in tensors.items():
        assert DTYPES[found[name]["dtype"]] == expected.dtype
        assert tuple(found[name]["shape"]) == expected.shape
        assert bytes(found[name]["data"]) == expected.tobytes()
        assert digests[name] == hashlib.sha256(expected.tobytes()).hexdigest()
    with SafetensorsFile(path) as file:
        assert file.metadata == {"k": "v"}
        assert {name: file.sha256(name) for name in file.names()} == digests


def test_views_share_the_mapped_file_and_outlive_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    array = np.arange(1 << 16, dtype=np.float32)
    write_safetensors(path, {"a": array})
    file = SafetensorsFile(path)
    first, second = file.read("a"), file.read("a")
    assert np.shares_memory(first, second)
    file.release()
    file.close()
    assert (first == array).all()
    with pytest.raises(SpecError, match="already closed"):
        file.read("a")


def test_unaligned_data_is_copied(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    header += b" " * ((4 - len(header)) % 8 + 1)
    data = np.array([1.5, -2], np.float32)
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + data.tobytes())
    with SafetensorsFile(path) as file:
        assert file.info("a").start % 4
        array = file.read("a")
    assert array.flags.aligned and not array.flags.writeable
    assert (array == data).all()


def test_bytes_do_not_depend_on_the_order_of_writing(rng: np.random.Generator) -> None:
    tensors = _tensors(rng)
    specs = {name: (a.shape, a.dtype) for name, a in tensors.items()}
    made = []
    for names in (list(tensors), list(reversed(tensors))):
        file = io.BytesIO()
        writer = SafetensorsWriter(
            file, {n: specs[n] for n in names}, {"b": "", "a": ""}
        )
        for name in names:
            writer.write(name, tensors[name])
        made.append((file.getvalue(), writer.finish(), writer.nbytes))
    assert made[0] == made[1]
    assert len(made[0][0]) == made[0][2]


def test_every_tensor_is_aligned(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = {
        f"{i}": np.zeros(rng.integers(1, 9), d) for i, d in enumerate(DTYPES.values())
    }
    write_safetensors(tmp_path / "x", tensors)
    with SafetensorsFile(tmp_path / "x") as file:
        for info in file.tensors.values():
            assert info.start % info.dtype.itemsize == 0


def test_takes_jax_strided_and_big_endian_arrays(tmp_path: Path) -> None:
    base = np.arange(12, dtype=np.float32).reshape(3, 4)
    tensors = {
        "jax": jnp.ones((2, 3), jnp.bfloat16),
        "transposed": base.T,
        "strided": base[:, ::2],
        "big": base.astype(">f4"),
    }
    write_safetensors(tmp_path / "x", tensors)
    with SafetensorsFile(tmp_path / "x") as file:
        assert file.dtype("jax") == ml_dtypes.bfloat16
        for name in ("transposed", "strided", "big"):
            assert (file.read(name) == np.asarray(tensors[name])).all()


def test_writer_refuses_what_was_not_declared() -> None:
    specs = {"a": ((2, 3), np.float32), "b": ((1,), np.int8)}
    writer = SafetensorsWriter(io.BytesIO(), specs)
    with pytest.raises(SpecError, match="tensor 'c' was not declared"):
        writer.write("c", np.zeros(1))
    with pytest.raises(
        SpecError, match=r"'a': got float32\[3, 2\], declared float32\[2, 3\]"
    ):
        writer.write("a", np.zeros((3, 2), np.float32))
    with pytest.raises(SpecError, match=r"'a': got float64\[2, 3\]"):
        writer.write("a", np.zeros((2, 3)))
    writer.write("a", np.zeros((2, 3), np.float32))
    with pytest.raises(SpecError, match="tensor 'a' was written before"):
        writer.write("a", np.zeros((2, 3), np.float32))
    with pytest.raises(
        SpecError, match=r"1 declared tensors were not written: \['b'\]"
    ):
        writer.finish()


def test_writer_refuses_names_and_dtypes() -> None:
    with pytest.raises(FormatError, match="looks like a file path"):
        SafetensorsWriter(io.BytesIO(), {"../a": ((), np.float32)})
    with pytest.raises(UnsupportedError, match="'a': dtype complex64 cannot be stored"):
        SafetensorsWriter(io.BytesIO(), {"a": ((), np.complex64)})
    with pytest.raises(UnsupportedError, match="'a': dtype int4 cannot be stored"):
        SafetensorsWriter(io.BytesIO(), {"a": ((2,), ml_dtypes.int4)})


def test_unknown_tensor_is_named(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", {"a": np.zeros(1)})
    with (
        SafetensorsFile(tmp_path / "x") as file,
        pytest.raises(SpecError, match="x: no tensor 'b'"),
    ):
        file.read("b")


def test_a_larger_header_can_be_allowed(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", {"a": np.zeros(1)})
    with pytest.raises(FormatError, match="or the limit of 16"):
        SafetensorsFile(tmp_path / "x", max_header=16)


def test_header_is_what_the_format_says(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", {"a": np.ones(3, np.int8), "b": np.ones(1)})
    raw = (tmp_path / "x").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    assert length % 8 == 0 and raw[8:9] == b"{"
    assert json.loads(raw[8 : 8 + length]) == {
        "b": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]},
        "a": {"dtype": "I8", "shape": [3], "data_offsets": [8, 11]},
    }
