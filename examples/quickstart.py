"""Quantize the bundled model five ways and compare quality, size and speed.

command   bash examples/quickstart.sh       (or, in an environment with qjax[plot],
          python examples/quickstart.py [--results FOLDER] [--windows N])
hardware  any CPU; written for 2 cores and 4 GB of memory
minutes   2 on two cores
expected  the table in README.md

Every step is a `qjax` command, run in this process and printed before it runs, so that
any line can be copied into a shell. The numbers come from their `--json` output.
"""

import argparse
import json
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

from qjax.cli import main as qjax

HERE = Path(__file__).resolve().parent
MODEL = HERE / "model"
BOOKS = HERE / "data" / "books-test.txt"
WIKITEXT = HERE / "data" / "wikitext-2-test.txt"
RECIPES = ["int8", "int4-g128", "nf4", "hqq-int3-g64"]
PROMPT = "The old man looked out over the sea, and"
HEADER = [
    "weights",
    "bits per quantized weight",
    "file size, MB",
    "perplexity, books",
    "perplexity, WikiText-2",
    "KL divergence",
    "decode, tokens/s",
]


def run(*arguments: object) -> dict:
    """Run one qjax command and return what it reports."""
    words = [_short(argument) for argument in arguments]
    print("$ qjax", shlex.join(words), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        status = qjax([*map(str, arguments), "--quiet", "--json", str(report)])
        if status:
            sys.exit(status)
        return json.loads(report.read_text("utf-8"))


def _short(argument: object) -> str:
    """An argument as printed: paths relative to the working directory if inside it."""
    if isinstance(argument, Path) and argument.is_relative_to(Path.cwd()):
        return str(argument.relative_to(Path.cwd()))
    return str(argument)


def measure(name: str, model: Path, windows: int, bits: float = 16.0) -> dict:
    """Size, quality and speed of one model, and a sample of what it writes."""
    common = ["--protocol", "gptq", "--context", 512, "--windows", windows]
    baseline = [] if model == MODEL else ["--baseline", MODEL]
    books = run("evaluate", model, "--text", BOOKS, *common, *baseline)
    wikitext = run("evaluate", model, "--text", WIKITEXT, *common)
    written = run(
        *["generate", model, "--prompt", PROMPT, "--max-tokens", 128],
        *["--temperature", 0.8, "--seed", 1],
    )
    return {
        "name": name,
        "bits_per_quantized_weight": bits,
        "size_bytes": sum(f.stat().st_size for f in model.glob("*.safetensors")),
        "books": books["perplexity"],
        "wikitext": wikitext["perplexity"],
        "kl_divergence": books.get("kl_divergence", 0.0),
        "decode_tokens_per_second": written["decode_tokens_per_second"],
        "text": written["text"],
    }


def table(rows: list[dict]) -> str:
    """The measurements as a Markdown table."""
    lines = [HEADER, ["---", *["---:"] * (len(HEADER) - 1)]]
    for row in rows:
        lines.append(
            [
                row["name"],
                f"{row['bits_per_quantized_weight']:.2f}",
                f"{row['size_bytes'] / 1e6:.2f}",
                f"{row['books']:.2f}",
                f"{row['wikitext']:.2f}",
                f"{row['kl_divergence']:.5f}",
                f"{row['decode_tokens_per_second']:.0f}",
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(rows: list[dict], path: Path) -> None:
    """Draw what each format saves against what it costs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    original, *quantized = rows
    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    for key, label, marker in (("books", "held-out books", "o"),
                               ("wikitext", "WikiText-2", "s")):  # fmt: skip
        axes.plot(
            [row["bits_per_quantized_weight"] for row in quantized],
            [100 * (row[key] / original[key] - 1) for row in quantized],
            linestyle="none",
            marker=marker,
            label=label,
        )
    for row in quantized:
        worst = max(row[key] / original[key] - 1 for key in ("books", "wikitext"))
        axes.annotate(
            row["name"],
            (row["bits_per_quantized_weight"], 100 * worst),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
        )
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.margins(x=0.15, y=0.2)
    axes.set_xlabel("bits per quantized weight (16 before)")
    axes.set_ylabel("perplexity, % above the original")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Quantize, measure, and write the table, the plot and the models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("quickstart-results"))
    parser.add_argument(
        "--windows", type=int, default=100, help="windows of 512 tokens per text"
    )
    options = parser.parse_args()
    results = options.results.resolve()
    results.mkdir(parents=True, exist_ok=True)

    rows = [measure("bf16 (original)", MODEL, options.windows)]
    for recipe in RECIPES:
        out = results / recipe
        shutil.rmtree(out, ignore_errors=True)
        done = run("quantize", MODEL, "--to", out, "--recipe", recipe)
        stored = sum(tensor["nbytes"] for tensor in done["tensors"])
        weights = sum(tensor["parameters"] for tensor in done["tensors"])
        rows.append(measure(recipe, out, options.windows, 8 * stored / weights))

    text = table(rows)
    (results / "table.md").write_text(text + "\n", "utf-8")
    (results / "table.json").write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    plot(rows, results / "quality.png")
    print(f"\n{text}\n\n{rows[-1]['name']} continues: {PROMPT}{rows[-1]['text']}\n")
    print(f"Results in {_short(results)}: table.md, table.json, quality.png, models.")


if __name__ == "__main__":
    main()
