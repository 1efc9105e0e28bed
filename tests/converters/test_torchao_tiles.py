"""torchao's 4-bit tiles against the layout restated for each word, and refusals."""

import contextlib
import re

import ml_dtypes
import numpy as np
import pytest

from qjax.converters.packed import check_parts
from qjax.converters.torchao import TorchAO
from qjax.errors import FormatError, QjaxError, UnsupportedError
from qjax.wrappers import InputScaled

from .packers import tiled_words

OUT, WIDE, GROUP = 16, 256, 32


def layer(tiles=8):
    """Parts of a layer, and its dense weight `[in, out]`."""
    rng = np.random.default_rng(tiles)
    codes = rng.integers(0, 16, (OUT, WIDE))
    both = rng.normal(size=(WIDE // GROUP, OUT, 2)).astype(ml_dtypes.bfloat16)
    both[1, 2, 0] = 0  # a group of one value
    scale, zero = np.repeat(both.astype("f4"), GROUP, axis=0).transpose(2, 0, 1)
    parts = {
        "_weight_qdata": tiled_words(codes, tiles),
        "_weight_scale_and_zero": both,
    }
    return parts, (codes.T - 8) * scale + zero


@pytest.mark.parametrize("tiles", [2, 4, 8])
def test_values(tiles):
    parts, want = layer(tiles)
    reader = TorchAO({}, "here")
    check_parts(reader, parts, "here: a")
    assert reader.shape(parts) == (OUT, WIDE)
    q = reader.read(parts, "here: a")
    assert q.format.bits == 4 and q.format.group == GROUP and q.dtype == "bfloat16"
    np.testing.assert_allclose(q.dequantize("float32"), want, rtol=0, atol=4e-6)


@pytest.mark.parametrize("told", [(16, 256), (9, 225), (15, 240)])
def test_what_is_filled_up(told):
    parts, want = layer()
    reader = TorchAO({}, "here")
    parts |= {"expected_shape": np.array(told)}
    assert reader.shape(parts) == told
    q = reader.read(parts, "here: a")
    assert q.shape == told[::-1]
    want = want[: told[1], : told[0]]
    np.testing.assert_allclose(q.dequantize("float32"), want, rtol=0, atol=4e-6)


@pytest.mark.parametrize("told", [(17, 256), (16, 257), (256, 16), (16,)])
def test_a_model_of_other_shapes(told):
    """The shape of the tiles, which the model then refuses."""
    parts = layer()[0] | {"expected_shape": np.array(told)}
    assert TorchAO({}, "here").shape(parts) == (OUT, WIDE)


def test_activations():
    parts, want = layer()
    before = np.linspace(1, 2, WIDE, dtype="f4")
    parts["_weight_act_pre_scale"] = before
    q = TorchAO({}, "here").read(parts, "here: a")
    assert isinstance(q, InputScaled)
    want = before[:, None] * want
    np.testing.assert_allclose(q.dequantize("float32"), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("part", "leaf", "message"),
    [
        ("qdata", np.zeros((2, 2, 32, 4), "i8"), "qdata is int64"),
        ("qdata", np.zeros((2, 2, 31, 4), "i4"), r"[2, 2, 31, 4], expected int32"),
        ("qdata", np.zeros((2, 2, 32, 3), "i4"), r"[2, 2, 32, 3], expected int32"),
        ("qdata", np.zeros((1, 2, 32, 4), "i4"), r"expected floats [groups, 8, 2]"),
        ("scale_and_zero", np.zeros((8, 16), "f4"), r"expected floats [groups, 16, 2]"),
        ("scale_and_zero", np.zeros((8, 16, 3), "f4"), "scale_and_zero is float32"),
        ("scale_and_zero", np.zeros((7, 16, 2), "f4"), "that divide 256 inputs"),
        ("scale_and_zero", np.zeros((8, 16, 2), "f8"), "scale_and_zero is float64"),
    ],
)
def test_layers_that_do_not_fit(part, leaf, message):
    parts = layer()[0] | {f"_weight_{part}": leaf}
    with pytest.raises(FormatError, match=rf"^here: a: .*{re.escape(message)}"):
        TorchAO({}, "here").read(parts, "here: a")
    with pytest.raises(FormatError, match=rf"^here: .*{re.escape(message)}"):
        TorchAO({}, "here").shape(parts)


def test_what_is_not_read():
    parts, _ = layer()
    several = parts | {"_weight_qdata": np.zeros((3, 2, 2, 32, 4), "i4")}
    with pytest.raises(UnsupportedError, match=r"here: a: int32 .* several matrices"):
        TorchAO({}, "here").read(several, "here: a")
    data = {"int4_tile_packed_ntile": 16}
    said = {"quant_type": {"default": {"_data": data, "_type": "Int4WeightOnlyConfig"}}}
    with pytest.raises(
        UnsupportedError, match=r"here: a: .*AMD's kernels.* expected 8"
    ):
        TorchAO(said, "here").read(parts, "here: a")


def test_shapes_that_lie(rng):
    """Every wrong shape ends in an error of qjax, or in a tensor."""
    for _ in range(100):
        parts = layer()[0] | {"expected_shape": rng.integers(0, 300, rng.integers(4))}
        name = rng.choice(sorted(parts))
        if name.startswith("_"):
            shape = rng.integers(0, 20, rng.integers(0, 6))
            parts[name] = np.zeros(shape, parts[name].dtype)
        reader = TorchAO({}, "here")
        with contextlib.suppress(QjaxError):
            reader.shape(parts)
        with contextlib.suppress(QjaxError):
            reader.read(parts, "here: a")
