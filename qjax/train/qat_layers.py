"""The layers of a model by the names that recipes know them by, and their report.

Layers of a decoder are stacked in runs: one NNX layer stands for several weights, each
with a name of its own. Where a recipe treats neighbours differently their run is cut.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx

from qjax.errors import UnsupportedError
from qjax.models import Decoder
from qjax.nn.base import QuantizedLayer
from qjax.nn.lora import without_adapter
from qjax.nn.swap import dotted
from qjax.recipes import Recipe
from qjax.train.lora_sites import sites

_TABLES = {
    "embed.tokens.embedding": "embed.embedding",
    "embed.places.embedding": "embed.position",
}


@dataclasses.dataclass(frozen=True)
class PreparedWeight:
    """What one weight, or the same weight of several layers, is trained as.

    Attributes:
      path: dotted path; of a run of layers `layers.0-5.attn.q.kernel`.
      shape: with the axis of the layers in front.
      format: name of the format.
      method: name of what chooses scales; `lsq` when they are learned.
      activations: what inputs are rounded to, or None.
      learned: number of scales and offsets that are learned.
      adapter: whether an adapter is trained in place of the weight.
    """

    path: str
    shape: tuple[int, ...]
    format: str
    method: str
    activations: str | None
    learned: int
    adapter: bool


@dataclasses.dataclass(frozen=True)
class QATReport:
    """What `prepare` did.

    Attributes:
      weights: those that are trained for a format.
      kept: paths of weights that no rule names.
    """

    weights: tuple[PreparedWeight, ...]
    kept: tuple[str, ...]


def layers(model: Any) -> Iterator[tuple[str, list[str], QuantizedLayer]]:
    """Yields layers: their path, its names in recipes, and the layer."""
    for parts, node in nnx.iter_modules(model):
        if not isinstance(node, QuantizedLayer):
            continue
        path = dotted((*parts, node.weight_name))
        path = _TABLES.get(path, path)
        if not isinstance(model, Decoder) or parts[0] != "layers":
            yield path, [path], node
            continue
        start, stop = model.runs[int(parts[1])]  # pyright: ignore[reportArgumentType]
        rest = dotted((*parts[2:], node.weight_name))
        run = str(start) if stop == start + 1 else f"{start}-{stop - 1}"
        names = [f"layers.{i}.{rest}" for i in range(start, stop)]
        yield f"layers.{run}.{rest}", names, node


def split_runs(model: Decoder, recipe: Recipe) -> None:
    """Cuts runs where the rules of neighbouring layers differ."""
    rules: dict[int, list[Any]] = {}
    for _, names, _ in layers(model):
        for name in names if len(names) > 1 else ():
            layer = int(name.split(".")[1])
            rule = recipe.match(name, (1, 1))
            own = None if rule is None else (rule.format, rule.method)
            rules.setdefault(layer, []).append(own)
    runs, blocks = [], []
    for block, (start, stop) in zip(model.layers, model.runs, strict=True):
        cuts = [i for i in range(start + 1, stop) if rules[i] != rules[i - 1]]
        graph, state = nnx.split(block)
        for a, b in itertools.pairwise([start, *cuts, stop]):
            part = jax.tree.map(lambda x, a=a, b=b: x[a - start : b - start], state)  # noqa: B023
            blocks.append(nnx.merge(graph, part) if cuts else block)
            runs.append((a, b))
    model.runs, model.layers = tuple(runs), nnx.List(blocks)


def take_adapters(model: Any, recipe: Recipe) -> dict[int, Any]:
    """Replaces layers under adapters that a rule names; adapters by their new layer."""
    named = {
        id(layer): path
        for path, names, layer in layers(model)
        if recipe.match(names[0], (1, 1)) is not None
    }
    found: dict[int, Any] = {}
    for site in sites(model):
        adapter, path = site.adapter, named.get(id(site.layer))
        if adapter is None or path is None:
            continue
        if adapter.rate:
            raise UnsupportedError(
                f"{path}: dropout of an adapter's input has no meaning when the sum "
                "of weight and adapter is rounded; set dropout=0"
            )
        plain = without_adapter(site.layer)
        site.replace(plain)
        found[id(plain)] = adapter
    return found


def entry(
    layer: QuantizedLayer, path: str, method: str, activation: str | None
) -> PreparedWeight:
    """What the report says of a layer in training."""
    value, qat = layer.variable.get_value(), layer.qat
    learned = [] if qat is None else [qat.scale, qat.offset]
    count = sum(part.get_value().size for part in learned if part is not None)
    return PreparedWeight(
        path,
        tuple(value.shape),
        (value.format if layer.format is None else layer.format).name,
        "lsq" if count else method,
        activation,
        count,
        qat is not None and qat.adapter is not None,
    )
