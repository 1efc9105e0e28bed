"""llama.cpp's quantizers against the bytes of its own library (tests/golden/methods).

The library is built without fused multiply-add; every block is expected to be equal.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.errors import SpecError
from qjax.formats import Int
from qjax.formats.ggml import TYPES, Ggml
from qjax.ggml import GgmlTensor
from qjax.methods import quantize
from qjax.methods.base import method_from_dict
from qjax.methods.ggml import GGML
from qjax.methods.ggml_encode import ENCODERS, encode
from qjax.methods.statistics import Statistics

encoded = jax.jit(encode, static_argnums=0, static_argnames="chunk")


@pytest.fixture(scope="module")
def golden(root):
    with np.load(root / "tests" / "golden" / "methods" / "ggml.npz") as file:
        return dict(file)


def codes(w, kind: str, **options):
    """The leaf of a quantized weight."""
    q = quantize(w, Ggml(kind), GGML(), **options)
    assert isinstance(q, GgmlTensor)
    assert q.shape == w.shape
    return q.codes


@pytest.mark.parametrize("case", ["plain", "imatrix"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_blocks_equal_those_of_llama_cpp(golden, kind, case):
    imatrix = golden["imatrix"][:, None] if case == "imatrix" else None
    if f"{kind}/{case}" not in golden:
        assert ENCODERS[kind].needy
        return
    got = np.array(encoded(kind, golden["x"].T, imatrix).T)
    expected = golden[f"{kind}/{case}"]
    if kind == "iq3_s":  # llama.cpp misplaces groups that follow one of zeros
        size = TYPES[kind].bytes
        got[5, :size] = expected[5, :size]
    np.testing.assert_array_equal(got, expected)


def test_groups_after_one_of_zeros_are_in_their_place(golden):
    x = golden["x"].T
    assert not x[32:64, 5].any()
    got = encoded("iq3_s", x, None)[: TYPES["iq3_s"].bytes, 5:6]
    miss = TYPES["iq3_s"].decode(got) - x[:256, 5:6]
    assert np.linalg.norm(miss) < 0.2 * np.linalg.norm(x[:256, 5])


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_know_the_blocks_of_their_types(kind):
    assert ENCODERS[kind].elements == TYPES[kind].elements


@pytest.mark.parametrize("chunk", [1, 100, 2048])
def test_chunks_do_not_matter(golden, chunk):
    x, imatrix = golden["x"].T, golden["imatrix"][:, None]
    got = encoded("q4_0", x, imatrix, chunk=chunk)
    np.testing.assert_array_equal(got.T, golden["q4_0/imatrix"])


def test_importance_may_differ_by_output(golden):
    x, imatrix = golden["x"].T, golden["imatrix"][:, None]
    wide = np.broadcast_to(imatrix, x.shape) * np.array([1, 4] * 4 + [1], np.float32)
    got = encoded("q5_1", x, wide)
    np.testing.assert_array_equal(got.T, golden["q5_1/imatrix"])


def test_statistics_are_the_imatrix(golden):
    w, imatrix = golden["x"].T, golden["imatrix"]
    s = Statistics.zeros(512)
    s = Statistics(s.count + 4, s.total, s.size, jnp.asarray(imatrix) * 4, s.peak)
    np.testing.assert_array_equal(
        codes(w, "q4_0", statistics=s).T, golden["q4_0/imatrix"]
    )
    unseen = codes(w, "q4_0", statistics=Statistics.zeros(512))
    ones = codes(w, "q4_0", importance=jnp.ones((512, 1)))
    np.testing.assert_array_equal(unseen, ones)


def test_leading_axes_are_batched(golden):
    w = golden["x"].T
    stacked = np.stack([w, 2 * w, -w]).reshape(3, 1, *w.shape)
    found = codes(stacked, "q8_0")
    for one, expected in zip(stacked[:, 0], found[:, 0], strict=True):
        np.testing.assert_array_equal(codes(one, "q8_0"), expected)


def test_weights_of_inputs_that_are_always_zero_survive(rng):
    w = rng.standard_normal((256, 2)).astype(np.float32)
    importance = np.ones((256, 1), np.float32)
    importance[16:48] = 0
    q = quantize(w, Ggml("q6_k"), GGML(), importance=importance)
    np.testing.assert_allclose(q.dequantize(), w, atol=0.1)


def test_scales_stay_finite():
    w = np.full((32, 1), 1e9, np.float32)
    q = quantize(w, Ggml("q8_0"), GGML())
    np.testing.assert_array_equal(q.dequantize(), 127 * 65504.0)


def test_refusals(rng):
    w = rng.standard_normal((256, 2)).astype(np.float32)
    with pytest.raises(SpecError, match=r"makes llama\.cpp's blocks, got int4-g32"):
        quantize(w, Int(4, 32), GGML())
    with pytest.raises(SpecError, match=r"iq2_xs needs an imatrix, as in llama\.cpp"):
        quantize(w, Ggml("iq2_xs"), GGML())
    with pytest.raises(SpecError, match="mode is 'better', expected one of 'llamacpp'"):
        GGML(mode="better")


def test_description_round_trips():
    assert method_from_dict(GGML().to_dict()) == GGML()
