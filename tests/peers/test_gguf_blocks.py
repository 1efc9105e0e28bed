"""Blocks of llama.cpp's types against gguf-py, bit for bit."""

import jax
import numpy as np
import pytest

from qjax.formats.ggml import TYPES

gguf = pytest.importorskip("gguf")
quants = pytest.importorskip("gguf.quants")
DECODED = [
    name
    for name, kind in TYPES.items()
    if name in ("f32", "f16", "bf16")
    or (kind.parts is not None and name not in ("q1_0", "q2_0"))  # gguf-py lacks them
]
LEAD, OUT = (4, 16), 8


@pytest.mark.parametrize("name", DECODED)
def test_values(name):
    kind = TYPES[name]
    rng = np.random.default_rng(kind.id)
    blocks = rng.integers(0, 256, (*LEAD, OUT, kind.bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        want = quants.dequantize(blocks, gguf.GGMLQuantizationType[name.upper()])
    got = jax.jit(kind.decode)(np.swapaxes(blocks, -1, -2))
    got = np.ascontiguousarray(np.swapaxes(np.asarray(got), -1, -2))
    number = ~np.isnan(want)  # scales are infinities or NaN in one of 32 blocks
    assert number.mean() > 0.8
    np.testing.assert_array_equal(~np.isnan(got), number)
    bits = [x[number].view(np.uint32) for x in (got, want)]
    np.testing.assert_array_equal(*bits)


def test_sizes():
    stale = {"q8_1": (32, 40)}
    for kind in gguf.GGMLQuantizationType:
        ours = TYPES[kind.name.lower()]
        size = stale.get(ours.name, (ours.elements, ours.bytes))
        assert (kind.value, gguf.GGML_QUANT_SIZES[kind]) == (ours.id, size)
