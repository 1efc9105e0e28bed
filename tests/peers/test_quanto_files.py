"""Layers that optimum-quanto saved, read and written without a bit's difference."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qjax.converters.quanto import Quanto, QuantoWriter
from qjax.errors import UnsupportedError

torch = pytest.importorskip("torch")
quanto = pytest.importorskip("optimum.quanto")

VIEWS = {
    torch.bfloat16: (torch.uint16, ml_dtypes.bfloat16),
    torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
    torch.float8_e5m2: (torch.uint8, ml_dtypes.float8_e5m2),
}


def array(tensor) -> np.ndarray:
    """A torch tensor in NumPy, in its own dtype."""
    raw, own = VIEWS.get(tensor.dtype, (None, None))
    plain = tensor.detach()
    return plain.numpy() if raw is None else plain.view(raw).numpy().view(own)


def tensor(leaf: np.ndarray):
    """The inverse of `array`."""
    for dtype, (raw, own) in VIEWS.items():
        if leaf.dtype == own:
            return torch.tensor(leaf.view(str(raw).rpartition(".")[2])).view(dtype)
    return torch.tensor(leaf)


def layer(kind, dtype, shape, zeropoint=False):
    out, wide = shape
    torch.manual_seed(0)
    linear = torch.nn.Linear(wide, out, bias=False)
    linear.weight.data = torch.randn(out, wide)
    linear = linear.to(getattr(torch, dtype))
    made = quanto.QLinear.from_module(linear, weights=quanto.qtypes[kind])
    if zeropoint:
        group = made.weight_group_size
        scale, shift = quanto.MaxOptimizer()(
            linear.weight, made.weight_qtype, 0, group, zeropoint=True
        )
        q = quanto.quantize_weight(
            linear.weight, made.weight_qtype, 0, scale, shift, group, optimized=False
        )
        made.weight = torch.nn.Parameter(q)
    else:
        made.freeze()
    return made


def parts_of(module) -> dict[str, np.ndarray]:
    return {k: array(v) for k, v in module.state_dict().items()}


def check(q, module, dtype, exact):
    want = module.weight.dequantize().float().detach().numpy().T
    got = np.asarray(q.dequantize("float32"))
    if exact:
        np.testing.assert_array_equal(got, want)
    else:  # they round the product to their dtype, and the difference again
        step = 2 * float(torch.finfo(getattr(torch, dtype)).eps)
        np.testing.assert_allclose(got, want, atol=step * np.abs(want).max(), rtol=step)


def again(module, made, kind, shape):
    other = layer(kind, str(module.weight.dtype).rpartition(".")[2], shape)
    state = {name: tensor(leaf) for name, leaf in made.items()}
    missing, unexpected = other.load_state_dict(state, strict=True)
    assert not missing and not unexpected
    left, right = other.weight.dequantize(), module.weight.dequantize()
    assert torch.equal(left, right)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["qint8", "qfloat8_e4m3fn", "qfloat8_e5m2"])
def test_eight_bits(kind, dtype):
    module = layer(kind, dtype, (7, 33))
    parts = parts_of(module)
    reader = Quanto({}, "here")
    assert reader.shape(parts) == (7, 33)
    q = reader.read(parts, "here: a")
    check(q, module, dtype, dtype == "float32")
    made = QuantoWriter().write(q, "there: a")
    assert sorted(made) == sorted(parts)
    for name, leaf in parts.items():
        assert made[name].tobytes() == leaf.tobytes()
    again(module, made, kind, (7, 33))


# (kind, dtype, [out, in], whether zero-points are integers): no groups, and each size
PACKED = [
    ("qint4", "float32", (7, 33), False),
    ("qint4", "float16", (6, 256), False),
    ("qint4", "float16", (5, 192), True),
    ("qint4", "bfloat16", (8, 160), True),
    ("qint4", "bfloat16", (8, 160), False),
    ("qint4", "float32", (3, 320), True),
    ("qint2", "float16", (7, 33), False),
    ("qint2", "bfloat16", (6, 256), False),
    ("qint2", "float32", (5, 192), True),
]


@pytest.mark.parametrize("case", PACKED, ids=lambda c: "-".join(map(str, c)))
def test_packed(case):
    kind, dtype, shape, zeropoint = case
    module = layer(*case)
    parts = parts_of(module)
    expected = {"expected_shape": np.array(shape)}
    reader = Quanto({"a": {"weights": kind, "activations": "none"}}, "here")
    assert reader.shape(parts | expected) == shape
    q = reader.read(parts | expected, "here: a")
    check(q, module, dtype, zeropoint and dtype == "float32")
    writer = QuantoWriter()
    made = writer.write(q, "there: a")
    assert sorted(made) == sorted(parts)
    for name, leaf in parts.items():
        if name == "weight._shift" and dtype == "float32" and not zeropoint:
            np.testing.assert_allclose(made[name], leaf, rtol=2e-7)
        else:
            assert made[name].dtype == leaf.dtype and made[name].shape == leaf.shape
            assert made[name].tobytes() == leaf.tobytes()
    if dtype != "float32" or zeropoint:
        again(module, made, kind, shape)
    assert writer.map() == {"a": {"weights": kind, "activations": "none"}}


def test_groups_that_the_library_keeps_in_another_layout():
    """bfloat16 in groups of 128: integers are refused by quanto itself."""
    module = layer("qint4", "bfloat16", (16, 256))
    state = {k: array(v) for k, v in module.state_dict().items()}
    parts = state | {"expected_shape": np.array((16, 256))}
    q = Quanto({}, "here").read(parts, "here: a")
    made = QuantoWriter().write(q, "there: a")
    assert made["weight._shift"].dtype.name == "bfloat16"
    again(module, made, "qint4", (16, 256))
    parts["weight._shift"] = np.full_like(state["weight._shift"], 7, np.uint8)
    q = Quanto({}, "here").read(parts, "here: a")
    with pytest.raises(UnsupportedError, match="no quotients of bfloat16"):
        QuantoWriter().write(q, "there: a")


def test_model_is_loaded_by_the_library(tmp_path):
    """Weights, settings and map of a whole model."""
    transformers = pytest.importorskip("transformers")
    models = pytest.importorskip("optimum.quanto.models")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=160,
        intermediate_size=192,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(torch.float16)
    theirs = models.QuantizedModelForCausalLM.quantize(
        model, weights="qint4", exclude="lm_head"
    )
    theirs.save_pretrained(tmp_path / "theirs")
    tensors = load_file(tmp_path / "theirs" / "model.safetensors")
    map_ = json.loads((tmp_path / "theirs" / "quanto_qmap.json").read_text())
    shapes = {
        name: tuple(m.weight.shape) for name, m in model.named_modules() if name in map_
    }
    reader, writer = Quanto(map_, "here"), QuantoWriter()
    rest = {k: v for k, v in tensors.items()}
    made = {}
    for name, shape in shapes.items():
        own = [k for k in tensors if k.startswith(f"{name}.")]
        parts = {k.removeprefix(f"{name}."): rest.pop(k) for k in own}
        parts["expected_shape"] = np.array(shape)
        q = reader.read(parts, f"here: {name}")
        made |= {f"{name}.{k}": v for k, v in writer.write(q, f"x: {name}").items()}
    assert writer.map() == map_
    for name, leaf in made.items():
        np.testing.assert_array_equal(leaf, tensors[name], err_msg=name)
    save_file(rest | made, tmp_path / "model.safetensors")
    settings = json.loads((tmp_path / "theirs" / "config.json").read_text())
    settings["quantization_config"] = writer.settings(["lm_head"])
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "quanto_qmap.json").write_text(json.dumps(writer.map()))
    ours = models.QuantizedModelForCausalLM.from_pretrained(tmp_path)
    for name in shapes:
        left = ours.get_submodule(name).weight.dequantize()
        assert torch.equal(left, model.get_submodule(name).weight.dequantize()), name
