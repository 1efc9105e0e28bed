"""Quantize a model from the Hugging Face hub by name, to int8 and to int4.

command   python examples/quantize_from_hub.py [--model EleutherAI/pythia-410m]
          [--to FOLDER]
hardware  2 CPU cores, 4 GB of memory, 3 GB of disk; an internet connection
minutes   2, and the download of 0.9 GB
expected  a folder and a line per recipe, and a few words that the smaller model writes;
          for Pythia-410M (811 MB in float16) int8 takes 509 MB and int4-g128 367 MB,
          31 % and 23 % of float32; 206 MB of both are the embeddings and the head,
          which stay as they are

Only weights, configuration and tokenizer are downloaded, never code. Quantizing streams
from disk to disk, one layer at a time, so memory does not grow with the model. A folder
works in place of a name; then nothing is downloaded.
"""

import argparse
import json
import sys
from pathlib import Path

from qjax.cli import main as qjax

RECIPES = ["int8", "int4-g128"]


def run(*arguments: object, report: Path) -> dict:
    """Run one qjax command and return what it reports."""
    status = qjax([*map(str, arguments), "--json", str(report)])
    if status:
        sys.exit(status)
    return json.loads(report.read_text("utf-8"))


def main() -> None:
    """Quantize with each recipe, report the sizes, and generate a little text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="EleutherAI/pythia-410m")
    parser.add_argument("--to", type=Path, default=Path("quantized"))
    options = parser.parse_args()
    options.to.mkdir(parents=True, exist_ok=True)

    name = options.model.rstrip("/").split("/")[-1]
    lines = []
    for recipe in RECIPES:
        out = options.to / f"{name}-{recipe}"
        done = run(
            *["quantize", options.model, "--to", out, "--recipe", recipe],
            report=options.to / f"{name}-{recipe}.json",
        )
        share = done["size_bytes"] / done["source_bytes"]
        lines.append(
            f"{recipe}: {done['size_bytes'] / 1e6:.1f} MB, {share:.1%} of the source, "
            f"{done['bits_per_weight']:.2f} bits per weight"
        )
    sample = run(
        *["generate", out, "--prompt", "The sea was", "--max-tokens", 16, "--quiet"],
        report=options.to / f"{name}-sample.json",
    )
    print(*lines, f"{RECIPES[-1]} writes: The sea was{sample['text']}", sep="\n")


if __name__ == "__main__":
    main()
