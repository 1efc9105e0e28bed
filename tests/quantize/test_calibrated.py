"""Calibrated recipes on whole models: presets, resumption, folding, the command."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.calibration import Percentile, static_inputs
from qjax.cli import main
from qjax.errors import SpecError
from qjax.methods import AWQ, GPTQ, HQQ, RTN, SignRound
from qjax.recipes import Recipe, Rule
from qjax.wrappers import InputScaled, RoundedInputs

PRESETS = [
    "gptq-int4-g64",
    "gptaq-int3-g32",
    "qronos-int3-g32",
    "ldlq-int3-g32",
    "awq-int3-g32",
    "spqr-3bit",
    "kmeans-3bit",
    "llm-int8",
    "w8a8",
    "w8a8-static",
    "aqlm-2bit",
    "best-2bit",
]


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 4096, (4, 24)).astype(np.int32)


@pytest.fixture(scope="module")
def dense(tiny):
    return qjax.load(tiny)[0]


def logits(model, tokens):
    return np.asarray(model(tokens)[0])


@pytest.mark.parametrize("name", PRESETS)
def test_calibrated_presets_quantize_save_and_run(name, tiny, tokens, dense, tmp_path):
    out = tmp_path / "out"
    report = qjax.quantize_checkpoint(tiny, out, name, calibration=tokens)
    model, _ = qjax.load(out)
    kernels = [p for p in dense.params() if p.startswith("layers.") and "kernel" in p]
    assert {t["name"] for t in report.tensors} == set(kernels)
    again = qjax.quantize_model(tiny, name, calibration=tokens)
    for a, b in zip(
        jax.tree.leaves(model.params()), jax.tree.leaves(again.params()), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    ours, original = logits(model, tokens), logits(dense, tokens)
    miss = np.linalg.norm(ours - original) / np.linalg.norm(original)
    assert miss < (0.02 if "8" in name else 0.6)


def test_an_interrupted_calibrated_run_ends_with_the_same_bytes(tiny, tokens, tmp_path):
    def stop(step):
        if step.done == 3 and not step.resumed:
            raise KeyboardInterrupt

    options = {"calibration": tokens}
    with pytest.raises(KeyboardInterrupt):
        qjax.quantize_checkpoint(
            tiny, tmp_path / "a", "gptaq-int3-g32", progress=stop, **options
        )
    seen = []
    qjax.quantize_checkpoint(
        tiny, tmp_path / "a", "gptaq-int3-g32", progress=seen.append, **options
    )
    assert [s.resumed for s in seen] == [True, True, True, False, False]
    qjax.quantize_checkpoint(tiny, tmp_path / "b", "gptaq-int3-g32", **options)
    for file in sorted((tmp_path / "b").iterdir()):
        assert (tmp_path / "a" / file.name).read_bytes() == file.read_bytes(), file.name


def test_norms_absorb_input_scales(dense, tokens):
    rules = Recipe((Rule("layers.*.kernel", qjax.Int(4, 32), AWQ(RTN())),), "awq")
    model = qjax.quantize_model(dense, rules, calibration=tokens)
    params = model.params()
    for name in ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up"):
        assert not isinstance(params[f"layers.0.{name}.kernel"], InputScaled)
    assert isinstance(params["layers.0.mlp.down.kernel"], InputScaled)
    kept = {k["name"]: k["reason"] for k in model.report.kept}
    assert kept["layers.1.attn_norm.scale"] == "absorbed input scales"
    size = sum(t["nbytes"] for t in (*model.report.tensors, *model.report.kept))
    assert size == model.report.size_bytes == qjax.model_size(model).nbytes


def test_rounding_of_a_block_is_learned(dense, tokens):
    fmt = qjax.Int(3, 32, symmetric=False)
    rule = Rule("layers.*.kernel", fmt, SignRound(steps=12, batch=2))
    model = qjax.quantize_model(dense, Recipe((rule,), "learned"), calibration=tokens)
    for tensor in model.report.tensors:
        start, best = tensor["block_error"]
        assert best < start
    plain = qjax.quantize_model(dense, Recipe((Rule("layers.*.kernel", fmt),), "rtn"))
    original = logits(dense, tokens)
    learned, rounded = (
        np.linalg.norm(logits(m, tokens) - original) for m in (model, plain)
    )
    assert learned < rounded


def test_eight_bit_activations_are_part_of_the_weight(dense, tokens):
    model = qjax.quantize_model(dense, "w8a8", calibration=tokens)
    weight = model.params()["layers.0.attn.q.kernel"]
    assert isinstance(weight, RoundedInputs)
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    scale = np.abs(x).max(1, keepdims=True) / 127
    rounded = np.round(x / scale) * scale
    np.testing.assert_allclose(
        qjax.matmul(x, weight), rounded @ np.asarray(weight.dequantize()), atol=2e-5
    )


@pytest.mark.parametrize("observer", [None, Percentile(99.0)])
def test_static_scales_come_from_what_the_quantized_model_computes(
    observer, dense, tokens
):
    dynamic = qjax.quantize_model(dense, "w8a8", calibration=tokens)
    model = static_inputs(dynamic, tokens, observer, batch=3)
    params = model.params()
    first = params["layers.0.attn.q.kernel"]
    block = next(model.blocks())[1]
    x = np.asarray(block.attn_norm(dynamic.embed(tokens, 0 * tokens)))
    covered = np.mean(np.abs(x) <= float(first.scale) * 127 * (1 + 1e-6))
    assert covered == 1.0 if observer is None else 0.985 < covered < 0.995
    values = np.asarray(qjax.matmul(jnp.asarray(x[0]), first))
    top = float(first.scale) * 127
    codes = np.round(np.clip(x[0], -top, top) / float(first.scale))
    want = codes * float(first.scale) @ np.asarray(first.dequantize())
    np.testing.assert_allclose(values, want, atol=2e-4)
    ours, original = logits(model, tokens), logits(dense, tokens)
    miss = np.linalg.norm(ours - original) / np.linalg.norm(original)
    assert miss < (0.02 if observer is None else 0.1)


def test_static_scales_need_rounded_activations(dense, tokens):
    with pytest.raises(SpecError, match="no weight of a block rounds its activations"):
        static_inputs(dense, tokens)


def test_a_rotated_recipe_changes_the_basis_and_not_the_model(dense, tokens, tmp_path):
    keep = Recipe((Rule("*", None),), "rotated", rotate=3)
    model = qjax.quantize_model(dense, keep)
    turned, own = model.params(), dense.params()
    assert np.abs(turned["embed.embedding"] - own["embed.embedding"]).max() > 1e-2
    np.testing.assert_allclose(
        logits(model, tokens), logits(dense, tokens), atol=2e-4, rtol=1e-3
    )


def test_the_command_calibrates_and_allocates(tiny, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("The whale swam on. " * 400, "utf-8")
    status = main(
        [
            *("quantize", str(tiny), "--to", str(tmp_path / "out")),
            *("--recipe", "gptq-int4-g32", "--calibration", str(text)),
            *("--target-bits", "4", "--report", str(tmp_path / "map")),
            *("--json", str(tmp_path / "result.json"), "--quiet"),
        ]
    )
    assert status == 0, capsys.readouterr().err
    result = json.loads((tmp_path / "result.json").read_text("utf-8"))
    assert result["recipe"] == "gptq-int4-g32@4"
    assert result["allocation"]["bits_per_weight"] <= 4
    assert {t["method"] for t in result["tensors"]} == {"gptq-group-order-hessian"}
    found = json.loads((tmp_path / "map" / "allocation.json").read_text("utf-8"))
    assert found == result["allocation"]
    assert (tmp_path / "map" / "allocation.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "gptq-int4-g64"], "needs calibration; pass calibration="),
        (["--report", "x"], "describes an allocation; give --target-bits too"),
        (["--target-bits", "4"], "needs calibration; pass token ids"),
        (["--calibration", "none.txt", "--recipe", "awq-int4-g64"], "cannot read"),
    ],
)
def test_bad_requests_end_with_one_line(tiny, tmp_path, capsys, options, message):
    assert main(["quantize", str(tiny), "--to", str(tmp_path / "out"), *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_named_methods_parse():
    assert isinstance(qjax.recipes.preset("gptq-int5-g32").rules[-1].method, GPTQ)
    assert isinstance(qjax.recipes.preset("hqq-int5-g32").rules[-1].method, HQQ)
