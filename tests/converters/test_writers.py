"""Layers of GPTQ, AWQ and bitsandbytes, written as they were read."""

import json

import numpy as np
import pytest

import qjax
from qjax.converters.awq import AWQ, AWQWriter
from qjax.converters.bitsandbytes import BitsAndBytes, BitsAndBytesWriter
from qjax.converters.gptq import GPTQ, GPTQWriter
from qjax.errors import UnsupportedError
from qjax.formats import FP4, NF4, Int
from qjax.wrappers import Permuted, RoundedInputs

from .packers import awq_words, dense, words

ROWS, COLS, GROUP = 96, 64, 32
INDEX = np.arange(ROWS) // GROUP


def same(made, parts) -> None:
    assert sorted(made) == sorted(parts)
    for name, leaf in parts.items():
        assert made[name].dtype == leaf.dtype and made[name].shape == leaf.shape, name
        np.testing.assert_array_equal(made[name], leaf)


def gptq_parts(bits, shift, index=INDEX, group=GROUP, symmetric=False):
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (ROWS, COLS))
    scales = rng.uniform(0.01, 0.1, (-(-ROWS // group), COLS)).astype(np.float16)
    zeros = rng.integers(shift, 2**bits, scales.shape)
    zeros = np.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros
    parts = {
        "qweight": words(codes, bits, 0),
        "qzeros": words(zeros - shift, bits, 1),
        "scales": scales,
        "g_idx": index.astype(np.int32),
    }
    return parts, dense(codes, scales, zeros, index)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_again(bits, layout, order, symmetric):
    index = np.random.default_rng(0).permutation(INDEX) if order else INDEX
    shift = int(layout == "gptq")
    parts, _ = gptq_parts(bits, shift, index, symmetric=symmetric)
    settings = {"bits": bits, "group_size": GROUP, "checkpoint_format": layout}
    q = GPTQ(settings, "here").read(parts, "here: a.b")
    writer = GPTQWriter(layout)
    same(writer.write(q, "there: a.b"), parts)
    found = writer.settings(["lm_head"])
    assert {k: found[k] for k in settings} == settings
    assert found["sym"] == symmetric and found["desc_act"] == order
    assert found["dynamic"] == {"-:^lm_head$": {}}


def test_settings_of_gptq_layers_that_differ():
    writer, read = GPTQWriter(), {}
    for layer, bits, group in (("a", 4, 32), ("b.c", 4, 32), ("b.d", 8, ROWS)):
        parts, read[layer] = gptq_parts(bits, 1, np.arange(ROWS) // group, group)
        own = {"bits": bits, "group_size": group}
        same(writer.write(GPTQ(own, "x").read(parts, "x"), f"there: {layer}"), parts)
    settings = writer.settings([])
    assert settings["bits"] == 4 and settings["group_size"] == 32
    override = {"bits": 8, "group_size": -1, "sym": False}
    assert settings["dynamic"] == {r"+:^b\.d$": override}
    again = GPTQ(settings, "there").read(parts, "there: b.d")
    np.testing.assert_array_equal(again.dequantize("float32"), read["b.d"])


def awq_parts():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (ROWS, COLS))
    scales = rng.uniform(0.01, 0.1, (3, COLS)).astype(np.float16)
    zeros = rng.integers(1, 16, scales.shape)
    parts = {"qweight": awq_words(codes), "qzeros": awq_words(zeros), "scales": scales}
    return parts, dense(codes, scales, zeros, INDEX)


def test_awq_again_and_as_gptq():
    parts, want = awq_parts()
    settings = {"bits": 4, "group_size": GROUP, "version": "gemm"}
    q = AWQ(settings, "here").read(parts, "here: a")
    writer = AWQWriter()
    same(writer.write(q, "there: a"), parts)
    assert writer.settings([])["group_size"] == GROUP
    for layout in ("gptq", "gptq_v2"):
        writer = GPTQWriter(layout)
        made = writer.write(q, "there: a")
        again = GPTQ(writer.settings([]), "there").read(made, "there: a")
        np.testing.assert_array_equal(again.dequantize("float32"), want)
        same(AWQWriter().write(again, "there: a"), parts)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(128, 24), (33, 7)])
@pytest.mark.parametrize("fmt", [NF4, FP4])
def test_four_bits_of_bitsandbytes(fmt, shape, nested, rng):
    w = rng.normal(size=shape).astype(np.float32)
    q = qjax.quantize(w, fmt(block=64, double=nested))
    writer = BitsAndBytesWriter()
    parts = dict(writer.write(q, "there: a"))
    again = BitsAndBytes({}, "there").read(parts, "there: a")
    np.testing.assert_array_equal(again.dequantize(), q.dequantize())
    same(BitsAndBytesWriter().write(again, "there: a"), parts)
    settings = writer.settings(["lm_head"])
    kind = fmt.__name__.lower()
    assert settings["bnb_4bit_quant_type"] == kind and settings["load_in_4bit"]
    assert settings["bnb_4bit_use_double_quant"] == nested
    assert settings["llm_int8_skip_modules"] == ["lm_head"]
    state = json.loads(parts[f"weight.quant_state.bitsandbytes__{kind}"].tobytes())
    assert state["shape"] == list(shape[::-1]) and state["blocksize"] == 64


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_eight_bits_of_bitsandbytes(dtype, rng):
    codes = rng.integers(-127, 128, (500, 48), dtype=np.int8)
    absmax = np.abs(rng.normal(size=500) * 10).astype(dtype).astype(np.float32)
    absmax[:4] = [1.98828125, 1.9921875, 3.984375, 1000]  # near 2: two x per x / 127
    parts = {"weight": codes, "SCB": absmax, "weight_format": np.zeros((), np.uint8)}
    q = BitsAndBytes({}, "here").read(parts, "here: a")
    writer = BitsAndBytesWriter()
    made = writer.write(q, "there: a")
    if dtype == "float16":  # of what people have: bit for bit
        same(made, parts)
    again = BitsAndBytes({}, "there").read(made, "there: a")
    np.testing.assert_array_equal(again.dequantize(), q.dequantize())
    same(writer.write(RoundedInputs(q), "there: b"), made)
    assert writer.settings([])["load_in_8bit"]


def permuted(q):
    return Permuted(q, np.arange(q.shape[0], dtype=np.int32)[::-1].copy())


HALF = {"scale_dtype": "float16"}
ASYMMETRIC = {"symmetric": False, "zero_dtype": "uint8", **HALF}


@pytest.mark.parametrize(
    ("writer", "fmt", "change", "message"),
    [
        (GPTQWriter, Int(5, 32, **HALF), None, "has 5 bits; this layout holds 2, 3"),
        (GPTQWriter, Int(4, 32), None, "scales of float32"),
        (GPTQWriter, NF4(32), None, "holds integers with groups along `in`"),
        (GPTQWriter, Int(4, 32, axis="out", **HALF), None, "groups along `in`"),
        (GPTQWriter, Int(4, 32, **ASYMMETRIC), None, "whole numbers from 1 to 16"),
        (GPTQWriter, Int(4, 32, **HALF), RoundedInputs, "holds integers"),
        (AWQWriter, Int(3, 32, **ASYMMETRIC), None, "has 3 bits; this layout holds 4"),
        (AWQWriter, Int(4, 32, **ASYMMETRIC), permuted, "groups out of order"),
        (BitsAndBytesWriter, Int(4, 32), None, "holds NF4, FP4 and int8"),
        (BitsAndBytesWriter, NF4(32), permuted, "holds NF4, FP4 and int8"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused(writer, fmt, change, message, rng):
    w = np.abs(rng.normal(size=(64, 32))).astype(np.float32)  # zero-points of 0
    q = qjax.quantize(w, fmt)
    q = q if change is None else change(q)
    with pytest.raises(UnsupportedError, match=rf"there: a: .*{message}"):
        writer().write(q, "there: a")


def test_layers_that_one_checkpoint_cannot_hold_together(rng):
    w = rng.normal(size=(64, 32)).astype(np.float32)
    writer = AWQWriter()
    writer.write(qjax.quantize(w, Int(4, 32, **HALF)), "there: a")
    with pytest.raises(
        UnsupportedError,
        match="b: has groups of 64, which makes groups of 32, 64 in all",
    ):
        writer.write(qjax.quantize(w, Int(4, "channel", **HALF)), "there: b")
    writer = BitsAndBytesWriter()
    writer.write(qjax.quantize(w, NF4(32)), "there: a")
    with pytest.raises(UnsupportedError, match="b: is fp4, other layers are not"):
        writer.write(qjax.quantize(w, FP4(32)), "there: b")
    with pytest.raises(UnsupportedError, match="does not fill whole 32-bit words"):
        GPTQWriter().write(qjax.quantize(w[:, :31], Int(3, 32, **HALF)), "there: c")
