"""Modules are compared with dense ones: products keep float32 activations."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _exact():
    with jax.default_matmul_precision("float32"):
        yield
