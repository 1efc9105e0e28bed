"""Importance matrices: both forms of file, what models make of them, computing one."""

import struct

import numpy as np
import pytest

import qjax
from qjax.converters.gguf_imatrix import (
    Imatrix,
    is_imatrix,
    read_imatrix,
    write_imatrix,
)
from qjax.converters.gguf_recipe import is_matrix, tensors
from qjax.converters.gguf_write import write_gguf
from qjax.errors import FormatError, SpecError
from qjax.formats import Ggml
from qjax.imatrix import imatrix
from qjax.methods.ggml import GGML
from qjax.recipes import Recipe, Rule

NAME = "blk.0.attn_q.weight"
MEANS = np.array([0.5, 2.0, 0.0, 8.0], np.float32)


@pytest.fixture(scope="module")
def model(model_path):
    return qjax.load(model_path)[0]


def binary(entries, tail=b""):
    data = struct.pack("<i", len(entries))
    for name, calls, values in entries:
        raw = name.encode()
        data += struct.pack("<i", len(raw)) + raw
        data += struct.pack("<ii", calls, len(values))
        data += np.asarray(values, "<f4").tobytes()
    return data + tail


def test_round_trip(tmp_path):
    made = Imatrix({NAME: MEANS}, {NAME: 64}, 3, 128, ["a text"])
    path = tmp_path / "m.gguf"
    write_imatrix(path, made)
    assert is_imatrix(path)
    found = read_imatrix(path)
    assert np.array_equal(found.means[NAME], MEANS)
    assert found.counts == {NAME: 64}
    assert (found.chunks, found.chunk_size) == (3, 128)
    assert list(found.datasets) == ["a text"]


def test_the_older_form(tmp_path):
    path = tmp_path / "m.dat"
    tail = struct.pack("<ii", 5, 4) + b"text"
    path.write_bytes(binary([(NAME, 2, 2 * MEANS)], tail))
    assert is_imatrix(path)
    found = read_imatrix(path)
    assert np.array_equal(found.means[NAME], MEANS)
    assert (found.counts, found.chunks) == ({NAME: 2}, 5)
    assert tuple(found.datasets) == ("text",)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (binary([(NAME, 1, MEANS)])[:-3], r"m\.dat: ends at byte 48, inside of an"),
        (binary([(NAME, 1, [1, np.nan])]), r"attn_q.weight: mean squares must be"),
        (binary([(NAME, 1, [1, -1])]), r"finite and not negative"),
        (binary([("", 1, [1])]), r"a name of 0 bytes at byte 4"),
        (struct.pack("<iii", 1, 1 << 30, 0), r"a name of 1073741824 bytes"),
    ],
    ids=["short", "nan", "negative", "nameless", "long"],
)
def test_damaged_files(tmp_path, data, message):
    path = tmp_path / "m.dat"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=message):
        read_imatrix(path)


def test_other_gguf_files_are_refused(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, {"general.type": "model"}, [])
    assert not is_imatrix(path)
    with pytest.raises(FormatError, match=r"another kind, expected general.type 'im"):
        read_imatrix(path)
    sums = np.ones((1, 4), np.float32)
    tensors = [("a.in_sum2", "f32", (1, 4), sums)]
    write_gguf(path, {"general.type": "imatrix"}, tensors, overwrite=True)
    with pytest.raises(FormatError, match=r"has a.in_sum2 without a.counts"):
        read_imatrix(path)


def test_nothing_to_write(tmp_path):
    with pytest.raises(SpecError, match="an importance matrix of no weights"):
        write_imatrix(tmp_path / "m.gguf", Imatrix({}, {}))


def test_of_another_model(model):
    with pytest.raises(FormatError, match=r"has 4 inputs, the model's has 256"):
        Imatrix({NAME: MEANS}, {NAME: 1}).by_path(model.config)


def test_is_what_calibration_finds(model, tmp_path):
    """The file gives the codes that calibration on the same tokens gives."""
    tokens = np.arange(256, dtype=np.int32).reshape(2, 128) * 13 % 4096
    found = imatrix(model, tokens)
    names = [p.name for _, p, shape in tensors(model.config) if is_matrix(p, shape)]
    assert set(found.means) == set(names) - {"token_embd.weight"}
    assert found.counts[NAME] == 256
    path = tmp_path / "m.gguf"
    write_imatrix(path, found)
    first = "layers.0.attn.q.kernel"
    recipe = Recipe((Rule(first, Ggml("q4_k"), GGML()),))
    ours, theirs, plain = (
        qjax.quantize_model(model, recipe, calibration=c).params()[first].codes
        for c in (path, tokens, None)
    )
    assert np.mean(np.asarray(ours) == np.asarray(theirs)) > 0.999
    assert np.mean(np.asarray(ours) == np.asarray(plain)) < 0.999
