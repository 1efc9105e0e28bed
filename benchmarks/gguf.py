"""GGUF side by side with llama.cpp, in one run: perplexity, text, speed, quantizing.

    command   python benchmarks/gguf.py --bin DIRECTORY [--presets Q8_0 Q4_K_M ...]
    needs     llama-perplexity, llama-quantize, llama-completion and llama-bench, built
              from the source archive of llama-cpp-python on PyPI (vendor/llama.cpp,
              cmake, GGML_NATIVE=ON)
    hardware  any CPU
    minutes   five on two cores
    result    a Markdown table for every preset

The bundled model is written as float32 and quantized by both sides. Compared are the
blocks of the two files, the perplexity of our file in both programs (llama.cpp rounds
activations to 8 bits), 32 greedy tokens of the float32 file, and decoding.
"""

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

import numpy as np

import qjax
from qjax.convert import convert
from qjax.converters.gguf_file import open_gguf
from qjax.evaluate import evaluate
from qjax.formats.ggml import TYPES
from qjax.generate import generate_detailed

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TEXT = EXAMPLES / "data" / "wikitext-2-test.txt"
PROMPT = "Once upon a time"


def run(program: Path, *arguments: object, errors: bool = True) -> str:
    """What a program prints."""
    command = [str(program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr * errors


def same_blocks(one: Path, other: Path) -> float:
    """Share of equal blocks of two files."""
    same = total = 0
    with open_gguf(one) as a, open_gguf(other) as b:
        for name, tensor in a.tensors.items():
            size = TYPES[tensor.type].bytes
            if TYPES[tensor.type].dtype is not None:
                continue
            x, y = (np.asarray(f.read(name)).reshape(-1, size) for f in (a, b))
            same += int((x == y).all(1).sum())
            total += len(x)
    return same / total


def perplexity(path: Path, text: Path, chunks: int) -> float:
    """Ours, by llama.cpp's protocol."""
    model, tokenizer = qjax.load(path)
    found = evaluate(
        qjax.prepack(model),
        tokenizer,
        text.read_text("utf-8"),
        protocol="llama.cpp",
        windows=chunks,
    )
    return found["perplexity"]


def decode_rate(path: Path) -> float:
    """Tokens per second, greedy, best of three after one to warm up."""
    model, tokenizer = qjax.load(path)
    model, ids = qjax.prepack(model), tokenizer.encode(PROMPT)
    rates = [
        generate_detailed(model, tokenizer, [ids], 128)[0].decode_tokens_per_second
        for _ in range(4)
    ]
    return max(rates[1:])


def their_rate(program: Path, path: Path, threads: int) -> float:
    """The same by llama-bench."""
    out = run(program, "-m", path, "-p", 0, "-n", 128, "-t", threads, "-o", "json")
    return json.loads(out[out.index("[") : out.rindex("]") + 1])[0]["avg_ts"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bin", type=Path, required=True)
    presets = ["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K"]
    parser.add_argument("--presets", nargs="*", default=presets)
    parser.add_argument("--chunks", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    threads = ("-t", options.threads)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        whole = work / "f32.gguf"
        convert(EXAMPLES / "model", whole, "gguf:F32")
        text = work / "text.txt"
        text.write_text(TEXT.read_text("utf-8").rstrip("\n"), "utf-8")
        said = run(
            options.bin / "llama-completion",
            *("-m", whole, "-p", PROMPT, "-n", 32, "--temp", 0, "-no-cnv", *threads),
            errors=False,
        )
        said = said.removeprefix(PROMPT).rstrip()  # it may end before the last words
        model, tokenizer = qjax.load(whole)
        ours = qjax.generate(model, tokenizer, PROMPT, max_tokens=32)
        equal = len(said) > 0.8 * len(ours) and ours.startswith(said)
        print(f"greedy text of the float32 file is equal: {equal}")
        print(
            "| preset | equal blocks | perplexity, llama.cpp | qjax | ratio "
            "| tokens/s, llama.cpp | qjax |"
        )
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
        for preset in ["F32", *options.presets]:
            path, equal = whole, ""
            if preset != "F32":
                path, other = work / f"{preset}.gguf", work / f"theirs-{preset}.gguf"
                convert(EXAMPLES / "model", path, f"gguf:{preset}")
                run(options.bin / "llama-quantize", whole, other, preset, 2)
                equal = f"{same_blocks(path, other):.2%}"
            out = run(
                options.bin / "llama-perplexity",
                *("-m", path, "-f", text, "-c", 512, "--chunks", options.chunks),
                *threads,
            )
            theirs = float(re.search(r"PPL = ([\d.]+)", out)[1])
            own = perplexity(path, text, options.chunks)
            bench = options.bin / "llama-bench"
            speeds = their_rate(bench, path, options.threads), decode_rate(path)
            print(
                f"| {preset} | {equal} | {theirs:.3f} | {own:.3f} "
                f"| {own / theirs:.4f} | {speeds[0]:.0f} | {speeds[1]:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
