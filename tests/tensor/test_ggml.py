"""Weights of llama.cpp's blocks: stored, rebuilt, cut, and told apart from others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.errors import FormatError, SpecError, UnsupportedError
from qjax.formats import MXFP4, Ggml, Int
from qjax.formats.ggml import TYPES
from qjax.ggml import GgmlTensor, take_apart
from qjax.methods import RTN, quantize
from qjax.methods.ggml import GGML
from qjax.models.columns import columns, joined
from qjax.specs import describe, rebuild
from tests.ggml_blocks import random_blocks


@pytest.mark.parametrize("name", ["q4_0", "q6_k", "iq2_xxs", "nvfp4"])
def test_a_description_and_bytes_are_the_weight(name):
    q = random_blocks(name, (2,), (512, 3))
    spec, arrays = describe("w", q)
    assert [*arrays] == ["w.codes"]
    again = rebuild("w", spec, arrays.get)
    assert again.format == q.format and again.matrix == q.matrix
    np.testing.assert_array_equal(again.codes, q.codes)
    bits = TYPES[name].bytes * 8 / TYPES[name].elements
    assert q.bits_per_weight == bits == q.format.block.bits_per_weight
    assert f"ggml-{name}, [2, 512, 3]" in repr(q)


HOSTILE = {
    "rows": ({}, (100, 3), r"w.codes: shape \(100, 3\).*expected \(36, 3\)"),
    "cols": ({}, (36, 4), r"w.codes: shape \(36, 4\)"),
    "matrix": ({"matrix": [63, 3]}, (36, 3), "blocks of 32 .* do not divide in=63"),
    "huge": ({"matrix": [2**39, 3]}, (36, 3), r"expected \(309237645312, 3\)"),
    "type": (
        {"format": {"type": "Ggml", "version": 1, "fields": {"type": "q9"}}},
        (36, 3),
        "w: ",
    ),
    "activations": ({"format": Ggml("q4_0").to_dict()}, (36,), "rank 2 or more"),
    "format": ({"format": Int(4, 32).to_dict()}, (36, 3), "cannot be a GgmlTensor"),
    "dtype": ({"dtype": "int8"}, (36, 3), "dtype 'int8' is not a float"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_descriptions_that_do_not_fit_are_refused(case):
    changes, shape, message = HOSTILE[case]
    spec, _ = describe("w", random_blocks("q4_0", (), (64, 3)))
    arrays = {"w.codes": np.zeros(shape, np.uint8)}
    with pytest.raises(FormatError, match=message):
        rebuild("w", {**spec, **changes}, arrays.get)
    with pytest.raises(FormatError, match=r"w\.codes"):
        rebuild("w", spec, {"w.codes": np.zeros((36, 3), np.int8)}.get)
    with pytest.raises(FormatError, match="cannot be a AffineTensor"):
        kind = {"type": "AffineTensor", "fields": {"codes": {"type": "array"}}}
        rebuild("w", {**spec, **kind}, {"w.codes": np.zeros((36, 3), np.uint8)}.get)


def test_columns_are_cut_and_joined_without_decoding():
    q = random_blocks("q5_k", (), (512, 6))
    index = np.array([5, 0, 3])
    np.testing.assert_array_equal(columns(q, index).codes, q.codes[:, index])
    pieces = [columns(q, slice(0, 4)), columns(q, slice(4, 6))]
    whole = joined(pieces)
    assert whole.matrix == (512, 6)
    np.testing.assert_array_equal(whole.codes, q.codes)
    other = random_blocks("q4_k", (), (512, 2))
    with pytest.raises(UnsupportedError, match="need one format"):
        joined([pieces[0], other])


def test_two_formats_of_one_kind_have_two_names():
    ours, theirs = MXFP4(), Ggml("mxfp4")
    assert (ours.name, theirs.name) == ("mxfp4", "ggml-mxfp4")
    assert {Ggml(n).name for n in ("nvfp4", "q4_0")} == {"ggml-nvfp4", "ggml-q4_0"}


def test_the_usual_method_is_llama_cpps():
    w = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    q, want = quantize(w, Ggml("q8_0")), quantize(w, Ggml("q8_0"), GGML())
    np.testing.assert_array_equal(q.codes, want.codes)
    with pytest.raises(SpecError, match=r"use method=GGML\(\)"):
        quantize(w, Ggml("q8_0"), RTN())
    with pytest.raises(SpecError, match="blocks of 256 weights do not divide in=64"):
        quantize(w, Ggml("q4_k"))


def test_powers_of_two_below_normal_numbers_are_decoded():
    data = np.zeros((17, 3), np.uint8)
    data[0] = 0, 1, 2  # 2^-128, 2^-127, 2^-126
    data[1:] = 0x71  # 12 and 1
    q = GgmlTensor(jnp.asarray(data), Ggml("mxfp4"), (32, 3))
    got = np.asarray(q.dequantize())
    want = np.float64(2.0) ** np.array([-128, -127, -126]) * np.array([[1], [12]])
    np.testing.assert_array_equal(got[[0, 16]], want.astype(np.float32))


def test_what_has_no_codes_says_so():
    q = random_blocks("q4_0", (), (64, 3))
    assert q.scale is None and q.vector == (32, 18)
    with pytest.raises(UnsupportedError, match=r"lie together in blocks; use dequant"):
        q.unpacked()
    with pytest.raises(UnsupportedError, match="would take more bits apart"):
        take_apart(random_blocks("iq2_xxs", (), (256, 3)))


def test_a_model_of_blocks_is_saved_and_loaded(model_path, tmp_path):
    model, _ = qjax.load(model_path)
    params = model.params()
    path = "layers.0.mlp.up.kernel"
    params[path] = random_blocks("q6_k", (), params[path].shape)
    made = qjax.models.Decoder(model.config, params, dtype=model.dtype)
    made.assets = model.assets
    qjax.save(made, tmp_path / "m")
    again, _ = qjax.load(tmp_path / "m")
    read = again.params()[path]
    assert dataclasses.replace(read, dtype="float32").format == Ggml("q6_k")
    jax.tree.map(np.testing.assert_array_equal, read.codes, params[path].codes)
