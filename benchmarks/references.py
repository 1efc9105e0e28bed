"""Perplexity of GPTQ and AWQ beside the original algorithms, over three calibrations.

    command   python benchmarks/references.py [CASE ...] [--seeds 3] [--windows 200]
    hardware  any CPU
    minutes   twenty on two cores
    result    a Markdown table of reference, ours and their ratio on both texts

Both sides run inside the same calibration (128 windows of 512 tokens, drawn from the
calibration text by each seed) and round the same layers in the same order to integers
with zero-points. The references are the NumPy restatements in `tests/methods`.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from quality import CALIBRATION, EXAMPLES, TEXTS, measure

import qjax
from qjax.formats import Cast, Int
from qjax.methods import AWQ, GPTQ, RTN, Method
from qjax.recipes import Recipe, Rule

sys.path.insert(0, str(EXAMPLES.parent / "tests" / "methods"))

from awq_reference import autoawq, autoawq_scale
from gptq_reference import gptq

WINDOWS = 128


@dataclasses.dataclass(frozen=True)
class Original(Method):
    """A reference algorithm, stored in float16.

    Attributes:
      kind: `gptq` or `awq`.
      bits: width of its integers.
      group: inputs per scale.
    """

    kind: str
    bits: int
    group: int
    needs = frozenset({"hessian"})

    @property
    def name(self) -> str:
        """For example `original-gptq`."""
        return f"original-{self.kind}"

    def prepare(self, weights, fmt, statistics):
        """AWQ's scales, which all layers of one input share."""
        if self.kind == "gptq":
            return None

        def scales(h, mean, *weights):
            turned = [np.asarray(w, np.float64).T for w in weights]
            mean = np.asarray(mean, np.float64)
            x = samples(h)
            found = autoawq_scale(x, turned, self.bits, self.group, x_mean=mean)
            return found.astype(np.float32)

        mean = statistics.size / statistics.count
        shape = jax.ShapeDtypeStruct(mean.shape, jnp.float32)
        return jax.pure_callback(scales, shape, statistics.hessian, mean, *weights)

    def __call__(
        self, w, fmt, *, importance=None, key=None, statistics=None, shared=None
    ):
        """The reference's weight."""

        def rounded(w, h, scales=None):
            w, h = np.asarray(w, np.float32), np.asarray(h)
            if self.kind == "gptq":
                return gptq(w, h, bits=self.bits, group=self.group)
            made = autoawq(samples(h), w, np.asarray(scales), self.bits, self.group)
            return made.astype(np.float32)

        args = [w, statistics.hessian, *([] if shared is None else [shared])]
        shape = jax.ShapeDtypeStruct(w.shape, jnp.float32)
        return RTN()(jax.pure_callback(rounded, shape, *args), fmt)


def samples(h):
    """As many inputs as there are features, with the given second moments."""
    values, vectors = np.linalg.eigh(np.asarray(h, np.float64))
    return np.sqrt(np.maximum(values, 0))[:, None] * vectors.T


def recipe(fmt, method) -> Recipe:
    """Every kernel of a block."""
    return Recipe((Rule("layers.*kernel", fmt, method),), method.name)


def cases():
    """Name, reference and ours."""
    for bits, group in ((4, 128), (3, 64), (2, 64)):
        fmt = Int(bits, group, symmetric=False, zero_dtype="uint8")
        for kind, ours in (("gptq", GPTQ()), ("awq", AWQ())):
            original = recipe(Cast("float16"), Original(kind, bits, group))
            yield f"{kind}-int{bits}-g{group}", original, recipe(fmt, ours)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "cases", nargs="*", default=["gptq", "awq"], help="gptq, awq-int3, ..."
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model, tokenizer = qjax.load(str(EXAMPLES / "model"))
    tokens = np.asarray(tokenizer.encode(CALIBRATION.read_text("utf-8")), np.int32)
    all_windows = tokens[: len(tokens) // 512 * 512].reshape(-1, 512)
    rows = {}
    print("| method | text | reference | ours | ratio |")
    print("| --- | --- | ---: | ---: | ---: |")
    for name, *sides in cases():
        if not any(name.startswith(case) for case in options.cases):
            continue
        found = []
        for seed in range(options.seeds):
            rng = np.random.default_rng(seed)
            picked = all_windows[rng.permutation(len(all_windows))[:WINDOWS]]
            made = (qjax.quantize_model(model, r, calibration=picked) for r in sides)
            found.append([measure(m, tokenizer, options.windows) for m in made])
        rows[name] = found
        for text in TEXTS:
            theirs, ours = (
                np.mean([pair[side][text] for pair in found]) for side in (0, 1)
            )
            print(
                f"| {name} | {text} | {theirs:.3f} | {ours:.3f} | "
                f"{ours / theirs:.4f} |",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
