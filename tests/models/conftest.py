"""What the tests of models share: the golden cases and small random models."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from qjax.models import Decoder, ModelConfig, from_hf, plan

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "models"


def load_golden() -> ModuleType:
    """Imports the script that makes the golden files."""
    spec = importlib.util.spec_from_file_location(
        "make_golden", GOLDEN / "make_golden.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


golden_module = load_golden()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs tests that take `case` once per golden case."""
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", sorted(golden_module.CASES))


@pytest.fixture(scope="session")
def golden() -> ModuleType:
    """The module that makes the golden files."""
    return golden_module


@pytest.fixture(scope="session")
def tensors_of():
    """Draws the checkpoint of a case: name -> tensor."""

    def draw(case: str) -> dict:
        config = ModelConfig.from_hf(golden_module.CASES[case])
        return {
            entry.name: golden_module.make_weight(entry.name, entry.shape)
            for entry in plan(config)
            if not entry.optional
        }

    return draw


@pytest.fixture(scope="session")
def model_of(tensors_of):
    """Builds the decoder of a case, once."""
    built: dict[str, Decoder] = {}

    def build(case: str) -> Decoder:
        if case not in built:
            config = ModelConfig.from_hf(golden_module.CASES[case])
            built[case] = Decoder(config, from_hf(config, tensors_of(case)))
        return built[case]

    return build
