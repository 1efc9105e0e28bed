"""compressed-tensors reads what is written, and what it writes is read.

Weights decompressed by the peer are compared to the last bit. It decodes 4-bit floats
in bfloat16, so these are compared in bfloat16.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.converters.compressed_tensors import CompressedTensors
from qjax.converters.compressed_write import CompressedTensorsWriter
from qjax.formats import FP8, MXFP4, MXFP8, NVFP4, Int
from qjax.wrappers import RoundedInputs

torch = pytest.importorskip("torch")
compressors = pytest.importorskip("compressed_tensors.compressors")
ct = pytest.importorskip("compressed_tensors.quantization")

OUT, WIDE = 136, 256
PRESETS = {
    "W4A16": "pack-quantized",
    "W3A16": "pack-quantized",
    "W4A16_ASYM": "pack-quantized",
    "W8A8": "int-quantized",
    "W4A8": "int-quantized",
    "W4AFP8": "pack-quantized",
    "FP8": "float-quantized",
    "FP8_DYNAMIC": "float-quantized",
    "FP8_BLOCK": "float-quantized",
    "NVFP4": "nvfp4-pack-quantized",
    "NVFP4A16": "nvfp4-pack-quantized",
    "MXFP4": "mxfp4-pack-quantized",
    "MXFP8": "mxfp8-quantized",
}


def array(tensor) -> np.ndarray:
    """A torch tensor in NumPy, with the dtypes of ml_dtypes."""
    small = {"torch.bfloat16": jnp.bfloat16, "torch.float8_e4m3fn": jnp.float8_e4m3fn}
    dtype = small.get(str(tensor.dtype))
    if dtype is None:
        return tensor.numpy()
    raw = torch.uint8 if tensor.element_size() == 1 else torch.uint16
    return tensor.contiguous().view(raw).numpy().view(dtype)


def statistics(scheme, rng) -> dict:
    """Scales of a weight as the scheme wants them."""
    weights = scheme.weights
    shapes = {
        "tensor": (1,),
        "channel": (OUT, 1),
        "block": (-(-OUT // 128), -(-WIDE // 128)),
    }
    groups = WIDE // (weights.group_size or WIDE)
    shape = shapes.get(weights.strategy, (OUT, groups))
    scale = torch.tensor(rng.uniform(0.01, 0.1, shape), dtype=torch.bfloat16)
    if weights.scale_dtype == torch.uint8:
        scale = 2.0 ** torch.floor(torch.log2(scale.float()))
    made = {"weight_scale": scale}
    if weights.strategy == "tensor_group":
        made["weight_scale"] = (scale * 1000).to(torch.float8_e4m3fn).float()
        made["weight_global_scale"] = torch.tensor([987.5])
    if not weights.symmetric:
        zero = rng.integers(-8, 8, tuple(scale.shape))
        made["weight_zero_point"] = torch.tensor(zero, dtype=torch.int8)
    if scheme.input_activations is not None:
        made["input_scale"] = torch.tensor([0.5], dtype=torch.bfloat16)
    return made


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset, rng):
    scheme = ct.preset_name_to_scheme(preset, ["Linear"])
    scheme.format = PRESETS[preset]
    compressor = compressors.BaseCompressor.get_value_from_registry(scheme.format)
    weight = torch.tensor(rng.normal(size=(OUT, WIDE)) * 0.1, dtype=torch.bfloat16)
    state = {"weight": weight, **statistics(scheme, rng)}
    made = compressor.compress(state, scheme)
    want = compressor.decompress(made, scheme)["weight"]
    groups = {"group_0": json.loads(scheme.model_dump_json())}
    settings = {"format": scheme.format, "config_groups": groups}
    reader = CompressedTensors(settings, "here")
    parts = {name: array(leaf) for name, leaf in made.items()}
    assert reader.shape(parts) == (OUT, WIDE)
    q = reader.read(parts, "here: layer")
    got = np.asarray(q.dequantize("bfloat16"))
    np.testing.assert_array_equal(got, array(want.to(torch.bfloat16)).T)

    again = CompressedTensorsWriter().write(q, "there: layer")
    for name in set(parts) - {"input_scale"} | set(again):
        assert again[name].dtype == parts[name].dtype, name
        np.testing.assert_array_equal(again[name], parts[name])


FORMATS = {
    "q_proj": Int(4, 32, scale_dtype="float16"),
    "k_proj": Int(3, "channel"),
    "v_proj": Int(8, "tensor"),
    "o_proj": FP8("e4m3", "block"),
    "gate_proj": MXFP4(),
    "up_proj": NVFP4(),
    "down_proj": MXFP8(),
}
ROUNDED = {"v_proj": "int8", "o_proj": "float8_e4m3fn"}


ASYMMETRIC = Int(3, 32, symmetric=False, zero_dtype="uint8")


@pytest.mark.parametrize("names", [list(FORMATS), ["q_proj"], ["v_proj"], "asymmetric"])
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_a_model_loads_in_transformers(names, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=32,
        dtype="float32",
    )
    formats, options = FORMATS, {}
    if names == "asymmetric":  # packed zero-points load no other way in transformers
        names, formats = ["k_proj"], {"k_proj": ASYMMETRIC}
        plain = transformers.CompressedTensorsConfig(dequantize=True)
        options = {"quantization_config": plain}
    torch.manual_seed(0)
    dense = transformers.LlamaForCausalLM(config)
    dense.save_pretrained(tmp_path)
    writer, state, want = CompressedTensorsWriter(), {}, {}
    kept = ["lm_head"]
    for name, leaf in dense.state_dict().items():
        layer = name.removesuffix(".weight")
        kind = layer.rpartition(".")[2]
        if kind not in names:
            state[name] = leaf
            if kind in FORMATS:
                kept.append(layer)
            continue
        q = qjax.quantize(jnp.asarray(leaf.numpy().T), formats[kind])
        q = RoundedInputs(q, ROUNDED[kind]) if kind in ROUNDED else q
        want[name] = np.asarray(q.dequantize("float32"))
        for part, value in writer.write(q, f"{tmp_path}: {layer}").items():
            state[f"{layer}.{part}"] = tensor(value)
    save(state, tmp_path)
    described = json.loads((tmp_path / "config.json").read_text("utf-8"))
    described["quantization_config"] = writer.settings(kept)
    (tmp_path / "config.json").write_text(json.dumps(described), "utf-8")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True, **options
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    for module in model.modules():
        compressors.decompress_module(module)
    loaded = model.state_dict()
    assert len(want) == 2 * len(names)
    for name, weight in want.items():
        got = loaded[name].float().numpy().T
        if "up_proj" in name:  # they decode it in bfloat16
            weight = np.asarray(jnp.asarray(weight, jnp.bfloat16), np.float32)
        np.testing.assert_array_equal(got, weight, err_msg=name)


def tensor(value: np.ndarray):
    """A NumPy array in torch."""
    if value.dtype == jnp.bfloat16:
        return torch.tensor(value.view(np.uint16)).view(torch.bfloat16)
    if value.dtype == jnp.float8_e4m3fn:
        return torch.tensor(value.view(np.uint8)).view(torch.float8_e4m3fn)
    return torch.tensor(value.copy())


def save(state, path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    whole = {name: leaf.contiguous() for name, leaf in state.items()}
    safetensors.save_file(whole, path / "model.safetensors", {"format": "pt"})
