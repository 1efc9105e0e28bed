"""Learned rounding against auto-round, with the same text, steps and batches.

Its weights are put into our decoder, so that nothing but the rounding differs. Signs of
gradients magnify the last bit, so one short run may differ by a percent either way.
"""

import numpy as np
import pytest

import qjax
from qjax.formats import Int
from qjax.methods import SignRound
from qjax.recipes import Recipe, Rule

torch = pytest.importorskip("torch")
auto_round = pytest.importorskip("auto_round")
pytestmark = pytest.mark.filterwarnings("ignore")

SAMPLES, CONTEXT, STEPS, BATCH, BITS, GROUP = 32, 128, 30, 4, 2, 64
NAMES = {
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


@pytest.fixture(scope="module")
def tokens(tokenizer, calibration_text):
    ids = tokenizer.encode(calibration_text[:30_000])[: SAMPLES * CONTEXT]
    return np.asarray(ids, np.int32).reshape(SAMPLES, CONTEXT)


def theirs(model, path, tokens):
    """The decoder with kernels as auto-round leaves them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    made, _ = auto_round.AutoRound(
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        AutoTokenizer.from_pretrained(path),
        bits=BITS,
        group_size=GROUP,
        sym=False,
        dataset=[torch.tensor(row)[None].long() for row in tokens],
        nsamples=SAMPLES,
        seqlen=CONTEXT,
        iters=STEPS,
        batch_size=BATCH,
        seed=0,
        amp=False,
        device_map="cpu",
        enable_torch_compile=False,
    ).quantize()
    state = made.state_dict()
    params = model.params()
    for name in [p for p in params if p.endswith("kernel") and p[:7] == "layers."]:
        _, layer, kind = name.removesuffix(".kernel").split(".", 2)
        weight = state[f"model.layers.{layer}.{NAMES[kind]}.weight"].float().numpy().T
        groups = weight.reshape(-1, GROUP, weight.shape[1])
        assert max(len(np.unique(g)) for g in groups[0].T) <= 2**BITS
        params[name] = weight.copy()
    return qjax.Decoder(model.config, params, dtype="float32")


def test_perplexity_is_at_most_that_of_auto_round(
    model, model_path, tokens, perplexity
):
    fmt = Int(BITS, GROUP, symmetric=False, zero_dtype="uint8")
    method = SignRound(steps=STEPS, batch=BATCH)
    recipe = Recipe((Rule("layers.*kernel", fmt, method),))
    ours = qjax.quantize_model(model, recipe, calibration=tokens)
    reference = perplexity(theirs(model, str(model_path), tokens))
    assert perplexity(ours) <= 1.01 * reference
