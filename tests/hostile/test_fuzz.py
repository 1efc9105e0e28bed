"""Mutated files either open or raise an error of qjax; nothing else happens."""

import json
import struct
from pathlib import Path
from typing import Any

import hostile_json
import hostile_layers
import hostile_pickle
import hostile_safetensors
import hostile_tensors
import numpy as np
import pytest
from hostile_case import model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qjax.converters.huggingface import Checkpoint
from qjax.converters.packed import PackedCheckpoint
from qjax.converters.state_pickle import parse_state
from qjax.converters.torch_pickle import load_torch
from qjax.errors import FormatError, IntegrityError, QjaxError
from qjax.io.json import parse_object
from qjax.io.safetensors import SafetensorsFile
from qjax.tensor import QuantizedTensor

fuzz = settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def _open(path: Path, data: bytes) -> None:
    """Open bytes as safetensors and read everything."""
    path.write_bytes(data)
    try:
        with SafetensorsFile(path) as file:
            total = sum(file.read(name).nbytes for name in file.names())
    except QjaxError:
        return
    (length,) = struct.unpack("<Q", data[:8])
    assert 8 + length + total == len(data)


def _flip(data: bytes, bits: list[int]) -> bytes:
    raw = bytearray(data)
    for bit in bits:
        raw[bit // 8 % len(raw)] ^= 1 << bit % 8
    return bytes(raw)


@fuzz
@given(bits=st.lists(st.integers(0, 1 << 12), min_size=1, max_size=3))
def test_safetensors_bit_flips(bits: list[int], tmp_path: Path) -> None:
    _open(tmp_path / "x", _flip(hostile_safetensors.GOOD, bits))


_NUMBER = st.one_of(
    st.integers(-2, 40), st.integers(), st.sampled_from([1 << 31, 1 << 62, 1 << 63])
)
_VALUE: Any = st.one_of(_NUMBER, st.none(), st.booleans(), st.text(max_size=3))
_ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.one_of(st.sampled_from(["U8", "F32", "BF16", "F4"]), _VALUE),
        "shape": st.one_of(st.lists(_VALUE, max_size=3), _VALUE),
        "data_offsets": st.one_of(st.lists(_VALUE, max_size=3), _VALUE),
    },
    optional={"extra": _VALUE},
)


@fuzz
@given(
    header=st.dictionaries(
        st.one_of(st.sampled_from(["a", "b", "__metadata__"]), st.text(max_size=4)),
        st.one_of(_ENTRY, _VALUE),
        max_size=3,
    ),
    size=st.integers(0, 40),
)
def test_safetensors_headers(header: Any, size: int, tmp_path: Path) -> None:
    raw = json.dumps(header).encode()
    _open(tmp_path / "x", struct.pack("<Q", len(raw)) + raw + b"\0" * size)


@fuzz
@given(data=st.binary(max_size=200))
def test_json_bytes(data: bytes) -> None:
    for text in (data, b'{"a":' + data + b"}"):
        try:
            assert isinstance(parse_object(text, "x"), dict)
        except FormatError as error:
            assert str(error).startswith("x: ")


_OPERATIONS = st.sampled_from(
    [bytes([code]) for code in range(256)]
    + [b"q\0", b"h\0", b"K\1", b"X\1\0\0\0a", b"ctorch\nFloatStorage\n"]
    + [b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n"]
    + [hostile_pickle.tensor(), hostile_pickle.storage()]
)


@fuzz
@given(parts=st.lists(_OPERATIONS, max_size=20))
def test_pickle_operations(parts: list[bytes]) -> None:
    with pytest.raises(FormatError, match="x: byte"):
        parse_state(b"\x80\x02" + b"".join(parts) + b"0", "x")


@fuzz
@given(bits=st.lists(st.integers(0, 1 << 13), min_size=1, max_size=3))
def test_checkpoint_bit_flips(bits: list[int], tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(_flip(hostile_pickle.GOOD, bits))
    try:
        tensors = load_torch(tmp_path / "x")
    except QjaxError:
        return
    assert all(tensor.size <= 4 for tensor in tensors.values())


@fuzz
@given(bit=st.integers(0, 16 * 8 - 1))
def test_every_payload_flip_is_found(bit: int, tmp_path: Path) -> None:
    start = hostile_pickle.GOOD.index(b"m/data/0") + len("m/data/0")
    data = _flip(hostile_pickle.GOOD, [start * 8 + bit])
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(IntegrityError, match="'m/data/0' is damaged"):
        load_torch(tmp_path / "x")


@fuzz
@given(name=st.text(max_size=12))
def test_shard_names(name: str, tmp_path: Path) -> None:
    from qjax.converters.shards import find_shards

    (tmp_path / "x.safetensors").write_bytes(hostile_json.A)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name + ".safetensors"}}))
    try:
        shards, _ = find_shards(tmp_path)
    except QjaxError:
        return
    assert shards == ["x.safetensors"]


_SIZE = st.sampled_from([1, 3, 8, 12, 33, 64, 96])
_DTYPE = st.sampled_from(["int32", "int64", "int8", "uint8", "float16", "float32"])
_SETTING: Any = st.one_of(_VALUE, st.lists(_VALUE, max_size=2), st.just({}))


@settings(fuzz, max_examples=250)
@given(base=st.sampled_from([*hostile_layers.BASES]), data=st.data())
def test_quantized_layers(base: str, data: Any, tmp_path: Path) -> None:
    """Parts of other shapes and types, and settings of any value."""
    config, layer = hostile_layers.BASES[base]
    parts = dict(layer)
    for part in data.draw(st.lists(st.sampled_from([*parts]), max_size=2)):
        shape = data.draw(st.lists(_SIZE, max_size=3))
        parts[part] = np.ones(shape, data.draw(_DTYPE)) if shape else None
    if hostile_layers.NF4 in parts and data.draw(st.booleans()):
        keys = st.sampled_from([*hostile_layers.NESTED])
        state = hostile_layers.NESTED | data.draw(st.dictionaries(keys, _SETTING))
        parts[hostile_layers.NF4] = hostile_tensors.text(state)
    keys = st.sampled_from([*config, "format", "checkpoint_format", "dynamic"])
    changes = data.draw(st.dictionaries(keys, _SETTING, max_size=1))
    model(
        tmp_path,
        {"model_type": "llama", "quantization_config": config | changes},
        model__safetensors=hostile_tensors.file_of(
            {f"x.{part}": leaf for part, leaf in parts.items()}
        ),
    )
    try:
        with Checkpoint(tmp_path) as source:
            packed = PackedCheckpoint(source)
            for name in packed.names():
                leaf, shape = packed.read(name), packed.shape(name)
                if isinstance(leaf, QuantizedTensor):
                    shape = (*shape[:-2], *shape[:-3:-1])
                assert leaf.shape == shape
    except QjaxError as error:
        assert len(str(error)) < 1500
