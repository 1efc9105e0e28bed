"""Reading and writing Hugging Face directories."""

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from qjax.converters.huggingface import Checkpoint, open_checkpoint, write_checkpoint
from qjax.errors import FormatError, QjaxError, SpecError
from qjax.io.safetensors import write_safetensors

CONFIG = {"model_type": "llama", "hidden_size": 4, "rms_norm_eps": 1e-05}


def _tensors(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        f"model.layers.{i}.weight": rng.normal(size=(8, 16)).astype(dtype)
        for i, dtype in enumerate([np.float32, np.float16, ml_dtypes.bfloat16] * 2)
    }


def _same(checkpoint: Checkpoint, tensors: dict[str, np.ndarray]) -> None:
    assert sorted(checkpoint.names()) == sorted(tensors)
    for name, expected in tensors.items():
        array = checkpoint.read(name)
        assert array.dtype == checkpoint.dtype(name) == expected.dtype
        assert array.shape == checkpoint.shape(name) == expected.shape
        assert array.tobytes() == expected.tobytes()


@pytest.mark.parametrize("shard_bytes", [1 << 30, 1200, 1])
@pytest.mark.parametrize("lazily", [True, False])
def test_round_trip(
    tmp_path: Path, rng: np.random.Generator, shard_bytes: int, lazily: bool
) -> None:
    tensors = _tensors(rng)
    (tmp_path / "tokenizer.json").write_text("{}")
    files = {"tokenizer.json": tmp_path / "tokenizer.json"}
    out = tmp_path / "out"
    given = tensors if lazily else iter(tensors.items())
    digests = write_checkpoint(out, CONFIG, given, files, shard_bytes=shard_bytes)
    assert sorted(digests) == sorted(tensors)
    with open_checkpoint(out) as checkpoint:
        assert checkpoint.config == CONFIG
        assert checkpoint.tokenizer_files == {"tokenizer.json": out / "tokenizer.json"}
        assert checkpoint.unlisted == () and checkpoint.ignored_config == ()
        assert len(checkpoint.files) == {1 << 30: 1, 1200: 2, 1: 6}[shard_bytes]
        _same(checkpoint, tensors)
    index = out / "model.safetensors.index.json"
    assert index.exists() == (shard_bytes != 1 << 30)
    if index.exists():
        total = sum(a.nbytes for a in tensors.values())
        assert json.loads(index.read_text())["metadata"] == {"total_size": total}


def test_bundled_model(model_path: Path) -> None:
    with open_checkpoint(model_path) as checkpoint:
        assert checkpoint.config["model_type"] == "llama"
        assert checkpoint.shape("model.embed_tokens.weight") == (4096, 256)
        assert "lm_head.weight" in checkpoint and "nothing" not in checkpoint
        assert "llama, 57 tensors in 1 files" in repr(checkpoint)
        with pytest.raises(SpecError, match="no tensor 'nothing' in the checkpoint"):
            checkpoint.read("nothing")


def test_code_in_the_config_is_dropped_and_reported(tmp_path: Path) -> None:
    config = CONFIG | {
        "auto_map": {"AutoModel": "evil.Model"},
        "trust_remote_code": True,
        "_attn_implementation_internal": "someone/kernel",
        "text_config": {"auto_map": {}, "hidden_size": 8},
        "quantization_config": {"auto_map": {}, "quant_type": {"_type": "Int4"}},
    }
    write_checkpoint(tmp_path / "m", config, {"a": np.zeros(1)})
    (tmp_path / "m" / "evil.py").write_text("raise SystemExit('executed')")
    with open_checkpoint(tmp_path / "m") as checkpoint:
        assert checkpoint.config == CONFIG | {
            "text_config": {"hidden_size": 8},
            "quantization_config": {"quant_type": {"_type": "Int4"}},
        }
        assert sorted(checkpoint.ignored_config) == [
            "_attn_implementation_internal",
            "auto_map",
            "quantization_config.auto_map",
            "text_config.auto_map",
            "trust_remote_code",
        ]


def test_unlisted_tensors_are_reported(tmp_path: Path) -> None:
    write_checkpoint(
        tmp_path / "m", {}, {n: np.zeros(4) for n in "abc"}, shard_bytes=64
    )
    index = tmp_path / "m" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["b"]
    index.write_text(json.dumps(content))
    with open_checkpoint(tmp_path / "m") as checkpoint:
        assert checkpoint.unlisted == ("b",)
        assert checkpoint.names() == ["a", "c"]


def test_digest_names_the_content(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = _tensors(rng)
    digests, prints = [], []
    for name, change in (("one", 0), ("two", 0), ("three", 1)):
        changed = dict(tensors)
        changed["model.layers.0.weight"] = tensors["model.layers.0.weight"] + change
        write_checkpoint(tmp_path / name, CONFIG, changed)
        with open_checkpoint(tmp_path / name) as checkpoint:
            digests.append(checkpoint.source_digest())
            prints.append(checkpoint.fingerprint())
            assert checkpoint.fingerprint() == prints[-1]
    assert digests[0] == digests[1] != digests[2]
    assert len(set(prints)) == 3  # the time of writing is part of it
    assert all(len(d) == 64 for d in digests + prints)


def test_where_there_is_nothing_to_open(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"no such directory, and not a Hub id"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(SpecError, match=r"no such directory, and not a Hub id"):
        open_checkpoint("../up")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SpecError, match="is a file, expected the model directory"):
        open_checkpoint(tmp_path / "file")
    with pytest.raises(SpecError, match="is a local directory, revision 'main' is for"):
        open_checkpoint(tmp_path, revision="main")
    with pytest.raises(SpecError, match=r"no config.json; expected a Hugging Face"):
        open_checkpoint(tmp_path)


def test_writing_is_refused_or_undone(tmp_path: Path) -> None:
    def failing() -> Iterator[tuple[str, np.ndarray]]:
        yield "a", np.zeros(4)
        yield "b", np.zeros(4)
        raise RuntimeError("lost the source")

    with pytest.raises(RuntimeError, match="lost the source"):
        write_checkpoint(tmp_path / "m", {}, failing(), shard_bytes=1)
    for size in (1, 1 << 20):
        twice = [("a", np.zeros(1)), ("a", np.zeros(1))]
        with pytest.raises(SpecError, match="tensor 'a' is given twice"):
            write_checkpoint(tmp_path / "m", {}, twice, shard_bytes=size)
    with pytest.raises(SpecError, match="no tensors to write"):
        write_checkpoint(tmp_path / "m", {}, {})
    with pytest.raises(SpecError, match="cannot be stored as JSON"):
        write_checkpoint(tmp_path / "m", {"a": float("nan")}, {"a": np.zeros(1)})
    with pytest.raises(SpecError, match=r"'\.\./x' is not a plain file name"):
        write_checkpoint(tmp_path / "m", {}, {"a": np.zeros(1)}, {"../x": "y"})
    assert list(tmp_path.iterdir()) == []
    write_checkpoint(tmp_path / "m", {}, {"a": np.zeros(1)})
    with pytest.raises(SpecError, match="exists and is not empty"):
        write_checkpoint(tmp_path / "m", {}, {"b": np.zeros(1)})
    write_checkpoint(tmp_path / "m", {}, {"b": np.zeros(1)}, overwrite=True)
    with open_checkpoint(tmp_path / "m") as checkpoint:
        assert checkpoint.names() == ["b"]


def test_files_stay_closed_after_an_error(tmp_path: Path) -> None:
    """A directory that is refused leaves no descriptor open."""
    write_checkpoint(tmp_path / "m", {}, {n: np.zeros(4) for n in "abc"}, shard_bytes=1)
    bad = tmp_path / "m" / "model-00003-of-00003.safetensors"
    bad.write_bytes(bad.read_bytes()[:-1])
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        with pytest.raises(FormatError, match="model-00003-of-00003"):
            open_checkpoint(tmp_path / "m")
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert before < resource.getrlimit(resource.RLIMIT_NOFILE)[0]


_HEAVY = """
import sys, pkgutil, importlib
import qjax.converters
for module in pkgutil.iter_modules(qjax.converters.__path__, "qjax.converters."):
    importlib.import_module(module.name)
print(sorted({"torch", "transformers", "huggingface_hub"} & set(sys.modules)))
"""


def test_importing_is_light() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _HEAVY], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


_STREAM = """
import sys
from pathlib import Path
from qjax.converters import huggingface

huggingface.WINDOW = 32 << 20

def resident(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) >> 10

with huggingface.open_checkpoint(sys.argv[1]) as checkpoint:
    before = resident("VmRSS")
    for name in checkpoint.names():
        checkpoint.read(name).max()
        if sys.argv[2] == "release":
            checkpoint.release()
    print(resident("VmHWM") - before, resident("VmRSS") - before)
"""


@pytest.mark.parametrize("how", ["release", "window"])
def test_streaming_keeps_one_layer_resident(tmp_path: Path, how: str) -> None:
    """128 MB in layers of 4 MB: reading all of it keeps a layer, or the window."""
    layer = np.zeros(4 << 20, np.uint8)
    tensors = {f"layers.{i}": layer for i in range(32)}
    write_checkpoint(tmp_path / "m", {}, tensors, shard_bytes=64 << 20)
    done = subprocess.run(
        [sys.executable, "-c", _STREAM, tmp_path / "m", how],
        capture_output=True,
        text=True,
        check=True,
    )
    peak, _ = map(int, done.stdout.split())
    assert peak < (4 if how == "release" else 32) + 10, done.stdout


def test_pt_and_lone_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    write_safetensors(tmp_path / "weights.safetensors", {"a": np.ones(2)})
    (tmp_path / "training_args.bin").write_bytes(b"not weights")
    with open_checkpoint(tmp_path) as checkpoint:
        assert (checkpoint.read("a") == 1).all()


def test_every_error_is_ours() -> None:
    with pytest.raises(QjaxError):
        open_checkpoint("a\0b")
