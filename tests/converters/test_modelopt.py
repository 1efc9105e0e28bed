"""ModelOpt layers, of one kind and mixed."""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.converters.modelopt import ModelOpt
from qjax.errors import FormatError, UnsupportedError
from qjax.wrappers import InputScaled, RoundedInputs

from .small_floats import E2M1, nibbles, power, spread, tiled

FLOAT8 = jnp.float8_e4m3fn
OUT, WIDE = 40, 160


def floats(rng) -> np.ndarray:
    return (rng.normal(size=(OUT, WIDE)) * 50).astype(np.float32).astype(FLOAT8)


def nvfp4(rng):
    codes = rng.integers(0, 16, (OUT, WIDE)).astype(np.uint8)
    scale = rng.uniform(1, 400, (OUT, WIDE // 16)).astype(np.float32).astype(FLOAT8)
    second = np.array(0.00123, np.float32)
    parts = {"weight": nibbles(codes), "weight_scale": scale, "weight_scale_2": second}
    return parts, E2M1[codes] * spread(scale.astype(np.float32) * second, 16)


def got(q) -> np.ndarray:
    return np.asarray(q.dequantize("float32")).T


def test_nvfp4(rng, caplog):
    parts, want = nvfp4(rng)
    reader = ModelOpt({"quant_algo": "NVFP4", "group_size": 16}, "here")
    assert reader.shape(parts) == (OUT, WIDE)
    q = reader.read(parts, "here: a")
    np.testing.assert_allclose(got(q), want, rtol=2.5e-7)  # two units of the last place
    assert not caplog.records
    parts["input_scale"] = np.array(0.1, np.float32)
    assert not isinstance(reader.read(parts, "here: a"), RoundedInputs)
    assert "here: activations (FP4) are not rounded" in caplog.text


@pytest.mark.parametrize("shape", [(), (1,), (OUT,), (OUT, 1), (1, 1, 2, 1)])
def test_fp8(shape, rng):
    scale = rng.uniform(0.01, 0.1, shape).astype(np.float32)
    parts = {"weight": floats(rng), "weight_scale": scale}
    reader = ModelOpt({"quantization": {"quant_algo": "FP8"}}, "here")
    assert reader.shape(parts) == (OUT, WIDE)
    q = reader.read(parts, "here: a")
    real = scale.reshape(-1, 1)
    if len(shape) == 4:
        real = tiled(scale[:, 0, :, 0], (OUT, WIDE))
    np.testing.assert_array_equal(got(q), parts["weight"].astype(np.float32) * real)
    assert not isinstance(q, RoundedInputs)
    parts["input_scale"] = np.array(0.5, np.float32)
    q = reader.read(parts, "here: a")
    assert isinstance(q, RoundedInputs) and float(q.scale) == 0.5


def test_layers_of_a_mixture(rng):
    layers = {"a": {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}}
    settings = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    reader = ModelOpt(settings, "here")
    parts = {"weight": floats(rng), "weight_scale": np.ones(OUT, np.float32)}
    q = reader.read(parts, "here: a")
    assert isinstance(q, RoundedInputs) and q.scale is None
    assert not isinstance(reader.read(parts, "here: b"), RoundedInputs)
    four, want = nvfp4(rng)
    np.testing.assert_allclose(got(reader.read(four, "here: c")), want, rtol=2.5e-7)


def test_mx(rng):
    exponents = rng.integers(110, 130, (OUT, WIDE // 32)).astype(np.uint8)
    codes = rng.integers(0, 16, (OUT, WIDE)).astype(np.uint8)
    real = spread(power(exponents), 32)
    reader = ModelOpt({"quant_algo": "MXFP8"}, "here")
    parts = {"weight": floats(rng), "weight_scale": exponents}
    want = parts["weight"].astype(np.float32) * real
    np.testing.assert_array_equal(got(reader.read(parts, "here: a")), want)
    four = {"weight": nibbles(codes), "weight_scale": exponents}
    np.testing.assert_array_equal(got(reader.read(four, "here: a")), E2M1[codes] * real)


def test_scaled_inputs(rng):
    parts, want = nvfp4(rng)
    factors = rng.uniform(0.5, 2, WIDE).astype(np.float32)
    reader = ModelOpt({"quant_algo": "NVFP4_AWQ"}, "here")
    q = reader.read(parts | {"pre_quant_scale": factors}, "here: a")
    assert isinstance(q, InputScaled)
    np.testing.assert_allclose(got(q), want * factors, rtol=5e-7)
    with pytest.raises(FormatError, match=r"^here: a.pre_quant_scale: has 3 numbers"):
        reader.read(parts | {"pre_quant_scale": factors[:3]}, "here: a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_scale_2": np.zeros((), np.float32)}, "expected one positive number"),
        ({"weight_scale_2": np.ones(2, np.float32)}, "expected one positive number"),
        ({"weight_scale_2": np.full((), np.nan, np.float32)}, "expected one positive"),
        ({"weight_scale": np.ones((OUT, 3), FLOAT8)}, r"expected float8_e4m3fn \[40, "),
        ({"weight": np.ones((OUT, WIDE), np.int8)}, "with weights in int8 are not"),
    ],
)
def test_parts_that_do_not_fit(change, message, rng):
    parts, _ = nvfp4(rng)
    with pytest.raises((FormatError, UnsupportedError), match=f"^here: a: .*{message}"):
        ModelOpt({}, "here").read(parts | change, "here: a")


def test_algorithms_that_are_not_read():
    with pytest.raises(UnsupportedError, match=r"^here: ModelOpt's W4A8_AWQ is not"):
        ModelOpt({"quant_algo": "W4A8_AWQ"}, "here")
    with pytest.raises(FormatError, match=r"^here: quantization is \[1\]"):
        ModelOpt({"quantization": [1]}, "here")
