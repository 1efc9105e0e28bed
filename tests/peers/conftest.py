"""The bundled model as comparisons use it: float32, loaded once."""

import pytest

import qjax


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
