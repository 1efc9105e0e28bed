"""Which Flax layers have a quantized counterpart, and how each is replaced."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from qjax.errors import SpecError, UnsupportedError
from qjax.formats import Format
from qjax.methods import Method
from qjax.nn.base import QuantizedLayer
from qjax.nn.conv import QConv
from qjax.nn.einsum import QEinsum
from qjax.nn.equation import general_equation, parse_einsum
from qjax.nn.linear import QEmbed, QLinear
from qjax.recipes import Rule

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Layer:
    """How one Flax layer is replaced."""

    weight: str
    build: Callable[[Any, Format, Method], QuantizedLayer]


def _settings(node: Any) -> dict[str, Any]:
    names = ("dtype", "precision", "preferred_element_type")
    dtypes = [v.get_value().dtype for v in (node.kernel, node.bias) if v is not None]
    with jax.numpy_dtype_promotion("standard"):
        held = jnp.result_type(*dtypes)
    return {name: getattr(node, name) for name in names} | {"param_dtype": held}


def _linear(node: Any, fmt: Format, method: Method) -> QuantizedLayer:
    settings = _settings(node)
    return QLinear(node.kernel, node.bias, format=fmt, method=method, **settings)


def _einsum(node: Any, fmt: Format, method: Method) -> QuantizedLayer:
    shape = getattr(node, "kernel_shape", None)
    if shape is None:
        shape = (*node.batch_axis.values(), *node.in_features, *node.out_features)
    return QEinsum(
        equation_of(node),
        node.kernel,
        node.bias,
        kernel_shape=shape,
        format=fmt,
        method=method,
        **_settings(node),
    )


def _embed(node: Any, fmt: Format, method: Method) -> QuantizedLayer:
    return QEmbed(node.embedding, dtype=node.dtype, format=fmt, method=method)


LAYERS: dict[type, Layer] = {
    nnx.Linear: Layer("kernel", _linear),
    nnx.LinearGeneral: Layer("kernel", _einsum),
    nnx.Einsum: Layer("kernel", _einsum),
    nnx.Embed: Layer("embedding", _embed),
    nnx.Conv: Layer("kernel", QConv),
    nnx.ConvTranspose: Layer("kernel", QConv),
}


def equation_of(node: Any) -> Any:
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


def custom_function(node: Any) -> str:
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


def weight_name(node: Any) -> str | None:
    """The name of the weight that a layer could quantize; None when there is none.

    Quantized layers that are still dense count, as those of `qjax.models.Decoder` are.
    """
    if isinstance(node, QuantizedLayer):
        return None if node.frozen else node.weight_name
    kind = LAYERS.get(type(node))
    return None if kind is None else kind.weight


def swap(node: Any, rule: Rule, method: Method | None, path: str) -> Any:
    """The quantized counterpart of a layer, or the layer when it has none.

    A dense `QuantizedLayer` is changed in place.
    """
    fmt = rule.format
    equation = equation_of(node)
    reason = f"custom {name}" if (name := custom_function(node)) else ""
    if isinstance(equation, UnsupportedError):
        reason = str(equation)
    if fmt is None or reason:
        _log.info("%s is kept: %s", path, reason)
        return node
    method = method or rule.method
    if isinstance(node, QuantizedLayer):
        node.format, node.method = fmt, method
        layer = node
    else:
        layer = LAYERS[type(node)].build(node, fmt, method)
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
