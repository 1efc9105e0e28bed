"""The bundled model as comparisons use it: float32, loaded once."""

import pytest

import qjax
from qjax.evaluate import evaluate


@pytest.fixture(scope="session")
def original(model_path):
    """The bundled model and its tokenizer."""
    return qjax.load(model_path, dtype="float32")


@pytest.fixture(scope="session")
def model(original):
    """The bundled model."""
    return original[0]


@pytest.fixture(scope="session")
def tokenizer(original):
    """The bundled tokenizer."""
    return original[1]


@pytest.fixture(scope="session")
def perplexity(tokenizer, books_text):
    """Perplexity of a decoder on 16 windows of held-out books."""

    def measure(model):
        text = books_text[:200_000]
        return evaluate(model, tokenizer, text, context=512, windows=16)["perplexity"]

    return measure
