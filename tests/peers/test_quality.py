"""What quantization costs on real text, against bitsandbytes inside transformers."""

import numpy as np
import pytest

import qjax
from qjax.evaluate import evaluate, plan_windows

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore")

WINDOWS, CONTEXT = 16, 512


@pytest.fixture(scope="module")
def ours(original, model_path, books_text):
    """Perplexity of the bundled model under a recipe, None being the original."""

    def measure(recipe):
        model, tokenizer = original
        if recipe is not None:
            model = qjax.quantize_model(str(model_path), recipe)
        found = evaluate(
            model, tokenizer, books_text[:200_000], context=CONTEXT, windows=WINDOWS
        )
        return found["perplexity"]

    return measure


def their_perplexity(model, tokenizer, text):
    ids = np.array(tokenizer.encode(text), np.int32)
    windows = plan_windows(ids, "gptq", CONTEXT).limit(WINDOWS)
    total = count = 0.0
    for tokens, _ in windows.batches(4):
        batch = torch.tensor(tokens, dtype=torch.int64)
        with torch.no_grad():
            logp = model(batch).logits.float().log_softmax(-1)
        picked = logp[:, :-1].gather(-1, batch[:, 1:, None])
        total -= picked.double().sum().item()
        count += picked.numel()
    return np.exp(total / count)


def test_int8_costs_less_than_a_thousandth(ours):
    assert ours("int8") == pytest.approx(ours(None), rel=1e-3)


def test_nf4_equals_bitsandbytes_in_transformers(
    ours, original, model_path, books_text
):
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        model_path, quantization_config=config, dtype=torch.float32
    ).eval()
    linear = theirs.model.layers[0].mlp.up_proj
    assert type(linear).__name__ == "Linear4bit"
    expected = their_perplexity(theirs, original[1], books_text[:200_000])
    assert ours("nf4") == pytest.approx(expected, rel=1e-3)
    assert ours("nf4") != pytest.approx(ours(None), rel=1e-3)
