"""Layers that other libraries packed, read without a bit's difference."""

import jax
import numpy as np
import pytest

from qjax.converters.bitsandbytes import STATES, BitsAndBytes
from qjax.converters.compressed_tensors import CompressedTensors

torch = pytest.importorskip("torch")

# (kind, block, nested, dtype, [out, in]): blocks within columns and across them
FOUR_BITS = [
    ("nf4", 64, False, "float32", (24, 128)),
    ("nf4", 64, True, "bfloat16", (40, 512)),
    ("nf4", 64, True, "float16", (7, 33)),
    ("nf4", 128, False, "float16", (6, 256)),
    ("fp4", 64, False, "float32", (24, 128)),
    ("fp4", 128, True, "bfloat16", (129, 127)),
    ("fp4", 64, True, "float32", (1, 3)),
]


def array(tensor) -> np.ndarray:
    """A torch tensor in NumPy, bfloat16 by its value."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


@pytest.mark.parametrize("case", FOUR_BITS, ids=lambda c: "-".join(map(str, c)))
def test_bitsandbytes_four_bits(case, rng):
    bnb = pytest.importorskip("bitsandbytes.functional")
    kind, block, nested, dtype, shape = case
    w = torch.tensor(rng.normal(size=shape)).to(getattr(torch, dtype))
    with torch.compiler.set_stance("force_eager"):
        packed, state = bnb.quantize_4bit(
            w, blocksize=block, quant_type=kind, compress_statistics=nested
        )
        want = array(bnb.dequantize_4bit(packed, state))
    saved = {k: v.numpy() for k, v in state.as_dict(packed=True).items()}
    parts = {f"weight.{name}": value for name, value in saved.items()}
    parts["weight"] = packed.numpy()
    assert set(parts) & set(STATES)
    reader = BitsAndBytes({}, "here")
    assert reader.shape(parts) == shape
    q = reader.read(parts, "here: layer")
    assert q.dtype == dtype
    got = np.asarray(jax.jit(lambda q: q.dequantize())(q), np.float32)
    np.testing.assert_array_equal(got, want.T)


def test_bitsandbytes_eight_bits(rng):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(48, 20, bias=False, has_fp16_weights=False)
    w = torch.tensor(rng.normal(size=(20, 48)), dtype=torch.float16)
    layer.weight = bnb.nn.Int8Params(w, has_fp16_weights=False)
    codes, stats, _ = bnb.functional.int8_vectorwise_quant(w)
    parts = {"weight": codes.numpy(), "SCB": stats.numpy()}
    reader = BitsAndBytes({}, "here")
    assert reader.shape(parts) == (20, 48)
    got = np.asarray(reader.read(parts, "here: layer").dequantize("float32"))
    want = bnb.functional.int8_vectorwise_dequant(codes, stats).numpy().T
    np.testing.assert_allclose(got, want, rtol=3e-7)  # they multiply by 1 / 127


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_compressed_tensors_packed(bits, symmetric, rng):
    module = pytest.importorskip("compressed_tensors.compressors.pack_quantized")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    out, wide, group = 40, 96, 32
    arguments = {"num_bits": bits, "symmetric": symmetric, "group_size": group}
    weights = quantization.QuantizationArgs(strategy="group", **arguments)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    half = 2 ** (bits - 1)
    scale = torch.tensor(rng.uniform(0.01, 0.1, (out, wide // group)).astype("float16"))
    zero = torch.tensor(rng.integers(-half, half, scale.shape), dtype=torch.int8)
    zero = torch.zeros_like(zero) if symmetric else zero
    codes = torch.tensor(rng.integers(-half, half, (out, wide)), dtype=torch.int8)
    wide_scale, wide_zero = (
        t.float().repeat_interleave(group, 1) for t in (scale, zero)
    )
    want = (codes.float() - wide_zero) * wide_scale
    state = {"weight": want, "weight_scale": scale.float(), "weight_zero_point": zero}
    made = module.PackedQuantizationCompressor.compress(state, scheme)
    parts = {name: value.numpy() for name, value in made.items()}
    if symmetric:
        parts.pop("weight_zero_point", None)
    config = {"num_bits": bits, "type": "int", "group_size": group}
    groups = {"group_0": {"targets": ["Linear"], "weights": config}}
    settings = {"format": "pack-quantized", "config_groups": groups}
    reader = CompressedTensors(settings, "here")
    assert reader.shape(parts) == (out, wide)
    got = np.asarray(reader.read(parts, "here: layer").dequantize("float32"))
    np.testing.assert_array_equal(got, want.numpy().T)
