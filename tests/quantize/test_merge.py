"""Adapters merged from disk to disk, and the command line of it."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import qjax
from qjax.artifact import Artifact, is_artifact
from qjax.checkpoint import Assets, checkpoint_parts
from qjax.cli import main
from qjax.converters.huggingface import open_checkpoint
from qjax.converters.peft import Adapter, Factors, read_adapter, write_adapter
from qjax.errors import SpecError
from qjax.models import Decoder, ModelConfig
from qjax.train.merge import merge, merge_checkpoint

Q, TABLE = "layers.0.attn.q.kernel", "embed.embedding"


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype("float32")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Over a projection and the table of embeddings."""
    path = tmp_path_factory.mktemp("adapter") / "adapter"
    q = Factors(0.1 * floats(64, 4), 0.1 * floats(4, 64), 2.0)
    table = Factors(0.1 * floats(4096, 4), 0.1 * floats(4, 64), 2.0, embedding=True)
    layers = {"model.layers.0.self_attn.q_proj": q, "model.embed_tokens": table}
    write_adapter(path, Adapter(layers, r=4, alpha=8))
    return path


@pytest.fixture(scope="module")
def packed(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "packed"
    qjax.quantize_checkpoint(tiny, path, "int4-g32")
    return path


def equal(one: dict, other: dict) -> None:
    """The same parameters, packed or not."""
    assert one.keys() == other.keys()
    for path, leaf in one.items():
        assert jax.tree.structure(leaf) == jax.tree.structure(other[path]), path
        pairs = zip(jax.tree.leaves(leaf), jax.tree.leaves(other[path]), strict=True)
        for a, b in pairs:
            np.testing.assert_array_equal(a, b)


def parameters(path) -> dict:
    """Of an artifact or a directory, as they lie there."""
    if is_artifact(path):
        parts = Artifact(path).parts()
        return {p: leaf for _, part in parts for p, leaf in part.items()}
    with open_checkpoint(path) as source:
        parts = checkpoint_parts(source)
        return {p: np.array(leaf) for _, part in parts for p, leaf in part.items()}


@pytest.mark.parametrize("mode", ["original", "dequantized", "requantized"])
def test_disk_and_memory_give_the_same(mode, packed, tiny, adapter, tmp_path):
    original = tiny if mode == "original" else None
    out = tmp_path / "out"
    told, done = merge_checkpoint(packed, adapter, out, mode, original=original)
    before = parameters(packed)
    base = Decoder(ModelConfig.from_hf(Artifact(packed).config), before)
    base.assets = Assets(str(packed), json.dumps(Artifact(packed).manifest["recipe"]))
    want, report = merge(base, adapter, mode, original=original)
    equal(parameters(out), want.params())
    equal(base.params(), before)
    assert report == told and set(report.tensors) == {Q, TABLE} and not done.dense
    assert (out / "tokenizer.json").exists()
    assert want.assets.recipe == (None if original else base.assets.recipe)
    if mode == "requantized":
        assert Artifact(out).manifest["recipe"] == Artifact(packed).manifest["recipe"]
    if mode == "dequantized":  # the model that is served unmerged
        tokens = np.arange(6)[None]
        served = qjax.load(packed, adapter=adapter)[0](tokens)[0]
        gap = np.abs(want(tokens)[0] - served).max()
        assert gap <= 1e-5 * np.abs(served).max()


def test_a_head_that_is_no_longer_tied(make_model, adapter, tmp_path):
    tied = make_model(tmp_path / "tied", tie_word_embeddings=True)
    tensors = load_file(tied / "model.safetensors")
    tensors.pop("lm_head.weight")
    save_file(tensors, tied / "model.safetensors", {"format": "pt"})
    before = parameters(tied)
    assert "head.kernel" not in before
    for fmt in ("safetensors", "qjax"):
        out = tmp_path / fmt
        merge_checkpoint(tied, adapter, out, "dequantized", fmt=fmt)
        made = parameters(out)
        np.testing.assert_array_equal(made["head.kernel"], before[TABLE].T)
        assert not np.array_equal(made[TABLE], before[TABLE])
    config = json.loads((tmp_path / "safetensors" / "config.json").read_text("utf-8"))
    assert config["tie_word_embeddings"] is False


def test_the_format_of_another_library(tiny, adapter, tmp_path):
    base, out = tmp_path / "int8", tmp_path / "out"
    qjax.quantize_checkpoint(tiny, base, "int8")
    name = "model.layers.0.self_attn.q_proj"
    own = read_adapter(adapter).layers[name]
    write_adapter(tmp_path / "q", Adapter({name: own}, r=4, alpha=8))
    told, done = merge_checkpoint(
        base,
        tmp_path / "q",
        out,
        "requantized",
        fmt="compressed-tensors",
        requantize=True,
    )
    assert told.relative is not None and told.relative < 0.5
    assert name in done.exact
    want = parameters(base)[Q].dequantize("float32") + 2.0 * own.a @ own.b
    with open_checkpoint(out) as source:
        (made,) = (part[Q] for _, part in checkpoint_parts(source) if Q in part)
        gap = np.abs(made.dequantize("float32") - want).max()
    assert gap < 0.01 * np.abs(want).max()
    with pytest.raises(SpecError, match="makes dense weights, which 'gptq' does not"):
        merge_checkpoint(tiny, adapter, tmp_path / "x", "dequantized", fmt="gptq")
    with pytest.raises(SpecError, match="format 'tar': expected one of"):
        merge_checkpoint(tiny, adapter, tmp_path / "x", "dequantized", fmt="tar")
    assert not (tmp_path / "x").exists()


def run(capsys, *args) -> dict:
    assert main([*map(str, args), "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command_line_merges(packed, tiny, adapter, tmp_path, capsys):
    asked = ("convert", packed, "--to", tmp_path / "a", "--adapter", adapter)
    made = run(capsys, *asked, "--merge", "requantized")
    assert made["merge"]["mode"] == "requantized" and made["format"] == "qjax"
    assert set(made["merge"]["tensors"]) == {Q, TABLE}
    asked = (*asked[:3], tmp_path / "b", *asked[4:], "--merge", "original")
    made = run(capsys, *asked, "--original", tiny)
    assert made["merge"]["relative"] > 0 and made["format"] == "huggingface"
    main([*map(str, (*asked, "--original", tiny, "--force"))])
    assert "merged into 2 weights (original): error 0." in capsys.readouterr().out


def test_the_command_line_writes_adapters(adapter, tmp_path, capsys):
    asked = ("convert", adapter, "--to", tmp_path / "a", "--format", "peft")
    made = run(capsys, *asked, "--form", "uniform")
    assert sorted(made["exact"]) == sorted(read_adapter(adapter).layers)
    again, first = read_adapter(tmp_path / "a"), read_adapter(adapter)
    for name, own in first.layers.items():
        np.testing.assert_array_equal(again.layers[name].a, own.a)
        np.testing.assert_array_equal(again.layers[name].b, own.b)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--merge", "original"], "--merge and --original are for an --adapter"),
        (["--original", "x"], "--merge and --original are for an --adapter"),
        (["--adapter", "x"], "say how with --merge"),
        (["--adapter", "x", "--merge", "original"], "needs the original model"),
        (
            ["--adapter", "x y", "--merge", "dequantized"],
            "no such directory, and not a Hub id",
        ),
        (
            ["--adapter", "x", "--merge", "dequantized", "--form", "uniform"],
            "do not apply to a merge",
        ),
        (["--format", "peft"], "expected a PEFT adapter"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tiny, tmp_path, capsys, args, text):
    assert main(["convert", str(tiny), "--to", str(tmp_path / "o"), *args]) == 2
    error = capsys.readouterr().err
    assert error.startswith("qjax: error: ") and error.count("\n") == 1
    assert text in error and not (tmp_path / "o").exists()
