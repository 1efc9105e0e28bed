"""GGUF files as checkpoints: opening, and tensors that do not fit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qjax.checkpoint import checkpoint_parts
from qjax.converters.gguf import GGUFCheckpoint
from qjax.converters.gguf_write import write_gguf
from qjax.converters.huggingface import open_checkpoint
from qjax.errors import FormatError, QjaxError, SpecError

from .gguf_models import config_of as model_of
from .gguf_models import opened, params_of, written


def repacked(path: Path, changes: dict[str, Any]) -> Path:
    """Writes a file again with other tensors: name to (type, shape, data) or None."""
    with GGUFCheckpoint(path) as source:
        file = source._file
        tensors = {
            name: (tensor.type, tensor.shape, np.array(file.read(name)))
            for name, tensor in file.tensors.items()
        }
        made = [(n, *t) for n, t in (tensors | changes).items() if t is not None]
        write_gguf(path, file.fields, made, overwrite=True)
    return path


_Q8 = np.zeros((2, 34), np.uint8)
_LINE = np.zeros(32, np.float32)
FILES: dict[str, tuple[str, dict[str, Any], str]] = {
    "absent": (
        "llama",
        {"blk.1.attn_q.weight": None},
        r"1 missing \(model.layers.1.self_attn.q_proj.weight\)",
    ),
    "layer": (
        "llama",
        {"blk.3.attn_norm.weight": ("f32", (32,), _LINE)},
        "1 unexpected .model.layers.3.input_layernorm.weight",
    ),
    "shape": (
        "llama",
        {"output_norm.weight": ("f32", (16,), _LINE[:16])},
        r"model.norm.weight: got \(16,\), expected \(32,\)",
    ),
    "rows": (
        "llama",
        {"blk.0.attn_q.weight": ("f32", (28, 32), np.zeros((28, 32), np.float32))},
        r"got \(28, 32\), expected \(32, 32\)",
    ),
    "numbers": (
        "llama",
        {"output_norm.weight": ("i32", (32,), _LINE.astype(np.int32))},
        "dtype int32, expected a float",
    ),
    "packed-norm": (
        "llama",
        {"output_norm.weight": ("q8_0", (32,), _Q8[0])},
        r"output_norm.weight \[32\] is q8_0; only matrices are read packed",
    ),
    "packed-positions": (
        "gpt2",
        {"position_embd.weight": ("q8_0", (64, 32), np.zeros((64, 34), np.uint8))},
        r"position_embd.weight \[64, 32\] is q8_0; only matrices are read packed",
    ),
    "no-model": ("llama", {"token_embd.weight": None}, "no tensor 'token_embd.weight'"),
}


@pytest.mark.parametrize("case", FILES)
def test_tensors_that_do_not_fit_are_refused(case, tmp_path):
    base, changes, message = FILES[case]
    config = model_of(base)
    path = repacked(written(tmp_path / "m.gguf", config, params_of(config)), changes)
    with pytest.raises(QjaxError, match=message), GGUFCheckpoint(path) as source:
        [*checkpoint_parts(source)]


def test_tensors_of_no_part_are_named_in_a_warning(tmp_path, caplog):
    config = model_of("llama")
    params = params_of(config)
    more = {
        "blk.0.attn_rot_embd": ("f32", (32,), _LINE),
        "blk.00.attn_norm.weight": ("f32", (32,), _LINE),  # not layer 0 once more
    }
    path = repacked(written(tmp_path / "m.gguf", config, params), more)
    _, read = opened(path)
    np.testing.assert_array_equal(
        read["layers.0.attn_norm.scale"], params["layers.0.attn_norm.scale"]
    )
    assert "2 tensors belong to no part of the model" in caplog.text
    with GGUFCheckpoint(path) as source:
        assert {*more} <= {*source.names()} and "blk.0.attn_rot_embd" in source
        np.testing.assert_array_equal(source.read("blk.0.attn_rot_embd"), _LINE)
        with pytest.raises(SpecError, match="no tensor 'x' in the file"):
            source.read("x")


def test_opening(tmp_path):
    config = model_of("llama")
    path = written(tmp_path / "M.GGUF", config, params_of(config))
    with open_checkpoint(path) as source:
        assert isinstance(source, GGUFCheckpoint) and source.directory == path
        assert source.fingerprint() and len(source.source_digest()) == 64
        source.release()
        digest = source.source_digest()
    with GGUFCheckpoint(path) as again:
        assert again.source_digest() == digest
    with pytest.raises(SpecError, match="is a local file, revision 'main' is for"):
        open_checkpoint(path, "main")
    (tmp_path / "d.gguf").mkdir()
    with pytest.raises(FormatError, match=r"d\.gguf: is a directory"):
        open_checkpoint(tmp_path / "d.gguf")
    (tmp_path / "e.gguf").write_bytes(b"no")
    with pytest.raises(FormatError, match=r"e\.gguf"):
        open_checkpoint(tmp_path / "e.gguf")
