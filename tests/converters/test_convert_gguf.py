"""`qjax.convert` to GGUF files and from them."""

import numpy as np
import pytest

import qjax
from qjax.converters.gguf_file import open_gguf
from qjax.errors import SpecError, UnsupportedError


@pytest.fixture(scope="module")
def small(model_path, tmp_path_factory):
    """The bundled model in 8 bits, and the types that were reported."""
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    return path, qjax.convert(model_path, path, "gguf:q8_0").types


def tensors(path):
    with open_gguf(path) as file:
        return {n: (t.type, np.array(file.read(n))) for n, t in file.tensors.items()}


def same(one, other):
    one, other = tensors(one), tensors(other)
    assert one.keys() == other.keys()
    for name, (kind, data) in one.items():
        assert other[name][0] == kind
        np.testing.assert_array_equal(other[name][1], data)


def test_a_preset_gives_its_types(small, model_path):
    path, types = small
    assert set(types.values()) == {"q8_0"}
    assert types["output.weight"] == types["token_embd.weight"] == "q8_0"
    stored = tensors(path)
    assert {kind for kind, _ in stored.values()} == {"q8_0", "f32"}
    with open_gguf(path) as file:
        assert file.metadata["general.file_type"] == 7
        assert file.metadata["llama.block_count"] == 6
    made = qjax.quantize_model(model_path, "q8_0")
    found = qjax.load(path)[0]
    key = "layers.2.attn.k.kernel"  # whose rows llama.cpp wants in another order
    assert np.array_equal(found.params()[key].codes, made.params()[key].codes)
    assert made.report.recipe == "q8_0"


def test_blocks_move_as_they_are(small, tmp_path):
    path, _ = small
    qjax.convert(path, tmp_path / "again.gguf", "gguf")
    same(path, tmp_path / "again.gguf")
    qjax.convert(path, tmp_path / "artifact", "qjax")
    qjax.convert(tmp_path / "artifact", tmp_path / "back.gguf", "gguf")
    same(path, tmp_path / "back.gguf")
    found = qjax.inspect(tmp_path / "back.gguf")
    assert found["recipe"] == "q8_0" and found["architecture"] == "llama"


def test_dense(model_path, small, tmp_path):
    qjax.convert(model_path, tmp_path / "h.gguf", "gguf:F16")
    assert {kind for kind, _ in tensors(tmp_path / "h.gguf").values()} == {"f16", "f32"}
    qjax.convert(small[0], tmp_path / "dense", "safetensors")
    model, tokenizer = qjax.load(tmp_path / "dense")
    other = qjax.load(small[0])[0]
    ids = np.array([tokenizer.encode("Once upon a time")])
    np.testing.assert_allclose(model(ids)[0], other(ids)[0], atol=2e-3)


def test_refusals(small, model_path, tmp_path):
    path, _ = small
    with pytest.raises(SpecError, match=r"gguf:Q9: expected one of F32, F16, BF16, Q2"):
        qjax.convert(model_path, tmp_path / "m.gguf", "gguf:Q9")
    with pytest.raises(SpecError, match=r"out: expected a file name that ends in"):
        qjax.convert(model_path, tmp_path / "out", "gguf")
    with pytest.raises(SpecError, match=r"m\.gguf: exists already; --force"):
        qjax.convert(model_path, path, "gguf")
    with pytest.raises(SpecError, match="only presets of gguf take a calibration"):
        qjax.convert(model_path, tmp_path / "m", "gptq", calibration="text.txt")
    with pytest.raises(SpecError, match=r"iq2_xxs needs an imatrix"):
        qjax.convert(model_path, tmp_path / "m.gguf", "gguf:IQ2_XXS")
    with pytest.raises(UnsupportedError, match=r"is already quantized \(q8_0\)"):
        qjax.convert(path, tmp_path / "m.gguf", "gguf:Q4_0")
    model = qjax.quantize_model(model_path, "int8")
    qjax.save(model, tmp_path / "int8")
    with pytest.raises(UnsupportedError, match=r"kernel is int8-channel, which GGUF"):
        qjax.convert(tmp_path / "int8", tmp_path / "m.gguf", "gguf")
    assert not (tmp_path / "m.gguf").exists()
