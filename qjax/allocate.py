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

`qjax.sensitivity` measures, `qjax.budget` solves.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qjax.budget import packed_bytes, solve
from qjax.calibration import CONTEXT, BlockStream, calibration_windows
from qjax.checkpoint import load
from qjax.errors import SpecError
from qjax.evaluate import plot_allocation, require_matplotlib
from qjax.formats import Format
from qjax.io.atomic import write_bytes
from qjax.methods import Method
from qjax.models import Decoder
from qjax.recipes import Recipe, Rule, load_recipe
from qjax.sensitivity import PROBE, SCORES, distortion

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
        raise SpecError(f"allocate: score is {score!r}, expected one of {[*SCORES]}")
    recipe = load_recipe(recipe)
    params = model.params()
    units, rules = _units(model, recipe, params, tokens)
    choices = list(candidates or _family(rules))
    tokens = tokens[:windows]
    sensitivity = SCORES[score](model, params, units, tokens, progress)
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
    tokens = calibration_windows(
        calibration,
        tokenizer,
        context=min(CONTEXT, model.config.max_context),
        vocab_size=model.config.vocab_size,
    )
    made = allocate(model, recipe, target_bits, tokens=tokens, progress=progress)
    if report is not None:
        folder = Path(report)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(made.to_dict(), indent=1) + "\n"
        write_bytes(folder / "allocation.json", text.encode(), overwrite=True)
        plot_allocation(made.to_dict()["units"], folder / "allocation.png")
    return made


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
        total += packed_bytes((rows, columns), fmt, method)
    return 8.0 * total
