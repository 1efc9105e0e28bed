"""Makes `quark.npz`: one layer as AMD Quark saves it, and its frozen weight.

Run with amd-quark 0.13 and transformers 5.24.0:

    python tests/golden/converters/make_quark.py

Arrays are named as in `peers.npz`.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from quark.torch import ModelQuantizer, export_safetensors
from quark.torch.quantization.config import config as specs
from safetensors.torch import load_file

NAME = "model.layers.0.self_attn.k_proj"
GROUPS = {"ch_axis": -1, "is_dynamic": False, "group_size": 32}
CASES = {
    "int4-group": (specs.Int4PerGroupSpec(symmetric=True, **GROUPS), "reorder"),
    "uint4-group": (specs.Uint4PerGroupSpec(symmetric=False, **GROUPS), "reorder"),
    "uint4-order": (specs.Uint4PerGroupSpec(symmetric=False, **GROUPS), "order"),
    "int4-channel": (
        specs.Int4PerChannelSpec(symmetric=True, ch_axis=0, is_dynamic=False),
        "reorder",
    ),
    "uint4-tensor": (
        specs.Uint4PerTensorSpec(
            observer_method="min_max",
            symmetric=False,
            scale_type="float",
            round_method="half_even",
            is_dynamic=False,
        ),
        "reorder",
    ),
    "int8-channel": (
        specs.Int8PerChannelSpec(symmetric=False, ch_axis=0, is_dynamic=False),
        "reorder",
    ),
    "fp8-tensor": (
        specs.FP8E4M3PerTensorSpec(observer_method="min_max", is_dynamic=False),
        "reorder",
    ),
    "mxfp4": (specs.OCP_MXFP4Spec(ch_axis=-1, is_dynamic=False), "reorder"),
    "int8-group": (specs.Int8PerGroupSpec(symmetric=False, **GROUPS), "reorder"),
}


def plain():
    """A Llama whose `k_proj` has 20 outputs, which fill no whole words."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=96,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        vocab_size=32,
    )
    return transformers.LlamaForCausalLM(config).eval()


def main() -> None:
    arrays = {}
    for case, (spec, order) in CASES.items():
        layer = specs.QLayerConfig(weight=spec.to_quantization_spec())
        others = ["lm_head", "*mlp*", "*q_proj", "*v_proj", "*o_proj"]
        config = specs.QConfig(global_quant_config=layer, exclude=others)
        model = ModelQuantizer(config).quantize_model(plain(), [torch.arange(8)[None]])
        model = ModelQuantizer.freeze(model)
        want = model.get_submodule(NAME).weight.detach().float().numpy().copy()
        arrays[f"quark-{case}/want"] = want
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            export_safetensors(model, folder, pack_method=order)
            saved = json.loads((Path(folder) / "config.json").read_text())
            text = json.dumps(saved["quantization_config"], sort_keys=True)
            arrays[f"quark-{case}/settings"] = np.frombuffer(text.encode(), np.uint8)
            for name, leaf in load_file(Path(folder) / "model.safetensors").items():
                if name.startswith(NAME + "."):
                    part = name.removeprefix(NAME + ".")
                    if leaf.dtype == torch.float8_e4m3fn:
                        leaf, part = leaf.view(torch.uint8), f"{part}@float8_e4m3fn"
                    arrays[f"quark-{case}/{part}"] = leaf.numpy()
    np.savez_compressed(Path(__file__).with_name("quark.npz"), **arrays)


if __name__ == "__main__":
    main()
