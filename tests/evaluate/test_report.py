"""Report folders: their files, tables, and what they refuse."""

import csv
import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.errors import MissingExtraError, SpecError
from qjax.evaluate import (
    bits_per_weight,
    compare_weights,
    markdown_table,
    memory_by_component,
    plot_layer_errors,
    plot_memory,
    plot_tensor,
    plot_tradeoff,
    report_evaluation,
    write_report,
)
from qjax.evaluate.plots import _pool
from qjax.evaluate.tradeoff import family
from qjax.formats import Int
from qjax.models import Decoder, ModelConfig, param_shapes
from qjax.quantize import quantize

COMMON = {"protocol": "gptq", "context": 512, "baseline_perplexity": 43.02, "bos": "no"}
RESULTS = [
    {"name": "int8", "bits_per_weight": 8.5, "perplexity": 43.01,
     "kl_divergence": 1e-4},
    {"name": "int4-g64", "bits_per_weight": 4.5, "perplexity": 43.4,
     "kl_divergence": 0.01, "size_bytes": 6_610_000, "top1_agreement": 0.9512},
    {"name": "hqq-int4-g64", "bits_per_weight": 4.5, "perplexity": 43.33,
     "kl_percentiles": {"50": 0.1}},
    {"name": "int2-g64", "bits_per_weight": 2.5, "perplexity": 54.7},
]  # fmt: skip
RESULTS = [{**COMMON, **result} for result in RESULTS]
TENSORS = [
    {"name": f"layers.{i}.{kind}.kernel", "error": 0.05 + 0.01 * i}
    for i in range(3)
    for kind in ("attn.q", "mlp.down")
] + [{"name": "head.kernel", "error": 0.02}, {"name": "norm.scale", "error": None}]
MEMORY = {"bf16": {"MLP": 7_000_000, "head": 2_000_000}, "int4": {"MLP": 1_900_000}}


def png_size(path):
    """Return width and height from a PNG's header."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return tuple(int.from_bytes(data[i : i + 4], "big") for i in (16, 20))


def test_a_full_report(tmp_path, rng):
    """Every file is there, the numbers read back, and the page shows the plots."""
    weight = rng.normal(size=(300, 70)).astype(np.float32)
    files = write_report(
        tmp_path / "new" / "report",
        RESULTS,
        tensors=TENSORS,
        tensor=("layers.0.attn.q", weight, np.round(weight)),
        memory=MEMORY,
    )
    names = {path.name for path in files}
    assert names == {path.name for path in (tmp_path / "new" / "report").iterdir()}
    plots = {"perplexity", "kl_divergence", "layer_errors", "tensor", "memory"}
    assert names == {f"{p}.png" for p in plots} | {
        "report.json", "results.csv", "report.md"}  # fmt: skip
    for path in files:
        if path.suffix == ".png":
            assert min(png_size(path)) >= 300
    folder = files[0].parent
    content = json.loads((folder / "report.json").read_text())
    assert content["results"] == RESULTS
    assert content["tensors"] == TENSORS
    assert content["memory"] == MEMORY
    with open(folder / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [r["name"] for r in RESULTS]
    assert float(rows[1]["perplexity"]) == 43.4
    assert rows[0]["top1_agreement"] == ""
    page = (folder / "report.md").read_text()
    assert "| int4-g64 | 4.500 | 6.61 | 43.400 | 0.01000 | 95.12 |" in page
    assert "protocol gptq, context 512" in page
    assert all(f"({p}.png)" in page for p in plots)


def test_a_small_report_replaces_an_older_one(tmp_path):
    """Without numbers there is no plot, and none of an earlier run stays behind."""
    write_report(tmp_path, RESULTS, memory=MEMORY)
    files = write_report(tmp_path, [{"name": "m", "perplexity": 9.0}])
    assert {p.name for p in files} == {p.name for p in tmp_path.iterdir()}
    assert len(files) == 3


def test_plots_are_reproducible(tmp_path):
    """The same numbers give the same bytes."""
    one = plot_tradeoff(RESULTS, tmp_path / "a.png").read_bytes()
    assert plot_tradeoff(RESULTS, tmp_path / "b.png").read_bytes() == one


def test_single_points_and_odd_values_draw(tmp_path):
    """One result, one cell, zero weights and many families are no special cases."""
    plot_tradeoff(RESULTS[:1], tmp_path / "a.png")
    no_base = [{"name": "x", "bits_per_weight": 4, "perplexity": 5.0}]
    plot_tradeoff(no_base, tmp_path / "a.png")
    many = [
        {"name": chr(97 + i) * 9, "bits_per_weight": 4, "perplexity": 5.0}
        for i in range(12)
    ]
    plot_tradeoff(many, tmp_path / "a.png")
    plot_tensor("zero", np.zeros((1, 1)), np.zeros((1, 1)), tmp_path / "a.png")
    plot_layer_errors([{"name": "w", "error": 0.0}], tmp_path / "a.png")
    plot_memory({"m": {"MLP": 5}}, tmp_path / "a.png")


def test_pooling_keeps_means(rng):
    """Cells are plain means, also where sizes do not divide."""
    values = rng.random((600, 100)).astype(np.float32)
    cells, steps = _pool(values)
    assert steps == (3, 1)
    np.testing.assert_allclose(cells[7, 5], values[21:24, 5].mean(), rtol=1e-6)
    values = rng.random((601, 3)).astype(np.float32)
    cells, _ = _pool(values)
    np.testing.assert_allclose(cells[-1], values[600:].mean(0), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("int4-g64", "int"), ("hqq-int4", "hqq"), ("nf4", "nf"), ("4bit", "4bit")],
)
def test_families(name, expected):
    """A family is the letters a name begins with."""
    assert family(name) == expected


def test_table_leaves_empty_columns_out():
    """Only measured columns appear; bars in names are escaped."""
    table = markdown_table([{"name": "a|b", "perplexity": 1.5}])
    assert table == "| model | perplexity |\n| :-- | --: |\n| a\\|b | 1.500 |\n"


def make_config():
    """Return a tiny Llama configuration."""
    return ModelConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": 20,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 16,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
        }
    )


@pytest.fixture(scope="module")
def models():
    """A dense model, one with int4 kernels, and the kernels' errors by name."""
    rng = np.random.default_rng(0)
    config = make_config()
    params = {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32)
        for name, shape in param_shapes(config).items()
    }
    packed = {
        name: quantize(w, Int(bits=4, group=8)) if ".kernel" in name else w
        for name, w in params.items()
    }
    errors = {
        name: np.linalg.norm(q.dequantize() - params[name])
        / np.linalg.norm(params[name])
        for name, q in packed.items()
        if ".kernel" in name
    }
    return Decoder(config, params), Decoder(config, packed), errors


def test_sizes(models):
    """Parts add up to all parameters, packed or not."""
    dense, packed, _ = models
    sizes = memory_by_component(dense)
    assert sizes["embedding"] == sizes["head"] == 20 * 16 * 4
    assert sizes["attention"] == 2 * 4 * 16 * 16 * 4
    assert sizes["MLP"] == 2 * 3 * 16 * 24 * 4
    assert sizes["norms"] == 5 * 16 * 4
    assert bits_per_weight(dense) == (32.0, sum(sizes.values()))
    small = memory_by_component(packed)
    assert small["MLP"] == sizes["MLP"] // 8 + sizes["MLP"] // 8  # codes, scales
    assert small["embedding"] == sizes["embedding"]
    assert 8 < bits_per_weight(packed)[0] < 32


def test_compare_weights(models):
    """Every packed tensor's error, and none of the kept ones."""
    dense, packed, errors = models
    found = {t["name"]: t["error"] for t in compare_weights(packed, dense)}
    assert set(found) == set(errors)
    for name, error in errors.items():
        assert found[name] == pytest.approx(error, rel=1e-4)
    assert compare_weights(dense, dense) == []


def test_report_of_one_evaluation(tmp_path, models):
    """Against a baseline there are two rows, errors, and the worst tensor's plot."""
    dense, packed, errors = models
    result = {"perplexity": 5.0, "baseline_perplexity": 4.9, "kl_divergence": 0.1}
    files = report_evaluation(tmp_path, result, packed, name="int4", baseline=dense)
    assert {p.name for p in files} == {
        "report.json", "results.csv", "report.md", "perplexity.png",
        "layer_errors.png", "tensor.png", "memory.png"}  # fmt: skip
    content = json.loads((tmp_path / "report.json").read_text())
    assert [row["name"] for row in content["results"]] == ["original", "int4"]
    assert [row["perplexity"] for row in content["results"]] == [4.9, 5.0]
    assert len(content["tensors"]) == len(errors)
    report_evaluation(
        tmp_path, result, packed, baseline=dense, tensor="layers.1.mlp.up"
    )
    with pytest.raises(SpecError, match=r"'layers.1.mlp.upp'; did you mean layers.1"):
        report_evaluation(
            tmp_path, result, packed, baseline=dense, tensor="layers.1.mlp.upp"
        )
    tensors = [{"name": "layers.0.mlp.up.kernel", "nbytes": 99}]
    stored = {"bits_per_weight": 4.5, "size_bytes": 99, "tensors": tensors}
    report_evaluation(tmp_path, result, packed, stored=stored)
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["results"][0]["size_bytes"] == 99
    assert content["memory"] == {"model": {"MLP": 99}}
    alone = report_evaluation(tmp_path, {"perplexity": 5.0}, packed)
    assert {p.suffix for p in alone} == {".json", ".csv", ".md", ".png"}
    assert len(alone) == 4


def test_refuses(tmp_path, monkeypatch):
    """Nothing to report, a file in the way, wrong shapes, no matplotlib."""
    with pytest.raises(SpecError, match="at least one result, each with a 'name'"):
        write_report(tmp_path, [{"perplexity": 1.0}])
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecError, match="is a file; name a folder"):
        write_report(tmp_path / "file", RESULTS)
    with pytest.raises(SpecError, match=r"got shapes \(2, 3\) and \(3, 2\)"):
        plot_tensor("w", np.ones((2, 3)), np.ones((3, 2)), tmp_path / "x.png")
    with pytest.raises(SpecError, match="no result has both bits_per_weight and perpl"):
        plot_tradeoff([{"name": "a"}], tmp_path / "x.png")
    with pytest.raises(SpecError, match="no tensor has an error"):
        plot_layer_errors([], tmp_path / "x.png")
    with pytest.raises(SpecError, match="no component has any bytes"):
        plot_memory({}, tmp_path / "x.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r'pip install "qjax-llm\[plot\]"'):
        write_report(tmp_path / "never", RESULTS)
    assert not (tmp_path / "never").exists()


def test_the_harness_adapter_says_what_to_install(monkeypatch):
    from qjax.evaluate.lm_eval import as_harness_model

    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(MissingExtraError, match=r'pip install "qjax-llm\[eval\]"'):
        as_harness_model(None, None)
