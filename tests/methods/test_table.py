"""One table: every method on every format, or an error that says why not.

What each pair must hold: finite values of the weight's shape, the format that was asked
for, an output error of correlated inputs that is not far above plain rounding's, and
the same bytes again from the same inputs.
"""

import jax
import numpy as np
import pytest

from qjax.errors import SpecError
from qjax.formats import (
    FP4,
    FP8,
    MXFP4,
    MXFP8,
    NF4,
    NVFP4,
    Additive,
    Cast,
    Int,
    KMeans,
    Trellis,
)
from qjax.methods import (
    AQLM,
    AWQ,
    GPTAQ,
    GPTQ,
    HQQ,
    LDLQ,
    RTN,
    LLMInt8,
    Lloyd,
    LowRankRepair,
    Qronos,
    Rotate,
    RoundInputs,
    SignRound,
    SmoothQuant,
    SpQR,
    TrellisLDLQ,
    method_from_dict,
    quantize,
)

from .calibrated import correlated, output_error, statistics_of

ROWS, COLS = 128, 32

FORMATS = {
    "int8-channel": Int(8, "channel"),
    "int4-group": Int(4, 32),
    "int3-asymmetric": Int(3, 32, symmetric=False, zero_dtype="uint8"),
    "nf4": NF4(32),
    "nf4-double": NF4(32, double=True),
    "fp4": FP4(32),
    "fp8": FP8(),
    "mxfp4": MXFP4(),
    "mxfp8": MXFP8(),
    "nvfp4": NVFP4(),
    "bfloat16": Cast("bfloat16"),
    "kmeans3": KMeans(3),
    "additive": Additive(1, 8, 8),
    "trellis3": Trellis(3),
}
METHODS = {
    "rtn": RTN("mse", grid=8),
    "hqq": HQQ(),
    "gptq": GPTQ(act_order="group", range="hessian"),
    "gptaq": GPTAQ(),
    "qronos": Qronos(),
    "ldlq": LDLQ(),
    "spqr": SpQR(),
    "awq": AWQ(grid=3),
    "smoothquant": SmoothQuant(),
    "rotated-gptq": Rotate(GPTQ()),
    "llm-int8": LLMInt8(),
    "round-inputs": RoundInputs(),
    "low-rank": LowRankRepair(RTN(), rank=4),
    "signround": SignRound(steps=8),
    "lloyd": Lloyd(),
    "aqlm": AQLM(),
    "trellis-ldlq": TrellisLDLQ(),
}
GRIDS = [name for name in FORMATS if name not in ("kmeans3", "additive", "trellis3")]
TAKES = dict.fromkeys(METHODS, GRIDS) | {
    "hqq": ["int8-channel", "int4-group", "int3-asymmetric"],
    "spqr": ["int3-asymmetric"],
    "signround": [n for n in GRIDS if n not in ("fp8", "mxfp8", "bfloat16")],
    "lloyd": ["kmeans3"],
    "aqlm": ["additive"],
    "trellis-ldlq": ["trellis3"],
}
# What plain rounding is compared on, where it has no codes of its own.
PEERS = {"kmeans3": Int(3), "additive": Int(1, 16), "trellis3": Int(3, 32)}


@pytest.fixture(scope="module")
def problem():
    """Inputs before and after an earlier layer drifted, a weight, their statistics."""
    rng = np.random.default_rng(0)
    x = correlated(rng, ROWS)
    drifted = x + 0.02 * correlated(rng, ROWS)
    w = rng.normal(size=(ROWS, COLS)).astype(np.float32)
    return x, drifted, w, statistics_of(drifted, x)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("method", METHODS)
def test_pair(method, fmt, problem):
    x, drifted, w, statistics = problem
    chosen = METHODS[method]
    if fmt not in TAKES[method]:
        with pytest.raises(SpecError, match=r"use |with |expected |encodes |fits "):
            quantize(w, FORMATS[fmt], chosen, statistics=statistics)
        return
    q = quantize(w, FORMATS[fmt], chosen, statistics=statistics)
    again = quantize(
        w, FORMATS[fmt], method_from_dict(chosen.to_dict()), statistics=statistics
    )
    for a, b in zip(jax.tree.leaves(q), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    assert q.shape == w.shape and q.dtype == "float32"
    plain = quantize(w, PEERS.get(fmt, FORMATS[fmt]), RTN())
    got, bar = (output_error(drifted, w, made, x) for made in (q, plain))
    assert got <= 1.02 * bar
