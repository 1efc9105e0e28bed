"""Conversion of NNX modules: quantize on the fly, freeze, report.

`quantize_module` swaps every layer that a recipe names for its quantized counterpart
and leaves the rest alone. It swaps `nnx.Linear`, `LinearGeneral`, `Einsum`, `Embed`,
`Conv` and `ConvTranspose`; a subclass of one of them, or a layer with a custom product
or promotion function, computes something of its own and is kept. Modules that appear
twice in the model are swapped once and stay shared. `quantization_report` says what
became of every weight.

Freezing works through the layers one at a time: beyond the model as it was, memory
holds the packed results and the temporaries of one layer; with `donate=True` each float
weight is freed as soon as its codes exist.
"""

import collections
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from qjax.errors import SpecError
from qjax.formats import Format
from qjax.methods import Method, Statistics, uses_of
from qjax.nn.base import QuantizedLayer
from qjax.nn.calibrated import freeze_calibrated
from qjax.nn.swap import dotted, swap, weight_name
from qjax.recipes import Recipe, load_recipe
from qjax.tree import check_matched


def quantize_module(
    module: Any,
    recipe: Recipe | Format | str,
    method: Method | None = None,
    *,
    freeze: bool = False,
    donate: bool = False,
    nonfinite: str = "raise",
    statistics: Mapping[str, Statistics] | None = None,
) -> Any:
    """Returns a copy of a module whose matching layers are quantized.

    Layers keep their float weights and quantize on the fly, with a straight-through
    gradient, until `freeze`. The model given is not changed; weights that are not
    quantized are shared with it as arrays, not as variables.

    Args:
      module: any NNX module, or a single layer.
      recipe: a recipe, a preset name, or one format (for every kernel but the head).
        Rules match dotted paths of weights, such as `layers.3.attn.q.kernel`.
      method: overrides the method of every rule.
      freeze: store codes at once instead of keeping float weights.
      donate: with `freeze`, delete the arrays of the weights that were packed; the
        given module cannot be used afterwards.
      nonfinite: what `freeze` does about NaN and infinity; see `qjax.quantize`.
      statistics: with `freeze`, of the inputs of each layer by path, for calibrated
        methods; see `qjax.calibration.calibrate`. Layers and experts that no token
        reached, or fewer than they have inputs, are rounded by `RTN("mse")` instead,
        with a warning and the reason in `quantization_report`.

    Returns:
      The quantized module.

    Raises:
      SpecError: a format does not fit a weight that a rule names, or no rule names
        any layer.
      NonFiniteError: a weight holds NaN or infinity.

    Example:
      >>> qmodel = qjax.nn.quantize_module(model, "nf4")
      >>> ...  # train, or calibrate
      >>> qmodel = qjax.nn.freeze(qmodel)
      >>> print(qmodel)
    """
    if donate and not freeze:
        raise SpecError("donate=True needs freeze=True: the float weights are in use")
    if statistics is not None and not freeze:
        raise SpecError(
            "statistics= need freeze=True: they are used when codes are made"
        )
    recipe = load_recipe(recipe)
    seen: list[str] = []
    matched: list[str] = []

    def one(parts: tuple[Any, ...], node: Any) -> Any:
        name = weight_name(node)
        if name is None:
            return node
        path = dotted((*parts, name))
        seen.append(path)
        rule = recipe.match(path, getattr(node, name).get_value().shape)
        if rule is None or rule.format is None:
            return node
        matched.append(path)
        return swap(node, rule, method, path)

    module = nnx.recursive_map(one, nnx.clone(module))
    check_matched(recipe, matched, seen)
    return _freeze(module, donate, nonfinite, statistics) if freeze else module


def freeze(module: Any, *, donate: bool = False, nonfinite: str = "raise") -> Any:
    """Returns a copy of a module in which on-the-fly weights are stored as codes.

    The codes are those of the last call on the fly. Frozen and dense layers stay.

    Args:
      module: a module from `quantize_module`, or one that holds quantized layers.
      donate: delete each float weight once its codes exist; the given module cannot be
        used afterwards. Weights that several layers share are not deleted.
      nonfinite: what to do about NaN and infinity; see `qjax.quantize`.

    Returns:
      The frozen module.

    Raises:
      NonFiniteError: a weight holds NaN or infinity.
    """
    return _freeze(nnx.clone(module), donate, nonfinite)


def _freeze(
    module: Any,
    donate: bool,
    nonfinite: str,
    statistics: Mapping[str, Statistics] | None = None,
) -> Any:
    """Freezes in place."""
    nodes = [(parts, node) for parts, node in nnx.iter_modules(module)]
    holders = collections.Counter(
        id(value)
        for _, node in nodes
        for value in vars(node).values()
        if isinstance(value, nnx.Variable)
    )
    shared: dict[Any, tuple[nnx.Variable, QuantizedLayer]] = {}
    for parts, node in nodes:
        if not isinstance(node, QuantizedLayer) or node.frozen or node.format is None:
            continue
        variable = node.variable
        equation = getattr(node, "equation", None)
        key = (id(variable), type(node), equation, node.format, node.method)
        if key in shared:
            first = shared[key][1]
            setattr(node, node.weight_name, first.variable)
            node.method = first.method
            if first.note:
                node.note = first.note
            continue
        path = dotted((*parts, node.weight_name))
        if statistics is not None and node.method and uses_of(node.method):
            freeze_calibrated(node, path, statistics.get(path), nonfinite)
        else:
            node.freeze(path, nonfinite=nonfinite)
        if holders[id(variable)] > 1:
            shared[key] = variable, node
        elif donate and isinstance(value := variable.get_value(), jax.Array):
            jax.block_until_ready(node.variable.get_value())
            value.delete()
    return module
