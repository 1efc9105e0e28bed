"""The training step: what it sums, what it leaves alone, what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qjax.errors import SpecError
from qjax.formats import Int
from qjax.models import Decoder, ModelConfig, param_shapes
from qjax.recipes import Recipe, Rule
from qjax.train.lora import LoRA, attach
from qjax.train.loss import chunked_loss, token_losses
from qjax.train.qat import QAT, prepare
from qjax.train.step import Step

CONFIG = ModelConfig.from_hf(
    {
        "model_type": "llama",
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
)
TIME = 12


def make_model():
    keys = jax.random.split(jax.random.key(0), len(param_shapes(CONFIG)))
    params = {
        path: jax.random.normal(key, shape) / np.sqrt(shape[0])
        for key, (path, shape) in zip(keys, param_shapes(CONFIG).items(), strict=True)
    }
    model = Decoder(CONFIG, params)
    attach(model, LoRA(rank=2), jax.random.key(1))
    return model


def make_batch(accumulate=1, rows=4):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 40, (accumulate * rows, TIME + 1)).astype(np.int32)
    weights = (rng.random((accumulate * rows, TIME)) < 0.7).astype(np.float32)
    weights[0] = 0.0  # micro-batches count different numbers of tokens
    arrays = {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "weights": weights,
        "positions": np.tile(np.arange(TIME, dtype=np.int32), (len(ids), 1)),
        "segments": np.ones((len(ids), TIME), np.int32),
    }
    return {k: v.reshape(accumulate, rows, TIME) for k, v in arrays.items()}


def run(batch, tx=None, **options):
    step = Step(make_model(), tx or optax.sgd(0.5), **options)
    state, metrics = step(step.init(jax.random.key(0)), step.frozen, batch)
    return jax.tree.leaves(state.trainable), metrics


def test_loss_is_that_of_the_whole_batch():
    model, batch = make_model(), make_batch(2, 2)
    flat = {k: v.reshape(4, TIME) for k, v in batch.items()}
    logits, _ = model(flat["tokens"])
    shifted = np.asarray(logits, np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    chances = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    picked = np.take_along_axis(chances, flat["targets"][..., None], -1)[..., 0]
    want = -(picked * flat["weights"]).sum() / flat["weights"].sum()
    _, metrics = run(batch)
    np.testing.assert_allclose(metrics.loss, want, rtol=1e-5)
    assert float(metrics.tokens) == flat["weights"].sum()


def test_parts_of_a_batch_do_not_matter():
    whole, metrics = run(make_batch(1, 4))
    for options in (
        {"remat": "none"},
        {"remat": "products"},
        {"loss_chunk": 7},
        {"remat": "offload"},
    ):
        parts, again = run(make_batch(2, 2), **options)
        np.testing.assert_allclose(again.loss, metrics.loss, rtol=1e-6)
        np.testing.assert_allclose(again.grad_norm, metrics.grad_norm, rtol=1e-5)
        for one, other in zip(parts, whole, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)


def test_samples_of_a_row_do_not_see_each_other():
    model = make_model()
    ids = make_batch()["tokens"][0, :1]
    positions = np.r_[np.arange(5), np.arange(7)].astype(np.int32)[None]
    segments = np.r_[np.full(5, 1), np.full(7, 2)].astype(np.int32)[None]
    got, _ = model.hidden(ids, positions=positions, segments=segments)
    alone = [model.hidden(part)[0] for part in (ids[:, :5], ids[:, 5:])]
    np.testing.assert_allclose(got, jnp.concatenate(alone, 1), atol=1e-5)
    mixed, _ = model.hidden(ids, positions=positions)
    assert np.abs(np.asarray(mixed - got)).max() > 1e-3
    with pytest.raises(SpecError, match="segments are for calls without a cache"):
        model.hidden(ids, model.init_cache(1, 16), segments=segments)


def test_long_rows_are_attended_in_parts(monkeypatch):
    model, batch = make_model(), make_batch()
    arrays = {k: v[0] for k, v in batch.items()}
    arrays["segments"] = np.tile(np.r_[np.full(5, 1), np.full(7, 2)], (4, 1))

    def loss(model):
        where = {
            k: jnp.asarray(arrays[k], jnp.int32) for k in ("positions", "segments")
        }
        hidden, _ = model.hidden(arrays["tokens"], **where)
        return chunked_loss(model, hidden, arrays["targets"], arrays["weights"])

    wrt = nnx.DiffState(0, nnx.LoRAParam)
    want = nnx.value_and_grad(loss, argnums=wrt)(model)
    monkeypatch.setattr("qjax.models.attention.MAX_SCORES", 4 * 2 * TIME * 5)
    got = nnx.value_and_grad(loss, argnums=wrt)(model)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_what_is_not_finite_changes_nothing():
    step = Step(make_model(), optax.adam(0.1))
    state = step.init(jax.random.key(0))
    before = jax.tree.map(np.asarray, (state.trainable, state.optimizer))
    bad = make_batch()
    bad["weights"][0, 1, 3] = np.inf
    state, metrics = step(state, step.frozen, bad)
    assert not bool(metrics.finite)
    assert int(state.step) == 0
    jax.tree.map(
        np.testing.assert_array_equal, (state.trainable, state.optimizer), before
    )
    state, metrics = step(state, step.frozen, make_batch())
    assert bool(metrics.finite)
    assert int(state.step) == 1


def test_only_adapters_change():
    model = make_model()
    step = Step(model, optax.sgd(1.0))
    base = jax.tree.map(np.asarray, step.frozen)
    state, _ = step(step.init(jax.random.key(0)), step.frozen, make_batch())
    variables = jax.tree.leaves(state.trainable, is_leaf=_variable)
    assert {type(v) for v in variables} == {nnx.LoRAParam}
    step.install(state)
    jax.tree.map(
        np.testing.assert_array_equal, nnx.split(model, nnx.LoRAParam, ...)[2], base
    )


def _variable(leaf):
    return isinstance(leaf, nnx.Variable)


def test_token_losses_and_their_gradient():
    logits = jax.random.normal(jax.random.key(0), (3, 7)) * 5
    targets = jnp.array([0, 6, 3])
    got = token_losses(logits, targets)
    want = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    slope = jax.grad(lambda x: token_losses(x, targets).sum())(logits)
    hot = jax.nn.softmax(logits) - jax.nn.one_hot(targets, 7)
    np.testing.assert_allclose(slope, hot, atol=1e-6)


def test_refused():
    model, batch = make_model(), make_batch()
    with pytest.raises(SpecError, match="nothing to train"):
        Step(Decoder(CONFIG, model.params()), optax.sgd(1.0))
    step = Step(model, optax.sgd(1.0))
    state = step.init(jax.random.key(0))
    with pytest.raises(SpecError, match="lacks weights"):
        step(state, step.frozen, {k: v for k, v in batch.items() if k != "weights"})
    with pytest.raises(SpecError, match="has shapes"):
        step(state, step.frozen, batch | {"weights": batch["weights"][0]})
    with pytest.raises(SpecError, match="remat='blocks'"):
        run(batch, remat="blocks")
    with pytest.raises(SpecError, match="loss_chunk is 0"):
        run(batch, loss_chunk=0)


def test_layers_know_the_number_of_the_step():
    model = Decoder(CONFIG, make_model().params())
    recipe = Recipe(rules=(Rule("layers.*kernel", Int(2, 8)),))
    prepare(model, QAT(recipe, start_step=1))
    step = Step(model, optax.sgd(0.0), wrt=QAT(recipe).wrt)
    state, losses = step.init(jax.random.key(0)), []
    for _ in range(3):
        state, metrics = step(state, step.frozen, make_batch())
        losses.append(float(metrics.loss))
    assert losses[0] != losses[1]  # from the second step on weights are rounded
    assert losses[1] == losses[2]
