"""compressed-tensors layers, written as they were read."""

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.converters.compressed_tensors import CompressedTensors
from qjax.converters.compressed_write import CompressedTensorsWriter
from qjax.errors import UnsupportedError
from qjax.formats import FP8, MXFP4, MXFP8, NF4, Cast, Int
from qjax.wrappers import Permuted, RoundedInputs

from .packers import dense, words
from .test_compressed_tensors import OUT, WIDE, equal, same, settings


@pytest.mark.parametrize("activation", [None, "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [32, "channel", "tensor"])
@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_integers_again(bits, group, symmetric, activation, rng):
    codes = rng.integers(0, 2**bits, (WIDE, OUT))
    groups = WIDE // group if group == 32 else 1
    shape = (1, 1) if group == "tensor" else (groups, OUT)
    scale = rng.uniform(0.01, 0.1, shape).astype(np.float16)
    zero = np.full(shape, 2 ** (bits - 1))
    if not symmetric:
        zero = rng.integers(0, 2**bits, shape)
    index = np.arange(WIDE) // (WIDE // groups)
    plain = activation == "int8"
    if group == "tensor" and not plain:  # packed codes have a scale for each output
        scale, zero = (np.repeat(a, OUT, 1) for a in (scale, zero))
    half = 2 ** (bits - 1)
    parts = {"weight_scale": scale.T.reshape(-1) if scale.size == 1 else scale.T}
    if plain:
        parts["weight"] = (codes - half).astype(np.int8).T
        zeros = (zero - half).astype(np.int8).T
        zeros = zeros.reshape(parts["weight_scale"].shape)
    else:
        parts["weight_packed"] = words(codes, bits, 0).T
        parts["weight_shape"] = np.array([OUT, WIDE])
        zeros = words(zero.T, bits, 0)
    if not symmetric:
        parts["weight_zero_point"] = zeros
    weights = {"num_bits": bits, "symmetric": symmetric}
    weights |= {"group_size": 32, "strategy": "group"} if groups > 1 else {}
    scheme = {"num_bits": 8, "type": "int" if plain else "float", "dynamic": True}
    layout = "int-quantized" if plain else "pack-quantized"
    config = settings(layout, weights, input_activations=activation and scheme)
    q = CompressedTensors(config, "here").read(parts, "here: a")
    equal(q, dense(codes, scale, zero, index).T)
    writer = CompressedTensorsWriter()
    same(writer.write(q, "there: a"), parts)
    found = writer.settings(["lm_head"])
    assert found["format"] == layout and found["ignore"] == ["lm_head"]
    made = found["config_groups"]["group_0"]
    assert made["targets"] == ["Linear"]
    assert {k: made["weights"][k] for k in weights} == weights


def test_order_of_activations_again(rng):
    index = rng.permutation(np.arange(WIDE) // 32).astype(np.int32)
    codes = rng.integers(0, 16, (WIDE, OUT))
    scale = rng.uniform(0.01, 0.1, (3, OUT)).astype(np.float16)
    parts = {
        "weight_packed": words(codes, 4, 0).T,
        "weight_scale": scale.T,
        "weight_shape": np.array([OUT, WIDE]),
        "weight_g_idx": index,
    }
    weights = {"num_bits": 4, "group_size": 32, "actorder": "group"}
    q = CompressedTensors(settings("pack-quantized", weights), "here").read(
        parts, "here: a"
    )
    assert isinstance(q, Permuted)
    equal(q, dense(codes, scale, np.full((3, OUT), 8), index).T)
    writer = CompressedTensorsWriter()
    same(writer.write(q, "there: a"), parts)
    made = writer.settings([])["config_groups"]["group_0"]["weights"]
    assert made["actorder"] == "group"


def test_layers_that_differ_are_named(rng):
    writer = CompressedTensorsWriter()
    w = jnp.asarray(rng.normal(size=(64, 8)), jnp.float32)
    for name, fmt in (("a", Int(4, 32)), ("b", MXFP4()), ("c", Int(4, 32))):
        q = qjax.quantize(w, fmt)
        parts = writer.write(q, f"there: x.{name}")
        assert ("weight_shape" in parts) == (name != "b")
    found = writer.settings([])
    assert found["format"] == "mixed-precision"
    groups = found["config_groups"]
    assert [group["targets"] for group in groups.values()] == [["x.a", "x.c"], ["x.b"]]
    reader = CompressedTensors(found, "here")
    equal(reader.read(parts, "here: x.c"), np.asarray(q.dequantize("float32")).T)


@pytest.mark.parametrize(
    ("fmt", "activation", "message"),
    [
        (NF4(32), None, "is CodebookTensor.*; compressed-tensors holds integers and"),
        (Int(4, 40), None, "64 inputs in groups of 40"),
        (Int(1, 32), None, r"zero-points from 0.5 to 0.5"),
        (FP8("e5m2"), None, "holds FP8 E4M3"),
        (FP8(), "int8", "with activations in int8"),
        (MXFP8("e5m2"), None, "holds FP8 E4M3"),
        (Cast(), None, "holds FP8 E4M3"),
    ],
)
def test_what_it_cannot_hold_is_refused(fmt, activation, message, rng):
    q = qjax.quantize(jnp.asarray(rng.normal(size=(64, 8)), jnp.float32), fmt)
    q = q if activation is None else RoundedInputs(q, activation)
    with pytest.raises(UnsupportedError, match=f"there: a: .*{message}"):
        CompressedTensorsWriter().write(q, "there: a")


def test_a_short_group_is_refused(rng):
    q = qjax.quantize(jnp.asarray(rng.normal(size=(40, 8)), jnp.float32), MXFP4())
    with pytest.raises(UnsupportedError, match=r"40 inputs.*multiples of 32"):
        CompressedTensorsWriter().write(q, "there: a")
