"""Peak memory of quantizing a checkpoint from disk, against its bound.

Writes a synthetic sharded bfloat16 Llama (3.4 GB by default), quantizes it with
`qjax quantize` in a process of its own, and compares that process's peak resident
memory with `packed size + 2 x largest layer + 1 GB`.

    python benchmarks/memory.py [--layers 7] [--recipe nf4] [--json FILE]

Needs about twice the checkpoint's size on disk; two to five minutes on 2 cores.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from qjax.converters.huggingface import write_checkpoint
from qjax.models import ModelConfig, plan


def config(layers: int) -> dict:
    """A Llama-2-7B of few layers."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    }


def tensors(spec: dict) -> Iterator[tuple[str, np.ndarray]]:
    """Random weights, one tensor at a time."""
    rng = np.random.default_rng(0)
    for entry in plan(ModelConfig.from_hf(spec)):
        w = rng.standard_normal(entry.shape, np.float32) * np.float32(0.02)
        yield entry.name, w.astype(ml_dtypes.bfloat16)


def main() -> None:
    """Measures, prints a line per figure, and writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--recipe", default="nf4")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--directory", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as folder:
        source, target = Path(folder) / "source", Path(folder) / "target"
        spec = config(args.layers)
        subprocess.run(  # in a process of its own: its memory must not count
            [sys.executable, __file__, "--make", str(source), str(args.layers)],
            check=True,
        )
        report = Path(folder) / "report.json"
        command = ["-m", "qjax.cli", "quantize", str(source), "--to", str(target)]
        subprocess.run(
            [sys.executable, *command, "--recipe", args.recipe, "--json", str(report)],
            check=True,
        )
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        result = json.loads(report.read_text("utf-8"))
    layer = sum(
        2 * int(np.prod(entry.shape))
        for entry in plan(ModelConfig.from_hf(spec))
        if entry.layer == 0
    )
    bound = result["size_bytes"] + 2 * layer + 10**9
    figures = {
        "recipe": args.recipe,
        "source_bytes": result["source_bytes"],
        "packed_bytes": result["size_bytes"],
        "largest_layer_bytes": layer,
        "peak_rss_bytes": result["peak_memory_bytes"],
        "peak_rss_any_child_bytes": peak,
        "bound_bytes": bound,
        "within_bound": result["peak_memory_bytes"] <= bound,
        "seconds": result["seconds"],
    }
    for key, value in figures.items():
        print(f"{key:26} {value:,}" if isinstance(value, int) else f"{key:26} {value}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--make"]:
        made = config(int(sys.argv[3]))
        write_checkpoint(sys.argv[2], made, tensors(made), shard_bytes=1 << 30)
    else:
        main()
