"""Sampling against plain NumPy, one token at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.errors import SpecError
from qjax.sampling import make_sampling, penalize, sample, threshold

BATCH, VOCAB = 4, 50
least_kept = jax.jit(threshold)
choose = jax.jit(sample)


def kept_by_loops(logits, top_k=0, top_p=1.0, min_p=0.0):
    """Return the kept tokens, following each filter's definition one after another."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if top_k:
        order = order[:top_k]
    weights = np.exp(np.array([logits[i] for i in order], np.float64) - max(logits))
    weights /= weights.sum()
    chosen, total = [], 0.0
    for token, weight in zip(order, weights, strict=True):
        if total >= top_p:
            break
        chosen.append(token)
        total += weight
    best = weights[0]
    return {t for t, w in zip(order, weights, strict=True) if t in chosen and
            w >= min_p * best}  # fmt: skip


@pytest.mark.parametrize("top_k", [0, 1, 7, 50, 1000])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 1.0])
def test_filters(rng, top_k, top_p, min_p):
    """The threshold keeps exactly the tokens the definitions keep."""
    logits = rng.normal(size=(BATCH, VOCAB)).astype(np.float32) * 2
    settings = make_sampling(BATCH, top_k=top_k, top_p=top_p, min_p=min_p)
    kept = np.asarray(logits >= least_kept(jnp.asarray(logits), settings))
    for row in range(BATCH):
        expected = kept_by_loops(logits[row], top_k, top_p, min_p)
        assert set(np.flatnonzero(kept[row])) == expected


def test_rows_have_their_own_settings(rng):
    """Each row of a batch is filtered by its own numbers."""
    logits = rng.normal(size=(BATCH, VOCAB)).astype(np.float32)
    values = {"top_k": [0, 3, 0, 9], "top_p": [1, 1, 0.5, 0.8], "min_p": [0.2, 0, 0, 0]}
    kept = np.asarray(
        logits >= least_kept(jnp.asarray(logits), make_sampling(BATCH, **values))
    )
    for row in range(BATCH):
        mine = {name: value[row] for name, value in values.items()}
        assert set(np.flatnonzero(kept[row])) == kept_by_loops(logits[row], **mine)


def test_repetition_penalty(rng):
    """Seen tokens: positive logits are divided, negative ones multiplied."""
    logits = rng.normal(size=(2, VOCAB)).astype(np.float32)
    seen = rng.random((2, VOCAB)) < 0.3
    got = penalize(jnp.asarray(logits), jnp.asarray(seen), jnp.asarray([1.3, 1.0]))
    expected = logits.copy()
    for token in np.flatnonzero(seen[0]):
        value = logits[0, token]
        expected[0, token] = value * 1.3 if value < 0 else value / 1.3
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_draws_follow_the_probabilities():
    """Frequencies of many draws match the softmax at the given temperature."""
    count, temperature = 20_000, 0.7
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    keys = jax.random.split(jax.random.key(1), count)
    settings = make_sampling(count, temperature=temperature)
    rows = jnp.broadcast_to(logits, (count, 4))
    drawn = np.asarray(choose(rows, jnp.zeros(rows.shape, bool), keys, settings))
    weights = np.exp(logits / temperature)
    expected = weights / weights.sum()
    got = np.bincount(drawn, minlength=4) / count
    np.testing.assert_allclose(got, expected, atol=4 * 0.5 / np.sqrt(count))


def test_greedy_and_drawn_rows_mix(rng):
    """Temperature 0 is the argmax, whatever other rows do."""
    logits = rng.normal(size=(BATCH, VOCAB)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), BATCH)
    seen = jnp.zeros((BATCH, VOCAB), bool)
    mixed = make_sampling(BATCH, temperature=[0, 1, 0, 5], top_k=[3, 2, 0, 0])
    got = np.asarray(choose(jnp.asarray(logits), seen, keys, mixed))
    assert list(got[[0, 2]]) == list(logits.argmax(-1)[[0, 2]])
    assert got[1] in np.argsort(-logits[1])[:2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1: expected 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1: expected 0"),
        ({"top_k": 1.5}, "top_k=1.5: expected whole numbers"),
        ({"top_p": 0.0}, "top_p=0.0: expected above 0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"min_p": 2.0}, "min_p=2.0: expected 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0: expected 0.001"),
        ({"top_k": [1, 2]}, r"top_k: got shape \(2,\), expected one number or 4"),
    ],
)
def test_refuses(settings, message):
    """Numbers outside their range are named."""
    with pytest.raises(SpecError, match=message):
        make_sampling(BATCH, **settings)


def test_greedy_takes_the_first_of_the_best(rng):
    logits = rng.integers(0, 5, (5, VOCAB)).astype(np.float32)
    logits[1, 7], logits[2], logits[3, 2], logits[4] = np.nan, -np.inf, np.inf, np.nan
    keys = jax.vmap(jax.random.key)(jnp.arange(5))
    seen = jnp.zeros((5, VOCAB), bool)
    drawn = choose(jnp.asarray(logits), seen, keys, make_sampling(5, temperature=0.0))
    np.testing.assert_array_equal(drawn, jnp.argmax(jnp.asarray(logits), -1))
