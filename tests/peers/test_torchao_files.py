"""Layers that torchao flattened into safetensors, read as it dequantizes them."""

import json
import pathlib
import runpy

import ml_dtypes
import numpy as np
import pytest

from qjax.converters.huggingface import open_checkpoint
from qjax.converters.packed import PackedCheckpoint
from qjax.converters.torchao import TorchAO
from qjax.wrappers import RoundedInputs

torch = pytest.importorskip("torch")
quantization = pytest.importorskip("torchao.quantization")
formats = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
nvfp4 = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
save_file = pytest.importorskip("safetensors.torch").save_file

PACKERS = pathlib.Path(__file__).parents[1] / "converters" / "packers.py"
OUT, WIDE = 48, 256
VIEWS = {
    torch.bfloat16: (torch.uint16, ml_dtypes.bfloat16),
    torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
    torch.float8_e5m2: (torch.uint8, ml_dtypes.float8_e5m2),
    torch.float8_e8m0fnu: (torch.uint8, ml_dtypes.float8_e8m0fnu),
}


def parts_of(weight) -> dict[str, np.ndarray]:
    tensors, _ = support.flatten_tensor_state_dict({"a.weight": weight})
    made = {}
    for name, leaf in tensors.items():
        raw, own = VIEWS.get(leaf.dtype, (None, None))
        array = leaf.contiguous()
        array = array.numpy() if raw is None else array.view(raw).numpy().view(own)
        made[name.removeprefix("a.")] = array
    return made


def weight(dtype="float32"):
    torch.manual_seed(0)
    return torch.randn(OUT, WIDE).to(getattr(torch, dtype))


def check(q, tensor, rtol=0.0):
    want = tensor.dequantize().float().numpy().T
    got = np.asarray(q.dequantize("float32"))
    np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol * 1e-2)


def read(tensor, settings=None):
    parts = parts_of(tensor)
    reader = TorchAO(settings or {}, "here")
    assert set(parts) <= set(reader.parts)
    assert reader.shape(parts) == (OUT, WIDE)
    return reader.read(parts, "here: a")


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_integers_of_any_width(bits, asymmetric):
    kind = quantization.MappingType
    mapping = kind.ASYMMETRIC if asymmetric else kind.SYMMETRIC
    target = getattr(torch, f"int{bits}")
    tensor = quantization.IntxUnpackedToInt8Tensor.from_hp(
        weight(), (1, 32), target, mapping_type=mapping
    )
    q = read(tensor)
    assert q.format.bits <= bits
    check(q, tensor)


@pytest.mark.parametrize("granularity", ["PerRow", "PerTensor"])
def test_int8(granularity):
    made = getattr(quantization, granularity)()
    tensor = quantization.Int8Tensor.from_hp(weight(), made)
    check(read(tensor), tensor)
    said = {
        "quant_type": {"default": {"_type": "Int8DynamicActivationInt8WeightConfig"}}
    }
    q = read(tensor, said)
    assert isinstance(q, RoundedInputs) and q.activation == "int8"


@pytest.mark.parametrize("granularity", ["PerRow", "PerTensor"])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_float8(dtype, granularity):
    tensor = quantization.Float8Tensor.from_hp(
        weight(),
        float8_dtype=getattr(torch, dtype),
        granularity=getattr(quantization, granularity)(),
    )
    check(read(tensor), tensor)


@pytest.mark.parametrize("swizzled", [False, True])
@pytest.mark.parametrize(
    "element", ["float8_e4m3fn", "float8_e5m2", "float4_e2m1fn_x2"]
)
def test_mx(element, swizzled):
    tensor = formats.MXTensor.to_mx(
        weight(), getattr(torch, element), 32, is_swizzled_scales=swizzled
    )
    check(read(tensor), tensor)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("swizzled", [False, True])
def test_nvfp4(swizzled, whole):
    w = weight()
    factor = nvfp4.per_tensor_amax_to_scale(w.abs().max()) if whole else None
    tensor = nvfp4.NVFP4Tensor.to_nvfp4(
        w, per_tensor_scale=factor, is_swizzled_scales=swizzled
    )
    check(read(tensor), tensor, 3e-7 if whole else 0.0)  # they multiply, not divide


def test_settings_as_transformers_writes_them():
    transformers = pytest.importorskip("transformers")
    config = quantization.Float8DynamicActivationFloat8WeightConfig()
    said = json.loads(transformers.TorchAoConfig(config).to_json_string())
    tensor = quantization.Float8Tensor.from_hp(weight())
    q = read(tensor, said)
    assert isinstance(q, RoundedInputs) and q.activation == "float8_e4m3fn"
    config = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int6)
    said = json.loads(transformers.TorchAoConfig(config).to_json_string())
    tensor = quantization.IntxUnpackedToInt8Tensor.from_hp(
        weight(), (1, 32), torch.int4
    )
    assert read(tensor, said).format.bits == 6  # as said, though fewer would do


@pytest.fixture
def tile_packed(monkeypatch):
    """Makes 4-bit tensors in tiles, and their codes as the kernel was given them.

    PyTorch packs tiles on GPUs only. Its kernel is replaced by a restatement; all else
    is torchao's: what is filled up, scales, zero-points and the order of codes.
    """
    words = runpy.run_path(str(PACKERS))["tiled_words"]
    given = []

    def kernel(data, tiles):
        given.append(torch.stack([data >> 4, data & 15], -1).flatten(1).int())
        shape = torch.ops.aten._convert_weight_to_int4pack(data.to("meta"), tiles).shape
        made = torch.from_numpy(words(given[-1].numpy(), tiles))
        assert made.shape == shape
        return made

    def make(weight, group, algorithm):
        kind = quantization.Int4TilePackedTo4dTensor
        return kind.from_hp(weight, [1, group], algorithm), given[-1]

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_convert_weight_to_int4pack", kernel, "CPU")
        yield make


@pytest.mark.parametrize(("algorithm", "group"), [("tinygemm", 32), ("hqq", 256)])
def test_tiles(tile_packed, algorithm, group, tmp_path):
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    out, wide = OUT - 3, 1000  # filled up to 48 and 1024
    w = torch.randn(out, wide, dtype=torch.bfloat16)
    tensor, codes = tile_packed(w, group, algorithm)
    scale, zero = tensor.scale_and_zero.unbind(-1)
    want = primitives._dequantize_affine_tinygemm(
        *(codes, (1, group), scale.T.float(), zero.T.float(), torch.int32, 0, 15),
        output_dtype=torch.float32,
    )[:out, :wide]
    assert (want - w).abs().max() < 0.5  # as fine as 4 bits are
    tensors, metadata = support.flatten_tensor_state_dict({"a.weight": tensor})
    save_file(tensors, tmp_path / "model.safetensors", metadata)
    config = quantization.Int4WeightOnlyConfig(group, True, "tile_packed_to_4d")
    transformers = pytest.importorskip("transformers")
    said = transformers.TorchAoConfig(config).to_json_string()
    (tmp_path / "config.json").write_text(f'{{"quantization_config": {said}}}')
    with open_checkpoint(tmp_path) as source:
        opened = PackedCheckpoint(source, {"a.weight": (out, wide)})
        assert opened.shape("a.weight") == (out, wide)
        got = opened.read("a.weight").dequantize("float32")
    np.testing.assert_allclose(got, want.numpy().T, rtol=0, atol=2e-6)
