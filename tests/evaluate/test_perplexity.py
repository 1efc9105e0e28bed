"""Perplexity, bits per byte and distances against float64 NumPy."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from qjax.errors import NonFiniteError, SpecError
from qjax.evaluate import Scorer, evaluate, plan_windows, score_windows, scoring
from qjax.formats import Int
from qjax.models import Decoder, ModelConfig, param_shapes
from qjax.quantize import quantize
from qjax.text import Tokenizer

VOCAB, DIM = 258, 8
TEXT = "Call me Ishmael — some years ago, never mind how long: ünïcode, 海. " * 5


def make_tokenizer(**config):
    """Return a tokenizer of single bytes with a BOS token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, config={"bos_token": "<s>", **config})


def hidden(params, tokens):
    """Return running means of embeddings: every token sees those before it."""
    total = jnp.cumsum(params["embed"][tokens], axis=1)
    return total / jnp.arange(1, tokens.shape[1] + 1, dtype=jnp.float32)[:, None]


def logits(params, h):
    """Return one logit per token of the vocabulary."""
    return h @ params["head"]


def make_model(seed=0, context=64, scale=3.0):
    """Return a causal model of two matrices."""
    rng = np.random.default_rng(seed)
    params = {
        "embed": rng.normal(size=(VOCAB, DIM)).astype(np.float32) * np.float32(scale),
        "head": rng.normal(size=(DIM, VOCAB)).astype(np.float32),
    }
    return Scorer(jax.tree.map(jnp.asarray, params), hidden, logits, VOCAB, context)


def log_probs(model, row):
    """Return float64 log-probabilities after every token of `row`."""
    embed, head = (np.asarray(model.params[k], np.float64) for k in ("embed", "head"))
    h = np.cumsum(embed[row], 0) / np.arange(1, len(row) + 1)[:, None]
    z = h @ head
    z -= z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def reference(model, baseline, windows):
    """Return nll, baseline nll, KL and agreement of every scored token."""
    out = []
    for tokens, mask in windows.batches(1):
        p, q = (log_probs(m, tokens[0]) for m in (model, baseline))
        for i in np.flatnonzero(mask[0]):
            before, target = i - 1, tokens[0, i]
            kl = (np.exp(q[before]) * (q[before] - p[before])).sum()
            agree = p[before].argmax() == q[before].argmax()
            out.append((-p[before, target], -q[before, target], kl, agree))
    return np.array(out).T


@pytest.mark.parametrize("protocol", ["gptq", "stride", "llama.cpp"])
@pytest.mark.parametrize("budget", [1, 3000, scoring.LOGITS_BYTES])
def test_scores_equal_the_reference(monkeypatch, protocol, budget):
    """Whatever the block of logits, scores are those of whole rows in float64."""
    monkeypatch.setattr(scoring, "LOGITS_BYTES", budget)
    model, baseline = make_model(0), make_model(1)
    tokens = np.array(make_tokenizer().encode(TEXT))
    windows = plan_windows(tokens, protocol, 32, bos_id=256).limit(5)
    scores = score_windows(model, windows, baseline=baseline, batch=2)
    nll, base, kl, agree = reference(model, baseline, windows)
    np.testing.assert_allclose(scores.nll, nll, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(scores.baseline_nll, base, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(scores.kl, kl, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(scores.agree, agree)
    alone = score_windows(model, windows, batch=5)
    np.testing.assert_allclose(alone.nll, scores.nll, rtol=1e-5, atol=1e-5)


def test_result_is_complete():
    """A result names its protocol and carries the numbers scripts rely on."""
    model, baseline = make_model(0), make_model(1)
    seen = []
    result = evaluate(
        model,
        make_tokenizer(),
        TEXT,
        context=32,
        windows=4,
        baseline=baseline,
        batch=3,
        progress=lambda *done: seen.append(done),
    )
    assert seen == [(3, 4), (4, 4)]
    windows = plan_windows(np.array(make_tokenizer().encode(TEXT)), "gptq", 32).limit(4)
    nll, base, kl, agree = reference(model, baseline, windows)
    assert result["protocol"] == "gptq"
    assert (result["context"], result["stride"], result["windows"]) == (32, 32, 4)
    assert result["bos"] == "none"
    assert result["text_sha256"] == hashlib.sha256(TEXT.encode()).hexdigest()
    assert result["tokens"] == len(nll) == 4 * 31
    close = lambda a, b: a == pytest.approx(b, rel=1e-4)  # noqa: E731
    assert close(result["perplexity"], np.exp(nll.mean()))
    assert close(result["baseline_perplexity"], np.exp(base.mean()))
    assert close(result["kl_divergence"], kl.mean())
    assert close(result["kl_divergence_stderr"], kl.std(ddof=1) / np.sqrt(len(kl)))
    assert close(result["kl_percentiles"]["max"], kl.max())
    assert close(result["top1_agreement"], agree.mean())
    # one token is one byte here
    assert close(result["bits_per_byte"], nll.mean() / np.log(2))


def make_decoders():
    """Return a tiny random Llama and the same with int8 kernels."""
    config = ModelConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": VOCAB,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
        }
    )
    rng = np.random.default_rng(0)
    params = {
        name: jnp.asarray(rng.normal(size=shape) * 0.3, jnp.float32)
        for name, shape in param_shapes(config).items()
    }
    packed = {
        name: quantize(w, Int(bits=8, group=16)) if ".kernel" in name else w
        for name, w in params.items()
    }
    return Decoder(config, params), Decoder(config, packed)


def test_decoders():
    """A decoder, dense or packed, is scored as its own logits say."""
    dense, packed = make_decoders()
    windows = plan_windows(np.array(make_tokenizer().encode(TEXT)), "gptq", 32)
    tokens, mask = next(windows.limit(4).batches(4))
    result = evaluate(
        packed, make_tokenizer(), TEXT, context=32, windows=4, baseline=dense
    )
    logp, logq = (
        np.asarray(jax.nn.log_softmax(jax.jit(lambda t, m=m: m(t)[0])(tokens)))[:, :-1]
        for m in (packed, dense)
    )
    keep = mask[:, 1:]
    nll = -np.take_along_axis(logp, tokens[:, 1:, None], -1)[..., 0][keep]
    kl = (np.exp(logq) * (logq - logp)).sum(-1)[keep]
    assert result["perplexity"] == pytest.approx(np.exp(np.mean(nll)), rel=1e-5)
    assert result["kl_divergence"] == pytest.approx(np.mean(kl), rel=1e-3, abs=1e-7)
    assert 0 < result["kl_divergence"] < 0.01


def test_a_model_against_itself():
    """Distance zero, agreement one, ratio one."""
    model = make_model()
    result = evaluate(model, make_tokenizer(), TEXT, context=32, baseline=model)
    assert result["kl_divergence"] == 0
    assert result["top1_agreement"] == 1
    assert result["perplexity_ratio"] == 1


def test_bits_per_byte_counts_the_bytes_of_scored_tokens():
    """BOS spells nothing; the first token of a window is neither scored nor counted."""
    tokenizer = make_tokenizer(add_bos_token=True)
    ids, ends = tokenizer.encode_with_bytes(TEXT)
    assert ids[0] == 256
    assert ends[0] == 0
    assert ends[-1] == len(TEXT.encode())
    assert ends == sorted(ends)
    result = evaluate(make_model(), tokenizer, TEXT, protocol="stride", context=32)
    assert result["bos"] == "text start"
    assert result["tokens"] == len(TEXT.encode())
    total = result["tokens"] * np.log(result["perplexity"])
    expected = total / np.log(2) / len(TEXT.encode())
    assert result["bits_per_byte"] == pytest.approx(expected)
    again = evaluate(make_model(), tokenizer, TEXT, protocol="llama.cpp", context=32)
    assert again["bos"] == "every window"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 65}, "context 65 is longer than the model's context of 64"),
        ({"text": "short"}, "the text has 5 tokens, shorter than one window of 32"),
        ({"text": ""}, "the text has 0 tokens"),
        ({"model": object()}, "got object, expected a qjax.models.Decoder"),
    ],
)
def test_refuses(changes, message):
    """Bad requests name what they got and what fits."""
    arguments = {"model": make_model(), "text": TEXT, "context": 32, **changes}
    with pytest.raises(SpecError, match=message):
        evaluate(tokenizer=make_tokenizer(), **arguments)


def test_refuses_other_vocabularies_and_nan():
    """A foreign tokenizer, a foreign baseline and NaN logits are errors."""
    model, tokenizer = make_model(), make_tokenizer()
    small = Scorer(model.params, hidden, logits, 100, 64)
    with pytest.raises(SpecError, match="has 258 ids, but the model's vocabulary is"):
        evaluate(small, tokenizer, TEXT, context=32)
    wide = Scorer(model.params, hidden, logits, 300, 64)
    with pytest.raises(SpecError, match="and the baseline 300; compare models that"):
        evaluate(model, tokenizer, TEXT, context=32, baseline=wide)
    broken = jax.tree.map(lambda x: x * jnp.float32(jnp.nan), model.params)
    with pytest.raises(NonFiniteError, match="logits are NaN or infinite"):
        evaluate(Scorer(broken, hidden, logits, VOCAB, 64), tokenizer, TEXT, context=32)


def test_a_large_vocabulary_never_has_all_its_logits():
    """Compiled for 256k tokens, scratch memory stays near the block of logits."""
    vocab, length = 256_000, 512
    head = jax.ShapeDtypeStruct((DIM, vocab), jnp.float32)
    compiled = scoring._judge.lower(
        logits,
        {"head": head},
        jax.ShapeDtypeStruct((1, length - 1, DIM), jnp.float32),
        jax.ShapeDtypeStruct((1, length), jnp.int32),
        scoring.LOGITS_BYTES // (4 * vocab),
    ).compile()
    used = compiled.memory_analysis().temp_size_in_bytes
    assert used < 4 * scoring.LOGITS_BYTES < length * vocab * 4
