"""Integers, FP8, MXFP4, MXFP8 and NVFP4 equal compressed-tensors to the last bit.

Both libraries get the same weight and the same scales (and zero-points); what they
decode is compared to the last bit, except for the sign of zero, which integer codes
cannot hold. compressed-tensors holds `W[out, in]`, the transpose.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.formats import FP8, MXFP4, MXFP8, NVFP4, Int
from qjax.methods.rtn import round_to_scales

torch = pytest.importorskip("torch")
ct = pytest.importorskip("compressed_tensors.quantization")
forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")

ROWS, COLS = 256, 136

UINT8 = "torch.uint8"
CASES = {
    "int4-group": (Int(4, 32), {"strategy": "group", "group_size": 32}),
    "int4-channel": (Int(4, "channel"), {"strategy": "channel"}),
    "int4-tensor": (Int(4, "tensor"), {"strategy": "tensor"}),
    "int4-asymmetric": (
        Int(4, 32, symmetric=False, zero_dtype="uint8"),
        {"strategy": "group", "group_size": 32, "symmetric": False},
    ),
    "int8-group": (Int(8, 128), {"strategy": "group", "group_size": 128}),
    "int8-channel": (Int(8, "channel"), {"strategy": "channel"}),
    "int8-tensor": (Int(8, "tensor"), {"strategy": "tensor"}),
    "int8-asymmetric": (
        Int(8, "channel", symmetric=False, zero_dtype="uint8"),
        {"strategy": "channel", "symmetric": False},
    ),
    "int3-group": (Int(3, 64), {"strategy": "group", "group_size": 64}),
    "fp8-tensor": (FP8(granularity="tensor"), {"strategy": "tensor"}),
    "fp8-channel": (FP8(), {"strategy": "channel"}),
    "fp8-block": (
        FP8(granularity="block"),
        {"strategy": "block", "block_structure": [128, 128]},
    ),
    "mxfp4": (MXFP4(), {"strategy": "group", "group_size": 32, "scale_dtype": UINT8}),
    "mxfp8": (MXFP8(), {"strategy": "group", "group_size": 32, "scale_dtype": UINT8}),
    "nvfp4": (NVFP4(), {"strategy": "tensor_group", "group_size": 16}),
}


def weight(rng) -> np.ndarray:
    """Normal weights, a heavy tail, zeros, and multiples of 1/8 that land on ties."""
    w = rng.normal(size=(ROWS, COLS)) * 0.5
    w[: ROWS // 4] = rng.standard_t(1.5, size=(ROWS // 4, COLS)) * 0.1
    w[ROWS // 2 :] = np.round(w[ROWS // 2 :] * 8) / 8
    w[:, 3] = 0
    return w.astype(np.float32)


def scales(fmt, rng):
    """Scales that clip some weights, powers of two among them (exact ties)."""
    shape = fmt.grouping((ROWS, COLS)).scale_shape
    span = 1.2 * 2 ** rng.uniform(-1, 1, size=shape)
    span[rng.random(shape) < 0.3] = 2.0
    scale = (span / 2 ** np.floor(np.log2(fmt.peak))).astype(np.float32)
    zero = divisor = None
    if isinstance(fmt, Int) and not fmt.symmetric:
        zero = rng.integers(0, fmt.levels + 1, size=shape).astype(np.uint8)
    if isinstance(fmt, MXFP4 | MXFP8):
        scale = (np.round(np.log2(scale)) + 127).astype(np.uint8)
    if isinstance(fmt, NVFP4):
        divisor = np.float32([[448 * 6 / 3.7]])
        scale = (scale * divisor).astype(jnp.float8_e4m3fn)
    return scale, zero, divisor


def peer(w, fmt, spec, scale, zero, divisor):
    integer = isinstance(fmt, Int)
    spec = {
        k: getattr(torch, v[6:]) if isinstance(v, str) and v.startswith("torch.") else v
        for k, v in spec.items()
    }
    args = ct.QuantizationArgs(
        num_bits=fmt.code_bits, type="int" if integer else "float", **spec
    )
    if scale.dtype == np.uint8:
        scale = np.exp2(scale.astype(np.float32) - 127)
    scale = torch.tensor(scale.astype(np.float32).T.copy())
    if fmt.grouping((ROWS, COLS)).kind == "tensor":
        scale = scale.reshape(1)
    zp = None
    if zero is not None:
        zp = torch.tensor(zero.T.astype(np.int32) - 2 ** (fmt.bits - 1))
    return forward.fake_quantize(
        x=torch.tensor(w.T.copy()),
        scale=scale,
        zero_point=zp,
        args=args,
        global_scale=None if divisor is None else torch.tensor(divisor.reshape(1)),
    ).numpy()


@pytest.mark.parametrize("case", CASES)
def test_fake_quantize_equals_decode_of_encode(case, rng):
    fmt, spec = CASES[case]
    w = weight(rng)
    scale, zero, divisor = scales(fmt, rng)
    theirs = peer(w, fmt, spec, scale, zero, divisor)

    @jax.jit
    def ours(w, scale, zero, divisor):
        q = round_to_scales(w, fmt, scale, zero, divisor)
        return q.dequantize(), q

    values, q = ours(w, scale, zero, divisor)
    np.testing.assert_array_equal(np.asarray(values).T, theirs)
    np.testing.assert_array_equal(np.asarray(q.scale), scale)
