"""Perplexity of our methods beside the original algorithms.

    command   python benchmarks/references.py [CASE ...] [--seeds 3] [--windows 200]
              [--samples 128] [--steps 50] [--batch 4]
    hardware  any CPU
    minutes   twenty on two cores for `gptq` and `awq`, about forty for `autoround`,
              ten for `data-free`
    result    a Markdown table of reference, ours and their ratio on both texts, means
              over the seeds, and the standard deviation of the ratio over them

Both sides see the same windows of 512 tokens, drawn from the calibration text by each
seed, and round the same layers to integers with zero-points. The references of GPTQ and
AWQ are the NumPy restatements in `tests/methods`, inside the same calibration. That of
SignRound is the package auto-round, with as many steps, each on a batch of the windows;
the seed is also that of the batches. `data-free` are the packages quanto, torchao, hqq
and bitsandbytes beside the recipe of as many bits; they have no seed.
"""

import argparse
import dataclasses
import itertools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from quality import CALIBRATION, EXAMPLES, TEXTS, measure

import qjax
from qjax.formats import Cast, Int
from qjax.methods import AWQ, GPTQ, RTN, Method, SignRound
from qjax.recipes import Recipe, Rule

sys.path.insert(0, str(EXAMPLES.parent / "tests" / "methods"))
sys.path.insert(0, str(EXAMPLES.parent / "tests" / "peers"))

from auto_round_reference import auto_round
from awq_reference import autoawq, autoawq_scale
from gptq_reference import gptq
from weight_only_reference import PEERS, replaced

MODEL = str(EXAMPLES / "model")


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


def quantized(model, windows, fmt, method):
    """The model with every kernel of a block quantized."""
    recipe = Recipe((Rule("layers.*kernel", fmt, method),), method.name)
    return qjax.quantize_model(model, recipe, calibration=windows)


def both(kind, bits, group, model, windows, **learning):
    """The model as the reference makes it, and as we do.

    Args:
      kind: `gptq`, `awq` or `autoround`.
      bits: width of the integers.
      group: inputs per scale.
      model: the original.
      windows: of calibration.
      **learning: steps, batch and seed of learned rounding.
    """
    fmt = Int(bits, group, symmetric=False, zero_dtype="uint8")
    if kind == "autoround":
        yield auto_round(model, MODEL, windows, bits, group, **learning)
        yield quantized(model, windows, fmt, SignRound(**learning))
    else:
        yield quantized(model, windows, Cast("float16"), Original(kind, bits, group))
        ours = GPTQ() if kind == "gptq" else AWQ()
        yield quantized(model, windows, fmt, ours)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "cases", nargs="*", default=["gptq", "awq"], help="awq, autoround-int3, ..."
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=200)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model, tokenizer = qjax.load(MODEL)
    tokens = np.asarray(tokenizer.encode(CALIBRATION.read_text("utf-8")), np.int32)
    all_windows = tokens[: len(tokens) // 512 * 512].reshape(-1, 512)
    rows = {}
    print("| method | text | reference | ours | ratio | deviation |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")

    def report(name, pairs):
        found = rows[name] = []
        for sides in pairs:
            found.append([measure(m, tokenizer, options.windows) for m in sides])
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
        for text in TEXTS:
            theirs, ours = np.array([[side[text] for side in p] for p in found]).T
            figures = f"{theirs.mean():.3f} | {ours.mean():.3f}"
            ratio = f"{ours.mean() / theirs.mean():.4f} | {np.std(ours / theirs):.4f}"
            print(f"| {name} | {text} | {figures} | {ratio} |", flush=True)

    def seeded(kind, bits, group):
        for seed in range(options.seeds):
            rng = np.random.default_rng(seed)
            picked = all_windows[rng.permutation(len(all_windows))[: options.samples]]
            learning = {"steps": options.steps, "batch": options.batch, "seed": seed}
            yield both(kind, bits, group, model, picked, **learning)

    def asked(name):
        return any(name.startswith(case) for case in options.cases)

    shapes = ((4, 128), (3, 64), (2, 64))
    for (bits, group), kind in itertools.product(shapes, ("gptq", "awq", "autoround")):
        name = f"{kind}-int{bits}-g{group}"
        if asked(name):
            report(name, seeded(kind, bits, group))
    for name, (peer, recipe) in PEERS.items():
        if asked(f"data-free-{name}"):
            ours = qjax.quantize_model(model, recipe)
            report(name, [(replaced(model, peer), ours)])


if __name__ == "__main__":
    main()
