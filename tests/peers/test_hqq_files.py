"""Layers that the hqq package saved, read and written without a bit's difference."""

import zipfile

import numpy as np
import pytest

from qjax.converters.hqq import HQQ, HQQWriter
from qjax.converters.hqq_parts import flat_state
from qjax.converters.state_pickle import TensorRef, parse_state

torch = pytest.importorskip("torch")
hqq = pytest.importorskip("hqq.core.quantize")

# (bits, group, axis, compute dtype, view as float)
CASES = [
    (8, 32, 1, "float32", False),
    (6, 32, 1, "float16", False),
    (5, 48, 1, "bfloat16", False),
    (4, 32, 1, "float16", False),
    (4, None, 1, "float32", True),
    (4, 8, 0, "float32", False),
    (3, 32, 1, "float32", False),
    (3, 40, 0, "float16", True),
    (2, 16, 1, "bfloat16", True),
    (2, 8, 0, "float32", False),
    (1.58, 32, 1, "float32", False),
    (1, 24, 1, "float16", False),
    (1, 40, 0, "float32", False),
]


def array(tensor) -> np.ndarray:
    """A torch tensor in NumPy, bfloat16 as it is."""
    if tensor.dtype != torch.bfloat16:
        return tensor.detach().numpy()
    import ml_dtypes

    return tensor.detach().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)


def layer(rng, case, state=None):
    bits, group, axis, dtype, view = case
    config = hqq.hqq_base_quant_config(bits, group, view_as_float=view, axis=axis)
    linear = torch.nn.Linear(96, 40, bias=False)
    linear.weight.data = torch.tensor(rng.normal(size=(40, 96)), dtype=torch.float32)
    dtype = getattr(torch, dtype)
    if state is None:
        return hqq.HQQLinear(linear, config, compute_dtype=dtype, device="cpu")
    made = hqq.HQQLinear(None, None, compute_dtype=dtype, device="cpu")
    made.load_state_dict(state)
    return made


def check(q, module, dtype):
    want = module.dequantize().float().numpy().T
    got = np.asarray(q.dequantize("float32"))
    if dtype == "float32":
        np.testing.assert_array_equal(got, want)
    else:  # they round the difference to half, and the product again
        step = float(torch.finfo(getattr(torch, dtype)).eps)
        top = np.abs(want).max()
        np.testing.assert_allclose(got, want, rtol=step, atol=top * step)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_safetensors_layout(case, rng):
    bits, _, _, dtype, view = case
    module = layer(rng, case)
    parts = {k: array(v) for k, v in module.state_dict().items()}
    reader = HQQ({}, "here")
    assert reader.shape(parts) == (40, 96)
    q = reader.read(parts, "here: a.b")
    assert q.dtype == dtype
    check(q, module, dtype)
    made = HQQWriter().write(q, "there: a.b")
    assert sorted(made) == sorted(parts)
    for name, leaf in parts.items():
        if name == "W_q" and view:
            leaf = leaf.view(made[name].dtype)
        if name == "view_as_float" or (name == "nbits" and bits == 1.58):
            continue
        assert made[name].dtype == leaf.dtype and made[name].shape == leaf.shape, name
        np.testing.assert_array_equal(made[name], leaf, err_msg=name)
    state = {k: torch.tensor(v) for k, v in made.items() if v.dtype.name != "bfloat16"}
    state |= {k: v for k, v in module.state_dict().items() if k not in state}
    again = layer(rng, case, state)
    assert torch.equal(again.dequantize(), module.dequantize())


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_nested_state(nested, offload, rng, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    module = layer(rng, (4, 32, 1, "float16", False))
    module.encoded_state_dict = False
    meta = module.meta
    if nested:  # as hqq 0.1 did
        for name in ("zero", "scale"):
            codes, inner = hqq.Quantizer.quantize(
                meta.pop(name), 8, group_size=24, optimize=False, axis=0, device="cpu"
            )
            meta[f"{name}_q"], meta[f"meta_{name}"] = codes, inner
            inner["compute_dtype"] = torch.float16
            meta[f"quant_{name}"] = True
    module.offload_meta = offload
    module.cuda("cpu")
    state = {"W_q": module.W_q, "meta": module.meta, "bias": None}
    plain = {"weight": np.ones(3, np.float32)}
    made = flat_state({"a.b": _plain(state), "norm": plain}, "here")
    assert made["norm.weight"] is plain["weight"]
    parts = {k.removeprefix("a.b."): v for k, v in made.items() if k[0] == "a"}
    q = HQQ({}, "here").read(parts, "here: a.b")
    check(q, module, "float16")


def _plain(value):
    """What reading the pickle without torch gives."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, torch.Tensor):
        return array(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return tuple(value) if isinstance(value, torch.Size) else value


def test_pickle_of_nested_state(rng, tmp_path):
    """What `save_quantized` writes is read without executing anything."""
    module = layer(rng, (4, 32, 1, "float16", False))
    module.encoded_state_dict = False
    torch.save({"a.b": dict(module.state_dict())}, tmp_path / "qmodel.pt")
    with zipfile.ZipFile(tmp_path / "qmodel.pt") as archive:
        data = archive.read("qmodel/data.pkl")
    made = flat_state(parse_state(data, "here"), "here")
    assert isinstance(made["a.b.W_q"], TensorRef)
    assert made["a.b.scale"].dtype == "float16"
    assert made["a.b.shape"].tolist() == [40, 96]
    assert made["a.b.compute_dtype"].tobytes() == b"float16"
