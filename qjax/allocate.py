"""Mixed precision: which layers deserve the bits.

Every group of kernels that share an input (query, key and value; gate and up) is a unit
and gets one of several candidates, formats with their methods. The loss of a unit at a
candidate is predicted as

    loss[unit, candidate] =
        sensitivity[unit] * distortion[candidate] / distortion[probe],

where `sensitivity` is what quantizing that unit alone with a cheap probe does to the
model (its KL divergence from the original, or `1/2 sum E[g^2] delta^2` with the loss
gradients `g` and the probe's errors `delta`), and `distortion` the mean squared error
of a candidate on Gaussian weights. The sum over units is then minimized under the
budget exactly, by dynamic programming over bytes.

Costs: for `kl` one evaluation of a few windows per unit. The result is an ordinary
`Recipe`, one rule per kernel, so everything that takes recipes takes it.

Reference: Frantar and Alistarh, arXiv 2208.11580, section 4 (dynamic programming over
layer-wise losses); Dong et al., HAWQ, arXiv 1905.03696 (sensitivity by layer).
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.calibration import BlockStream, calibration_windows
from qjax.checkpoint import load
from qjax.errors import SpecError
from qjax.evaluate import (
    Windows,
    as_scorer,
    plot_allocation,
    require_matplotlib,
    score_windows,
)
from qjax.formats import Format, Int
from qjax.io.atomic import write_bytes
from qjax.methods import RTN, Method, Statistics, needs_of, quantize
from qjax.models import Decoder
from qjax.recipes import Recipe, Rule, load_recipe

SCORES = ("kl", "gradient")
STEPS = 4096
"""Parts that the budget is cut into; sizes are rounded up to them."""
PROBE = Int(3, "channel", symmetric=False), RTN("mse")
"""What sensitivity is measured with; fits matrices of any shape."""
BITS = (1, 2, 3, 4, 5, 6, 8)


@dataclasses.dataclass(frozen=True)
class Unit:
    """Kernels that are quantized alike, and what was decided for them.

    Attributes:
      paths: dotted paths.
      weights: number of weights.
      sensitivity: what quantizing them with the probe does to the model.
      format: name of the chosen format.
      bits: stored bits per weight at that choice.
      loss: predicted loss at that choice.
    """

    paths: tuple[str, ...]
    weights: int
    sensitivity: float
    format: str
    bits: float
    loss: float


@dataclasses.dataclass(frozen=True)
class Allocation:
    """A mixed-precision recipe and how it came about.

    Attributes:
      recipe: one rule per kernel, before the rules of the recipe it began with.
      units: what each group of kernels got.
      bits: stored bits per weight over all of them.
      target: the bits that were allowed.
      score: how sensitivity was measured.
    """

    recipe: Recipe
    units: tuple[Unit, ...]
    bits: float
    target: float
    score: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "recipe": self.recipe.to_dict(),
            "target_bits": self.target,
            "bits_per_weight": self.bits,
            "score": self.score,
            "units": [dataclasses.asdict(unit) for unit in self.units],
        }


def allocate(
    model: Decoder,
    recipe: Recipe | Format | str | os.PathLike[str],
    target_bits: float,
    *,
    tokens: np.ndarray,
    candidates: Sequence[tuple[Format, Method]] | None = None,
    score: str = "kl",
    windows: int = 8,
    progress: Callable[[int, int, str], None] | None = None,
) -> Allocation:
    """Chooses a format for every kernel under a budget of bits.

    Args:
      model: the dense model.
      recipe: says which kernels are quantized, and with `candidates=None` also the
        family they come from: its format at 1 to 8 bits, with its method.
      target_bits: stored bits per quantized weight, scales included, that must not be
        exceeded on average.
      tokens: int32 `[windows, time]`, calibration windows.
      candidates: formats and methods to choose from; they may mix.
      score: `kl` or `gradient`; see the module.
      windows: how many of the windows are read.
      progress: called with units done, their number and a name.

    Returns:
      The allocation; quantize with its `recipe`.

    Raises:
      SpecError: nothing to quantize, no family to choose from, a budget below the
        smallest candidate, or an unknown score.
    """
    if score not in SCORES:
        raise SpecError(f"allocate: score is {score!r}, expected one of {SCORES}")
    recipe = load_recipe(recipe)
    params = model.params()
    units, rules = _units(model, recipe, params, tokens)
    choices = list(candidates or _family(rules))
    tokens = tokens[:windows]
    measure = _by_kl if score == "kl" else _by_gradient
    sensitivity = measure(model, params, units, tokens, progress)
    size = np.array([[_bits(params, u, c) for c in choices] for u in units])
    loss = np.array(
        [
            [s * distortion(*c) / distortion(*PROBE) for c in choices]
            for s in sensitivity
        ]
    )
    weights = np.array([sum(params[p].size for p in unit) for unit in units])
    picked = solve(size, loss, int(target_bits * weights.sum()))
    made = tuple(
        Unit(
            unit,
            int(weights[i]),
            float(sensitivity[i]),
            choices[k][0].name,
            float(size[i, k] / weights[i]),
            float(loss[i, k]),
        )
        for i, (unit, k) in enumerate(zip(units, picked, strict=True))
    )
    chosen = [
        Rule(path, *choices[k])
        for unit, k in zip(units, picked, strict=True)
        for path in unit
    ]
    total = sum(size[i, k] for i, k in enumerate(picked)) / weights.sum()
    name = f"{recipe.name}@{target_bits:g}"
    final = dataclasses.replace(recipe, rules=(*chosen, *recipe.rules), name=name)
    return Allocation(final, made, float(total), float(target_bits), score)


def allocate_checkpoint(
    source: str | os.PathLike[str],
    recipe: Recipe | Format | str | os.PathLike[str],
    target_bits: float,
    *,
    calibration: Any,
    revision: str | None = None,
    report: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Allocation:
    """`allocate` for a model on disk, with the chosen map written to a directory.

    Args:
      source: Hugging Face directory or Hub id, dense; it is loaded whole.
      recipe: see `allocate`.
      target_bits: see `allocate`.
      calibration: token ids or the path of a text; see `quantize_model`.
      revision: of a Hub id.
      report: directory for `allocation.json` and `allocation.png`, made if missing.
      progress: see `allocate`.

    Raises:
      SpecError: see `allocate`; or there is no calibration.
    """
    if calibration is None:
        raise SpecError(
            "allocate: measuring how sensitive layers are needs calibration; pass "
            "token ids or the path of a text (--calibration FILE)"
        )
    if report is not None:
        require_matplotlib()  # before the work
    model, tokenizer = load(source, revision=revision)
    vocab = model.config.vocab_size
    tokens = calibration_windows(calibration, tokenizer, vocab_size=vocab)
    made = allocate(model, recipe, target_bits, tokens=tokens, progress=progress)
    if report is not None:
        folder = Path(report)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(made.to_dict(), indent=1) + "\n"
        write_bytes(folder / "allocation.json", text.encode(), overwrite=True)
        plot_allocation(made.to_dict()["units"], folder / "allocation.png")
    return made


def solve(
    bits: np.ndarray, loss: np.ndarray, budget: int, steps: int = STEPS
) -> list[int]:
    """The choice per row with the least total loss within a budget.

    Args:
      bits: `[units, choices]`, cost of each choice, whole numbers.
      loss: `[units, choices]`, loss of each choice.
      budget: total cost allowed.
      steps: parts the budget is cut into; costs are rounded up to whole parts, so the
        budget holds and the result is optimal up to `units / steps` of it.

    Returns:
      Index of the choice of each unit.

    Raises:
      SpecError: even the cheapest choices exceed the budget.
    """
    if bits.min(axis=1).sum() > budget:
        least = bits.min(axis=1).sum()
        raise SpecError(
            f"allocate: the smallest candidates need {least / budget:.3f} times the "
            "budget; allow more bits, or add candidates with fewer"
        )
    # What every choice needs at least is exact; only the rest is rounded to steps.
    base = bits.min(axis=1, keepdims=True)
    spare = budget - base.sum()
    unit = max(spare / steps, 1.0)  # below `steps` bits nothing needs rounding
    steps = int(spare / unit)
    cost = np.ceil((bits - base) / unit - 1e-9).astype(np.int64)
    best = np.zeros(steps + 1)
    back = np.zeros((len(bits), steps + 1), np.int64)
    for i in range(len(bits)):
        tried = np.full((bits.shape[1], steps + 1), np.inf)
        for k in range(bits.shape[1]):
            if (c := cost[i, k]) <= steps:
                tried[k, c:] = best[: steps + 1 - c] + loss[i, k]
        back[i] = tried.argmin(axis=0)
        best = tried.min(axis=0)
    at, picked = steps, []
    for i in range(len(bits) - 1, -1, -1):
        picked.append(int(back[i, at]))
        at -= cost[i, picked[-1]]
    return picked[::-1]


@functools.cache
def distortion(fmt: Format, method: Method) -> float:
    """Mean squared error on a `[256, 256]` standard normal matrix, white inputs."""
    w = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    statistics = None
    if needs_of(method):
        x = jnp.eye(256, dtype=jnp.float32)
        zeros = Statistics.zeros(256, hessian=True, cross=True, gradient=(256, 256))
        statistics = dataclasses.replace(zeros.add(x, x), gradient=jnp.ones(w.shape))
    q = quantize(w, fmt, method, statistics=statistics)
    return float(jnp.mean(jnp.square(q.dequantize(jnp.float32) - w)))


def _units(
    model: Decoder, recipe: Recipe, params: Mapping[str, Any], tokens: np.ndarray
) -> tuple[list[tuple[str, ...]], list[Rule]]:
    """Kernels that share an input and a rule, layer by layer, and all their rules."""
    stream = BlockStream(model.config, tokens[:1], model.dtype)
    stream.embed(params, params)
    found: dict[tuple[int, int, Rule], list[str]] = {}
    for layer in range(model.config.layers):
        prefix = f"layers.{layer}."
        own = {p[len(prefix) :]: w for p, w in params.items() if p.startswith(prefix)}
        for number, group in enumerate(stream.groups(layer, own)):
            for path in (prefix + name for name in group):
                rule = recipe.match(path, params[path].shape)
                if rule is not None:
                    found.setdefault((layer, number, rule), []).append(path)
    if not found:
        raise SpecError(
            f"allocate: recipe {recipe.name!r} quantizes no kernel of a layer, so "
            "there is nothing to allocate"
        )
    rules = list(dict.fromkeys(rule for _, _, rule in found))
    return [tuple(paths) for paths in found.values()], rules


def _family(rules: Sequence[Rule]) -> list[tuple[Format, Method]]:
    """A rule's format at all its widths."""
    found: list[tuple[Format, Method]] = []
    for rule in rules:
        assert rule.format is not None  # rules that keep are not among units
        names = {f.name for f in dataclasses.fields(rule.format)}  # pyright: ignore[reportArgumentType]
        if "bits" not in names:
            raise SpecError(
                f"allocate: {rule.format.name} has one width only; pass candidates=, "
                "or take a recipe whose format has bits, such as gptq-int4-g64"
            )
        for bits in BITS:
            try:
                wide = dataclasses.replace(rule.format, bits=bits)  # pyright: ignore[reportArgumentType, reportCallIssue]
            except SpecError:
                continue
            found.append((wide, rule.method))
    return found


def _bits(params: Mapping[str, Any], unit: Sequence[str], choice: Any) -> float:
    """Stored bits of a unit at a choice, from shapes alone."""
    fmt, method = choice
    total = 0
    for path in unit:
        rows, columns = params[path].shape
        total += _packed_bytes((rows, columns), fmt, method)
    return 8.0 * total


@functools.cache
def _packed_bytes(shape: tuple[int, int], fmt: Format, method: Method) -> int:
    needs = needs_of(method)

    def run(w: Any, statistics: Any) -> Any:
        return method(w, fmt, statistics=statistics if needs else None)

    w = jax.ShapeDtypeStruct(shape, jnp.float32)
    statistics = jax.eval_shape(
        lambda: Statistics.zeros(shape[-2], hessian=True, cross=True, gradient=shape)
    )
    return jax.eval_shape(run, w, statistics).nbytes


def _by_kl(model, params, units, tokens, progress) -> np.ndarray:
    """KL divergence from the original when one unit alone has the probe's errors."""
    baseline = as_scorer(model)
    count, time = tokens.shape
    windows = Windows(
        tokens.reshape(-1),
        time,
        start=np.arange(count) * time,
        length=np.full(count, time),
        first=np.ones(count, np.int64),
    )
    found = []
    for i, unit in enumerate(units):
        changed = dict(params)
        for path in unit:
            q = quantize(params[path], *PROBE, name=path)
            changed[path] = q.dequantize().astype(params[path].dtype)
        other = as_scorer(Decoder(model.config, changed, dtype=model.dtype))
        scores = score_windows(other, windows, baseline=baseline)
        assert scores.kl is not None  # there is a baseline
        found.append(max(float(np.mean(scores.kl, dtype=np.float64)), 1e-12))
        if progress is not None:
            progress(i + 1, len(units), unit[0])
    return np.array(found)


def _by_gradient(model, params, units, tokens, progress) -> np.ndarray:
    """`1/2 sum E[g^2] delta^2` per unit, `g` the gradient of a window's mean loss."""
    kernels = {path: params[path] for unit in units for path in unit}

    def loss(kernels, window):
        changed = Decoder(model.config, {**params, **kernels}, dtype=model.dtype)
        logits, _ = changed(window[None, :-1])
        logp = jax.nn.log_softmax(logits[0].astype(jnp.float32))
        return -jnp.mean(jnp.take_along_axis(logp, window[1:, None], axis=-1))

    run = jax.jit(jax.grad(loss))
    total = {path: 0.0 for path in kernels}
    miss = {
        path: jnp.square(quantize(w, *PROBE).dequantize(jnp.float32) - w)
        for path, w in kernels.items()
    }
    for i, window in enumerate(jnp.asarray(tokens)):
        gradient = run(kernels, window)
        for path in kernels:
            score = jnp.sum(jnp.square(gradient[path].astype(jnp.float32)) * miss[path])
            total[path] += float(score)
        if progress is not None:
            progress(i + 1, len(tokens), "gradients")
    # Squared gradients of a mean over tokens are 1 / time of those of single tokens.
    scale = 0.5 * (tokens.shape[1] - 1) / len(tokens)
    return np.array([max(scale * sum(total[p] for p in u), 1e-12) for u in units])
