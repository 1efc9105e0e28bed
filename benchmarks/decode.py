"""Decode speed of the bundled model: float32, int8, int4, and transformers' float32.

    command   python benchmarks/decode.py [--tokens 256] [--rounds 5]
    needs     nothing beyond qjax; torch and transformers for the last row
    hardware  any CPU
    minutes   1
    result    a table: tokens per second of greedy decoding, batch 1, best of the rounds

The models take turns within each round, so that a busy machine slows all of them.
Speeds are those `generate_detailed` reports: compiled programs only, compilation
excluded.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import qjax

MODEL = Path(__file__).resolve().parent.parent / "examples" / "model"
PROMPT = "It was the"


def qjax_runner(model, tokenizer, tokens: int) -> Callable[[], float]:
    """Return a function that decodes and returns tokens per second."""

    def run() -> float:
        (result,) = qjax.generate_detailed(model, tokenizer, [PROMPT], tokens)
        return result.decode_tokens_per_second

    return run


def transformers_runner(tokens: int) -> Callable[[], float] | None:
    """Return the same for transformers, or None where it cannot run."""
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        return None
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(MODEL)(PROMPT, return_tensors="pt").input_ids

    def timed(count: int) -> float:
        start = time.perf_counter()
        model.generate(
            ids,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        return time.perf_counter() - start

    # the difference leaves prefill and setup out
    return lambda: (tokens - 1) / (timed(tokens) - timed(1))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    model, tokenizer = qjax.load(MODEL, dtype="float32")
    runners = {"qjax float32": qjax_runner(model, tokenizer, arguments.tokens)}
    for recipe in ("int8", "int4-g128", "nf4"):
        packed = qjax.quantize_model(model, recipe)
        runners[f"qjax {recipe}"] = qjax_runner(packed, tokenizer, arguments.tokens)
    peer = transformers_runner(arguments.tokens)
    if peer is not None:
        runners["transformers float32"] = peer
    best = dict.fromkeys(runners, 0.0)
    for run in runners.values():
        run()
    for _ in range(arguments.rounds):
        for name, run in runners.items():
            best[name] = max(best[name], run())
    print("| model | tokens/s |\n| :-- | --: |")
    for name, speed in best.items():
        print(f"| {name} | {speed:.0f} |")


if __name__ == "__main__":
    main()
