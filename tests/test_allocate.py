"""Mixed precision: the optimum under a budget, ties between kernels, messages."""

import itertools
import json

import numpy as np
import pytest

import qjax
from qjax.allocate import allocate
from qjax.budget import solve
from qjax.errors import SpecError
from qjax.evaluate import evaluate
from qjax.methods import HQQ, RTN
from qjax.sensitivity import distortion


@pytest.fixture(scope="module")
def bundled(model_path):
    return qjax.load(model_path)


@pytest.fixture(scope="module")
def tokens(bundled, calibration_text):
    ids = bundled[1].encode(calibration_text, add_special_tokens=False)
    return np.asarray(ids[: 4 * 128], np.int32).reshape(4, 128)


def test_solve_finds_the_optimum(rng):
    for _ in range(20):
        bits = rng.integers(1, 9, (5, 3)).astype(float)
        loss = rng.random((5, 3))
        budget = int(rng.integers(int(bits.min(1).sum()), 40))
        picked = solve(bits, loss, budget)
        rows = np.arange(5)
        assert bits[rows, picked].sum() <= budget
        best = min(
            loss[rows, list(ks)].sum()
            for ks in itertools.product(range(3), repeat=5)
            if bits[rows, list(ks)].sum() <= budget
        )
        assert loss[rows, picked].sum() == pytest.approx(best)


def test_solve_says_when_the_budget_is_too_small():
    with pytest.raises(SpecError, match=r"smallest candidates need 2\.000 times"):
        solve(np.array([[4.0, 8.0]]), np.array([[1.0, 0.5]]), 2)


def test_distortion_is_the_error_on_gaussian_weights():
    four = distortion(qjax.Int(4, 64, symmetric=False), RTN("mse"))
    three = distortion(qjax.Int(3, 64, symmetric=False), RTN("mse"))
    assert 0.006 < four < 0.0085 and 3 < three / four < 5


@pytest.mark.parametrize("score", ["kl", "gradient"])
def test_allocation_holds_the_budget_and_ties_kernels(bundled, tokens, score):
    model, _ = bundled
    seen = []
    made = allocate(
        model,
        "int4-g64",
        3.5,
        tokens=tokens,
        score=score,
        windows=2,
        progress=lambda *a: seen.append(a),
    )
    assert len(made.units) == 6 * 4
    assert made.units[0].paths == tuple(
        f"layers.0.attn.{n}.kernel" for n in ("q", "k", "v")
    )
    assert 3.2 < made.bits <= 3.5 and len({u.format for u in made.units}) > 1
    packed = qjax.quantize_model(model, made.recipe)
    size = qjax.model_size(packed)
    bits = 8 * size.quantized_bytes / size.quantized_parameters
    assert bits == pytest.approx(made.bits, rel=1e-6)
    assert seen[-1][0] == seen[-1][1]
    assert json.loads(json.dumps(made.to_dict()))["target_bits"] == 3.5


def test_mixed_precision_beats_one_width(bundled, tokens, books_text):
    model, tokenizer = bundled
    made = allocate(model, "hqq-int4-g64", 3.5, tokens=tokens, windows=4)
    ours, uniform = (
        evaluate(
            qjax.quantize_model(model, r),
            tokenizer,
            books_text,
            context=128,
            windows=64,
        )["perplexity"]
        for r in (made.recipe, "hqq-int3-g64")
    )
    assert ours < uniform


def test_candidates_may_mix(bundled, tokens):
    pairs = [(qjax.NF4(), RTN()), (qjax.Int(2, 64, symmetric=False), HQQ())]
    made = allocate(bundled[0], "nf4", 3.6, tokens=tokens, candidates=pairs, windows=1)
    assert {u.format for u in made.units} == {p[0].name for p in pairs}
    assert made.bits <= 3.6


def test_bad_requests(bundled, tokens):
    model, _ = bundled
    with pytest.raises(SpecError, match="has one width only; pass candidates="):
        allocate(model, "nf4", 3.5, tokens=tokens)
    with pytest.raises(SpecError, match="score is 'fisher', expected one of"):
        allocate(model, "int4-g64", 3.5, tokens=tokens, score="fisher")
    keep = qjax.Recipe((qjax.Rule("*", None),), "nothing")
    with pytest.raises(SpecError, match="quantizes no kernel of a layer"):
        allocate(model, keep, 3.5, tokens=tokens)
