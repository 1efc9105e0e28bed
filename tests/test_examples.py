"""The examples run as written, on the bundled model and without a network."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest


def example(root, name):
    """The module of an example."""
    spec = importlib.util.spec_from_file_location(
        name, root / "examples" / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def hub_cache(tmp_path, model_path):
    """A hub cache that holds the bundled model under the name of another."""
    commit = "9879c9b5f8bea9051dcb0e68dff21493d67e9d4f"
    repository = tmp_path / "hub" / "models--EleutherAI--pythia-410m"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    (repository / "blobs").mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(model_path.glob("*"))):
        blob = repository / "blobs" / f"{number:040x}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return tmp_path / "hub"


@pytest.mark.slow
def test_quantize_from_hub(root, hub_cache, tmp_path):
    done = _python(
        root / "examples" / "quantize_from_hub.py",
        *["--model", "EleutherAI/pythia-410m", "--to", tmp_path / "out"],
        HF_HUB_CACHE=str(hub_cache),
        HF_HUB_OFFLINE="1",
    )
    assert done.returncode == 0, done.stderr
    sizes = {}
    for recipe in ("int8", "int4-g128"):
        report = tmp_path / "out" / f"pythia-410m-{recipe}.json"
        sizes[recipe] = json.loads(report.read_text())["size_bytes"]
        assert (tmp_path / "out" / f"pythia-410m-{recipe}" / "qjax.json").exists()
    source = (root / "examples" / "model" / "model.safetensors").stat().st_size
    assert sizes["int4-g128"] < sizes["int8"] < 0.75 * source
    assert "int4-g128 writes: The sea was" in done.stdout


@pytest.mark.slow
def test_quickstart(root, tmp_path):
    done = _python(
        root / "examples" / "quickstart.py", "--results", tmp_path, "--windows", 2
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "table.json").read_text())
    original, *quantized = rows
    assert [row["name"] for row in quantized] == example(root, "quickstart").RECIPES
    for row in quantized:
        assert 2 < row["bits_per_quantized_weight"] < 9
        assert row["size_bytes"] < original["size_bytes"]
        assert 0 < row["kl_divergence"] < 0.2
        assert row["books"] < 1.2 * original["books"]
        assert row["decode_tokens_per_second"] > 0
        assert row["text"].strip()
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "table.md").read_text() in done.stdout + "\n"


def test_readme_table_is_the_quickstarts(root):
    text = (root / "README.md").read_text("utf-8")
    block = text.split("<!-- quickstart:begin -->")[1]
    block = block.split("<!-- quickstart:end -->")[0].strip().splitlines()
    quickstart = example(root, "quickstart")
    assert block[0] == "| " + " | ".join(quickstart.HEADER) + " |"
    names = [line.split("|")[1].strip() for line in block[2:]]
    assert names == ["bf16 (original)", *quickstart.RECIPES]
