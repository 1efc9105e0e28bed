"""Report folders: their files, tables, and what they refuse."""

import csv
import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.errors import MissingExtraError, SpecError
from qjax.evaluate import (
    markdown_table,
    memory_by_component,
    plot_layer_errors,
    plot_memory,
    plot_tensor,
    plot_tradeoff,
    write_report,
)
from qjax.evaluate.plots import _pool
from qjax.evaluate.tradeoff import family
from qjax.models import Decoder, ModelConfig, param_shapes

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


def test_memory_by_component():
    """Parts add up to all parameters."""
    config = ModelConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": 20,
            "hidden_size": 8,
            "intermediate_size": 12,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 16,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
        }
    )
    shapes = param_shapes(config)
    params = {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}
    sizes = memory_by_component(Decoder(config, params))
    assert sizes["embedding"] == sizes["head"] == 20 * 8 * 4
    assert sizes["attention"] == 2 * 4 * 8 * 8 * 4
    assert sizes["MLP"] == 2 * 3 * 8 * 12 * 4
    assert sizes["norms"] == 5 * 8 * 4
    assert sum(sizes.values()) == sum(p.nbytes for p in params.values())


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
