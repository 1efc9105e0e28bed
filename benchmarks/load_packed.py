"""Time and memory of loading quantized checkpoints of other libraries.

Command:   python benchmarks/load_packed.py [FORMAT ...] [--layers 18]
Hardware:  any CPU; needs 2.1 GB of disk and 5 GB of memory. About a minute per format.
Measures:  a synthetic Llama with random codes, 2 GB in the format of each library,
           loaded by `qjax.load` from the page cache in a process of its own: GB/s of
           packed bytes and the peak of resident memory above the start, mapped file
           pages included, in units of the packed size.
Expected:  docs/performance.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from qjax.converters.huggingface import write_checkpoint

HIDDEN, WIDE, VOCAB = 4096, 14336, 1024
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
KERNELS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (1024, HIDDEN),
    "self_attn.v_proj": (1024, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (WIDE, HIDDEN),
    "mlp.up_proj": (WIDE, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDE),
}


def settings(kind: str) -> dict:
    """`quantization_config` of a format."""
    if kind.startswith("gptq"):
        ordered = kind == "gptq-desc_act"
        return {
            "quant_method": "gptq",
            "bits": 3 if kind == "gptq-3bit" else 4,
            "group_size": 128,
            "desc_act": ordered,
        }
    if kind == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": 128}
    if kind == "bitsandbytes":
        return {"quant_method": "bitsandbytes", "load_in_4bit": True}
    if kind == "hqq-3bit":
        return {"quant_method": "hqq"}
    scheme = {"num_bits": 4, "type": "int", "group_size": 128}
    if kind == "fp8":
        scheme = {"num_bits": 8, "type": "float"}
    groups = {"group_0": {"targets": ["Linear"], "weights": scheme}}
    layout = "float-quantized" if kind == "fp8" else "pack-quantized"
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": groups,
    }


def layer(kind: str, out: int, wide: int, rng) -> dict[str, np.ndarray]:
    """The tensors of one layer, with random codes."""

    def words(*shape: int) -> np.ndarray:
        return np.frombuffer(rng.bytes(4 * int(np.prod(shape))), "i4").reshape(shape)

    groups = wide // 128
    scale = rng.uniform(0.01, 0.02, (groups, out)).astype(np.float16)
    if kind.startswith("gptq"):
        bits = 3 if kind == "gptq-3bit" else 4
        index = np.arange(wide, dtype=np.int32) // 128
        if kind == "gptq-desc_act":
            index = rng.permutation(index)
        return {
            "qweight": words(wide * bits // 32, out),
            "qzeros": words(groups, out * bits // 32),
            "scales": scale,
            "g_idx": index,
        }
    if kind == "awq":
        zeros = words(groups, out // 8)
        return {"qweight": words(wide, out // 8), "qzeros": zeros, "scales": scale}
    if kind == "bitsandbytes":
        count = out * wide
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16"}
        state |= {"shape": [out, wide]}
        name = "weight.quant_state.bitsandbytes__nf4"
        return {
            "weight": np.frombuffer(rng.bytes(count // 2), np.uint8)[:, None],
            "weight.absmax": np.full(count // 64, 0.02, np.float32),
            "weight.quant_map": np.linspace(-1, 1, 16, dtype=np.float32),
            name: np.frombuffer(json.dumps(state).encode(), np.uint8),
        }
    if kind == "hqq-3bit":
        count = out * wide // 64
        numbers = {"nbits": 3, "axis": 1, "group_size": 64}
        return {
            "W_q": words(-(-count // 10), 64) & np.int32(2**30 - 1),
            "scale": np.full((count, 1), 0.01, np.float16),
            "zero": rng.uniform(0, 7, (count, 1)).astype(np.float16),
            "shape": np.array([out, wide]),
            "packing": np.frombuffer(b"3bit_32", np.uint8),
            **{name: np.array(value, np.int32) for name, value in numbers.items()},
        }
    if kind == "fp8":
        import ml_dtypes

        bits = np.frombuffer(rng.bytes(out * wide), np.uint8).reshape(out, wide) & 0x77
        codes = bits.view(ml_dtypes.float8_e4m3fn)
        return {"weight": codes, "weight_scale": np.full((out, 1), 0.01, np.float32)}
    return {
        "weight_packed": words(out, wide // 8),
        "weight_scale": np.ascontiguousarray(scale.T),
        "weight_shape": np.array([out, wide]),
    }


def tensors(kind: str, layers: int) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the model, one at a time."""
    rng = np.random.default_rng(0)
    yield "model.embed_tokens.weight", np.zeros((VOCAB, HIDDEN), np.float16)
    for i in range(layers):
        start = f"model.layers.{i}."
        for name, (out, wide) in KERNELS.items():
            for part, leaf in layer(kind, out, wide, rng).items():
                yield f"{start}{name}.{part}", leaf
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{start}{norm}.weight", np.ones(HIDDEN, np.float16)
    yield "model.norm.weight", np.ones(HIDDEN, np.float16)
    yield "lm_head.weight", np.zeros((VOCAB, HIDDEN), np.float16)


def child(folder: str) -> None:
    """Loads a model and prints seconds and memory as JSON."""
    import jax
    from flax import nnx

    from qjax.checkpoint import checkpoint_parts, hold
    from qjax.converters.huggingface import open_checkpoint
    from qjax.models import Decoder, ModelConfig
    from qjax.models.stacks import Stacks

    def resident(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(field))

    jax.block_until_ready(jax.numpy.zeros(3) + 1)
    Path("/proc/self/clear_refs").write_text("5")
    before, started = resident("VmRSS"), time.perf_counter()
    packed = 0.0
    with open_checkpoint(folder) as source:
        config = ModelConfig.from_hf(source.config)
        params, parts = Stacks(config.layers), checkpoint_parts(source)
        while True:
            read = time.perf_counter()
            _, part = next(parts, (None, None))
            if part is None:
                break
            held = {path: hold(leaf, "bfloat16") for path, leaf in part.items()}
            jax.block_until_ready(held)
            packed += time.perf_counter() - read
            params.add(held)
    model = Decoder(config, params, dtype="bfloat16")
    jax.block_until_ready(nnx.state(model))
    done = time.perf_counter() - started
    facts = {"packed": packed, "loaded": done, "peak": resident("VmHWM") - before}
    print(json.dumps(facts))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    known = ["gptq", "gptq-desc_act", "gptq-3bit", "awq", "bitsandbytes"]
    known += ["hqq-3bit", "compressed-tensors", "fp8"]
    parser.add_argument("formats", nargs="*", default=known)
    parser.add_argument("--layers", type=int, default=18)
    options = parser.parse_args()
    print("| checkpoint | GB | read GB/s | loaded GB/s | peak memory / size |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for kind in options.formats:
        with tempfile.TemporaryDirectory() as folder:
            layers = options.layers // (2 if kind == "fp8" else 1)
            config = CONFIG | {"num_hidden_layers": layers}
            config |= {"quantization_config": settings(kind)}
            target = Path(folder) / "model"
            write_checkpoint(target, config, tensors(kind, layers))
            size = sum(file.stat().st_size for file in target.iterdir())
            for file in target.iterdir():
                file.read_bytes()  # into the page cache
            command = [sys.executable, __file__, "--child", str(target)]
            env = os.environ | {"JAX_PLATFORMS": "cpu"}
            done = subprocess.run(command, capture_output=True, text=True, env=env)
            if done.returncode:
                raise SystemExit(done.stderr)
            facts = json.loads(done.stdout.splitlines()[-1])
            print(
                f"| {kind} | {size / 1e9:.2f} | {size / facts['packed'] / 1e9:.2f} | "
                f"{size / facts['loaded'] / 1e9:.2f} | {facts['peak'] / size:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2])
    else:
        main()
