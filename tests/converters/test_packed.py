"""Packed layers of foreign checkpoints, decoded to what their formats define."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as settings_of_tests
from hypothesis import strategies as st

from qjax.converters.awq import AWQ
from qjax.converters.bitsandbytes import BitsAndBytes
from qjax.converters.compressed_tensors import FORMATS, CompressedTensors
from qjax.converters.gptq import GPTQ
from qjax.converters.packed import check_parts
from qjax.errors import FormatError, QjaxError, UnsupportedError
from qjax.formats import Int
from qjax.wrappers import Permuted, RoundedInputs

from .packers import awq_words, dense, whole_codes, words

ROWS, COLS, GROUP = 96, 64, 32
TRIVIAL = np.arange(ROWS) // GROUP


def draw(bits: int, symmetric: bool = False, groups: int = ROWS // GROUP):
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (ROWS, COLS))
    scales = rng.uniform(0.01, 0.1, (groups, COLS)).astype(np.float16)
    zeros = rng.integers(1, 2**bits + 1, scales.shape)
    return codes, scales, np.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros


def equal(q, want) -> None:
    np.testing.assert_array_equal(np.asarray(q.dequantize("float32")), want)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("order", ["none", "trivial", "activation"])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(bits, layout, order, symmetric):
    codes, scales, zeros = draw(bits, symmetric)
    if layout == "gptq_v2":
        zeros = np.minimum(zeros, 2**bits - 1)
    index = TRIVIAL
    if order == "activation":
        index = np.random.default_rng(1).permutation(TRIVIAL)
    settings = {"bits": bits, "group_size": GROUP, "checkpoint_format": layout}
    parts = {
        "qweight": words(codes, bits, 0),
        "qzeros": words(zeros - (layout == "gptq"), bits, 1),
        "scales": scales,
        "g_idx": index.astype(np.int32),
    }
    if order == "none":
        del parts["g_idx"]
    reader = GPTQ(settings, "here")
    assert reader.shape(parts) == (COLS, ROWS)
    q = reader.read(parts, "here: layer")
    equal(q, dense(codes, scales, zeros, index))
    assert isinstance(q, Permuted) == (order == "activation")
    assert isinstance(q.format, Int) and q.format.symmetric == symmetric
    assert q.dtype == "float16"


def test_gptq_golden_words():
    ramp = np.arange(32).reshape(32, 1) % 8
    assert [hex(w) for w in words(ramp, 3, 0)[:, 0].view(np.uint32)] == [
        "0x88fac688",
        "0xc688fac6",
        "0xfac688fa",
    ]
    assert hex(words(ramp, 4, 0).view(np.uint32)[0, 0]) == "0x76543210"
    assert hex(awq_words(ramp[:8].T)[0, 0]) == "0x75316420"


def test_gptq_without_groups_and_negative_indices():
    codes, scales, zeros = draw(4, groups=1)
    parts = {
        "qweight": words(codes, 4, 0),
        "qzeros": words(zeros - 1, 4, 1),
        "scales": scales,
        "g_idx": np.full(ROWS, -1, np.int32),
    }
    q = GPTQ({"bits": 4, "group_size": -1}, "here").read(parts, "here: layer")
    equal(q, dense(codes, scales, zeros, np.zeros(ROWS, int)))
    assert isinstance(q.format, Int) and q.format.group == "channel"


def test_awq():
    codes, scales, zeros = draw(4)
    zeros = np.minimum(zeros, 15)
    parts = {
        "qweight": awq_words(codes),
        "qzeros": awq_words(zeros),
        "scales": scales,
    }
    reader = AWQ({"bits": 4, "group_size": GROUP, "version": "GEMM"}, "here")
    assert reader.shape(parts) == (COLS, ROWS)
    equal(reader.read(parts, "here: layer"), dense(codes, scales, zeros, TRIVIAL))


def settings(bits: int, **more) -> dict:
    weights = {"num_bits": bits, "type": "int", "group_size": GROUP}
    group = {"targets": ["Linear"], "weights": weights, **more}
    return {"format": "pack-quantized", "config_groups": {"group_0": group}}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
def test_compressed_integers(bits, symmetric, old):
    codes, scales, zeros = draw(bits, symmetric)
    zeros = np.minimum(zeros, 2**bits - 1)
    pack = whole_codes if old else lambda codes, bits: words(codes, bits, 0)
    parts = {
        "weight_packed": pack(codes, bits).T,
        "weight_scale": scales.T,
        "weight_shape": np.array([COLS, ROWS]),
    }
    if not symmetric:
        parts["weight_zero_point"] = pack(zeros.T, bits)
    reader = CompressedTensors(settings(bits), "here")
    assert reader.shape(parts) == (COLS, ROWS)
    q = reader.read(parts, "here: layer")
    equal(q, dense(codes, scales, zeros, TRIVIAL))


def test_the_closest_target_decides():
    schemes = {"b": ["Linear"], "c": ["re:.*down.*"], "d": ["layers.1.mlp.down_proj"]}
    groups = {
        name: {"targets": targets, "weights": {"num_bits": bits, "group_size": GROUP}}
        for bits, (name, targets) in enumerate(schemes.items(), 2)
    }
    config = {"format": "pack-quantized", "config_groups": groups}
    reader = CompressedTensors(config, "here")
    for layer, bits in (
        ("layers.0.mlp.up_proj", 2),
        ("layers.0.mlp.down_proj", 3),
        ("model.layers.1.mlp.down_proj", 4),
    ):
        codes, scales, zeros = draw(bits, True)
        parts = {
            "weight_packed": words(codes, bits, 0).T,
            "weight_scale": scales.T,
            "weight_shape": np.array([COLS, ROWS]),
        }
        q = reader.read(parts, f"here: {layer}")
        equal(q, dense(codes, scales, zeros, TRIVIAL))
    del groups["b"]
    with pytest.raises(FormatError, match="no target of config_groups names it"):
        CompressedTensors(config, "here").read(parts, "here: layers.0.attn.q_proj")


@pytest.mark.parametrize("dynamic", [True, False])
def test_rounded_activations_come_along(dynamic):
    codes, scales, _ = draw(8, groups=1)
    scheme = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": dynamic}
    config = settings(8, input_activations=scheme)
    config["format"] = "int-quantized"
    del config["config_groups"]["group_0"]["weights"]["group_size"]
    parts = {
        "weight": (codes - 128).astype(np.int8).T,
        "weight_scale": scales.T,
        "input_scale": np.array([0.5], np.float16),
    }
    q = CompressedTensors(config, "here").read(parts, "here: layer")
    equal(q, (codes - 128) * scales.astype(np.float32))
    assert isinstance(q, RoundedInputs)
    assert (q.scale is None) if dynamic else (float(q.scale) == 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qweight": np.zeros((12, 63), np.int32)}, "scales have shape"),
        ({"qzeros": np.zeros((3, 7), np.int32)}, "fewer than 64 zero-points"),
        ({"scales": np.ones((2, 64), np.float16)}, "zero-points have shape"),
        ({"g_idx": np.zeros(96, np.int32)}, "expected 3 groups of 32 inputs"),
    ],
)
def test_parts_that_do_not_fit(change, message):
    codes, scales, zeros = draw(4)
    parts = {
        "qweight": words(codes, 4, 0),
        "qzeros": words(zeros - 1, 4, 1),
        "scales": scales,
        "g_idx": TRIVIAL.astype(np.int32),
    }
    reader = GPTQ({"bits": 4, "group_size": GROUP}, "here")
    with pytest.raises(FormatError, match=rf"here: layer.*{message}"):
        reader.read(parts | change, "here: layer")


@pytest.mark.parametrize(
    ("reader", "config", "message"),
    [
        (GPTQ, {"bits": 4, "checkpoint_format": "bitblas"}, "'bitblas' is not read"),
        (GPTQ, {"bits": 4, "pack_dtype": "int16"}, "words of 'int16' are not read"),
        (GPTQ, {"bits": 9}, "bits is 9, expected 2, 3, 4, 5, 6, 7 or 8"),
        (AWQ, {"bits": 4, "version": "x"}, "version 'x' with 4 bits"),
        (AWQ, {"bits": 8}, "version 'gemm' with 8 bits"),
        (CompressedTensors, {}, "no config_groups"),
        (CompressedTensors, {"format": "sparse", "config_groups": {"a": {}}}, "sparse"),
    ],
)
def test_settings_that_are_not_read(reader, config, message):
    with pytest.raises((FormatError, UnsupportedError), match=message):
        reader(config, "here")


SIZES = st.sampled_from([0, 1, 3, 8, 12, 64, 96])


@settings_of_tests(max_examples=60, derandomize=True, deadline=None)
@given(
    reader=st.sampled_from([GPTQ, AWQ, CompressedTensors, BitsAndBytes]),
    bits=st.sampled_from([2, 3, 4, 8, 0, -1, "4", None, [4]]),
    group=st.sampled_from([32, -1, 0, "g", None, 10**9]),
    data=st.data(),
)
def test_parts_of_any_shape_give_a_tensor_or_a_clear_error(reader, bits, group, data):
    weights = {"num_bits": bits, "group_size": group}
    config = {"bits": bits, "group_size": group, "format": None}
    if reader is CompressedTensors:
        config["format"] = data.draw(st.sampled_from(FORMATS))
        any_of = st.sampled_from([weights, None, [1], "x"])
        scheme = {"weights": weights, "targets": ["Linear"]}
        scheme[data.draw(st.sampled_from(["weights", "other"]))] = data.draw(any_of)
        config["config_groups"] = {"a": scheme}
    rng, parts = np.random.default_rng(0), {}
    for name, (kind, rank) in reader.parts.items():
        if data.draw(st.integers(0, 9), name):
            shape = [data.draw(SIZES) for _ in range(rank or 2)]
            values = rng.integers(0, 100, shape)
            parts[name] = values.astype({"floating": "float16"}.get(kind, "int32"))
    state = {"shape": [data.draw(SIZES), data.draw(SIZES)], "blocksize": group}
    for name in reader.stated if reader is BitsAndBytes else ():
        parts[name] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    try:
        check_parts(reader, parts, "here: layer")
        q = reader(config, "here").read(parts, "here: layer")
    except (QjaxError, KeyError) as error:  # PackedCheckpoint names missing parts
        assert str(error)
    else:
        assert q.dequantize("float32").shape == q.shape
