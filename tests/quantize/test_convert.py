"""A small model, written as every other library's checkpoint and read back."""

import json

import numpy as np
import pytest

import qjax
from qjax.convert import FORMATS, OWN
from qjax.converters.packed_write import WRITERS
from qjax.errors import SpecError, UnsupportedError
from qjax.formats import Int
from qjax.methods import RTN
from qjax.recipes import Recipe, Rule

HALF = Int(4, 64, symmetric=False, scale_dtype="float16", zero_dtype="uint8")
CASES = {
    "int4-g64": ("compressed-tensors", "mlx", "hqq", "awq"),
    "symmetric": ("gptq", "compressed-tensors"),
    "whole-zeros": ("gptq_v2", "awq"),
    "int8": ("bnb", "quanto", "compressed-tensors"),
    "nf4": ("bnb",),
    "fp8": ("compressed-tensors", "quanto"),
    "nvfp4": ("compressed-tensors",),
    "mxfp4": ("compressed-tensors", "mlx"),
    "hqq-int4-g64": ("hqq",),
}
RECIPES = {
    "symmetric": Recipe((Rule("layers.*kernel", Int(4, 64), RTN()),)),
    "whole-zeros": Recipe((Rule("layers.*kernel", HALF, RTN()),)),
}
AGAIN = {  # what does not fit, why, and how far rounding again goes
    ("int4-g64", "awq"): ("zero-points from", 0.6),
    ("int4-g64", "compressed-tensors"): ("zero-points", 0.6),
    ("symmetric", "gptq"): ("scales of float32", 4e-3),
}


def test_the_command_line_offers_every_writer():
    assert set(FORMATS) == {*OWN, *WRITERS}


def weights(path):
    params = qjax.load(path)[0].params()
    names = [p for p in params if p.startswith("layers.") and p.endswith("kernel")]
    return {p: np.asarray(params[p].dequantize("float32")) for p in names}


@pytest.fixture(scope="module")
def small(make_model, tmp_path_factory):
    """A directory whose widths are multiples of every group."""
    folder = tmp_path_factory.mktemp("small") / "model"
    return make_model(folder, hidden_size=128, intermediate_size=256)


@pytest.fixture(scope="module", params=CASES)
def packed(request, small, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "packed"
    recipe = RECIPES.get(request.param, request.param)
    qjax.quantize_checkpoint(small, folder, recipe)
    return request.param, folder, weights(folder)


def test_formats(packed, tmp_path):
    recipe, folder, want = packed
    for fmt in CASES[recipe]:
        why, loss = AGAIN.get((recipe, fmt), ("", 0))
        if why:
            with pytest.raises(UnsupportedError, match=why):
                qjax.convert(folder, tmp_path / fmt, fmt)
        done = qjax.convert(folder, tmp_path / fmt, fmt, requantize=bool(why))
        assert len(done.rounded if why else done.exact) == len(want)
        got = weights(tmp_path / fmt)
        last = 3e-7 if fmt in ("bnb", "quanto", "mlx") else 0  # places of float32
        for name, leaf in want.items():
            atol = loss * np.abs(leaf).max() / 7 if why else 1e-7 * bool(last)
            np.testing.assert_allclose(got[name], leaf, rtol=last, atol=atol)
        config = json.loads((tmp_path / fmt / "config.json").read_text("utf-8"))
        assert config["quantization_config"]
        again = tmp_path / f"{fmt}-again"
        qjax.convert(tmp_path / fmt, again, fmt)
        first = (tmp_path / fmt / "model.safetensors").read_bytes()
        assert (again / "model.safetensors").read_bytes() == first


def test_a_dense_model_is_not_written_packed(tiny, tmp_path):
    with pytest.raises(SpecError, match="no quantized weights; quantize it first"):
        qjax.convert(tiny, tmp_path / "out", "gptq")
    assert not (tmp_path / "out").exists()
