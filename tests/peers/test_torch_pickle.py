"""PyTorch checkpoints, written by PyTorch itself."""

import json
from pathlib import Path

import numpy as np
import pytest

from qjax.converters.huggingface import open_checkpoint, write_checkpoint
from qjax.converters.torch_pickle import TorchFile, load_torch
from qjax.errors import FormatError, QjaxError, UnsupportedError
from qjax.io.safetensors import SafetensorsFile

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]

DTYPES = (
    "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 uint16 uint32 "
    "uint64 bool float8_e4m3fn float8_e5m2"
).split()


def _same(array: np.ndarray, tensor: "torch.Tensor") -> None:
    dense = tensor.detach().contiguous()
    raw = (
        dense.reshape(-1).view(torch.uint8).numpy().tobytes() if dense.numel() else b""
    )
    assert array.dtype.name == str(tensor.dtype).removeprefix("torch.")
    assert array.shape == tuple(tensor.shape)
    assert array.tobytes() == raw
    assert not array.flags.writeable or not array.size


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("wrapped", [False, True])
def test_every_dtype(tmp_path: Path, protocol: int, wrapped: bool) -> None:
    state = {d: torch.arange(6).reshape(2, 3).to(getattr(torch, d)) for d in DTYPES}
    state["empty"] = torch.zeros(0, 3)
    state["scalar"] = torch.tensor(2.5)
    saved = {"state_dict": state} if wrapped else state
    torch.save(saved, tmp_path / "x.bin", pickle_protocol=protocol)
    tensors = load_torch(tmp_path / "x.bin")
    assert list(tensors) == list(state)
    for name, tensor in state.items():
        _same(tensors[name], tensor)


def test_strides_parameters_and_shared_storage(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = {
        "base": base,
        "transposed": base.t(),
        "part": base[1:3, ::2],
        "bf16": base.to(torch.bfloat16).t(),
        "parameter": torch.nn.Parameter(base[0]),
    }
    torch.save(state, tmp_path / "x.pt")
    with TorchFile(tmp_path / "x.pt") as file:
        for name, tensor in state.items():
            _same(file.read(name), tensor)
        assert np.shares_memory(file.read("base"), file.read("transposed"))
        assert file.read("transposed").strides == (4, 24)


def test_a_module_state_dict(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    torch.save(module.state_dict(), tmp_path / "x.pt")
    tensors = load_torch(tmp_path / "x.pt")
    for name, tensor in module.state_dict().items():
        _same(tensors[name], tensor)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: torch.nn.Linear(2, 2),
            FormatError,
            r"torch\.nn\.modules\.linear\.Linear",
        ),
        (
            lambda: {"a": torch.eye(2).to_sparse()},
            FormatError,
            "_rebuild_sparse_tensor",
        ),
        (
            lambda: {"a": torch.ones(2, device="meta")},
            FormatError,
            "_rebuild_meta_tensor",
        ),
        (lambda: {"a": torch.ones(1).expand(9)}, FormatError, "pass the 1 elements"),
        (lambda: {"model": {"a": torch.ones(1)}}, FormatError, "'model' is a dict"),
        (lambda: [torch.ones(1)], FormatError, "holds a list, expected a dict"),
        (lambda: {"a": torch.ones(1) + 1j}, FormatError, "ComplexFloatStorage"),
    ],
)
def test_refusals(tmp_path: Path, make, error: type, message: str) -> None:
    torch.save(make(), tmp_path / "x.pt")
    with pytest.raises(error, match=message):
        load_torch(tmp_path / "x.pt")


def test_older_formats_are_named(tmp_path: Path) -> None:
    torch.save(
        {"a": torch.ones(1)}, tmp_path / "x", _use_new_zipfile_serialization=False
    )
    with pytest.raises(UnsupportedError, match=r"from before PyTorch 1\.6"):
        load_torch(tmp_path / "x")
    module = torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2), check_trace=False)
    torch.jit.save(module, tmp_path / "x")
    with pytest.raises(QjaxError, match="is compressed"):
        load_torch(tmp_path / "x")


def test_sharded_directory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    shards = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    for name, shard in zip("ab", shards, strict=True):
        torch.save({name: torch.full((3,), ord(name))}, tmp_path / shard)
    index = json.dumps({"weight_map": dict(zip("ab", shards, strict=True))})
    (tmp_path / "pytorch_model.bin.index.json").write_text(index)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.read("b").tolist() == [98] * 3
        assert [path.name for path in checkpoint.files] == shards
        checkpoint.release()
        assert len(checkpoint.source_digest()) == 64


def test_low_precision_safetensors_of_torch(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    names = ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float32", "bool"]
    state = {n: torch.arange(5).to(getattr(torch, n)) for n in names}
    save_file(state, tmp_path / "x.safetensors")
    with SafetensorsFile(tmp_path / "x.safetensors") as file:
        read = {name: file.read(name) for name in names}
        for name in names:
            _same(read[name], state[name])
        write_checkpoint(tmp_path / "out", {}, read)
    again = load_file(tmp_path / "out" / "model.safetensors")
    for name in names:
        _same(read[name], again[name])


def test_transformers_loads_what_we_write(tmp_path: Path, model_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    with open_checkpoint(model_path) as checkpoint:
        tensors = {n: checkpoint.read(n) for n in checkpoint.names()}
        files = checkpoint.tokenizer_files
        write_checkpoint(out, checkpoint.config, tensors, files, shard_bytes=4 << 20)
    assert len(list(out.glob("model-*-of-00004.safetensors"))) == 4
    ids = torch.tensor([[1, 5, 9, 200]])
    logits = [
        AutoModelForCausalLM.from_pretrained(path)(ids).logits
        for path in (model_path, out)
    ]
    assert torch.equal(logits[0], logits[1])
    text = "Once upon a time"
    first, second = (AutoTokenizer.from_pretrained(p)(text) for p in (model_path, out))
    assert first["input_ids"] == second["input_ids"]
