"""Bits-per-weight arithmetic, exact: the textbook cases, and odd sizes."""

from fractions import Fraction as F
from math import ceil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.formats import FP8, MXFP4, MXFP8, NF4, NVFP4, Cast, Int
from qjax.methods import quantize

BIG = (8192, 28672)
N = BIG[0] * BIG[1]

TEXTBOOK = {
    "4 bits and two float32 per 64": (Int(4, 64, symmetric=False), F(5)),
    "absmax float32 per 64": (NF4(64), F(9, 2)),
    "double quantization": (
        NF4(64, double=True),
        4 + F(8, 64) + F(32, 64 * 256) + F(32, N),
    ),
    "4 bits and float16 per 128": (Int(4, 128, scale_dtype="float16"), F(33, 8)),
    "4 bits, float16 scale, 8-bit zero per 128": (
        Int(4, 128, symmetric=False, scale_dtype="float16", zero_dtype="uint8"),
        4 + F(16 + 8, 128),
    ),
    "3 bits and bfloat16 per 64": (Int(3, 64, scale_dtype="bfloat16"), F(13, 4)),
    "5 bits per channel": (Int(5, "channel"), 5 + F(32, BIG[0])),
    "8 bits per tensor": (Int(8, "tensor"), 8 + F(32, N)),
    "scales in 8 bits": (
        Int(4, 64, scale_dtype="uint8"),
        4 + F(8, 64) + F(32, 64 * 256),
    ),
    "fp8 blocks": (FP8(granularity="block"), 8 + F(32, 128 * 128)),
    "mxfp4": (MXFP4(), F(17, 4)),
    "mxfp8": (MXFP8(), F(33, 4)),
    "nvfp4": (NVFP4(), F(9, 2) + F(32, N)),
    "bfloat16": (Cast("bfloat16"), F(16)),
}


@pytest.mark.parametrize("case", TEXTBOOK)
def test_textbook(case):
    """By shape alone: a 235M-weight matrix, and nothing is allocated."""
    fmt, want = TEXTBOOK[case]
    w = jax.ShapeDtypeStruct(BIG, jnp.float32)
    q = jax.eval_shape(lambda w: quantize(w, fmt), w)
    assert F(8 * q.nbytes, q.size) == want
    assert q.bits_per_weight == pytest.approx(float(want), abs=1e-12)


def test_double_quantization_costs_0_127_bits():
    assert float(TEXTBOOK["double quantization"][1]) == pytest.approx(4.127, abs=5e-4)


def nf4_bytes(rows: int, cols: int, block: int = 64) -> int:
    blocks = ceil(rows * cols / block)
    return ceil(rows * cols / 2) + blocks + 4 * ceil(blocks / 256) + 4


ODD = {
    "int4": (Int(4, 64), lambda r, c: ceil(r / 2) * c + 4 * ceil(r / 64) * c),
    "int3": (Int(3, 64), lambda r, c: ceil(r / 8) * 3 * c + 4 * ceil(r / 64) * c),
    "int8": (Int(8, "channel"), lambda r, c: r * c + 4 * c),
    "nf4": (NF4(64, double=True), nf4_bytes),
    "nvfp4": (NVFP4(), lambda r, c: ceil(r / 2) * c + ceil(r / 16) * c + 4),
    "fp8": (
        FP8(granularity="block"),
        lambda r, c: r * c + 4 * ceil(r / 128) * ceil(c / 128),
    ),
}


@pytest.mark.parametrize("shape", [(129, 7), (255, 3)])
@pytest.mark.parametrize("case", ODD)
def test_bytes_of_odd_sizes(case, shape):
    fmt, formula = ODD[case]
    q = quantize(np.ones(shape, np.float32), fmt)
    assert q.nbytes == formula(*shape)
    assert sum(np.asarray(x).nbytes for x in jax.tree.leaves(q)) == q.nbytes
