"""Caching, padding, stacking and the module interface leave the logits unchanged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qjax.errors import SpecError
from qjax.models import Decoder, ModelConfig, from_hf, positions_from_mask

# One case per way of attending, positioning and normalizing.
VARIED = ["llama-yarn", "mistral", "gemma3-old", "gpt_neox", "gpt2-scaled", "opt-after"]


@nnx.jit
def _run(model, tokens, cache=None, positions=None):
    return model(tokens, cache, positions=positions)


def _full(model, tokens):
    return np.asarray(_run(model, tokens)[0])


def _padded(tokens, lengths, side):
    """Rows of the given lengths in a batch as wide as the longest, and its mask."""
    width = max(lengths)
    batch, mask = np.zeros((2, width), np.int32), np.zeros((2, width), bool)
    for row, n in enumerate(lengths):
        where = slice(width - n, width) if side == "left" else slice(0, n)
        batch[row, where], mask[row, where] = tokens[row, :n], True
    return batch, mask


@pytest.mark.parametrize("name", VARIED)
def test_prefill_and_steps_equal_one_pass(name, golden, model_of):
    model, tokens = model_of(name), golden.make_tokens()
    expected = _full(model, tokens)
    for lengths, side in [([9, 9], "left"), ([5, 9], "left"), ([9, 5], "right")]:
        batch, mask = _padded(tokens, lengths, side)
        positions = positions_from_mask(jnp.asarray(mask))
        logits, cache = _run(model, batch, model.init_cache(2, 16), positions)
        assert bool(jnp.isfinite(logits).all())
        np.testing.assert_array_equal(cache.next_positions, lengths)
        got = [[*np.asarray(logits)[row][mask[row]]] for row in (0, 1)]
        for t in range(3):
            step = np.array([[tokens[row, n + t]] for row, n in enumerate(lengths)])
            logits, cache = _run(model, step, cache)
            got = [[*got[row], np.asarray(logits)[row, 0]] for row in (0, 1)]
        assert int(cache.index) == 12
        for row, n in enumerate(lengths):
            np.testing.assert_allclose(
                got[row], expected[row, : n + 3], atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("name", ["phi3-long", "llama-dynamic"])
def test_length_dependent_rotations_are_per_row(name, golden, model_of):
    model, tokens = model_of(name), golden.make_tokens()
    batch, mask = _padded(tokens, [5, 9], "left")
    positions = positions_from_mask(jnp.asarray(mask))
    logits = np.asarray(_run(model, batch, None, positions)[0])
    for row, n in enumerate([5, 9]):
        alone = _full(model, tokens[row : row + 1, :n])[0]
        np.testing.assert_allclose(logits[row][mask[row]], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", VARIED)
def test_scan_equals_blocks_one_by_one(name, golden, model_of):
    model, tokens = model_of(name), jnp.asarray(golden.make_tokens())
    where = nnx.jit(lambda model, tokens: model.positions(tokens))(model, tokens)
    step = nnx.jit(lambda block, x, where, numbers: block(x, where, numbers)[0])
    x = model.embed(tokens, where.queries)
    for _, block, numbers in model.blocks():
        x = step(block, x, where, numbers)
    x = x if model.norm is None else model.norm(x)
    np.testing.assert_allclose(
        model.logits(x), _full(model, tokens), atol=1e-5, rtol=1e-5
    )


def test_decode_loop_stays_on_device(golden, model_of):
    model, tokens = model_of("llama"), golden.make_tokens()

    @nnx.jit
    def greedy(model, tokens):
        logits, cache = model(tokens, model.init_cache(2, 12))
        graph, state = nnx.split(model)

        def step(carry):
            cache, last, count, out = carry
            logits, cache = nnx.merge(graph, state)(last[:, None], cache)
            last = jnp.argmax(logits[:, -1], axis=-1).astype(jnp.int32)
            return cache, last, count + 1, out.at[:, count].set(last)

        last = jnp.argmax(logits[:, -1], axis=-1).astype(jnp.int32)
        out = jnp.zeros((2, 6), jnp.int32).at[:, 0].set(last)
        carry = (cache, last, jnp.int32(1), out)
        return jax.lax.while_loop(lambda c: c[2] < 6, step, carry)[3]

    text = tokens[:, :4]
    for token in np.asarray(greedy(model, tokens[:, :4])).T:
        np.testing.assert_array_equal(_full(model, text)[:, -1].argmax(-1), token)
        text = np.concatenate([text, token[:, None].astype(np.int32)], axis=1)


def test_layers_that_differ_in_dtype_form_runs(golden, tensors_of):
    config = ModelConfig.from_hf(golden.CASES["gemma3-old"])
    params = from_hf(config, tensors_of("gemma3-old"))
    whole = Decoder(config, params)
    assert whole.runs == ((0, 3),)
    path = "layers.1.mlp.up.kernel"
    params[path] = params[path].astype(jnp.bfloat16)
    split = Decoder(config, params)
    assert split.runs == ((0, 1), (1, 2), (2, 3))
    again = split.params()
    assert again.keys() == params.keys()
    assert all(again[p].dtype == params[p].dtype for p in params)
    params = {p: jnp.asarray(leaf, jnp.float32) for p, leaf in params.items()}
    tokens = golden.make_tokens()
    expected = _full(Decoder(config, params), tokens)
    logits, cache = _run(split, tokens, split.init_cache(2, 12))
    np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=1e-5)
    assert len(cache.runs) == 3


def test_compile_size_does_not_grow_with_depth(golden):
    def size(layers):
        data = {**golden.CASES["llama"], "num_hidden_layers": layers}
        config = ModelConfig.from_hf(data)
        from qjax.models import param_shapes

        params = {p: np.zeros(s, np.float32) for p, s in param_shapes(config).items()}
        graph, state = nnx.split(Decoder(config, params))
        run = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens)[0])
        return len(run.lower(state, golden.make_tokens()).as_text())

    assert size(12) < 1.02 * size(2)


def test_long_calls_are_attended_in_parts(golden, model_of, monkeypatch):
    model, tokens = model_of("gemma3-old"), golden.make_tokens()
    expected = _full(model, tokens)
    monkeypatch.setattr("qjax.models.attention.MAX_SCORES", 2 * 4 * 12 * 5)
    got = nnx.jit(lambda model, tokens: model(tokens)[0])(model, tokens)
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-5)


def test_bfloat16_compute_is_close_and_logits_stay_float32(golden, tensors_of):
    config = ModelConfig.from_hf(golden.CASES["gemma2"])
    params = from_hf(config, tensors_of("gemma2"))
    tokens = golden.make_tokens()
    exact = _full(Decoder(config, params, dtype="float32"), tokens)
    model = Decoder(config, params, dtype="bfloat16")
    rough, cache = _run(model, tokens, model.init_cache(2, 12))
    assert rough.dtype == jnp.float32
    assert cache.runs[0].keys.dtype == jnp.bfloat16
    assert np.abs(np.asarray(rough) - exact).max() < 0.1 * np.abs(exact).max()


def test_gradients_reach_every_parameter(golden, model_of):
    model, tokens = model_of("gemma3-new"), golden.make_tokens()

    def loss(model):
        logits, _ = model(tokens)
        return -jax.nn.log_softmax(logits)[:, :-1].mean()

    grads = nnx.to_flat_state(nnx.jit(nnx.grad(loss))(model))
    assert len(list(grads)) == len(jax.tree.leaves(nnx.state(model)))
    for path, leaf in grads:
        assert float(jnp.abs(leaf.get_value()).max()) > 0, path


def test_split_state_shows_stacked_leaves(model_of):
    _, state = nnx.split(model_of("llama"))
    shapes = {leaf.shape for leaf in jax.tree.leaves(state)}
    assert (3, 32, 48) in shapes


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda p: p.pop("layers.1.attn.q.kernel"),
            r"layers\.1\.attn\.q\.kernel is mis",
        ),
        (lambda p: p.update(extra=np.zeros(1)), "extra is unknown"),
        (
            lambda p: p.update({"norm.scale": np.zeros(31)}),
            r"norm\.scale has shape \(31,\), expected \(32,\)",
        ),
    ],
)
def test_parameters_that_do_not_fit_are_named(golden, tensors_of, change, message):
    config = ModelConfig.from_hf(golden.CASES["llama"])
    params = from_hf(config, tensors_of("llama"))
    change(params)
    with pytest.raises(SpecError, match=message):
        Decoder(config, params)


def test_lengths_that_do_not_fit_are_refused(golden, model_of):
    tokens = golden.make_tokens()
    with pytest.raises(SpecError, match="12 tokens do not fit a cache of 8 slots"):
        model_of("llama")(tokens, model_of("llama").init_cache(2, 8))
    with pytest.raises(SpecError, match="65 positions exceed this model's 64 learned"):
        model_of("gpt2").init_cache(1, 65)
    with pytest.raises(SpecError, match="cache length is 0"):
        model_of("llama").init_cache(1, 0)
