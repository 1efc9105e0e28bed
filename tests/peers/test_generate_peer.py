"""Generation and perplexity of the bundled model against transformers."""

import numpy as np
import pytest

from qjax.evaluate import evaluate, plan_windows
from qjax.generate import generate_detailed

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def theirs(model_path):
    """The same in transformers."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        model_path, dtype=torch.float32
    ).eval()


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_text(model, tokenizer, theirs, books_text, penalty):
    """The same tokens as transformers, with and without repetition penalty."""
    for prompt in ("Call me", "It was a dark and", books_text[5000:5600]):
        ids = tokenizer.encode(prompt)
        expected = theirs.generate(
            torch.tensor([ids]),
            max_new_tokens=48,
            do_sample=False,
            repetition_penalty=penalty,
            pad_token_id=0,
        )[0, len(ids) :].tolist()
        got = generate_detailed(
            model, tokenizer, [ids], 48, repetition_penalty=penalty
        )[0]
        assert got.tokens == expected


def their_nll(theirs, windows):
    """Return float64 negative log-likelihoods of scored tokens."""
    scores = []
    for tokens, mask in windows.batches(8):
        with torch.no_grad():
            logits = theirs(torch.tensor(tokens)).logits.log_softmax(-1)
        next_ones = torch.tensor(tokens[:, 1:], dtype=torch.int64)[..., None]
        picked = logits[:, :-1].gather(-1, next_ones)[..., 0]
        scores.append(-picked.numpy().astype(np.float64)[mask[:, 1:]])
    return np.concatenate(scores)


@pytest.mark.parametrize("protocol", ["gptq", "stride", "llama.cpp"])
def test_perplexity(model, tokenizer, theirs, books_text, protocol):
    """Perplexity equals transformers' on the same windows within 0.001 %."""
    text = books_text[:60_000]
    ours = evaluate(model, tokenizer, text, protocol=protocol, windows=12)
    ids = np.array(tokenizer.encode(text))
    windows = plan_windows(ids, protocol, 512).limit(12)
    expected = np.exp(their_nll(theirs, windows).mean())
    assert ours["perplexity"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_published_baselines(model, tokenizer, books_text, wikitext):
    """The first 200 windows give the model's published perplexities within 0.02 %."""
    for text, expected in ((books_text, 43.0178), (wikitext, 30.3787)):
        result = evaluate(model, tokenizer, text, windows=200)
        assert result["perplexity"] == pytest.approx(expected, rel=2e-4)
