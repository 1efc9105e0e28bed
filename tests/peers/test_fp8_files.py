"""Layers of FP8 and MXFP4 checkpoints equal what transformers makes of them."""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.converters.fp8 import BlockFP8
from qjax.converters.mxfp4 import weights

torch = pytest.importorskip("torch")
fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")


def bits(tensor, dtype) -> np.ndarray:
    """A tensor of bytes in NumPy."""
    return tensor.view(torch.uint8).numpy().view(dtype)


@pytest.mark.parametrize("shape", [(256, 384), (128, 128)])
@pytest.mark.parametrize("dtype", ["float32", "float8_e8m0fnu"])
def test_blocks(shape, dtype, rng):
    weight = torch.tensor(rng.normal(size=shape) * 50).to(torch.float8_e4m3fn)
    grid = (shape[0] // 128, shape[1] // 128)
    scale = torch.tensor(rng.uniform(0.001, 0.01, grid)).to(getattr(torch, dtype))
    want = fp8.Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
    small = jnp.float8_e8m0fnu
    parts = {
        "weight": bits(weight, jnp.float8_e4m3fn),
        "weight_scale_inv": scale.numpy() if dtype == "float32" else bits(scale, small),
    }
    q = BlockFP8({"weight_block_size": [128, 128]}, "here").read(parts, "here: a")
    np.testing.assert_array_equal(np.asarray(q.dequantize("float32")), want.numpy().T)


@pytest.mark.parametrize("four", [True, False])
def test_exponents(four, rng):
    scale = torch.tensor(rng.integers(100, 150, (8, 4)), dtype=torch.uint8)
    if four:
        weight = torch.tensor(rng.integers(-128, 128, (8, 64)), dtype=torch.int8)
    else:
        weight = torch.tensor(rng.normal(size=(8, 128)) * 50).to(torch.float8_e4m3fn)
    want = fp8.Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
    dtype = np.int8 if four else jnp.float8_e4m3fn
    parts = {"weight": bits(weight, dtype), "weight_scale_inv": scale.numpy()}
    q = BlockFP8({}, "here").read(parts, "here: a")
    np.testing.assert_array_equal(np.asarray(q.dequantize("float32")), want.numpy().T)


def test_experts_of_gpt_oss(rng):
    blocks = torch.tensor(rng.integers(0, 256, (3, 10, 2, 16)), dtype=torch.uint8)
    scales = torch.tensor(rng.integers(100, 150, (3, 10, 2)), dtype=torch.uint8)
    want = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    q = weights(blocks.numpy(), scales.numpy(), "here: a")
    got = np.asarray(q.dequantize("float32"))
    np.testing.assert_array_equal(got, want.float().numpy())
