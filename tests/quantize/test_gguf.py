"""GGUF files as sources: loaded, run, evaluated, quantized, saved."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax.calibration import calibration_windows
from qjax.cli import main
from qjax.errors import SpecError, UnsupportedError
from qjax.evaluate import evaluate
from qjax.formats import Ggml, Int
from qjax.methods.ggml import GGML
from qjax.recipes import Recipe, Rule
from qjax.tensor import QuantizedTensor


@pytest.fixture(scope="module")
def dense(tiny, tmp_path_factory):
    """The tiny model as float32 in a GGUF file."""
    path = tmp_path_factory.mktemp("gguf") / "dense.gguf"
    qjax.convert(tiny, path, "gguf:F32")
    return path


@pytest.fixture(scope="module")
def packed(tiny, tmp_path_factory):
    """The same in blocks of 4 bits."""
    path = tmp_path_factory.mktemp("gguf") / "packed.gguf"
    qjax.convert(tiny, path, "gguf:q4_0")
    return path


@nnx.jit
def logits(model):
    return model(jnp.asarray([[5, 17, 300, 4095, 8]], jnp.int32))[0]


def run(capsys, *args):
    assert main([*map(str, args), "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_dense_file_is_the_model(tiny, dense):
    want, tokenizer = qjax.load(tiny, dtype="float32")
    model, found = qjax.load(dense, dtype="float32")
    assert model.params().keys() == want.params().keys()
    jax.tree.map(np.testing.assert_array_equal, model.params(), want.params())
    np.testing.assert_array_equal(logits(model), logits(want))
    text = "Once upon a time, in 1850 ..."
    assert found.encode(text) == tokenizer.encode(text)
    assert found.eos_id == tokenizer.eos_id and found.bos_id == tokenizer.bos_id


def test_a_packed_file_stays_packed_and_is_saved(packed, tmp_path):
    model, _ = qjax.load(packed, dtype="float32")
    kinds = {
        leaf.format.type
        for leaf in model.params().values()
        if isinstance(leaf, QuantizedTensor)
    }
    assert kinds == {"q4_0", "q8_0"}  # rows of 96 numbers, and the head
    want = logits(model)
    qjax.save(model, tmp_path / "a")
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names >= {"qjax.json", "config.json", "tokenizer.json"}
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["model_type"] == "llama" and config["num_key_value_heads"] == 2
    again, tokenizer = qjax.load(tmp_path / "a", dtype="float32")
    np.testing.assert_array_equal(logits(again), want)
    assert tokenizer.decode(tokenizer.encode("the sea")) == "the sea"


def test_the_command_line(packed, dense, books_text, tmp_path, capsys):
    found = run(capsys, "inspect", packed)
    assert found["format"] == "gguf" and found["recipe"] == "q4_0"
    assert found["formats"]["ggml-q4_0"] >= 20 and found["bits_per_weight"] < 7
    assert found["matmul"].keys() == {"ggml-q4_0", "ggml-q8_0"}
    assert "tensors q4_0, as the file says" in found["found"][0]
    text = tmp_path / "text.txt"
    text.write_text(books_text[:2000], "utf-8")
    result = run(
        capsys,
        *("evaluate", packed, "--text", text, "--context", "32", "--windows", "2"),
        *("--baseline", dense),
    )
    assert 0 < result["kl_divergence"] < 0.1
    made = run(capsys, "generate", packed, "--prompt", "The sea", "--max-tokens", "3")
    assert 1 <= len(made["tokens"]) <= 3


def test_perplexity_is_that_of_the_original(tiny, dense, books_text):
    settings = dict(context=32, windows=2)
    text = books_text[:2000]
    want = evaluate(*qjax.load(tiny, dtype="float32"), text, **settings)
    found = evaluate(*qjax.load(dense, dtype="float32"), text, **settings)
    assert found["perplexity"] == want["perplexity"]


def test_a_dense_file_is_quantized(tiny, dense, tmp_path, books_text):
    recipe = Recipe((Rule("*mlp.up.kernel", Int(4, 32)),), "four")
    want = qjax.quantize_model(tiny, recipe).params()
    made = qjax.quantize_model(dense, recipe)
    for path, leaf in made.params().items():
        jax.tree.map(np.testing.assert_array_equal, leaf, want[path])
    qjax.save(made, tmp_path / "a")
    again, _ = qjax.load(tmp_path / "a")
    jax.tree.map(np.testing.assert_array_equal, again.params(), made.params())


def test_a_text_calibrates_with_the_tokenizer_of_the_file(dense, books_text, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(books_text[:3000], "utf-8")
    recipe = Recipe((Rule("*mlp.up.kernel", Ggml("q4_0"), GGML()),), "up")
    report = qjax.quantize_checkpoint(dense, tmp_path / "a", recipe, calibration=text)
    assert len(report.tensors) == 3
    tokenizer = qjax.load(dense)[1]
    tokens = calibration_windows(text, tokenizer, context=64)
    want = qjax.quantize_model(dense, recipe, calibration=tokens)
    found, _ = qjax.load(tmp_path / "a")
    path = "layers.1.mlp.up.kernel"
    np.testing.assert_array_equal(found.params()[path].codes, want.params()[path].codes)
    plain = qjax.quantize_model(dense, recipe).params()[path]
    assert not np.array_equal(plain.codes, want.params()[path].codes)


def test_what_is_packed_is_not_quantized_again(packed, dense):
    with pytest.raises(UnsupportedError, match="quantized"):
        qjax.quantize_model(packed, Int(4, 32))
    with pytest.raises(SpecError, match=r"use method=GGML\(\)"):
        qjax.quantize_model(dense, Recipe((Rule("*kernel", Ggml("q4_0")),), "x"))
