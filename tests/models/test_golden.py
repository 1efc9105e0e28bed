"""Logits equal those of transformers, for every architecture and option."""

import numpy as np
import pytest
from flax import nnx

from qjax.models import ModelConfig


@nnx.jit
def _logits(model, tokens):
    return model(tokens)[0]


def test_logits_equal_transformers(case, golden, model_of):
    stored = np.load(golden.HERE / f"{golden.family(case)}.npz")
    got = np.asarray(_logits(model_of(case), golden.make_tokens()))
    assert got.dtype == np.float32
    scale = np.abs(stored[case]).max()
    assert np.abs(got - stored[case]).max() <= 2e-4 * scale


def test_every_family_has_a_golden_file(golden):
    from qjax.models.families import FAMILIES

    assert {golden.family(case) for case in golden.CASES} == set(FAMILIES)
    for name in FAMILIES:
        assert "transformers" in str(np.load(golden.HERE / f"{name}.npz")["versions"])


@pytest.mark.parametrize("left, right", [("gemma3-old", "gemma3-new")])
def test_options_change_the_logits(left, right, golden):
    stored = np.load(golden.HERE / "gemma3_text.npz")
    assert not np.allclose(stored[left], stored[right], atol=1e-2)


def test_cases_cover_the_options(golden):
    configs = [ModelConfig.from_hf(case) for case in golden.CASES.values()]
    kinds = {rope.kind for config in configs for rope in config.ropes}
    assert kinds == {"default", "linear", "dynamic", "llama3", "yarn", "longrope"}
    for option in ("tied", "qk_norm", "parallel_residual", "norm_after", "post_norms"):
        assert {getattr(config, option) for config in configs} == {True, False}
