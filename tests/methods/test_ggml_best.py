"""Better blocks than llama.cpp's: never more weighted error, and less in the mean."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.converters.gguf_recipe import mixture
from qjax.errors import SpecError
from qjax.formats.ggml import TYPES, Ggml
from qjax.ggml import GgmlTensor
from qjax.methods import prepare, quantize
from qjax.methods.fallback import choose
from qjax.methods.ggml import GGML
from qjax.methods.ggml_best import refined
from qjax.methods.ggml_encode import encode
from qjax.methods.ggml_feedback import fed_back
from qjax.methods.ggml_kinds import BETTER, KINDS, POINTS
from qjax.models import ModelConfig
from qjax.recipes import Recipe, preset, recipe_from_dict

from .calibrated import correlated, statistics_of

encoded = jax.jit(encode, static_argnums=0, static_argnames=("chunk", "best"))
GROUP = {kind: 16 if kind in ("q2_k", "q3_k", "q6_k") else 32 for kind in KINDS}
GROUP |= POINTS


@pytest.fixture(scope="module")
def golden(root):
    with np.load(root / "tests" / "golden" / "methods" / "ggml.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def real(golden):
    return golden["x"].T, golden["imatrix"][:, None]


def by_block(x, size):
    """From `[in, out]` to `[size, blocks, out]`."""
    return jnp.moveaxis(jnp.reshape(x, (-1, size, x.shape[1])), 1, 0)


def decoded(kind, codes):
    """Weights `[in, out]`, float64."""
    t = TYPES[kind]
    blocks = jnp.reshape(codes, (-1, t.bytes, codes.shape[1]))
    return np.asarray(t.decode(blocks), np.float64).reshape(-1, codes.shape[1])


def errors(kind, codes, w, importance):
    """Of all blocks, by the definition of the measure."""
    w = np.asarray(w, np.float64)
    square = (w * w).reshape(-1, GROUP[kind], w.shape[1])
    weight = np.sqrt(square + square.mean(1, keepdims=True)).reshape(w.shape)
    if importance is not None:
        weight = weight * importance
    error = weight * (decoded(kind, codes) - w) ** 2
    return error.reshape(-1, TYPES[kind].elements, w.shape[1]).sum(1)


def outliers(rng, shape):
    """Weights with heavy tails."""
    return (0.02 * rng.standard_t(4, shape)).astype(np.float32)


@pytest.mark.parametrize(
    ("kind", "case"),
    [(kind, "plain") for kind in sorted(KINDS)]
    + [(kind, "imatrix") for kind in ("q2_k", "q3_k", "q4_1", "q5_0")],
)
def test_no_block_gets_worse_and_most_get_better(real, rng, kind, case):
    w = np.concatenate([real[0], outliers(rng, (512, 7))], 1)
    importance = real[1] if case == "imatrix" else None
    old = errors(kind, encoded(kind, w, importance), w, importance)
    new = errors(kind, encoded(kind, w, importance, best=True), w, importance)
    assert (new <= old).all()
    assert new[:, -7:].mean() < 0.995 * old[:, -7:].mean()
    assert (new < old).mean() > 0.4


@pytest.mark.parametrize("kind", ["iq2_xs", "iq3_s"])
def test_blocks_of_points_get_better_steps(golden, kind):
    w, importance = golden["x"].T, golden["imatrix"][:, None]
    old = golden[f"{kind}/imatrix"].T
    blocks = by_block(old, TYPES[kind].bytes)
    new = refined(kind, lambda *_: blocks, by_block(w, 256), by_block(importance, 256))
    np.testing.assert_array_equal(new[2:], blocks[2:])
    new = jnp.moveaxis(new, 0, 1).reshape(old.shape)
    before, after = (errors(kind, b, w, importance) for b in (old, new))
    assert (after <= before).all()
    assert after.sum() < 0.998 * before.sum()


def test_chunks_do_not_matter_and_runs_are_equal(rng):
    w = outliers(rng, (512, 5))
    want = encoded("q4_1", w, best=True)
    np.testing.assert_array_equal(encoded("q4_1", w, best=True), want)
    np.testing.assert_array_equal(encoded("q4_1", w, best=True, chunk=256), want)


@pytest.mark.parametrize("kind", ["q4_k", "q8_0"])
def test_degenerate_blocks_stay_as_good(kind):
    w = np.zeros((512, 3), np.float32)
    w[:, 1] = 1e9
    w[0, 2] = -1e-6
    old, new = (decoded(kind, encoded(kind, w, best=b)) for b in (False, True))
    assert np.isfinite(new).all()
    assert (np.abs(new - w).sum(0) <= np.abs(old - w).sum(0)).all()


def test_blocks_that_are_exact_are_kept():
    codes = np.resize(np.arange(-8, 8, dtype=np.float32), (32, 1))
    blocks = encoded("q4_0", codes)
    np.testing.assert_array_equal(decoded("q4_0", blocks), codes)
    np.testing.assert_array_equal(encoded("q4_0", codes, best=True), blocks)


def test_the_method_takes_the_better_blocks(rng):
    w = outliers(rng, (256, 4))
    q = quantize(w, Ggml("q4_0"), GGML("best"))
    assert isinstance(q, GgmlTensor)
    np.testing.assert_array_equal(q.codes, encoded("q4_0", w, best=True))
    with pytest.raises(
        SpecError, match=r"no better blocks than llama\.cpp's for tq2_0"
    ):
        quantize(w, Ggml("tq2_0"), GGML("best"))


def test_recipes_of_better_blocks(root):
    recipe = preset("q4_k_m-best")
    assert recipe == Recipe((), "q4_k_m-best", mixture="Q4_K_M", best=True)
    assert recipe_from_dict(recipe.to_dict()) == recipe
    assert preset("q4_k_m").to_dict() == {
        "name": "q4_k_m",
        "rules": [],
        "mixture": "Q4_K_M",
    }
    settings = (root / "examples" / "model" / "config.json").read_text()
    config = ModelConfig.from_hf(json.loads(settings))
    old, new = (
        mixture(preset(name), config, imatrix=False).rules
        for name in ("iq3_s", "iq3_s-best")
    )
    assert [rule.format for rule in old] == [rule.format for rule in new]
    for rule in new:
        kind = rule.format.type
        assert rule.method == GGML("best" if kind in BETTER else "llamacpp")
    assert {rule.method.mode for rule in new} == {"best"}
    with pytest.raises(
        SpecError, match=r"mean q4_k_m-best or .*, those of llama\.cpp also with -best"
    ):
        preset("q4_k_m_best")
    with pytest.raises(SpecError, match="best is 'true', expected true with"):
        recipe_from_dict({"rules": [], "best": "true"})
    with pytest.raises(SpecError, match="best is True, expected true with a mixture"):
        recipe_from_dict({"rules": [], "best": True})


@pytest.mark.parametrize(
    ("kind", "share"), [("q2_k", 0.7), ("iq4_xs", 0.7), ("iq3_s", 0.999)]
)
def test_output_errors_of_all_columns_are_lower(golden, rng, kind, share):
    w, old = golden["x"].T, golden[f"{kind}/imatrix"].T
    x = correlated(rng, 512, tokens=1024)
    known = statistics_of(x)
    shared = GGML("best").prepare([], Ggml(kind), known)
    new = jax.jit(fed_back, static_argnums=0)(kind, w, old, shared, known.hessian)
    before, after = (
        np.square(x @ (decoded(kind, blocks) - w)).sum(0) for blocks in (old, new)
    )
    assert (after <= before * (1 + 1e-4)).all()
    assert after.sum() < share * before.sum()


def test_hessians_are_shared_and_few_tokens_leave_the_mean_squares(rng):
    w, fmt, method = outliers(rng, (256, 2)), Ggml("q4_0"), GGML("best")
    known = statistics_of(correlated(rng, 256, tokens=256))
    shared = prepare(method, fmt, [w], known)
    want = quantize(w, fmt, method, statistics=known)
    got = quantize(w, fmt, method, statistics=known, shared=shared)
    np.testing.assert_array_equal(got.dequantize(), want.dequantize())
    assert prepare(GGML(), fmt, [w], known) is None
    few = dataclasses.replace(known, count=known.count - 1)
    found = choose(method, fmt, few)
    assert found.reason == (
        "255 calibration tokens for 256 inputs; ggml-best with the mean squares of "
        "inputs alone"
    )
    assert found.statistics is not None
    assert found.statistics.hessian is None
    assert found.statistics.square is known.square
