"""Whole quantized checkpoints: loaded packed, equal to their dense selves."""

import json
import shutil

import jax
import numpy as np
import pytest

import qjax
from qjax.cli import main
from qjax.converters.huggingface import open_checkpoint, write_checkpoint
from qjax.errors import FormatError, UnsupportedError
from qjax.tensor import QuantizedTensor

from .packers import awq_words, dense, words

GROUP = 64
SETTINGS = {
    "gptq": {"quant_method": "gptq", "bits": 3, "group_size": GROUP, "desc_act": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "group_size": GROUP},
            }
        },
        "ignore": ["lm_head"],
    },
}


def rounded(weight: np.ndarray, bits: int, index: np.ndarray):
    """Codes, scales and zero-points of `[in, out]` by the group of each input."""
    groups = [weight[index == g] for g in range(index.max() + 1)]
    low = np.stack([np.minimum(g.min(0), 0) for g in groups])
    high = np.stack([np.maximum(g.max(0), 0) for g in groups])
    scale = np.maximum((high - low) / (2**bits - 1), 1e-4).astype(np.float16)
    zero = np.clip(np.round(-low / scale.astype(np.float32)), 1, 2**bits - 1).astype(
        int
    )
    codes = np.round(weight / scale[index].astype(np.float32)) + zero[index]
    return np.clip(codes, 0, 2**bits - 1).astype(int), scale, zero


def packed(kind: str, weight: np.ndarray, rng) -> tuple[dict, np.ndarray]:
    """The tensors of a layer, by part, and its dense weight `[out, in]`."""
    weight = weight.T.astype(np.float32)
    index = np.arange(len(weight)) // GROUP
    if kind == "gptq":
        index = rng.permutation(index)
    bits = SETTINGS[kind].get("bits", 4)
    codes, scale, zero = rounded(weight, bits, index)
    if kind == "compressed-tensors":
        zero = np.full_like(zero, 8)
        parts = {
            "weight_packed": words(codes, 4, 0).T,
            "weight_scale": scale.T,
            "weight_shape": np.array(weight.shape[::-1]),
        }
    elif kind == "awq":
        parts = {"qweight": awq_words(codes), "qzeros": awq_words(zero)}
        parts["scales"] = scale
    else:
        parts = {"qweight": words(codes, bits, 0), "qzeros": words(zero - 1, bits, 1)}
        parts |= {"scales": scale, "g_idx": index.astype(np.int32)}
    return parts, dense(codes, scale, zero, index).T


@pytest.fixture(scope="module", params=SETTINGS)
def pair(request, model_path, tmp_path_factory):
    """A packed checkpoint of the bundled model, and the dense one it stands for."""
    kind, rng = request.param, np.random.default_rng(0)
    made, plain = {}, {}
    with open_checkpoint(model_path) as source:
        config = json.loads((model_path / "config.json").read_text("utf-8"))
        for name in source.names():
            tensor = np.array(source.read(name))
            if "proj" in name:
                parts, plain[name] = packed(kind, tensor, rng)
                start = name.removesuffix("weight")
                made |= {start + p: np.ascontiguousarray(t) for p, t in parts.items()}
            else:
                made[name] = plain[name] = tensor
        files = source.tokenizer_files
        root = tmp_path_factory.mktemp(kind)
        quantized = {**config, "quantization_config": SETTINGS[kind]}
        write_checkpoint(root / "packed", quantized, made, files)
        write_checkpoint(root / "dense", config, plain, files)
    return root / "packed", root / "dense"


def test_logits_and_bytes(pair, tmp_path):
    ours, tokenizer = qjax.load(pair[0])
    want, _ = qjax.load(pair[1])
    params, exact = ours.params(), want.params()
    kernels = [p for p in params if p.startswith("layers.") and p.endswith("kernel")]
    for path in kernels:
        q = params[path]
        assert isinstance(q, QuantizedTensor) and q.bits_per_weight < 4.9
        np.testing.assert_array_equal(q.dequantize("float32"), exact[path])
    tokens = np.asarray([tokenizer.encode("It was a dark and stormy night")])
    np.testing.assert_allclose(ours(tokens)[0], want(tokens)[0], atol=5e-3)

    main(["convert", str(pair[0]), "--to", str(tmp_path / "out"), "--format", "qjax"])
    again, _ = qjax.load(tmp_path / "out")
    for a, b in zip(
        jax.tree.leaves(again.params()), jax.tree.leaves(params), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    report = qjax.inspect(pair[0])
    name = params[kernels[0]].format.name
    assert report["formats"][name] == len(kernels)
    assert report["recipe"] == SETTINGS[pair[0].parent.name[:-1]]["quant_method"]
    assert report["matmul"][name]


def tensors_of(directory) -> dict[str, np.ndarray]:
    with open_checkpoint(directory) as source:
        return {name: np.array(source.read(name)) for name in source.names()}


def test_rewriting_and_formats_of_others(pair, tmp_path):
    kind = pair[0].parent.name[:-1]
    start, want = tensors_of(pair[0]), tensors_of(pair[1])
    if kind in ("gptq", "awq"):
        done = qjax.convert(pair[0], tmp_path / "same", kind)
        made = tensors_of(tmp_path / "same")
        assert made.keys() == start.keys() and not done.rounded
        for name, leaf in start.items():
            np.testing.assert_array_equal(made[name], leaf)
        assert not done.dense and done.exact and "lm_head" not in done.exact
        config = json.loads((tmp_path / "same" / "config.json").read_text("utf-8"))
        found = config["quantization_config"]
        assert SETTINGS[kind].items() <= found.items()
    other = tmp_path / "other"
    if kind == "gptq":
        with pytest.raises(UnsupportedError, match=r"layers.0.*holds.*--requantize"):
            qjax.convert(pair[0], other, "awq")
        assert not other.exists()
        done = qjax.convert(pair[0], other, "awq", requantize=True)
        assert len(done.rounded) == len(done.exact) + len(done.rounded) > 0
        qjax.convert(pair[0], other, "gptq_v2", overwrite=True)
    else:
        out = ["convert", str(pair[0]), "--to", str(other), "--format", "gptq_v2"]
        main([*out, "--json", str(tmp_path / "report.json")])
        report = json.loads((tmp_path / "report.json").read_text("utf-8"))
        assert len(report["exact"]) == report["formats"][report["tensors"][2]["format"]]
    qjax.convert(other, tmp_path / "dense", "safetensors")
    for name, leaf in tensors_of(tmp_path / "dense").items():
        np.testing.assert_array_equal(leaf, want[name].astype(leaf.dtype))


def test_layers_are_found_without_settings(pair, tmp_path, caplog):
    copy = shutil.copytree(pair[0], tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text("utf-8"))
    settings = config.pop("quantization_config")
    (copy / "config.json").write_text(json.dumps(config), "utf-8")
    kind = settings["quant_method"]
    want = tensors_of(pair[1])
    params = qjax.load(copy)[0].params()
    assert "nothing says how" in caplog.text and kind in caplog.text
    assert "as their tensors look" in qjax.inspect(copy)["found"][0]
    got = params["layers.0.mlp.down.kernel"].dequantize("float32")
    name = "model.layers.0.mlp.down_proj.weight"
    np.testing.assert_array_equal(np.asarray(got).T, want[name])

    side = {"gptq": "quantize_config.json", "awq": "quant_config.json"}.get(kind)
    if side is not None:
        del settings["quant_method"]
        (copy / side).write_text(json.dumps(settings), "utf-8")
        assert side in qjax.inspect(copy)["found"][0]

    config["quantization_config"] = {"quant_method": "bitsandbytes"}  # it is not
    (copy / "config.json").write_text(json.dumps(config), "utf-8")
    caplog.clear()
    report = qjax.inspect(copy)
    assert report["recipe"] == kind
    assert "config.json does not explain how" in caplog.text


def test_a_packed_checkpoint_is_not_quantized_again(pair, tmp_path):
    with pytest.raises(UnsupportedError, match="already quantized"):
        qjax.quantize_checkpoint(pair[0], tmp_path / "out", "int4-g64")
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_with_a_checkpoint_is_named(pair, tmp_path):
    copy = shutil.copytree(pair[0], tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text("utf-8"))
    config["quantization_config"]["quant_method"] = "higgs"
    (copy / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(UnsupportedError, match="quantized with 'higgs', which is not"):
        qjax.load(copy)
    with open_checkpoint(pair[0]) as source:
        name = next(n for n in source.names() if n.endswith(("scales", "weight_scale")))
        tensors = {n: np.array(source.read(n)) for n in source.names()}
        tensors[name] = tensors[name].astype(np.int32)
        files = source.tokenizer_files
        write_checkpoint(tmp_path / "wrong", source.config, tensors, files)
    with pytest.raises(FormatError, match=f"{name}: is int32.*floating"):
        qjax.load(tmp_path / "wrong")
    config["quantization_config"] = ["gptq"]
    (copy / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(FormatError, match="quantization_config is"):
        qjax.load(copy)
