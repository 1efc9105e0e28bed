"""Layers of torchao that its tests cannot make without a GPU, and what is refused."""

import logging

import ml_dtypes
import numpy as np
import pytest

from qjax.converters.packed import check_parts
from qjax.converters.torchao import TorchAO
from qjax.errors import FormatError, QjaxError, UnsupportedError
from qjax.wrappers import InputScaled, RoundedInputs

OUT, WIDE, GROUP = 6, 64, 16
E8M0 = ml_dtypes.float8_e8m0fnu


def parts_of(**leaves):
    return {f"_weight_{name}": leaf for name, leaf in leaves.items()}


def plain(bits=4):
    """A layer of one code per byte, and its dense weight `[in, out]`."""
    rng = np.random.default_rng(bits)
    half = 2 ** (bits - 1)
    codes = rng.integers(-half, half, (OUT, WIDE), dtype=np.int8)
    scale = rng.uniform(0.01, 0.1, (OUT, WIDE // GROUP)).astype(np.float32)
    zero = rng.integers(-half, half, scale.shape, dtype=np.int8)
    wide = [np.repeat(leaf.astype("f4"), GROUP, axis=1) for leaf in (scale, zero)]
    dense = (codes - wide[1]) * wide[0]
    return parts_of(qdata=codes, scale=scale, zero_point=zero), dense.T


def nibbles():
    """An `Int4Tensor`, and its dense weight."""
    rng = np.random.default_rng(0)
    codes = rng.integers(-8, 8, (OUT, WIDE))
    data = (codes[:, ::2] & 15) | ((codes[:, 1::2] & 15) << 4)
    scale = rng.uniform(0.01, 0.1, (WIDE // GROUP, OUT)).astype(np.float16)
    zero = rng.normal(size=scale.shape).astype(np.float16)
    scale[1, 2] = 0  # a group of one value
    wide = [np.repeat(leaf.astype("f4"), GROUP, axis=0) for leaf in (scale, zero)]
    dense = codes.T * wide[0] + wide[1]
    parts = parts_of(qdata=data.astype(np.uint8).view(np.int8), scale=scale)
    return parts | parts_of(zero_point=zero), dense


@pytest.mark.parametrize("made", [plain(), plain(8), plain(1), nibbles()])
def test_integers(made):
    parts, want = made
    reader = TorchAO({}, "here")
    check_parts(reader, parts, "here: a")
    assert reader.shape(parts) == (OUT, WIDE)
    got = reader.read(parts, "here: a").dequantize("float32")
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("element", ["e4m3", "e5m2"])
def test_float8_in_blocks(element, rng):
    kind = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}[element]
    data = rng.normal(size=(130, 256)).astype(kind)
    scale = rng.uniform(0.1, 1, (2, 2)).astype(np.float32)
    q = TorchAO({}, "here").read(parts_of(qdata=data, scale=scale), "here: a")
    wide = np.repeat(np.repeat(scale, 128, 0)[:130], 128, 1)
    want = data.astype(np.float32) * wide
    np.testing.assert_array_equal(q.dequantize("float32"), want.T)


def test_activations(caplog):
    parts, want = plain()
    static = parts_of(
        act_quant_scale=np.ones((1, 1), "f4") / 4,
        act_quant_zero_point=np.zeros((1, 1), np.int8),
        act_pre_scale=np.full(WIDE, 2, np.float16),
    )
    q = TorchAO({}, "here").read(parts | static, "here: a")
    assert isinstance(q, InputScaled) and isinstance(q.base, RoundedInputs)
    assert q.base.activation == "int8" and float(q.base.scale) == 0.25
    np.testing.assert_allclose(q.dequantize("float32"), 2 * want, rtol=1e-6)
    with caplog.at_level(logging.WARNING):
        kind = {"_type": "Int8DynamicActivationIntxWeightConfig"}
        q = TorchAO({"quant_type": {"default": kind}}, "here").read(parts, "here: a")
    assert "rounded in a way that is not computed" in caplog.text
    assert not isinstance(q, RoundedInputs)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"qdata": np.zeros((6, 8), "i4")}, UnsupportedError, r"int32 \[6, 8\] is in"),
        ({"qdata": np.zeros((2, 6, 8), "i1")}, UnsupportedError, "several matrices"),
        ({"scale": np.ones((5, 4), "f4")}, FormatError, r"scales \[5, 4\] for codes"),
        ({"scale": np.ones((6, 3), "f4")}, FormatError, r"scales \[6, 3\] for codes"),
        ({"scale": np.ones((6, 4), "i4")}, FormatError, "scales are int32"),
        ({"zero_point": np.ones((6, 3), "i1")}, FormatError, "zero-points have shape"),
        ({"zero_point": np.full((6, 4), np.nan, "f4")}, FormatError, "not finite"),
        ({"act_quant_scale": np.ones(3, "f4")}, UnsupportedError, "expected one scale"),
        ({"act_quant_zero_point": np.ones(1, "i1")}, UnsupportedError, "a zero-point,"),
        ({"act_pre_scale": np.ones(7, "f4")}, FormatError, r"expected \[64\]"),
        ({"qdata": np.zeros((6, 64), "f2")}, UnsupportedError, "expected float8 with"),
        (
            {"qdata": np.zeros((6, 64), "u1"), "scale": np.zeros((6, 2)).astype(E8M0)},
            UnsupportedError,
            "expected MXFP4, MXFP8 or NVFP4",  # six bits, one code per byte
        ),
    ],
)
def test_layers_that_do_not_fit(changes, error, message):
    parts, _ = plain()
    with pytest.raises(error, match=rf"^here: a.*{message}"):
        TorchAO({}, "here").read(parts | parts_of(**changes), "here: a")


def test_scale_of_the_whole_weight():
    data, scale = np.zeros((4, 8), np.uint8), np.ones((4, 1), ml_dtypes.float8_e4m3fn)
    parts = parts_of(qdata=data, scale=scale, per_tensor_scale=np.float32(-1))
    with pytest.raises(FormatError, match="per_tensor_scale is not one positive"):
        TorchAO({}, "here").read(parts, "here: a")


def test_shapes_that_lie(rng):
    """Every wrong shape ends in an error of qjax, or in a tensor."""
    reader = TorchAO({}, "here")
    micro = parts_of(qdata=np.zeros((6, 32), "u1"), scale=np.ones((6, 2)).astype(E8M0))
    for parts in (plain()[0], nibbles()[0], micro):
        for _ in range(70):
            name = rng.choice(sorted(parts))
            shape = rng.integers(1, 10, rng.integers(1, 4))
            wrong = parts | {name: np.zeros(shape, parts[name].dtype)}
            try:
                check_parts(reader, wrong, "here: a")
                reader.read(wrong, "here: a")
            except QjaxError:
                pass
