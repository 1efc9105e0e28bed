"""Types that gguf-py quantizes, bit for bit."""

import jax
import numpy as np
import pytest

from qjax.methods.ggml_encode import encode

gguf = pytest.importorskip("gguf")


@pytest.mark.parametrize(
    "kind", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "tq1_0", "tq2_0", "mxfp4"]
)
def test_blocks_equal_those_of_gguf_py(rng, kind):
    x = (0.02 * rng.standard_t(3, size=(64, 512))).astype(np.float32)
    x[1], x[2] = 0.0, np.round(x[2] * 100) / 128
    expected = gguf.quantize(x, gguf.GGMLQuantizationType[kind.upper()])
    got = jax.jit(encode, static_argnums=0)(kind, x.T)
    np.testing.assert_array_equal(got.T, expected)
