"""Flax Linen models over quantized parameters, without changing the model.

`quantize_params` runs the model abstractly once to learn which axes each layer
contracts, then packs the kernels a recipe names. `apply` runs the model: `nn.Dense`,
`DenseGeneral`, `Einsum` and `Embed` multiply by packed weights through `qjax.ops`;
convolutions, and any other module that asks for a packed parameter, get its decoded
value as a temporary of the call (run under `jit`, so that one nobody uses is never
computed). Models that are written with `QDense` need no adapter.

Refuses kernels scanned over an axis that is not the first.
"""

import dataclasses
import logging
import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Num, PyTree

from qjax import ops
from qjax.errors import SpecError, UnsupportedError
from qjax.formats import Format, Int
from qjax.methods import Method
from qjax.nn.base import compute_dtype, fake_quantize
from qjax.nn.einsum import contract
from qjax.nn.equation import Equation, general_equation, parse_einsum
from qjax.nn.linear import multiply, transpose
from qjax.recipes import Recipe
from qjax.tensor import QuantizedTensor
from qjax.tree import is_quantized, quantize_tree

_log = logging.getLogger(__name__)


def quantize_params(
    module: nn.Module,
    variables: PyTree,
    recipe: Recipe | Format | str,
    *args: Any,
    quantize_method: Method | None = None,
    key: Array | None = None,
    nonfinite: str = "raise",
    **kwargs: Any,
) -> PyTree:
    """Packs the parameters of a Linen model.

    Args:
      module: the model.
      variables: what `module.init` returned, or trained variables.
      recipe: a recipe, a preset name, or one format. Rules match dotted paths such as
        `params.encoder.Dense_0.kernel`.
      *args: arguments of one call of the model; only their shapes matter.
      quantize_method: overrides the method of every rule.
      key: random key of stochastic methods.
      nonfinite: what to do about NaN and infinity; see `qjax.quantize`.
      **kwargs: keyword arguments of `module.apply` for that call (`rngs`, `mutable`,
        `method`, the model's own).

    Returns:
      The variables, with a `QuantizedTensor` in place of each packed kernel, in matrix
      form `[*batch, contracted, features]`.

    Raises:
      SpecError: no rule names a parameter, or a format does not fit one.

    Example:
      >>> packed = quantize_params(model, model.init(key, x), "int4-g128", x)
      >>> y = jax.jit(lambda v, x: apply(model, v, x))(packed, x)
    """
    variables = nn.meta.unbox(variables)
    seen = _layers(module, variables, args, kwargs)

    def arrange(name: str, leaf: Any) -> tuple[Any, int]:
        layer = seen.get(name)
        if layer is None:
            return leaf, -2
        if leaf.shape[leaf.ndim - len(layer.shape) :] != layer.shape:
            raise SpecError(
                f"shape {tuple(leaf.shape)} does not end with {layer.shape}, which one "
                "layer uses; scan over the first axis (variable_axes={'params': 0})"
            )
        return layer.to_matrix(leaf), layer.axis

    return quantize_tree(
        variables,
        recipe,
        quantize_method,
        key=key,
        nonfinite=nonfinite,
        arrange=arrange,
    )


def apply(module: nn.Module, variables: PyTree, *args: Any, **kwargs: Any) -> Any:
    """`module.apply` for variables with packed leaves.

    Args:
      module: any Linen module, unchanged.
      variables: variables from `quantize_params`, or a tree with leaves from
        `quantize_tree`.
      *args: as in `module.apply`.
      **kwargs: as in `module.apply`.

    Returns:
      What `module.apply` returns.
    """
    boxed = jax.tree.map(
        lambda leaf: _Packed(leaf) if is_quantized(leaf) else leaf,
        variables,
        is_leaf=is_quantized,
    )
    with nn.intercept_methods(_intercept):
        result = module.apply(boxed, *args, **kwargs)
    return jax.tree.map(
        lambda leaf: leaf.value if isinstance(leaf, _Packed) else leaf,
        result,
        is_leaf=lambda leaf: isinstance(leaf, _Packed),
    )


class QDense(nn.Dense):
    """`nn.Dense` that quantizes its kernel on the fly, or multiplies by a packed one.

    With a float kernel every call rounds it to `format`, with a straight-through
    gradient. With variables whose kernel `quantize_tree` packed, the same model runs on
    codes; the codes are equal.

    Attributes:
      format: the number format of a float kernel.
      quantize_method: how codes are chosen.

    Example:
      >>> model = QDense(256, format=qjax.Int(4, 64))
      >>> packed = qjax.quantize_tree(model.init(key, x), model.format)
      >>> y = model.apply(packed, x)
    """

    format: Format = Int(8, "channel")
    quantize_method: Method | None = None

    @nn.compact
    def __call__(self, inputs: Num[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Multiplies; see the class."""
        w = _packed(self, "kernel")
        if w is None:
            shape = (jnp.shape(inputs)[-1], self.features)
            w = self.param("kernel", self.kernel_init, shape, self.param_dtype)
            w = fake_quantize(w, self.format, self.quantize_method)
        bias = None
        if self.use_bias:
            shape = (self.features,)
            bias = self.param("bias", self.bias_init, shape, self.param_dtype)
        return _product(self, general_equation((-1,), 1), inputs, w, bias, w.shape)


class _Packed(flax.struct.PyTreeNode, nn.meta.AxisMetadata):
    """Carries a packed parameter through Linen, which would check its leaves' shapes.

    Modules that ask for the parameter itself get it decoded.
    """

    value: QuantizedTensor

    def unbox(self) -> Any:
        """The decoded weight."""
        _log.debug("%r is decoded for a module that multiplies by itself", self.value)
        return self.value.dequantize()

    def replace_boxed(self, val: Any) -> Any:
        """A new value is an ordinary parameter."""
        return val

    def add_axis(self, index: int, params: dict[Any, Any]) -> "_Packed":
        """Leading axes are those of the leaves."""
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "_Packed":
        """Leading axes are those of the leaves."""
        return self


@dataclasses.dataclass(frozen=True)
class _Layer:
    """How the kernel of one layer of a model becomes a matrix.

    Attributes:
      shape: shape of the kernel that one call uses.
      equation: its product; None for convolutions and tables.
      axis: -1 for tables.
    """

    shape: tuple[int, ...]
    equation: Equation | None = None
    axis: int = -2

    def to_matrix(self, leaf: Any) -> Any:
        """The leaf, with any leading axes, in matrix form."""
        if self.equation is not None:
            return self.equation.to_matrix(jnp.asarray(leaf), self.shape)
        if self.axis == -1:
            return leaf
        lead = leaf.shape[: leaf.ndim - len(self.shape)]
        return leaf.reshape(*lead, math.prod(self.shape[:-1]), self.shape[-1])


_TABLES = (nn.Embed,)
_PRODUCTS = (nn.Dense, QDense, nn.DenseGeneral, nn.Einsum)
_CONVOLUTIONS = (nn.Conv, nn.ConvTranspose)


def _layers(module: Any, variables: Any, args: Any, kwargs: Any) -> dict[str, _Layer]:
    """The layers that a call of the model uses, by path of the weight."""
    found: dict[str, _Layer] = {}

    def record(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer, kind = context.module, type(context.module)
        name = "embedding" if kind in _TABLES else "kernel"
        path = ".".join(("params", *layer.path, name))
        weight = None
        if context.method_name in ("__call__", "attend"):
            weight = layer.get_variable("params", name)
        if weight is not None and not is_quantized(weight):
            shape = tuple(weight.shape)
            if kind in _TABLES:
                found[path] = _Layer(shape, axis=-1)
            elif kind in _CONVOLUTIONS:
                found[path] = _Layer(shape)
            elif kind in _PRODUCTS and (equation := _equation(layer, args, kwargs)):
                found[path] = _Layer(shape, equation)
        return next_fun(*args, **kwargs)

    def call(variables: Any) -> Any:
        return module.apply(variables, *args, **kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(call, variables)
    return found


def _intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Runs the layers that know packed weights on them."""
    layer, kind, method = context.module, type(context.module), context.method_name
    name = "embedding" if kind in _TABLES else "kernel"
    known = kind in (*_TABLES, *_PRODUCTS, *_CONVOLUTIONS) and kind is not QDense
    if not known or method not in ("__call__", "attend"):
        return next_fun(*args, **kwargs)
    w = _packed(layer, name)
    if w is None:
        return next_fun(*args, **kwargs)
    if kind in _TABLES:
        return _embed(layer, w, method, *args, **kwargs)
    if kind in _CONVOLUTIONS:
        return _convolve(layer, w, *args, **kwargs)
    equation = _equation(layer, args, kwargs)
    x = args[0] if args else kwargs["inputs"]
    shape = _kernel_shape(layer, equation, x) if equation else None
    if equation is None or shape is None or equation.matrix_shape(shape) != w.shape:
        return next_fun(*args, **kwargs)
    bias = layer.get_variable("params", "bias") if layer.use_bias else None
    return _product(layer, equation, x, w, bias, shape)


def _packed(layer: nn.Module, name: str) -> QuantizedTensor | None:
    """A layer's packed parameter, or None."""
    value = layer.get_variable("params", name)
    value = value.value if isinstance(value, _Packed) else value
    return value if is_quantized(value) else None


def _product(layer: Any, equation: Any, x: Any, w: Any, bias: Any, shape: Any) -> Any:
    bias = nn.meta.unbox(bias)
    params = jnp.dtype(w.dtype)
    if bias is not None:
        with jax.numpy_dtype_promotion("standard"):
            params = jnp.promote_types(params, bias.dtype)
    x = jnp.asarray(x)
    x = x.astype(compute_dtype(x, layer.dtype, params))
    return contract(equation, x, w, bias, shape, layer)


def _embed(layer: Any, w: Any, method: str, x: Any) -> Any:
    dtype = compute_dtype(x, layer.dtype, w.dtype)
    if method == "attend":
        return multiply(x.astype(dtype), transpose(w), None)
    return ops.embed(x, w, dtype=layer.dtype)


def _convolve(layer: Any, w: Any, *args: Any, **kwargs: Any) -> Any:
    """The layer itself, on its decoded kernel."""
    params = {"kernel": w.dequantize()}
    size = layer.kernel_size
    taps = (size,) if isinstance(size, int) else tuple(size)
    params["kernel"] = params["kernel"].reshape(*taps, -1, w.shape[-1])
    if layer.use_bias:
        params["bias"] = nn.meta.unbox(layer.get_variable("params", "bias"))
    alone = layer.clone(parent=None, name=None)
    return alone.apply({"params": params}, *args, **kwargs)


def _equation(layer: Any, args: Any, kwargs: Any) -> Equation | None:
    """The product a layer computes; None when it is not a product with a matrix."""
    if isinstance(layer, nn.Einsum):
        given = args[1] if len(args) > 1 else kwargs.get("einsum_str")
        text = layer.einsum_str or given
    elif layer.dot_general_cls or layer.dot_general not in (None, lax.dot_general):
        return None
    try:
        if isinstance(layer, nn.Einsum):
            return parse_einsum(text)
        if isinstance(layer, nn.DenseGeneral):
            axis, features, batch = map(
                _tuple, (layer.axis, layer.features, layer.batch_dims)
            )
            return general_equation(axis, len(features), batch)
        return general_equation((-1,), 1)
    except UnsupportedError as error:
        _log.info("%s is kept as it is: %s", ".".join(layer.path), error)
        return None


def _kernel_shape(layer: Any, equation: Equation, x: Any) -> tuple[int, ...]:
    """Shape of the kernel that a call with `x` uses."""
    if isinstance(layer, nn.Einsum):
        return tuple(layer.shape)
    full = equation.expand(jnp.ndim(x))
    size = dict(zip(full.x, jnp.shape(x), strict=True))
    size |= dict(zip(full.features, _tuple(layer.features), strict=True))
    return tuple(size[c] for c in full.kernel)


def _tuple(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)
