"""FP8 layers of DeepSeek, of one scale per tensor, and of FBGEMM."""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.converters.fp8 import BlockFP8, FbgemmFP8, fbgemm_experts
from qjax.errors import FormatError, UnsupportedError
from qjax.wrappers import RoundedInputs

from .small_floats import E2M1, nibbles, power, spread, tiled

FLOAT8 = jnp.float8_e4m3fn
BLOCKS = {"weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def floats(rng, *shape) -> np.ndarray:
    return (rng.normal(size=shape) * 50).astype(np.float32).astype(FLOAT8)


def equal(q, want) -> None:
    got = np.asarray(q.dequantize("float32"))
    np.testing.assert_array_equal(got, np.swapaxes(want, -1, -2))
    assert q.dtype == "bfloat16"


@pytest.mark.parametrize("shape", [(256, 128), (129, 200), (3, 130), (40, 5)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e8m0fnu"])
def test_blocks(shape, dtype, rng, caplog):
    grid = (-(-shape[0] // 128), -(-shape[1] // 128))
    scale = rng.uniform(0.001, 0.01, grid).astype(np.dtype(dtype))
    parts = {"weight": floats(rng, *shape), "weight_scale_inv": scale}
    reader = BlockFP8(BLOCKS, "here")
    assert reader.shape(parts) == shape
    want = parts["weight"].astype(np.float32) * tiled(scale.astype(np.float32), shape)
    for name in ("a", "b"):
        q = reader.read(parts, f"here: {name}")
        equal(q, want)
        assert not isinstance(q, RoundedInputs)
    (warning,) = caplog.records
    assert "here: activations (float8_e4m3fn, one scale per" in warning.getMessage()


@pytest.mark.parametrize("scheme", ["static", "dynamic", None])
@pytest.mark.parametrize(
    ("name", "other"),
    [("weight_scale_inv", "activation_scale"), ("weight_scale", "input_scale")],
)
def test_one_scale(name, other, scheme, rng):
    parts = {
        "weight": floats(rng, 24, 40),
        name: np.array(0.03, jnp.bfloat16),
        other: np.array(0.25, np.float32),
    }
    config = {"activation_scheme": scheme, "weight_block_size": None}
    q = BlockFP8(config, "here").read(parts, "here: a")
    equal(q, parts["weight"].astype(np.float32) * np.float32(parts[name]))
    assert isinstance(q, RoundedInputs) == (scheme is not None)
    if scheme is not None:
        assert q.activation == "float8_e4m3fn"
        assert (q.scale is None) == (scheme == "dynamic")
        assert scheme == "dynamic" or float(q.scale) == 0.25


def test_layers_in_mx_formats(rng):
    codes = rng.integers(0, 16, (8, 64)).astype(np.uint8)
    scale = rng.integers(100, 150, (8, 2)).astype(np.uint8)
    real = spread(power(scale), 32)
    reader = BlockFP8(BLOCKS, "here")
    four = {"weight": nibbles(codes).view(np.int8), "weight_scale_inv": scale}
    assert reader.shape(four) == (8, 64)
    equal(reader.read(four, "here: a"), E2M1[codes] * real)
    eight = {"weight": floats(rng, 8, 64), "weight_scale_inv": scale}
    assert reader.shape(eight) == (8, 64)
    want = eight["weight"].astype(np.float32) * real
    equal(reader.read(eight, "here: a"), want)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"weight_block_size": [64, 64]}, r"weight_block_size \[64, 64\] is not read"),
        ({"activation_scheme": "odd"}, "activation_scheme is 'odd', expected static"),
    ],
)
def test_settings_that_are_not_read(config, message):
    with pytest.raises((FormatError, UnsupportedError), match=f"^here: .*{message}"):
        BlockFP8(config, "here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_scale_inv": np.ones((2, 2), np.float32)}, r"scales \[2, 2\] is not"),
        ({"weight_scale_inv": np.ones((1, 1), FLOAT8)}, "scales of float8_e4m3fn"),
        ({"weight": np.ones((40, 64), np.float16)}, r"float16 \[40, 64\] with scales"),
    ],
)
def test_parts_that_do_not_fit(change, message, rng):
    parts = {"weight": floats(rng, 40, 64)}
    parts["weight_scale_inv"] = np.ones((1, 1), np.float32)
    with pytest.raises((FormatError, UnsupportedError), match=f"^here: a: .*{message}"):
        BlockFP8(BLOCKS, "here").read(parts | change, "here: a")
    config = {"activation_scheme": "static"}
    with pytest.raises(KeyError, match="input_scale"):
        BlockFP8(config, "here").read(parts, "here: a")
    parts["input_scale"] = np.zeros((), np.float32)
    with pytest.raises(FormatError, match=r"^here: a: the scale of activations is 0.0"):
        BlockFP8(config, "here").read(parts, "here: a")


def test_fbgemm(rng):
    parts = {"weight": floats(rng, 24, 40)}
    parts["weight_scale"] = rng.uniform(0.01, 0.1, (24, 1)).astype(np.float32)
    reader = FbgemmFP8({"activation_scale_ub": 1200.0}, "here")
    assert reader.shape(parts) == (24, 40)
    q = reader.read(parts, "here: a")
    equal(q, parts["weight"].astype(np.float32) * parts["weight_scale"])
    assert isinstance(q, RoundedInputs) and q.scale is None
    parts["weight_scale"] = parts["weight_scale"][:3]
    with pytest.raises(UnsupportedError, match=r"^here: a: .*scales \[3, 1\]"):
        reader.read(parts, "here: a")


def test_experts_of_llama_4(rng):
    """Scales of `down_proj` belong to its last axis, also where both are as long."""
    weight = floats(rng, 3, 8, 8)
    for shape in ((3, 1, 8), (3, 8, 1)):
        scale = rng.uniform(0.01, 0.1, shape).astype(np.float32)
        q = fbgemm_experts(weight, scale, "here: a")
        want = weight.astype(np.float32) * scale.reshape(3, 1, 8)
        np.testing.assert_array_equal(np.asarray(q.dequantize("float32")), want)
        assert q.shape == (3, 8, 8)
    with pytest.raises(FormatError, match=r"^here: a: weights .* with scales \[3, 4\]"):
        fbgemm_experts(weight, np.ones((3, 4), np.float32), "here: a")
