"""BitNet layers, decoded by loops as the format describes them."""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.converters.bitnet import BitNet
from qjax.converters.packed import check_parts
from qjax.errors import FormatError, UnsupportedError
from qjax.tensor import AffineTensor
from qjax.wrappers import RoundedInputs


def draw(rows: int, cols: int):
    """Packed weights, and the weights `[in, out]`."""
    w = np.random.default_rng(rows).integers(-1, 2, (cols, rows))
    packed = np.zeros((cols // 4, rows), np.uint8)
    for o in range(cols):
        for i in range(rows):
            field, row = divmod(o, cols // 4)
            packed[row, i] |= (w[o, i] + 1) << 2 * field
    return packed, w.T.astype(np.float32)


@pytest.mark.parametrize("linear", [None, "bitlinear", "autobitlinear"])
@pytest.mark.parametrize(("rows", "cols"), [(16, 12), (10, 4), (7, 20)])
def test_values(rows, cols, linear):
    packed, w = draw(rows, cols)
    scale = np.array([1.3], jnp.bfloat16)
    parts = {"weight": packed, "weight_scale": scale}
    reader = BitNet({"linear_class": linear} if linear else {}, "here")
    check_parts(reader, parts, "here: layer")
    assert reader.shape(parts) == (cols, rows)
    q = reader.read(parts, "here: layer")
    assert isinstance(q, RoundedInputs) and q.activation == "int8" and q.scale is None
    assert isinstance(q.base, AffineTensor) and q.base.codes.shape == (
        -(-rows // 4),
        cols,
    )
    assert q.dtype == "bfloat16"
    factor = scale.astype(np.float32)
    want = w * factor if linear == "autobitlinear" else w * (1 / factor)
    np.testing.assert_array_equal(q.dequantize("float32"), want)


def test_unfit_layers():
    packed, _ = draw(8, 8)
    one = np.ones(1, np.float32)
    for change, message in (
        ({"weight": packed | 0xC0}, "weight: holds fields of 3"),
        (
            {"weight_scale": np.ones(8, np.float32)},
            "8 numbers, the first 1.0; expected",
        ),
        ({"weight_scale": 0 * one}, "one finite positive scale"),
        ({"weight_scale": np.nan * one}, "one finite positive scale"),
    ):
        parts = {"weight": packed, "weight_scale": one, **change}
        with pytest.raises(FormatError, match=message):
            BitNet({}, "here").read(parts, "here: layer")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"linear_class": 3}, FormatError, "linear_class is 3, expected bitlinear or"),
        ({"quantization_mode": "online"}, UnsupportedError, "whenever they are used"),
        ({"use_rms_norm": True}, UnsupportedError, "norm of their own"),
    ],
)
def test_unread_settings(settings, error, message):
    with pytest.raises(error, match=message):
        BitNet(settings, "here")
