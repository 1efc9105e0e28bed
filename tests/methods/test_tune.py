"""Tuning of scales by distillation and by blocks, and sums of squared gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.errors import NonFiniteError, SpecError
from qjax.formats import FP8, MXFP4, NF4, NVFP4, Cast, Int
from qjax.methods import quantize
from qjax.methods.blockscales import tune_block_scales
from qjax.methods.continuous import Continuous
from qjax.methods.fisher import fisher_gradients
from qjax.methods.tune import tune_scales
from qjax.ops import matmul
from qjax.wrappers import InputScaled, LowRank

VOCAB, DIM = 11, 16
FMT = Int(3, 8, symmetric=False, scale_dtype="float16", zero_dtype="float16")


def logits_fn(params, tokens):
    x = jnp.take(params["table"], tokens, axis=0)
    x = x * params["norm"]
    h = x + jnp.tanh(matmul(x, params["up"]))
    return matmul(h, params["head"])


@pytest.fixture
def dense(rng):
    shapes = {"table": (VOCAB, DIM), "up": (DIM, DIM), "head": (DIM, VOCAB)}
    params = {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
    return params | {"norm": np.exp(0.3 * rng.standard_normal(DIM)).astype(np.float32)}


@pytest.fixture
def batches(rng):
    return [rng.integers(0, VOCAB, (3, 5)).astype(np.int32) for _ in range(6)]


def packed_of(dense, stretch=1.0):
    """Two quantized weights whose scales are off by a factor."""
    packed = dict(dense)
    for name in ("up", "head"):
        q = quantize(dense[name], FMT)
        scale = (q.scale.astype(jnp.float32) * stretch).astype(jnp.float16)
        packed[name] = dataclasses.replace(q, scale=scale)
    return packed


def numpy_kl(teacher, student):
    p, q = (np.asarray(x, np.float64) for x in (teacher, student))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    return np.mean(np.sum(np.exp(p) * (p - q), -1))


def test_tuning_undoes_a_wrong_scale(dense, batches):
    packed = packed_of(dense, 1.2)
    calls = []

    def teacher(tokens):
        return logits_fn(dense, tokens)

    tuned, report = tune_scales(
        logits_fn,
        packed,
        batches,
        teacher,
        steps=40,
        lr=0.02,
        held_out=2,
        progress=lambda step, loss: calls.append(step),
    )
    assert calls == list(range(1, 41)) and len(report.training) == 40
    assert [step for step, _ in report.held_out] == [0, 10, 20, 30, 40]
    assert report.best == min(loss for _, loss in report.held_out)
    assert jax.tree.structure(tuned) == jax.tree.structure(packed)
    for old, new in zip(jax.tree.leaves(packed), jax.tree.leaves(tuned), strict=True):
        assert old.dtype == new.dtype and old.shape == new.shape
        if not jnp.issubdtype(old.dtype, jnp.floating):
            np.testing.assert_array_equal(old, new)
    np.testing.assert_array_equal(tuned["norm"], packed["norm"])
    np.testing.assert_array_equal(tuned["table"], packed["table"])
    # Held-out losses are those of the tensors as stored.
    losses = [
        np.mean([numpy_kl(teacher(t), logits_fn(p, t)) for t in batches[-2:]])
        for p in (packed, tuned)
    ]
    np.testing.assert_allclose([report.start, report.best], losses, rtol=1e-3)
    unstretched = np.mean(
        [numpy_kl(teacher(t), logits_fn(packed_of(dense), t)) for t in batches[-2:]]
    )
    assert report.best < min(0.4 * report.start, unstretched)


def test_logits_of_the_teacher_may_be_given(dense, batches):
    packed = packed_of(dense, 1.1)
    targets = [logits_fn(dense, jnp.asarray(t)) for t in batches]
    options = {"steps": 3, "lr": 1e-2, "checks": 1}
    a = tune_scales(logits_fn, packed, batches, targets, **options)
    b = tune_scales(
        logits_fn, packed, batches, lambda t: logits_fn(dense, t), **options
    )
    assert a[1] == b[1]
    np.testing.assert_array_equal(a[0]["up"].scale, b[0]["up"].scale)
    decoded = tune_scales(logits_fn, packed, batches, targets, decoded=True, **options)
    np.testing.assert_allclose(decoded[1].best, a[1].best, rtol=1e-2)


def test_a_hopeless_rate_keeps_every_byte(dense, batches):
    packed = packed_of(dense)
    targets = [logits_fn(dense, jnp.asarray(t)) for t in batches]
    tuned, report = tune_scales(
        logits_fn, packed, batches, targets, steps=2, lr=50.0, checks=1
    )
    assert report.step == 0 and report.best == report.start
    for old, new in zip(jax.tree.leaves(packed), jax.tree.leaves(tuned), strict=True):
        np.testing.assert_array_equal(old, new)


CASES = {
    "int": (Int(4, 8), ["scale"]),
    "asymmetric": (Int(4, 8, symmetric=False), ["scale", "zero"]),
    "integer zeros": (Int(4, 8, symmetric=False, zero_dtype="uint8"), ["scale"]),
    "nested": (NF4(64, double=True), ["scale", "offset"]),
    "e8m0": (MXFP4(), []),
    "e4m3": (NVFP4(), ["global_scale"]),
    "fp8": (FP8(), ["scale"]),
    "cast": (Cast("bfloat16"), []),
}


@pytest.mark.parametrize("case", CASES)
def test_which_leaves_move(rng, case):
    fmt, want = CASES[case]
    q = quantize(rng.standard_normal((64, 4)).astype(np.float32), fmt)
    s = jnp.ones(64, jnp.float32)
    a, b = jnp.ones((64, 2), jnp.float16), jnp.ones((2, 4), jnp.float16)
    params = {
        "w": LowRank(InputScaled(q, s), a, b),
        "norm": s,
        "dense": a,
    }
    split = Continuous.split(params)
    assert sorted(split.kinds) == sorted([*want, "s", "a", "b"])
    moved = Continuous.split(params, vectors=True)
    assert sorted(moved.kinds) == sorted([*want, "s", "a", "b", ""])
    back = split.merge(split.zeros(), stored=True)
    for old, new in zip(jax.tree.leaves(params), jax.tree.leaves(back), strict=True):
        assert old.dtype == new.dtype
        np.testing.assert_array_equal(
            np.asarray(old, np.float32), np.asarray(new, np.float32)
        )


def test_scales_stay_positive_and_finite_in_16_bits():
    q = quantize(np.ones((8, 2), np.float32), Int(4, 8, scale_dtype="float16"))
    scale = jnp.asarray([[6e-5, 6e4]], jnp.float16)
    split = Continuous.split({"w": dataclasses.replace(q, scale=scale)})
    for delta in (-100.0, 100.0):
        moved = split.merge((jnp.full((1, 2), delta),), stored=True)["w"].scale
        assert np.all(np.isfinite(moved)) and np.all(np.asarray(moved) > 0)
    exact = split.merge((jnp.full((1, 2), 0.01),), stored=False)["w"].scale
    stored = split.merge((jnp.full((1, 2), 0.01),), stored=True)["w"].scale
    assert exact.dtype == jnp.float32 and stored.dtype == jnp.float16
    np.testing.assert_array_equal(exact, stored.astype(jnp.float32))


def test_bad_requests(dense, batches):
    packed = packed_of(dense)
    targets = [logits_fn(dense, jnp.asarray(t)) for t in batches]

    def tune(params=packed, data=batches, teacher=targets, **options):
        return tune_scales(logits_fn, params, data, teacher, **options)

    with pytest.raises(SpecError, match="hold no float scales"):
        tune(params=dense)
    with pytest.raises(SpecError, match="steps is 0"):
        tune(steps=0)
    with pytest.raises(SpecError, match="lr is -1"):
        tune(lr=-1)
    with pytest.raises(SpecError, match="6 batches, 6 of them held out"):
        tune(held_out=6)
    with pytest.raises(SpecError, match="5 teacher logits for 6 batches"):
        tune(teacher=targets[1:])
    with pytest.raises(NonFiniteError, match="divergence from the teacher is nan"):
        tune(teacher=[t * jnp.nan for t in targets], steps=1)


def block(weights, x):
    return x + matmul(jnp.tanh(matmul(x, weights["up"])), weights["down"])


def test_block_scales(rng):
    up, down = (rng.standard_normal((DIM, DIM)).astype(np.float32) for _ in range(2))
    x = rng.standard_normal((10, 4, DIM)).astype(np.float32)
    y = x + np.tanh(x @ up) @ down
    packed = packed_of({"up": up, "head": down}, 1.2)
    packed = {"up": packed["up"], "down": packed["head"]}
    tuned, report = tune_block_scales(
        block, packed, x, y, steps=40, lr=0.02, batch=4, held_out=0.2
    )

    def held_out_error(q):
        a, b = (np.asarray(q[k].dequantize(), np.float64) for k in ("up", "down"))
        return np.mean(np.square(x + np.tanh(x @ a) @ b - y)[-2:])

    np.testing.assert_allclose(report.start, held_out_error(packed), rtol=1e-3)
    np.testing.assert_allclose(report.best, held_out_error(tuned), rtol=1e-3)
    assert report.best < 0.5 * report.start
    for name in packed:
        np.testing.assert_array_equal(tuned[name].codes, packed[name].codes)
        assert tuned[name].scale.dtype == jnp.float16
    with pytest.raises(SpecError, match="1 samples, 1 of them held out"):
        tune_block_scales(block, packed, x[:1], y[:1])
    with pytest.raises(SpecError, match="held_out 1"):
        tune_block_scales(block, packed, x, y, held_out=1)
    with pytest.raises(SpecError, match="batch is 0"):
        tune_block_scales(block, packed, x, y, batch=0)


def linear_loss(params, tokens):
    y = jnp.take(params["table"], tokens, axis=0) @ params["w"]
    return 0.5 * jnp.sum(jnp.square(y))


def test_fisher_sums_squares_per_sequence(dense, batches):
    params = {"table": dense["table"], "w": dense["up"], "bias": np.ones(3, np.float32)}
    got = fisher_gradients(linear_loss, params, batches[:2])
    assert set(got) == {"table", "w"}
    want = np.zeros((DIM, DIM))
    for tokens in np.concatenate(batches[:2]):
        x = dense["table"][tokens].astype(np.float64)
        want += np.square(x.T @ (x @ dense["up"]))
    np.testing.assert_allclose(got["w"], want, rtol=1e-4)
    one = np.concatenate(batches[:2])
    other = fisher_gradients(linear_loss, params, [one], select=lambda p, _: p == "w")
    assert set(other) == {"w"}
    np.testing.assert_allclose(other["w"], got["w"], rtol=1e-5)


def test_fisher_refuses(dense, batches):
    params = {"table": dense["table"], "w": dense["up"]}
    with pytest.raises(SpecError, match="no batches"):
        fisher_gradients(linear_loss, params, [])
    with pytest.raises(SpecError, match="no weight is selected"):
        fisher_gradients(linear_loss, params, batches, select=lambda *_: False)
    with pytest.raises(NonFiniteError, match="gradient of table is NaN or infinite"):
        fisher_gradients(linear_loss, params | {"w": params["w"] * np.inf}, batches[:1])
