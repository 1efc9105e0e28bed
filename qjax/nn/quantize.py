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
import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from qjax.errors import SpecError, UnsupportedError
from qjax.formats import Format
from qjax.methods import Method
from qjax.nn.base import QuantizedLayer, QuantizedParam
from qjax.nn.conv import QConv
from qjax.nn.einsum import QEinsum, general_equation, parse_einsum
from qjax.nn.linear import QEmbed, QLinear
from qjax.recipes import Recipe, Rule, load_recipe
from qjax.tensor import QuantizedTensor
from qjax.tree import check_matched

_log = logging.getLogger(__name__)


def quantize_module(
    module: Any,
    recipe: Recipe | Format | str,
    method: Method | None = None,
    *,
    freeze: bool = False,
    donate: bool = False,
    nonfinite: str = "raise",
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
    recipe = load_recipe(recipe)
    seen: list[str] = []
    matched: list[str] = []

    def swap(parts: tuple[Any, ...], node: Any) -> Any:
        kind = _LAYERS.get(type(node))
        if kind is None:
            return node
        path = dotted((*parts, kind.weight))
        seen.append(path)
        rule = recipe.match(path, getattr(node, kind.weight).get_value().shape)
        if rule is None or rule.format is None:
            return node
        matched.append(path)
        return _convert(node, kind, rule, method, path)

    module = nnx.recursive_map(swap, nnx.clone(module))
    check_matched(recipe, matched, seen)
    return _freeze(module, donate, nonfinite) if freeze else module


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


def _freeze(module: Any, donate: bool, nonfinite: str) -> Any:
    """Freezes in place."""
    nodes = [(parts, node) for parts, node in nnx.iter_modules(module)]
    holders = collections.Counter(
        id(value)
        for _, node in nodes
        for value in vars(node).values()
        if isinstance(value, nnx.Variable)
    )
    shared: dict[Any, tuple[nnx.Variable, nnx.Variable]] = {}
    for parts, node in nodes:
        if not isinstance(node, QuantizedLayer) or node.frozen or node.format is None:
            continue
        variable = node.variable
        equation = getattr(node, "equation", None)
        key = (id(variable), type(node), equation, node.format, node.method)
        if key in shared:
            setattr(node, node.weight_name, shared[key][1])
            continue
        node.freeze(dotted((*parts, node.weight_name)), nonfinite=nonfinite)
        if holders[id(variable)] > 1:
            shared[key] = variable, node.variable
        elif donate and isinstance(value := variable.get_value(), jax.Array):
            jax.block_until_ready(node.variable.get_value())
            value.delete()
    return module


@dataclasses.dataclass(frozen=True)
class WeightReport:
    """What became of one parameter.

    Attributes:
      path: dotted path.
      shape: logical shape.
      format: format name, or dtype name when kept.
      state: `frozen`, `on the fly` or `kept`.
      reason: why it was kept; empty otherwise.
      method: method name of a quantized weight; empty otherwise.
      nbytes: bytes held now.
      bits_per_weight: those bytes, in bits over logical weights.
    """

    path: str
    shape: tuple[int, ...]
    format: str
    state: str
    reason: str
    method: str
    nbytes: int
    bits_per_weight: float


def quantization_report(module: Any) -> list[WeightReport]:
    """Lists every parameter of a module: quantized how, or kept why.

    Args:
      module: any NNX module.

    Returns:
      One entry per `nnx.Param` or `QuantizedParam`, shared ones once.
    """
    owners = {
        id(variable): (node, name)
        for _, node in nnx.iter_modules(module)
        for name, variable in vars(node).items()
        if isinstance(variable, nnx.Variable)
    }
    return [
        _report(dotted(parts), variable, *owners.get(id(variable), (None, "")))
        for parts, variable in _parameters(module)
    ]


def _parameters(module: Any) -> Iterator[tuple[tuple[Any, ...], nnx.Variable]]:
    for parts, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Param | QuantizedParam):
            yield parts, node


def _report(path: str, variable: nnx.Variable, node: Any, name: str) -> WeightReport:
    value = variable.get_value()
    shape = tuple(value.shape)
    nbytes = int(value.nbytes)
    bits = 8 * nbytes / value.size if value.size else 0.0
    if isinstance(value, QuantizedTensor):
        fmt, state, reason = value.format.name, "frozen", ""
    elif (
        isinstance(node, QuantizedLayer)
        and name == node.weight_name
        and node.format is not None
    ):
        fmt, state, reason = node.format.name, "on the fly", ""
    else:
        fmt, state = jnp.dtype(value.dtype).name, "kept"
        reason = _reason(value, node, name)
    method = getattr(node, "method", None) if state != "kept" else None
    label = "" if state == "kept" else (method.name if method else "")
    return WeightReport(path, shape, fmt, state, reason, label, nbytes, bits)


def _reason(value: Any, node: Any, name: str) -> str:
    """Why a parameter is in floating point."""
    if value.ndim < 2:
        return "vector"
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return f"{value.dtype} is not a float"
    kind = _LAYERS.get(type(node))
    if kind is None:
        owner = next((c for c in _LAYERS if isinstance(node, c)), None)
        if owner is not None:
            return f"{type(node).__name__} is a subclass of nnx.{owner.__name__}"
        if isinstance(node, QuantizedLayer):
            return "no format" if name == node.weight_name else "not the weight"
        return f"{type(node).__name__} is not a layer that is quantized"
    if name != kind.weight:
        return "bias"
    if custom := _custom(node):
        return f"custom {custom}"
    if isinstance(equation := _equation(node), UnsupportedError):
        return str(equation)
    return "no rule of the recipe"


@dataclasses.dataclass(frozen=True)
class _Layer:
    """How one Flax layer is replaced."""

    weight: str
    build: Callable[[Any, Format, Method], QuantizedLayer]


def _settings(node: Any) -> dict[str, Any]:
    names = ("dtype", "param_dtype", "precision", "preferred_element_type")
    return {name: getattr(node, name) for name in names}


def _linear(node: Any, fmt: Format, method: Method) -> QuantizedLayer:
    settings = _settings(node)
    return QLinear(node.kernel, node.bias, format=fmt, method=method, **settings)


def _einsum(node: Any, fmt: Format, method: Method) -> QuantizedLayer:
    shape = getattr(node, "kernel_shape", None)
    if shape is None:
        shape = (*node.batch_axis.values(), *node.in_features, *node.out_features)
    return QEinsum(
        _equation(node),
        node.kernel,
        node.bias,
        kernel_shape=shape,
        format=fmt,
        method=method,
        **_settings(node),
    )


def _embed(node: Any, fmt: Format, method: Method) -> QuantizedLayer:
    return QEmbed(node.embedding, dtype=node.dtype, format=fmt, method=method)


_LAYERS: dict[type, _Layer] = {
    nnx.Linear: _Layer("kernel", _linear),
    nnx.LinearGeneral: _Layer("kernel", _einsum),
    nnx.Einsum: _Layer("kernel", _einsum),
    nnx.Embed: _Layer("embedding", _embed),
    nnx.Conv: _Layer("kernel", QConv),
    nnx.ConvTranspose: _Layer("kernel", QConv),
}


def _equation(node: Any) -> Any:
    """The equation of a layer, the error that says it has none, or None."""
    try:
        if isinstance(node, nnx.Einsum):
            return parse_einsum(node.einsum_str)
        if isinstance(node, nnx.LinearGeneral):
            batch = tuple(node.batch_axis)
            return general_equation(node.axis, len(node.out_features), batch)
    except UnsupportedError as error:
        return error
    return None


def _custom(node: Any) -> str:
    """The name of a function of its own that the layer computes with, or ''."""
    defaults = {
        "dot_general": (None, lax.dot_general),
        "dot_general_cls": (None,),
        "einsum_op": (None, jnp.einsum),
        "promote_dtype": (None, _flax_promotion()),
    }
    if isinstance(node, nnx.Conv | nnx.ConvTranspose):
        return ""  # they run as they are, on the decoded kernel
    for name, allowed in defaults.items():
        if getattr(node, name, None) not in allowed:
            return name
    return ""


def _flax_promotion() -> Any:
    from flax.nnx.nn import dtypes

    return dtypes.promote_dtype


def _convert(
    node: Any, kind: _Layer, rule: Rule, method: Method | None, path: str
) -> Any:
    """The quantized counterpart of a layer, or the layer when it has none."""
    fmt = rule.format
    equation = _equation(node)
    reason = f"custom {name}" if (name := _custom(node)) else ""
    if isinstance(equation, UnsupportedError):
        reason = str(equation)
    if fmt is None or reason:
        _log.info("%s is kept: %s", path, reason)
        return node
    layer = kind.build(node, fmt, method or rule.method)
    value = layer.variable.get_value()
    matrix = jax.eval_shape(layer.to_matrix, value).shape[-2:]
    rows, cols = matrix if layer.weight_axis == -2 else matrix[::-1]
    try:
        fmt.grouping((rows, cols))
    except SpecError as error:
        raise SpecError(
            f"{path}: {error}; or put a rule that keeps it before {rule.pattern!r}"
        ) from None
    return layer


def dotted(parts: tuple[Any, ...]) -> str:
    """A graph path as recipes write it, `layers.3.attn.q.kernel`."""
    return ".".join(str(part) for part in parts)
