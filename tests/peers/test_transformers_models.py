"""The decoder side by side with transformers: logits, padding, generation, loading."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

from qjax.models import (  # noqa: E402
    Decoder,
    ModelConfig,
    from_hf,
    plan,
    positions_from_mask,
    to_hf,
)

_SCRIPT = Path(__file__).resolve().parent.parent / "golden/models/make_golden.py"
_SPEC = importlib.util.spec_from_file_location("make_golden_live", _SCRIPT)
assert _SPEC is not None and _SPEC.loader is not None
golden = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(golden)

SEED = 7

# PyTorch warns about its own deprecated parts when transformers first compiles.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


@nnx.jit
def _run(model, tokens, cache=None, positions=None):
    return model(tokens, cache, positions=positions)


def _ours(case):
    config = ModelConfig.from_hf(golden.CASES[case])
    tensors = {
        entry.name: golden.make_weight(entry.name, entry.shape, SEED)
        for entry in plan(config)
        if not entry.optional
    }
    return Decoder(config, from_hf(config, tensors))


@pytest.mark.parametrize("case", sorted(golden.CASES))
def test_logits(case):
    tokens = golden.make_tokens(SEED)
    theirs = golden.reference_logits(
        golden.load_reference(golden.CASES[case], SEED), tokens
    )
    ours = np.asarray(_run(_ours(case), tokens)[0])
    assert np.abs(ours - theirs).max() <= 2e-4 * np.abs(theirs).max()


@pytest.mark.parametrize("case", ["llama", "mistral", "gemma3-new", "opt"])
def test_left_padded_greedy_generation(case):
    reference = golden.load_reference(golden.CASES[case], SEED)
    model, tokens = _ours(case), golden.make_tokens(SEED)[:, :6]
    mask = np.ones((2, 6), bool)
    mask[0, :2], tokens[0, :2] = False, 0
    theirs = reference.generate(
        torch.from_numpy(tokens).long(),
        attention_mask=torch.from_numpy(mask).long(),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
    ).numpy()[:, 6:]
    positions = positions_from_mask(jnp.asarray(mask))
    logits, cache = _run(model, tokens, model.init_cache(2, 14), positions)
    ours = []
    for _ in range(8):
        last = np.asarray(logits[:, -1].argmax(-1)).astype(np.int32)
        ours.append(last)
        logits, cache = _run(model, last[:, None], cache)
    np.testing.assert_array_equal(np.stack(ours, axis=1), theirs)


@pytest.mark.parametrize("case", sorted({golden.family(c): c for c in golden.CASES}))
def test_written_tensors_load_in_transformers(case, tmp_path):
    data = golden.CASES.get(case) or golden.CASES[f"{case.split('_')[0]}-new"]
    config = ModelConfig.from_hf(data)
    model = _ours(next(c for c, d in golden.CASES.items() if d is data))
    tensors = dict(to_hf(config, model.params()))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(data))
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    theirs = golden.reference_logits(loaded.eval(), golden.make_tokens())
    ours = np.asarray(_run(model, golden.make_tokens())[0])
    assert np.abs(ours - theirs).max() <= 2e-4 * np.abs(theirs).max()


def test_bundled_model_has_the_same_loss(model_path, books_text):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_path)
    ids = np.array(tokenizer(books_text[:4000])["input_ids"][:512], np.int32)[None]
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        model_path, dtype=torch.float32
    )
    theirs = golden.reference_logits(reference, ids)
    config = ModelConfig.from_hf(json.loads((model_path / "config.json").read_text()))
    tensors = load_file(model_path / "model.safetensors")
    ours = np.asarray(_run(Decoder(config, from_hf(config, tensors)), ids)[0])

    def loss(logits):
        wide = logits[0, :-1].astype(np.float64)
        top = wide.max(-1)
        total = top + np.log(np.exp(wide - top[:, None]).sum(-1))
        return (total - np.take_along_axis(wide, ids[0, 1:, None], 1)[:, 0]).mean()

    assert np.abs(ours - theirs).max() <= 2e-4 * np.abs(theirs).max()
    assert abs(loss(ours) - loss(theirs)) < 1e-5
    assert 2.5 < loss(ours) < 4.5
