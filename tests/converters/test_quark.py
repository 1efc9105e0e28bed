"""Quark layers."""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.converters.quark import Quark
from qjax.errors import FormatError, UnsupportedError
from qjax.wrappers import RoundedInputs

from .packers import awq_words
from .small_floats import E2M1, nibbles, power, spread

FLOAT8 = jnp.float8_e4m3fn
OUT, WIDE = 24, 64


def settings(weight, inputs=None) -> dict:
    return {"global_quant_config": {"weight": weight, "input_tensors": inputs}}


def floats(rng) -> np.ndarray:
    return (rng.normal(size=(OUT, WIDE)) * 50).astype(np.float32).astype(FLOAT8)


def equal(q, want) -> None:
    np.testing.assert_array_equal(np.asarray(q.dequantize("float32")).T, want)


def test_mxfp4(rng, caplog):
    codes = rng.integers(0, 16, (OUT, WIDE)).astype(np.uint8)
    exponents = rng.integers(110, 130, (OUT, WIDE // 32)).astype(np.uint8)
    parts = {"weight": nibbles(codes), "weight_scale": exponents}
    four = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32}
    reader = Quark(settings([four], four | {"is_dynamic": True}), "here")
    assert reader.shape(parts) == (OUT, WIDE)
    q = reader.read(parts, "here: a")
    equal(q, E2M1[codes] * spread(power(exponents), 32))
    assert not isinstance(q, RoundedInputs)
    assert "here: activations (fp4) are not rounded" in caplog.text


@pytest.mark.parametrize("shape", [(), (1,), (OUT,)])
@pytest.mark.parametrize("dynamic", [True, False])
def test_fp8(dynamic, shape, rng):
    scale = rng.uniform(0.01, 0.1, shape).astype(np.float32)
    parts = {"weight": floats(rng), "weight_scale": scale}
    parts["input_scale"] = np.array(0.5, np.float32)
    kind = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": dynamic}
    q = Quark(settings(kind, kind), "here").read(parts, "here: a")
    equal(q, parts["weight"].astype(np.float32) * scale.reshape(-1, 1))
    assert isinstance(q, RoundedInputs) and q.activation == "float8_e4m3fn"
    assert q.scale is None if dynamic else float(q.scale) == 0.5


@pytest.mark.parametrize("shape", [(1,), (OUT,), (OUT, 1)])
@pytest.mark.parametrize("zero", [None, np.int8, np.float32])
def test_int8(zero, shape, rng):
    codes = rng.integers(-128, 128, (OUT, WIDE)).astype(np.int8)
    scale = rng.uniform(0.01, 0.1, shape).astype(np.float32)
    parts, point = {"weight": codes, "weight_scale": scale}, 0
    if zero is not None:
        point = rng.integers(-5, 5, shape)
        parts["weight_zero_point"] = point.astype(zero)
        point = point.reshape(-1, 1)
    kind = {"dtype": "int8", "is_dynamic": False}
    q = Quark(settings(kind), "here").read(parts, "here: a")
    wide = codes.astype(np.float32) - np.float32(point)
    equal(q, wide * scale.reshape(-1, 1))


def test_layers_that_differ(rng):
    config = settings({"dtype": "fp8_e4m3"}, {"dtype": "fp8_e4m3", "is_dynamic": True})
    config["layer_quant_config"] = {"*.down": {"weight": {"dtype": "fp8_e4m3"}}}
    parts = {"weight": floats(rng), "weight_scale": np.array([0.5], np.float32)}
    reader = Quark(config, "here")
    assert isinstance(reader.read(parts, "here: x.up"), RoundedInputs)
    assert not isinstance(reader.read(parts, "here: x.down"), RoundedInputs)


@pytest.mark.parametrize(
    ("kind", "parts", "message"),
    [
        (
            "int4",
            {"weight": np.ones((8, 8), np.int32)},
            "int4 in int32 .* does not wri",
        ),
        ("int3", {"weight": np.ones((8, 3), np.uint8)}, "Quark's int3 in uint8"),
        ("fp6_e2m3", {"weight": np.ones((8, 48), np.uint8)}, "Quark's fp6_e2m3 in"),
        (None, {"weight": np.ones((8, 8), np.int32)}, "Quark's weights in int32"),
        ("fp4", {"weight": np.ones((8, 8), np.uint8)}, r"uint8 \[8, 1\]"),
    ],
)
def test_what_is_not_read(kind, parts, message):
    config = settings({"dtype": kind} if kind else None)
    scale = np.ones((8, 2), np.uint8 if "uint8" in message or kind else np.float32)
    with pytest.raises((FormatError, UnsupportedError), match=f"^here: a: .*{message}"):
        Quark(config, "here").read({**parts, "weight_scale": scale}, "here: a")


def grouped(rng):
    """A uint4 layer with scales of 16 inputs, its codes, and the settings."""
    codes = rng.integers(0, 16, (WIDE, OUT))
    scale = rng.uniform(0.01, 0.1, (WIDE // 16, OUT)).astype(np.float32)
    parts = {"weight": awq_words(codes), "weight_scale": scale}
    kind = {"dtype": "uint4", "qscheme": "per_group", "group_size": 16, "ch_axis": -1}
    return parts, codes, kind


@pytest.mark.parametrize("zero", [None, "float32", "int32"])
def test_four_bits_with_groups(zero, rng):
    parts, codes, kind = grouped(rng)
    scale, point = parts["weight_scale"], np.zeros((WIDE // 16, OUT))
    if zero == "float32":
        point = rng.uniform(0, 15, point.shape).astype("f4")
        parts["weight_zero_point"] = point
    elif zero == "int32":
        point = rng.integers(0, 16, point.shape)
        parts["weight_zero_point"] = awq_words(point)
    reader = Quark(settings(kind), "here")
    assert reader.shape(parts) == (OUT, WIDE)
    point, wide = (np.repeat(a.astype("f4"), 16, axis=0) for a in (point, scale))
    equal(reader.read(parts, "here: a"), ((codes.astype("f4") - point) * wide).T)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": np.zeros((64, 4), "i4")}, r"int32 \[64, 4\] with scales float32"),
        ({"weight": np.zeros((64, 24), "u1")}, "uint4 per group in uint8"),
        ({"weight_scale": np.ones(24, "f4")}, r"float32 \[24\], which Quark does not"),
        ({"weight_scale": np.ones((5, 24), "f4")}, r"float32 \[5, 24\], which Quark"),
        ({"weight_scale": np.ones((24, 4), "f4")}, r"float32 \[24, 4\], which Quark"),
        ({"weight_scale": np.ones((4, 24), "f8")}, "scales float64"),
        ({"weight_zero_point": np.zeros((4, 3), "i1")}, "is int8, expected int32"),
        ({"weight_zero_point": np.zeros((3, 3), "i4")}, "zero-points have shape"),
        ({"weight_zero_point": np.full((4, 24), np.nan, "f4")}, "is not finite"),
    ],
)
def test_groups_that_do_not_fit(changes, message, rng):
    parts, _, kind = grouped(rng)
    with pytest.raises(FormatError, match=f"^here: a.*{message}"):
        Quark(settings(kind), "here").read(parts | changes, "here: a")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"export": {"pack_method": "zigzag"}}, "'zigzag' is not read; .* reorder or"),
        ({"ch_axis": 0}, "uint4 along axis 0 per group in int32"),
    ],
)
def test_orders_that_are_not_read(changes, message, rng):
    parts, _, kind = grouped(rng)
    with pytest.raises(UnsupportedError, match=f"^here: a: .*{message}"):
        Quark(settings(kind | changes) | changes, "here").read(parts, "here: a")


def test_settings_that_are_wrong():
    with pytest.raises(FormatError, match=r"^here: export is \[1\]"):
        Quark({"export": [1]}, "here")
    with pytest.raises(FormatError, match=r"^here: layer_quant_config is \[1\]"):
        Quark({"layer_quant_config": [1]}, "here")
