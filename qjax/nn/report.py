"""What became of every parameter of a module: quantized how, or kept why."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.errors import UnsupportedError
from qjax.nn.base import QuantizedLayer, QuantizedParam
from qjax.nn.swap import LAYERS, custom_function, dotted, equation_of
from qjax.tensor import QuantizedTensor
from qjax.tree import dotted_path, is_quantized


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
      note: what was done otherwise than the recipe asks, by expert where there are
        several, such as a fallback for want of calibration tokens; empty otherwise.
    """

    path: str
    shape: tuple[int, ...]
    format: str
    state: str
    reason: str
    method: str
    nbytes: int
    bits_per_weight: float
    note: str = ""


def quantization_report(module: Any) -> list[WeightReport]:
    """Lists every parameter of a module or tree: quantized how, or kept why.

    Args:
      module: any NNX module, or a tree of parameters such as Linen variables.

    Returns:
      One entry per `nnx.Param` or `QuantizedParam`, shared ones once; of a tree, one
      per array.
    """
    if not isinstance(module, nnx.Module):
        leaves = jax.tree_util.tree_leaves_with_path(module, is_leaf=is_quantized)
        return [
            _report(dotted_path(path), leaf, None, "")
            for path, leaf in leaves
            if hasattr(leaf, "dtype")
        ]
    owners = {
        id(variable): (node, name)
        for _, node in nnx.iter_modules(module)
        for name, variable in vars(node).items()
        if isinstance(variable, nnx.Variable)
    }
    return [
        _report(
            dotted(parts),
            variable.get_value(),
            *owners.get(id(variable), (None, "")),
        )
        for parts, variable in _parameters(module)
    ]


def _parameters(module: Any) -> Iterator[tuple[tuple[Any, ...], nnx.Variable]]:
    for parts, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Param | QuantizedParam):
            yield parts, node


def _report(path: str, value: Any, node: Any, name: str) -> WeightReport:
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
    note = getattr(node, "note", "") if state == "frozen" else ""
    return WeightReport(path, shape, fmt, state, reason, label, nbytes, bits, note)


def _reason(value: Any, node: Any, name: str) -> str:
    """Why a parameter is in floating point."""
    if value.ndim < 2:
        return "vector"
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return f"{value.dtype} is not a float"
    if node is None:
        return "no rule of the recipe"
    kind = LAYERS.get(type(node))
    if kind is None:
        owner = next((c for c in LAYERS if isinstance(node, c)), None)
        if owner is not None:
            return f"{type(node).__name__} is a subclass of nnx.{owner.__name__}"
        if isinstance(node, QuantizedLayer):
            return "no rule of the recipe" if name == node.weight_name else "bias"
        return f"no layer that is quantized owns it, but {type(node).__name__}"
    if name != kind.weight:
        return "bias"
    if custom := custom_function(node):
        return f"custom {custom}"
    if isinstance(equation := equation_of(node), UnsupportedError):
        return str(equation)
    return "no rule of the recipe"
