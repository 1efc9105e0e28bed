"""GPT-2 as transformers saves it through bitsandbytes, which turns its matrices."""

import numpy as np
import pytest

from qjax.checkpoint import checkpoint_parts
from qjax.converters.huggingface import open_checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
functional = pytest.importorskip("bitsandbytes.functional")

NAMES = {
    "attn.o": "attn.c_proj",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_values(kind, tmp_path):
    torch.manual_seed(0)
    wide = {"n_embd": 64, "n_inner": 128}  # on CPUs its blocks must not cross rows
    config = transformers.GPT2Config(
        **wide,
        vocab_size=32,
        n_positions=16,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    dense = transformers.GPT2LMHeadModel(config)
    dense.save_pretrained(tmp_path / "dense")
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    options = {"load_in_8bit": True} if kind == "int8" else four
    with torch.compiler.set_stance("force_eager"):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense",
            dtype=torch.float32,
            quantization_config=transformers.BitsAndBytesConfig(**options),
        )
    model.save_pretrained(tmp_path / "saved")

    def theirs(name):
        weight = model.transformer.h[0].get_submodule(name).weight
        if kind == "int8":
            return functional.int8_vectorwise_dequant(weight.data, weight.SCB)
        with torch.compiler.set_stance("force_eager"):
            return functional.dequantize_4bit(weight.data, weight.quant_state)

    with open_checkpoint(tmp_path / "saved") as source:
        params = {k: v for _, part in checkpoint_parts(source) for k, v in part.items()}
    ours = {
        name: params[f"layers.0.{path}.kernel"].dequantize("float32")
        for path, name in NAMES.items()
    }
    joint = [params[f"layers.0.attn.{c}.kernel"].dequantize("float32") for c in "qkv"]
    ours["attn.c_attn"] = np.concatenate(joint, axis=1)
    for name, got in ours.items():
        was = dense.transformer.h[0].get_submodule(name).weight.detach()
        assert got.shape == was.shape and np.abs(got - was.numpy()).max() < 0.02
        want = theirs(name).float().numpy().T
        np.testing.assert_allclose(got, want, rtol=3e-7 if kind == "int8" else 0)
