"""Evaluating against a base file, writing one, and the statistics, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import models

from qjax.errors import NonFiniteError, SpecError
from qjax.evaluate import (
    LogitsFile,
    Scorer,
    TokenScores,
    evaluate,
    scoring,
    summarize,
)
from qjax.models import Decoder, ModelConfig, param_shapes
from qjax.text import Tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXT = "themodelreadsthesewordsletterbyletterandjudgeseveryone" * 2
CONTEXT, WINDOWS, SCORED = 16, 6, 7


def make_tokenizer():
    """Return a tokenizer of single letters that opens a text with BOS."""
    vocab = {letter: index for index, letter in enumerate(LETTERS)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.add_special_tokens(["<s>"])
    return Tokenizer(backend, config={"bos_token": "<s>", "add_bos_token": True})


def make_decoder(seed=0, vocab=64, scale=0.4):
    """Return a tiny random Llama."""
    config = ModelConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": vocab,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
        }
    )
    rng = np.random.default_rng(seed)
    params = {
        name: jnp.asarray(rng.normal(size=shape) * scale, jnp.float32)
        for name, shape in param_shapes(config).items()
    }
    params["head.kernel"] = params["head.kernel"] * 12  # logits far more than 16 apart
    return Decoder(config, params)


def run(model, **changes):
    """Evaluate under the protocol of base files."""
    arguments = {"text": TEXT, "protocol": "llama.cpp", "context": CONTEXT, **changes}
    return evaluate(model, make_tokenizer(), **arguments)


@pytest.fixture(scope="module")
def pair():
    return make_decoder(0), make_decoder(0, scale=0.42)


@pytest.fixture(scope="module")
def base(pair, tmp_path_factory):
    """A file of what the second model says, and the result of writing it."""
    path = tmp_path_factory.mktemp("base") / "base.kld"
    return path, run(pair[1], write_logits=path)


def reference_kl(model, path):
    """Return the KL divergence as llama.cpp sums it, in float64, of every token."""
    with LogitsFile(path) as file:
        line, codes = file.read(0, file.rows)
        tokens = file.tokens.copy()
    tokens[:, 0] = 26
    logits = np.asarray(model(jnp.asarray(tokens))[0], np.float64)
    logits = logits[:, CONTEXT // 2 : -1].reshape(len(codes), -1)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    logq = line[:, :1].astype(np.float64) * codes + line[:, 1:]
    terms = np.exp(logq) * (logq - logp)
    assert 0.1 < (logq > -16).mean() < 0.9  # both kinds of entries are there
    return np.where(logq > -16, terms, 0).sum(-1)


def test_against_a_file(pair, base):
    """The same keys as with the model itself, and the numbers up to 16 bits."""
    path, alone = base
    assert (alone["windows"], alone["tokens"]) == (WINDOWS, WINDOWS * SCORED)
    direct, stored = run(pair[0], baseline=pair[1]), run(pair[0], baseline=str(path))
    assert direct.keys() == stored.keys()
    assert alone["perplexity"] == pytest.approx(direct["baseline_perplexity"], rel=1e-6)
    kl = reference_kl(pair[0], path)
    assert stored["kl_divergence"] == pytest.approx(kl.mean(), abs=1e-5)
    assert stored["kl_percentiles"]["max"] == pytest.approx(kl.max(), abs=1e-4)
    assert stored["perplexity"] == pytest.approx(direct["perplexity"], rel=1e-6)
    assert stored["top1_agreement"] == direct["top1_agreement"] < 1
    for key in ("delta_p", "delta_p_rms", "kl_divergence", "kl_divergence_stderr"):
        assert stored[key] == pytest.approx(direct[key], abs=2e-4), key


def test_a_file_does_not_depend_on_batches(pair, base, tmp_path, monkeypatch):
    """Nor on how many logits are formed at once, nor on a baseline beside it."""
    monkeypatch.setattr(scoring, "LOGITS_BYTES", 5 * 4 * 64)
    out = tmp_path / "out.kld"
    seen = []
    result = run(
        pair[1],
        baseline=pair[0],
        write_logits=out,
        batch=4,
        progress=lambda *done: seen.append(done),
    )
    assert seen == [(4, 6), (6, 6)]
    with LogitsFile(out) as file, LogitsFile(base[0]) as expected:
        np.testing.assert_array_equal(file.tokens, expected.tokens)
        assert file.tokens[0, 0] == 26 != file.tokens[1, 0]  # BOS only opens the text
        for found, want in zip(file.read(0, 42), expected.read(0, 42), strict=True):
            np.testing.assert_allclose(found, want, rtol=1e-4, atol=1)
    want = run(pair[1], baseline=pair[0])
    for key in ("kl_divergence", "baseline_perplexity", "delta_p"):
        assert result[key] == pytest.approx(want[key], rel=1e-4), key
    in_parts = run(pair[0], baseline=out, batch=4)
    whole = run(pair[0], baseline=base[0])
    assert in_parts["kl_divergence"] == pytest.approx(whole["kl_divergence"], rel=1e-3)


def test_a_file_limits_the_windows(pair, tmp_path):
    """A file of two windows is compared in two, or in fewer if asked."""
    out = tmp_path / "out.kld"
    run(pair[0], windows=2, write_logits=out)
    result = run(pair[0], baseline=out)
    assert (result["windows"], result["tokens"]) == (2, 14)
    assert abs(result["kl_divergence"]) < 1e-4
    assert run(pair[0], baseline=out, windows=1)["windows"] == 1
    run(pair[0], windows=1, write_logits=out, overwrite=True)
    assert run(pair[0], baseline=out)["windows"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": "gptq"}, "windows of protocol 'llama.cpp', got protocol 'gptq'"),
        ({"context": 8}, r"context is 8, but .*base\.kld holds windows of 16 tokens"),
        ({"text": TEXT[:70]}, r"has 4 windows of 16 tokens, but .*base\.kld holds 6"),
        (
            {"text": TEXT[:20] + "z" + TEXT[21:]},
            r"window 1, token 5 has id 25 in the text and 17 in .*base\.kld; it was",
        ),
        ({"model": make_decoder(vocab=63)}, "has 63 tokens .* and the baseline 64"),
    ],
)
def test_refuses_other_windows(pair, base, changes, message):
    """What differs between the file and the run is named."""
    with pytest.raises(SpecError, match=message):
        run(**{"model": pair[0], "baseline": base[0], **changes})


def test_refuses_to_write(pair, base, tmp_path):
    """Another protocol, a file in the way; a model of NaN leaves nothing behind."""
    with pytest.raises(SpecError, match="a base file holds windows of protocol 'llama"):
        run(pair[0], protocol="gptq", write_logits=tmp_path / "a.kld")
    with pytest.raises(SpecError, match=r"base\.kld: exists; choose another name"):
        run(pair[0], write_logits=base[0])
    scorer = scoring.as_scorer(pair[0])
    broken = jax.tree.map(lambda x: x * jnp.asarray(jnp.nan, x.dtype), scorer.params)
    broken = Scorer(broken, scorer.hidden, scorer.logits, 64, 32)
    with pytest.raises(NonFiniteError, match="logits are NaN or infinite"):
        run(broken, write_logits=tmp_path / "a.kld")
    assert list(tmp_path.iterdir()) == []


def moments(values):
    """Return mean and error from sums, as `mean_and_uncertainty` does."""
    n, mean = len(values), values.sum() / len(values)
    return mean, np.sqrt(((values**2).sum() / n - mean**2) / (n - 1))


def test_statistics():
    """Every statistic, from the sums that llama.cpp keeps."""
    rng = np.random.default_rng(0)
    base = rng.gamma(2.0, size=500)
    nll = np.abs(base + 0.2 * rng.normal(size=500))
    kl, agree = rng.gamma(1.0, size=500), rng.random(500) < 0.8
    found = summarize(TokenScores(nll, base, kl, agree))
    (a, da), (b, db) = moments(nll), moments(base)
    cov = ((nll * base).sum() / 500 - a * b) / 499
    ratio_error = np.sqrt(da**2 + db**2 - 2 * cov)
    ppl, ppl_base = np.exp(a), np.exp(b)
    difference = (ppl * da) ** 2 + (ppl_base * db) ** 2 - 2 * ppl * ppl_base * cov
    delta = np.exp(-nll) - np.exp(-base)
    square, square_error = moments(delta**2)
    share = agree.mean()
    expected = {
        "perplexity": (ppl, ppl * da),
        "baseline_perplexity": (ppl_base, ppl_base * db),
        "ln_perplexity_ratio": (a - b, ratio_error),
        "perplexity_ratio": (np.exp(a - b), np.exp(a - b) * ratio_error),
        "perplexity_difference": (ppl - ppl_base, np.sqrt(difference)),
        "kl_divergence": moments(kl),
        "delta_p": moments(delta),
        "delta_p_rms": (np.sqrt(square), square_error / np.sqrt(square) / 2),
        "top1_agreement": (share, np.sqrt(share * (1 - share) / 499)),
    }
    for key, (value, error) in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-6), key
        assert found[f"{key}_stderr"] == pytest.approx(error, rel=1e-6), key
    assert found["ln_perplexity_correlation"] == pytest.approx(cov / (da * db))
    for key, values in (("kl_percentiles", kl), ("delta_p_percentiles", delta)):
        parts = found[key]
        assert (parts["min"], parts["max"]) == (values.min(), values.max())
        assert parts["50"] == pytest.approx(np.median(values))
        assert list(parts.values()) == sorted(parts.values())
        assert {"0.1", "1", "5", "10", "90", "95", "99", "99.9"} < parts.keys()


def test_statistics_of_what_never_changes():
    """One token, or the same model twice: no NaN, and no correlation of a constant."""
    one = np.array([2.0])
    found = summarize(TokenScores(one, one, one * 0, one > 0))
    assert found["ln_perplexity_correlation"] is None
    assert found["delta_p_rms"] == found["delta_p_rms_stderr"] == 0
    assert found["perplexity_ratio"] == 1
