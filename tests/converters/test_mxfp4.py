"""Experts of gpt-oss."""

import numpy as np
import pytest

from qjax.converters.mxfp4 import GptOss, gate_and_up, weights
from qjax.errors import FormatError
from qjax.formats import MXFP4

from .small_floats import E2M1, nibbles, power


def experts(rng, *shape):
    """Blocks, scales and the dense weight `[..., out, in]`."""
    codes = rng.integers(0, 16, (*shape, 32)).astype(np.uint8)
    scales = rng.integers(100, 150, shape).astype(np.uint8)
    dense = E2M1[codes] * power(scales)[..., None]
    return nibbles(codes), scales, dense.reshape(*shape[:-1], -1)


def equal(q, want) -> None:
    got = np.asarray(q.dequantize("float32"))
    np.testing.assert_array_equal(np.swapaxes(got, -1, -2), want)
    assert isinstance(q.format, MXFP4) and q.shape == got.shape


@pytest.mark.parametrize("shape", [(3, 10, 2), (10, 2), (1, 2, 1)])
def test_weights(shape, rng):
    blocks, scales, want = experts(rng, *shape)
    reader = GptOss({}, "here")
    parts = {"blocks": blocks, "scales": scales}
    assert reader.shape(parts) == want.shape
    q = reader.read(parts, "here: a")
    equal(q, want)
    if len(shape) == 3:
        equal(q[0], want[0])


def test_gate_and_up_alternate(rng):
    blocks, scales, want = experts(rng, 3, 10, 2)
    gate, up = gate_and_up(blocks, scales, "here: a")
    equal(gate, want[:, 0::2])
    equal(up, want[:, 1::2])
    with pytest.raises(FormatError, match="do not hold pairs of gate and up"):
        gate_and_up(blocks[:, :9], scales[:, :9], "here: a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": np.ones((3, 10, 2, 8), np.uint8)}, r"expected uint8 \[experts"),
        ({"blocks": np.ones((3, 10, 2, 16), np.int8)}, "blocks are int8"),
        ({"scales": np.ones((3, 2, 10), np.uint8)}, r"expected \[3, 10, 2\]"),
        ({"scales": np.ones((3, 10, 2), np.float16)}, r"expected uint8 \[3, 10, 2\]"),
    ],
)
def test_parts_that_do_not_fit(change, message, rng):
    blocks, scales, _ = experts(rng, 3, 10, 2)
    with pytest.raises(FormatError, match=f"^here: a: .*{message}"):
        weights(**{"blocks": blocks, "scales": scales, "where": "here: a", **change})
