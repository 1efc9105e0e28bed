"""Memory of the QLoRA step on TPUs that need not exist, against its bars.

    python benchmarks/finetune_aot.py                      # every case: 30 minutes
    python benchmarks/finetune_aot.py --match 8b --no-kernels --json out.json

Compiles the training step of `qjax finetune` ahead of time with libtpu, one case after
the other: NF4 with quantized scales, adapters in float32 on all linear layers, AdamW,
rows of 2048 tokens, each block computed again in the gradient. A line per case with the
bytes that its compiler says a chip needs and what they are for; the exit status is 1
where that is above the bar.

The last two cases show, on four layers, that no dense weight is kept for the gradient.
Both keep all activations; in the second, products decode their weight in plain JAX,
whose gradient keeps every decoded matrix. The first has to need less by at least 0.95
of those.
"""

import argparse
import dataclasses
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import qjax.ops
from qjax.abstract import find_config
from qjax.models import ModelConfig, param_shapes
from qjax.plan import Plan, Work, plan
from qjax.train.lora import LoRA

GIB = 2**30

CASES: dict[str, tuple[str, str, dict[str, Any], float | None]] = {
    "7b-r64": ("llama-2-7b", "v5e-1", {}, 8.2),
    "8b-r64": ("llama-3-8b", "v5e-1", {}, 10.2),
    "8b-r16": ("llama-3-8b", "v5e-1", {"lora": LoRA(rank=16)}, 7.9),
    "13b-r64": ("llama-2-13b", "v5e-1", {}, 13.8),
    "70b-r64": ("llama-3-70b", "v5p-1", {}, 58.0),
    "70b-r64-4chips": ("llama-3-70b", "v6e-4", {"batch": 4}, 20.0),
    "residuals": ("llama-3-8b", "v5p-1", {"remat": "none"}, None),
    "residuals-plain": ("llama-3-8b", "v5p-1", {"remat": "none"}, None),
}
"""Model, device, settings and greatest GiB of a chip."""


def config_of(name: str) -> ModelConfig:
    """The model of a case."""
    config = find_config(CASES[name][0])[0]
    if name.startswith("residuals"):
        config = dataclasses.replace(config, layers=4)
    return config


def dense_bytes(config: ModelConfig) -> int:
    """Bytes of a model's linear layers in bfloat16."""
    shapes = param_shapes(config).items()
    return sum(2 * s[0] * s[1] for p, s in shapes if "layers" in p and len(s) == 2)


def run(name: str, kernels: bool) -> Plan:
    """Plans one case."""
    _, device, settings, _ = CASES[name]
    model = config_of(name)
    work = Work(**{"lora": LoRA(rank=64), "kernels": kernels, **settings})
    if not name.endswith("plain"):
        return plan(model, device, mode="finetune", work=work)
    kept = qjax.ops.matmul
    qjax.ops.matmul = lambda x, w, **_: x @ w.dequantize(x.dtype)
    try:
        return plan(model, device, mode="finetune", work=work)
    finally:
        qjax.ops.matmul = kept


def main() -> None:
    """Runs the cases and says which miss their bars."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--match", default="", help="regular expression on names")
    parser.add_argument("--no-kernels", dest="kernels", action="store_false")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results, missed = {}, []
    for name in (n for n in CASES if re.search(args.match, n)):
        begin = time.perf_counter()
        made = run(name, args.kernels)
        seconds = time.perf_counter() - begin
        model, device, _, bar = CASES[name]
        peak = made.peak_bytes_per_device / GIB
        results[name] = {"bar": bar, "seconds": round(seconds, 1), **made.to_dict()}
        parts = ", ".join(f"{k} {v / GIB:.2f}" for k, v in made.breakdown.items())
        limit = "" if bar is None else f" <= {bar}"
        print(f"{name} ({model}, {device}): {peak:.2f}{limit} GiB; {parts}", flush=True)
        if bar is not None and peak > bar:
            missed.append(name)
    pair = ("residuals", "residuals-plain")
    if all(name in results for name in pair):
        packed, plain = (results[name]["peak_bytes_per_device"] for name in pair)
        share = (plain - packed) / dense_bytes(config_of("residuals"))
        print(f"plain products keep {share:.2f} of the dense weights more; >= 0.95")
        if share < 0.95:
            missed.append("residuals")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if missed:
        sys.exit(f"above their bars: {', '.join(missed)}")


if __name__ == "__main__":
    main()
