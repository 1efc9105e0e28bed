"""Too few tokens: when a Hessian is not used, what is done instead, and why."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.formats import Additive, Int, KMeans, Trellis
from qjax.methods import (
    AQLM,
    AWQ,
    GPTQ,
    HQQ,
    RTN,
    Lloyd,
    SmoothQuant,
    Statistics,
    TrellisLDLQ,
    quantize,
)
from qjax.methods.fallback import choose, equal_inputs

from .calibrated import statistics_of

FMT = Int(3, 32, symmetric=False)


def tokens(count, features=16):
    zeros = Statistics.zeros(features, hessian=True)
    return zeros.add(jnp.ones((count, features), jnp.float32))


@pytest.mark.parametrize(
    ("method", "fmt", "count", "chosen", "reason"),
    [
        (GPTQ(), FMT, 16, GPTQ(), ""),
        (
            GPTQ(),
            FMT,
            15,
            RTN("mse"),
            "15 calibration tokens for 16 inputs; rtn-mse instead",
        ),
        (
            AWQ(GPTQ()),
            FMT,
            1,
            RTN("mse"),
            "1 calibration token for 16 inputs; rtn-mse instead",
        ),
        (
            GPTQ(),
            FMT,
            0,
            RTN("mse"),
            "no calibration token reached it; rtn-mse instead",
        ),
        (SmoothQuant(), FMT, 1, SmoothQuant(), ""),  # sums alone
        (HQQ(), FMT, 0, HQQ(), ""),
        (
            TrellisLDLQ(),
            Trellis(2),
            3,
            TrellisLDLQ(),
            "3 calibration tokens for 16 inputs; trellis without them instead",
        ),
        (
            AQLM(),
            Additive(1, 8, 8),
            0,
            AQLM(),
            "no calibration token reached it; aqlm with equal inputs instead",
        ),
        (
            Lloyd(feedback=True),
            KMeans(2),
            2,
            Lloyd(feedback=True),
            "2 calibration tokens for 16 inputs; lloyd-feedback with equal inputs "
            "instead",
        ),
    ],
    ids=lambda v: getattr(v, "name", None),
)
def test_the_rule(method, fmt, count, chosen, reason):
    found = choose(method, fmt, tokens(count))
    assert (found.method, found.reason) == (chosen, reason)
    if fmt is not FMT:
        w = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)
        q = quantize(w, fmt, found.method, statistics=found.statistics)
        assert np.linalg.norm(q.dequantize() - w) < 0.6 * np.linalg.norm(w)


def test_sums_alone_are_not_called_too_few():
    sums = Statistics.zeros(16).add(jnp.ones((3, 16), jnp.float32))
    found = choose(TrellisLDLQ(), Trellis(2), sums)
    assert found.statistics is sums and not found.reason


def test_equal_inputs_keep_the_fields():
    some = tokens(3)
    equal = equal_inputs(some)
    assert jax.tree.structure(equal) == jax.tree.structure(some)
    np.testing.assert_array_equal(equal.hessian, np.eye(16))
    assert float(equal.count) == 16


def test_few_tokens_fit_themselves_and_many_all(rng):
    """The measurement behind the rule, small: error on tokens not calibrated on."""
    w = rng.standard_t(5, size=(64, 32)).astype(np.float32)
    # A mild spectrum, as behind a norm.
    mix = rng.normal(size=(64, 64)) * np.geomspace(1, 0.3, 64)[:, None]
    x = (rng.normal(size=(4096, 64)) @ mix).astype(np.float32)
    held = x[2048:]

    def error(q):
        return float(np.sum(np.square(held @ (np.asarray(q.dequantize()) - w))))

    plain = error(quantize(w, FMT, RTN("mse")))
    found = [
        error(quantize(w, FMT, GPTQ(), statistics=statistics_of(x[:count]))) / plain
        for count in (32, 2048)
    ]
    assert found[0] > 1.2 and found[1] < 0.9
