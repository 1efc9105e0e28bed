"""Learned rounding against auto-round, with the same text, steps and batches.

Signs of gradients magnify the last bit, so one short run may differ by a percent either
way; `benchmarks/references.py` takes the mean of longer ones.
"""

import numpy as np
import pytest

import qjax
from qjax.formats import Int
from qjax.methods import SignRound
from qjax.recipes import Recipe, Rule

from .auto_round_reference import auto_round

pytest.importorskip("torch")
pytest.importorskip("auto_round")
pytestmark = pytest.mark.filterwarnings("ignore")

SAMPLES, CONTEXT, STEPS, BATCH, BITS, GROUP = 32, 128, 30, 4, 2, 64


@pytest.fixture(scope="module")
def tokens(tokenizer, calibration_text):
    ids = tokenizer.encode(calibration_text[:30_000])[: SAMPLES * CONTEXT]
    return np.asarray(ids, np.int32).reshape(SAMPLES, CONTEXT)


def test_perplexity_is_at_most_that_of_auto_round(
    model, model_path, tokens, perplexity
):
    fmt = Int(BITS, GROUP, symmetric=False, zero_dtype="uint8")
    method = SignRound(steps=STEPS, batch=BATCH)
    recipe = Recipe((Rule("layers.*kernel", fmt, method),))
    ours = qjax.quantize_model(model, recipe, calibration=tokens)
    theirs = auto_round(
        model, str(model_path), tokens, BITS, GROUP, steps=STEPS, batch=BATCH
    )
    assert perplexity(ours) <= 1.01 * perplexity(theirs)
