"""Fine-tune the bundled model in 4 bits: on instructions, and on books.

command   python examples/finetune.py [--results FOLDER] [--steps N]
          (in an environment with qjax[train])
hardware  any CPU; written for 2 cores and 2 GB of memory
minutes   3 on two cores that do nothing else (183 s of CPU time)
expected  perplexity of held-out answers to instructions from 849 to 21, of held-out
          books from 34.1 to 33.7; answers of one word

Both runs quantize the model to NF4 with 8-bit scales and train LoRA adapters over it
(QLoRA). Of every file a part is held out, which the perplexities are of. The books are
among those that the model was trained on, so they have little left to teach; answering
instructions is new to it, and 180 of them are few: more steps only learn them by heart
(after 120 the held-out perplexity is 25). Every step is a `qjax` command, printed
before it runs.
"""

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path

from qjax.cli import main as qjax

HERE = Path(__file__).resolve().parent
MODEL = HERE / "model"
INSTRUCTIONS = HERE / "data" / "instructions.jsonl"
BOOKS = HERE / "data" / "books-calibration.txt"
PROMPT = "### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:\n"
QUESTIONS = [
    ("Give the opposite of the word.", "hot"),
    ("Put the verb in the past.", "walk"),
    ("Write the word for more than one.", "tree"),
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


def train(data: Path, out: Path, steps: int, *more: object) -> dict:
    """Train adapters on a file; continues if it was interrupted."""
    return run(
        *["finetune", MODEL, "--data", data, "--to", out, "--resume"],
        *["--steps", steps, "--optimizer.learning-rate", 2e-3],
        *["--optimizer.schedule", "cosine", "--data.eval-fraction", 0.1, *more],
    )


def answer(adapter: str, instruction: str, word: str) -> str:
    """What the tuned model says to an instruction."""
    return run(
        *["generate", MODEL, "--adapter", adapter],
        *["--prompt", PROMPT.format(instruction, word), "--max-tokens", 12],
    )["text"].strip()


def main() -> None:
    """Train twice, and print perplexities and answers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("finetune-results"))
    parser.add_argument("--steps", type=int, default=60, help="updates of each run")
    options = parser.parse_args()
    results = options.results.resolve()

    short = ["--data.context", 128, "--batch", 8]
    long = ["--data.context", 256, "--batch", 4]
    tuned = {
        "instructions": train(
            INSTRUCTIONS, results / "instructions", options.steps, *short
        ),
        "books": train(BOOKS, results / "books", options.steps, *long),
    }
    adapter = tuned["instructions"]["adapter"]
    answers = [(*question, answer(adapter, *question)) for question in QUESTIONS]

    print("\nperplexity on held-out text, before and after:")
    for name, done in tuned.items():
        print(
            f"  {name:12} {done['eval_perplexity_before']:9.2f} "
            f"{done['eval_perplexity']:9.2f}   ({done['steps']} steps, "
            f"{done['seconds']:.0f} s, {done['tokens_per_second']:,.0f} tokens/s)"
        )
    print("\nanswers of the model tuned on instructions:")
    for instruction, word, text in answers:
        print(f"  {instruction} {word}: {text}")
    print(f"\nAdapters for PEFT: {_short(results)}/*/adapter")


if __name__ == "__main__":
    main()
