"""Artifacts: what is written, verified, refused, resumed."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import qjax
from qjax.errors import FormatError, IntegrityError, QjaxError, SpecError
from qjax.io.safetensors import SafetensorsFile
from qjax.models import to_hf
from qjax.specs import describe, rebuild
from qjax.wrappers import (
    InputScaled,
    LowRank,
    Permuted,
    Rotated,
    SplitInputs,
    Transposed,
    WithOutliers,
)


@pytest.fixture(scope="module")
def artifact(tiny, tmp_path_factory):
    """The tiny model as nf4, with its report."""
    out = tmp_path_factory.mktemp("artifact") / "out"
    seen = []
    report = qjax.quantize_checkpoint(tiny, out, "nf4", progress=seen.append)
    return out, report, seen


def tree_bytes(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(path.iterdir())}


def test_report_names_every_tensor_and_progress_every_part(artifact):
    out, report, seen = artifact
    names = {t["name"] for t in report.tensors} | {t["name"] for t in report.kept}
    assert len(report.tensors) == 3 * 7
    assert len(names) == len(report.tensors) + len(report.kept) == 3 * 9 + 3
    assert all(
        0 < t["error"] < 0.2 and t["format"] == "nf4-b64-dq" for t in report.tensors
    )
    assert {t["reason"] for t in report.kept} == {"vector", "kept by the recipe"}
    stored = sum(f.stat().st_size for f in out.glob("*.safetensors"))
    assert report.size_bytes <= stored <= report.size_bytes + 60_000
    assert report.bits_per_weight == 8 * report.size_bytes / sum(
        t["parameters"] for t in (*report.tensors, *report.kept)
    )
    assert [s.done for s in seen] == [1, 2, 3, 4, 5] and seen[0].total == 5
    assert json.loads(json.dumps(report.to_dict()))["recipe"] == "nf4"


def test_loading_gives_the_tensors_that_quantize_gives(artifact, tiny):
    model, tokenizer = qjax.load(artifact[0])
    dense, _ = qjax.load(tiny)
    packed, original = model.params(), dense.params()
    path = "layers.1.attn.q.kernel"
    own = qjax.quantize(original[path], qjax.NF4(64, double=True))
    for a, b in zip(jax.tree.leaves(packed[path]), jax.tree.leaves(own), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    np.testing.assert_array_equal(packed["norm.scale"], original["norm.scale"])
    assert tokenizer.decode(tokenizer.encode("whale")) == "whale"


def test_saving_a_loaded_model_keeps_every_array(artifact, tmp_path):
    model, _ = qjax.load(artifact[0])
    qjax.save(model, tmp_path / "again")
    again, _ = qjax.load(tmp_path / "again")
    first, second = jax.tree.leaves(model.params()), jax.tree.leaves(again.params())
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    with pytest.raises(SpecError, match="exists and is not empty"):
        qjax.save(model, tmp_path / "again")


def test_in_memory_equals_streaming(artifact, tiny):
    streamed = qjax.load(artifact[0])[0].params()
    for source in (str(tiny), qjax.load(tiny)[0]):
        params = qjax.quantize_model(source, "nf4").params()
        same = jax.tree.map(lambda a, b: bool((a == b).all()), streamed, params)
        assert all(jax.tree.leaves(same))


def test_same_source_and_recipe_give_the_same_bytes(artifact, tiny, tmp_path):
    qjax.quantize_checkpoint(tiny, tmp_path / "twice", "nf4")
    assert tree_bytes(tmp_path / "twice") == tree_bytes(artifact[0])


KILLED = """
import sys, time, qjax
def slow(step):
    print(step.done, flush=True)
    time.sleep(0.2)
qjax.quantize_checkpoint(sys.argv[1], sys.argv[2], "nf4", progress=slow)
"""


@pytest.mark.parametrize("after", [1, 4])
def test_a_killed_run_continues_to_the_same_bytes(artifact, tiny, tmp_path, after):
    out = tmp_path / "out"
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tiny), str(out)],
        stdout=subprocess.PIPE,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    for line in child.stdout:
        if int(line) >= after:
            break
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not out.exists()
    seen = []
    report = qjax.quantize_checkpoint(tiny, out, "nf4", progress=seen.append)
    assert sum(step.resumed for step in seen) >= after
    assert tree_bytes(out) == tree_bytes(artifact[0])
    assert report.tensors == artifact[1].tensors
    assert not out.with_name("out.partial").exists()


def test_unfinished_work_of_another_recipe_is_not_mixed_in(tiny, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def stop(step):
        if step.done == 2:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        qjax.quantize_checkpoint(tiny, out, "nf4", progress=stop)
    with pytest.raises(SpecError, match="unfinished work of another run"):
        qjax.quantize_checkpoint(tiny, out, "int8")
    qjax.quantize_checkpoint(tiny, out, "int8", overwrite=True)
    formats = {t["format"] for t in qjax.inspect(out)["tensors"]}
    assert "int8-channel" in formats and "nf4-b64-dq" not in formats


def test_a_full_disk_leaves_the_old_artifact(artifact, tiny, tmp_path, monkeypatch):
    out = Path(shutil.copytree(artifact[0], tmp_path / "out"))
    before = tree_bytes(out)
    real = os.fsync

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(QjaxError, match="space"):
        qjax.quantize_checkpoint(tiny, out, "int8", overwrite=True)
    monkeypatch.setattr(os, "fsync", real)
    assert tree_bytes(out) == before
    qjax.load(out)


@pytest.mark.parametrize("name", ["layer-0001.safetensors", "final.safetensors"])
def test_a_flipped_bit_is_refused_by_file_and_tensor(artifact, tmp_path, name):
    out = Path(shutil.copytree(artifact[0], tmp_path / "out"))
    with SafetensorsFile(out / name) as part:
        tensor = part.names()[-1]
        at = part.info(tensor).start
    data = bytearray((out / name).read_bytes())
    data[at] ^= 1
    (out / name).write_bytes(data)
    with pytest.raises(IntegrityError) as error:
        qjax.load(out)
    assert name in str(error.value) and tensor in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_changed_copied_file_is_refused(artifact, tmp_path, name):
    out = Path(shutil.copytree(artifact[0], tmp_path / "out"))
    data = (out / name).read_bytes()
    (out / name).write_bytes(data.replace(b"0", b"1", 1))
    with pytest.raises(IntegrityError, match=name):
        qjax.load(out)


def test_missing_and_truncated_parts_are_refused(artifact, tmp_path):
    out = Path(shutil.copytree(artifact[0], tmp_path / "out"))
    part = out / "layer-0002.safetensors"
    data = part.read_bytes()
    part.write_bytes(data[:-1])
    with pytest.raises(IntegrityError, match=r"layer-0002\.safetensors.*manifest says"):
        qjax.load(out)
    part.unlink()
    with pytest.raises(IntegrityError, match=r"no layer-0002\.safetensors"):
        qjax.load(out)


def edit_manifest(out: Path, change) -> None:
    file = out / "qjax.json"
    manifest = json.loads(file.read_text("utf-8"))
    change(manifest)
    file.write_text(json.dumps(manifest), "utf-8")


def newer(m):
    m["format_version"] = 2


def no_files(m):
    del m["files"]


def outside(m):
    m["files"]["../../etc/passwd"] = {"size": 1}


def unlisted_file(m):
    m["tensors"]["norm.scale"]["file"] = "other.safetensors"


def unknown_class(m):
    m["tensors"]["layers.0.attn.q.kernel"]["spec"]["type"] = "os.system"


def other_matrix(m):
    m["tensors"]["layers.0.attn.q.kernel"]["spec"]["matrix"] = [64, 65]


def other_format(m):
    spec = m["tensors"]["layers.0.attn.q.kernel"]["spec"]
    spec["format"] = {"kind": "Int", "bits": 4, "group": 64}


def huge_bits(m):
    spec = m["tensors"]["layers.0.attn.q.kernel"]["spec"]
    spec["format"] = {"kind": "Int", "bits": 10**9}


def missing_scale(m):
    del m["tensors"]["layers.0.attn.q.kernel"]["spec"]["fields"]["scale"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (newer, "format version 2, this qjax reads 1 to 1"),
        (no_files, "'files' is missing"),
        (outside, "is not a plain file name"),
        (unlisted_file, "is in no listed file"),
        (unknown_class, "unknown tensor type 'os.system'"),
        (other_matrix, "layers.0.attn.q.kernel"),
        (other_format, "cannot be a CodebookTensor"),
        (huge_bits, "bits is 1000000000"),
        (missing_scale, "layers.0.attn.q.kernel.scale"),
    ],
)
def test_hostile_manifests_are_refused(artifact, tmp_path, change, text):
    out = Path(shutil.copytree(artifact[0], tmp_path / "out"))
    edit_manifest(out, change)
    with pytest.raises((FormatError, IntegrityError)) as error:
        qjax.load(out)
    assert text in str(error.value)


def wrapped(q):
    rng = np.random.default_rng(0)
    rows = np.arange(64, dtype=np.int32)
    signs = np.ones(64, np.float32)
    few = np.array([1, 5], np.int32)
    return [
        Transposed(q),
        Permuted(q, rows[::-1].copy()),
        InputScaled(q, signs),
        Rotated(q, signs),
        WithOutliers(q, np.ones(2, np.float32), few, few),
        LowRank(q, rng.random((64, 2), np.float32), rng.random((2, 32), np.float32)),
        SplitInputs(q, np.ones((2, 32), np.float16), np.array([7, 64], np.int32)),
        Rotated(q, signs.astype(np.int8)),
    ]


def test_every_wrapper_is_described_and_rebuilt(rng):
    q = qjax.quantize(rng.standard_normal((64, 32)).astype(np.float32), qjax.Int(4, 32))
    for w in wrapped(q):
        spec, arrays = describe("w", w)
        spec = json.loads(json.dumps(spec))
        again = rebuild("w", spec, arrays.__getitem__)
        np.testing.assert_array_equal(again.dequantize(), w.dequantize())


@pytest.mark.parametrize(
    ("index", "field", "value", "text"),
    [
        (1, "perm", np.zeros(64, np.int32), "is not a permutation"),
        (2, "s", np.ones(63, np.float32), "shape (63,), expected (64,)"),
        (4, "rows", np.array([0, 64], np.int32), "index outside 0..63"),
        (3, "signs", np.full(64, 0.5, np.float32), "expected +1 and -1 only"),
        (5, "b", np.ones((3, 32), np.float32), "expected (2, 32)"),
        (6, "rows", np.ones((3, 32), np.float16), "expected (2, 32)"),
        (6, "index", np.array([7, 65], np.int32), "expected distinct rows of 0..63"),
        (6, "index", np.array([7, 7], np.int32), "expected distinct rows of 0..63"),
        (7, "signs", np.zeros(64, np.int8), "expected +1 and -1 only"),
    ],
)
def test_wrappers_with_wrong_leaves_are_refused(rng, index, field, value, text):
    q = qjax.quantize(rng.standard_normal((64, 32)).astype(np.float32), qjax.Int(4, 32))
    bad = dataclasses.replace(wrapped(q)[index], **{field: value})
    spec, arrays = describe("w", bad)
    with pytest.raises(FormatError) as error:
        rebuild("w", spec, arrays.__getitem__)
    assert text in str(error.value)


def test_converting_back_gives_the_dequantized_checkpoint(artifact, tmp_path, tiny):
    qjax.convert(artifact[0], tmp_path / "dense", "safetensors")
    model, _ = qjax.load(artifact[0])
    config = model.config
    expected = {
        path: np.asarray(leaf.dequantize() if hasattr(leaf, "dequantize") else leaf)
        for path, leaf in model.params().items()
    }
    with SafetensorsFile(tmp_path / "dense" / "model.safetensors") as file:
        for name, tensor in to_hf(config, expected):
            np.testing.assert_array_equal(file.read(name), tensor)
    qjax.convert(tiny, tmp_path / "kept", "qjax")
    assert set(qjax.inspect(tmp_path / "kept")["formats"]) == {"float32"}
    with pytest.raises(SpecError, match="is a qjax artifact already"):
        qjax.convert(artifact[0], tmp_path / "x", "qjax")
    with pytest.raises(SpecError, match="expected one of qjax, safetensors"):
        qjax.convert(artifact[0], tmp_path / "x", "onnx")
