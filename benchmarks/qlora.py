"""Held-out loss of QLoRA beside LoRA over the weights in 16 bits.

    command   python benchmarks/qlora.py [--steps 60] [--seeds 3] [--json FILE]
    hardware  any CPU
    minutes   about ten on two cores
    result    a Markdown table: held-out loss (nats per token) of the bundled model
              before and after, over NF4 with 8-bit scales and over 16 bits, and the
              ratio of the two, means over the seeds

Data and settings are those of `examples/finetune.py`; seeds are of the adapters.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path

from qjax.cli import main as qjax

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
RUNS = {
    "instructions": ("instructions.jsonl", ["--data.context", "128", "--batch", "8"]),
    "books": ("books-calibration.txt", ["--data.context", "256", "--batch", "4"]),
}


def tuned(data: str, more: list[str], recipe: str, steps: int, seed: int) -> dict:
    """What `qjax finetune` reports."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = ["finetune", str(EXAMPLES / "model")]
        command += ["--data", str(EXAMPLES / "data" / data), "--recipe", recipe]
        command += ["--to", f"{folder}/run", "--steps", str(steps), "--quiet"]
        command += ["--seed", str(seed), "--json", str(report)]
        command += ["--optimizer.learning-rate", "2e-3", "--optimizer.schedule"]
        command += ["cosine", "--data.eval-fraction", "0.1", *more]
        if status := qjax(command):
            sys.exit(status)
        return json.loads(report.read_text("utf-8"))


def main() -> None:
    """Trains and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print("| data | before | LoRA, 16 bits | before, NF4 | QLoRA, NF4 | ratio |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    found = {}
    for name, (data, more) in RUNS.items():
        cells = {}
        for recipe in ("none", "nf4"):
            runs = [
                tuned(data, more, recipe, options.steps, seed)
                for seed in range(options.seeds)
            ]
            for key in ("eval_perplexity_before", "eval_perplexity"):
                losses = [math.log(run[key]) for run in runs]
                cells[recipe, key] = statistics.mean(losses)
        row = list(cells.values())
        found[name] = row
        cells = " | ".join(f"{value:.4f}" for value in (*row, row[3] / row[1]))
        print(f"| {name} | {cells} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), "utf-8")


if __name__ == "__main__":
    main()
