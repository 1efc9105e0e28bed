"""Perplexity of the bundled model under every preset, on both test texts.

    command   python benchmarks/quality.py [RECIPE ...] [--windows 200] [--data-free]
              [--json FILE]
    hardware  any CPU
    minutes   half a minute per recipe on two cores, up to two for calibrated ones and
              ten for learned rounding
    result    a Markdown table; decoder linears only, embeddings and head kept

Protocol `gptq`: windows of 512 tokens, first token of each not scored, float32.
Calibrated recipes read the first 128 windows of 512 tokens of the calibration text,
those of GGUF (`q4_k_m`, `q4_k_m-best`) as well, unless `--data-free`.
`RECIPE@BITS` allocates a width to every layer, `BITS` on average.
"""

import argparse
import json
from pathlib import Path

import qjax
from qjax.allocate import allocate_checkpoint
from qjax.evaluate import evaluate
from qjax.recipes import BEST

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
CALIBRATION = EXAMPLES / "data" / "books-calibration.txt"
TEXTS = {"books": "books-test.txt", "WikiText-2": "wikitext-2-test.txt"}


def measure(model, tokenizer, windows: int) -> dict[str, float]:
    """Perplexity on each text."""
    found = {}
    for name, file in TEXTS.items():
        text = (EXAMPLES / "data" / file).read_text("utf-8")
        result = evaluate(model, tokenizer, text, context=512, windows=windows)
        found[name] = result["perplexity"]
    return found


def quantized(path: str, recipe: str, calibration: Path | None):
    """The model under a recipe, with `@` and a number under an allocated one."""
    name, _, bits = recipe.partition("@")
    chosen = name
    if bits:
        found = allocate_checkpoint(path, name, float(bits), calibration=calibration)
        chosen = found.recipe
    return qjax.quantize_model(path, chosen, calibration=calibration)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*qjax.PRESETS, *BEST]
    parser.add_argument("recipes", nargs="*", default=names)
    parser.add_argument("--windows", type=int, default=200)
    parser.add_argument("--data-free", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    calibration = None if options.data_free else CALIBRATION
    path = str(EXAMPLES / "model")
    original, tokenizer = qjax.load(path)
    rows = {"original": {"bits": 16.0} | measure(original, tokenizer, options.windows)}
    print("| recipe | bits per quantized weight | books | WikiText-2 |")
    print("| --- | ---: | ---: | ---: |")
    for recipe in ["original", *options.recipes]:
        if recipe != "original":
            model = quantized(path, recipe, calibration)
            size = qjax.model_size(model)
            bits = 8 * size.quantized_bytes / size.quantized_parameters
            rows[recipe] = {"bits": bits} | measure(model, tokenizer, options.windows)
        row = rows[recipe]
        figures = [f"{row['bits']:.3f}", *(f"{row[text]:.3f}" for text in TEXTS)]
        print(f"| {recipe} | {' | '.join(figures)} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
