"""Makes `peers.npz`: one layer as each library saves it, and what it decodes it to.

Run with transformers 5.24.0, torch 2.13.0 (CPU), bitsandbytes 0.50.2, optimum-quanto
0.2.7, hqq 0.2.8.post1, torchao 0.18.0 and auto-round 0.16.1:

    python tests/golden/converters/make_peers.py

Arrays are `CASE/want`, float32 `[out, in]`, and `CASE/PART` by the name of a part;
`CASE/settings` is the quantization_config as JSON.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from auto_round import AutoRound
from auto_round.export.export_to_awq.utils import dequantize_gemm
from auto_round_extension.torch.qlinear_torch_zp import QuantLinear
from bitsandbytes import functional
from hqq.core.quantize import BaseQuantizeConfig
from hqq.models.hf.base import AutoHQQHFModel
from optimum import quanto
from safetensors.torch import load_file
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

NAME = "model.layers.0.self_attn.k_proj"
HERE = Path(__file__).parent
MODEL = HERE.parents[2] / "examples" / "model"


def plain(wide=64):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=wide,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=32,
    )
    return transformers.LlamaForCausalLM(config).eval()


def through_transformers(folder, config):
    plain().save_pretrained(folder / "plain")
    kind = transformers.AutoModelForCausalLM
    model = kind.from_pretrained(
        folder / "plain", dtype=torch.float32, quantization_config=config
    )
    model.save_pretrained(folder / "saved")
    weight = model.get_submodule(NAME).weight
    if isinstance(config, transformers.TorchAoConfig):
        return weight.dequantize()
    if config.load_in_8bit:
        return functional.int8_vectorwise_dequant(weight.data, weight.SCB)
    return functional.dequantize_4bit(weight.data, weight.quant_state)


def through_quanto(folder, kind):
    causal = quanto.QuantizedModelForCausalLM
    model = causal.quantize(plain(), weights=getattr(quanto, kind), exclude="lm_head")
    model.save_pretrained(folder / "saved")
    return model._wrapped.get_submodule(NAME).weight.dequantize()


def through_hqq(folder, bits):
    model = plain()
    config = BaseQuantizeConfig(nbits=bits, group_size=32, axis=1)
    AutoHQQHFModel.quantize_model(
        model, config, compute_dtype=torch.float32, device="cpu"
    )
    AutoHQQHFModel.save_to_safetensors(model, str(folder / "saved"))
    return model.get_submodule(NAME).dequantize()


def through_auto_round(folder, layout):
    AutoRound(
        plain(192),
        transformers.AutoTokenizer.from_pretrained(MODEL),
        bits=4,
        group_size=32,
        sym=False,
        iters=0,
        disable_opt_rtn=True,
        device_map="cpu",
        enable_torch_compile=False,
    ).quantize_and_save(str(folder / "saved"), format=layout)
    tensors = load_file(next(folder.rglob("*.safetensors")))
    start = NAME + "."
    own = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
    own["scales"] = own["scales"].float()  # products in float32
    if layout == "auto_awq":
        return dequantize_gemm(**own, bits=4, group_size=32).T
    layer = QuantLinear(4, 32, 192, 96, bias=False, g_idx=True)
    for name, leaf in own.items():
        setattr(layer, name, leaf)
    return layer(torch.eye(192)).T


def bits(kind):
    if kind == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )


def torchao(config):
    return transformers.TorchAoConfig(config)


CASES = {
    "bitsandbytes-nf4": (through_transformers, bits("nf4")),
    "bitsandbytes-fp4": (through_transformers, bits("fp4")),
    "bitsandbytes-int8": (through_transformers, bits("int8")),
    "torchao-int8": (through_transformers, torchao(Int8WeightOnlyConfig(version=2))),
    "torchao-float8": (through_transformers, torchao(Float8WeightOnlyConfig())),
    "quanto-int8": (through_quanto, "qint8"),
    "quanto-int4": (through_quanto, "qint4"),
    "quanto-int2": (through_quanto, "qint2"),
    "hqq-4": (through_hqq, 4),
    "hqq-3": (through_hqq, 3),
    "gptq-4": (through_auto_round, "auto_gptq"),
    "awq-4": (through_auto_round, "auto_awq"),
}


def main() -> None:
    torch.compiler.set_stance("force_eager")
    arrays = {}
    for case, (make, what) in CASES.items():
        with tempfile.TemporaryDirectory() as name:
            want = make(Path(name), what)
            arrays[f"{case}/want"] = want.detach().float().numpy()
            saved = Path(name) / "saved"
            config = next(saved.rglob("config.json"), None)
            settings = json.loads(config.read_text()) if config else {}
            settings = settings.get("quantization_config") or {}
            text = json.dumps(settings, sort_keys=True)
            arrays[f"{case}/settings"] = np.frombuffer(text.encode(), np.uint8)
            for tensor, leaf in load_file(next(saved.rglob("*.safetensors"))).items():
                if tensor.startswith(NAME + "."):
                    if leaf.dtype == torch.float8_e4m3fn:
                        leaf = leaf.view(torch.uint8)
                        tensor += "@float8_e4m3fn"
                    part = tensor.removeprefix(NAME + ".")
                    arrays[f"{case}/{part}"] = leaf.numpy()
    np.savez_compressed(HERE / "peers.npz", **arrays)


if __name__ == "__main__":
    main()
