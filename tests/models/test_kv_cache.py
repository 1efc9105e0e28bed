"""Quantized key-value caches: close to float ones, the same in every loop, smaller."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax.errors import SpecError
from qjax.models import positions_from_mask

# One case per way of attending: plain, windows and soft-caps, learned positions.
VARIED = ["llama-yarn", "mistral", "gemma2", "gpt2-scaled"]
KINDS = ["int8", "fp8", "int4"]
LOOSE = {"int8": 0.02, "fp8": 0.08, "int4": 0.25}
"""Greatest deviation of a logit over the spread of the logits."""


@nnx.jit
def _run(model, tokens, cache=None, positions=None):
    return model(tokens, cache, positions=positions)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", VARIED)
def test_steps_are_close_to_a_float_cache(name, kind, golden, model_of):
    model, tokens = model_of(name), golden.make_tokens()
    expected = np.asarray(_run(model, tokens)[0])
    for left in (False, True):
        mask = np.ones((2, 9), bool)
        mask[1, slice(0, 4) if left else slice(5, 9)] = False
        batch = np.zeros((2, 9), np.int32)
        batch[mask] = np.concatenate([tokens[0, :9], tokens[1, :5]])
        positions = positions_from_mask(jnp.asarray(mask))
        logits, cache = _run(model, batch, model.init_cache(2, 16, kind), positions)
        got = [[*np.asarray(logits)[row][mask[row]]] for row in (0, 1)]
        for t in range(3):
            step = np.array([[tokens[0, 9 + t]], [tokens[1, 5 + t]]])
            logits, cache = _run(model, step, cache)
            got = [[*got[row], np.asarray(logits)[row, 0]] for row in (0, 1)]
        for row, n in ((0, 12), (1, 8)):
            worst = np.abs(np.array(got[row]) - expected[row, :n]).max()
            assert 0 < worst < LOOSE[kind] * expected.std() * 10


@pytest.fixture(scope="module")
def bundled(model_path):
    """The bundled model and its tokenizer."""
    return qjax.load(model_path)


@pytest.fixture(scope="module")
def measured(bundled, books_text):
    """Logits of one-token steps over held-out text by cache, and the tokens."""
    model, tokenizer = bundled
    tokens = np.array(tokenizer.encode(books_text[:8000])[:640], np.int32)
    tokens = tokens.reshape(4, 160)
    graph, params = nnx.split(model)

    def steps(dtype, rotate):
        @jax.jit
        def run(params):
            def step(cache, token):
                logits, cache = nnx.merge(graph, params)(token[:, None], cache)
                return cache, logits[:, 0]

            cache = model.init_cache(4, 160, dtype, rotate=rotate)
            return jax.lax.scan(step, cache, tokens.T)[1]

        return jnp.swapaxes(run(params), 0, 1)

    return steps, steps(None, "none"), tokens


@pytest.mark.parametrize(
    "dtype, rotate, ratio, divergence, agreement",
    [
        ("int8", "none", 1.001, 1e-4, 0.985),
        ("fp8", "none", 1.005, 2e-3, 0.95),
        ("int4", "none", 1.03, 0.02, 0.88),
        ("int4", "both", 1.02, 0.015, 0.89),
    ],
)
def test_quality_on_text(measured, dtype, rotate, ratio, divergence, agreement):
    steps, base, tokens = measured
    got = steps(dtype, rotate)

    def perplexity(logits):
        p = jax.nn.log_softmax(logits[:, :-1])
        return float(jnp.exp(-jnp.take_along_axis(p, tokens[:, 1:, None], 2).mean()))

    p, q = jax.nn.log_softmax(base), jax.nn.log_softmax(got)
    assert perplexity(got) < ratio * perplexity(base)
    assert float((jnp.exp(p) * (p - q)).sum(-1).mean()) < divergence
    assert float((got.argmax(-1) == base.argmax(-1)).mean()) > agreement


def test_generation_with_int8_equals_float(bundled):
    model, tokenizer = bundled
    prompt = "Once upon a time"
    texts = [
        qjax.generate(model, tokenizer, prompt, max_tokens=24, cache_dtype=dtype)
        for dtype in (None, "int8")
    ]
    assert texts[0] == texts[1]
    short = qjax.generate(
        model, tokenizer, prompt, max_tokens=4, cache_dtype="int4", cache_rotate="both"
    )
    assert isinstance(short, str) and short


def test_bytes(bundled):
    model, _ = bundled
    whole = model.init_cache(1, 512, "bfloat16").nbytes
    per_number = {"int8": 8, "fp8": 8, "int4": 4}
    for kind, bits in per_number.items():
        expected = whole * (bits / 16 + 4 / model.config.head_dim / 2)
        assert model.init_cache(1, 512, kind).nbytes == expected


def test_unknown_caches_are_refused(golden, model_of):
    model = model_of("llama")
    for dtype, rotate, message in (
        ("int3", "none", "cache dtype 'int3'; expected a float dtype or one of int8"),
        ("int32", "none", "cache dtype 'int32'"),
        ("int8", "values", "rotate='values'"),
        ("float32", "keys", "rotate='keys' is for quantized caches"),
    ):
        with pytest.raises(SpecError, match=message):
            model.init_cache(1, 8, dtype, rotate=rotate)
