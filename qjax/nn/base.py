"""What every quantized layer shares: where its weight lives and when it is packed.

A layer's weight is in one of three states. *Dense*: a float `nnx.Param` and no format.
*On the fly*: a float `nnx.Param` and a format; every call quantizes the weight and
multiplies by the result, with a straight-through gradient, so the layer can be
calibrated or trained for its format; `qjax.nn.qat` adds what is learned beside the
weight. *Frozen*: a `QuantizedParam` that holds codes and
scales, and no float weight. Freezing stores exactly the codes of the last state.

`QuantizedParam` is not a `nnx.Param`: optimizers and `nnx.grad` that take every `Param`
never see integer leaves.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from qjax.errors import SpecError
from qjax.formats import Format
from qjax.methods import Method, quantize
from qjax.tensor import QuantizedTensor


class QuantizedParam(nnx.Variable):
    """A frozen weight: its value is a `QuantizedTensor`."""


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def fake_quantize(
    w: Float[Array, "*lead in out"],
    fmt: Format,
    method: Method | None = None,
    axis: int = -2,
) -> Float[Array, "*lead in out"]:
    """Rounds a weight to what a format can store; the gradient passes straight through.

    `y = dequantize(quantize(w))` and `dy/dw = 1`.

    Args:
      w: float weight.
      fmt: the number format.
      method: how codes are chosen; default `RTN()`.
      axis: the contraction axis, -2 or -1, as in `qjax.quantize`.

    Returns:
      Array of the shape and dtype of `w`.

    Reference: Bengio et al. 2013, arXiv:1308.3432 (straight-through estimator).
    """
    return _quantize_alone(w, fmt, method, axis).dequantize()


@fake_quantize.defjvp
def _straight_through(fmt, method, axis, primals, tangents):
    return fake_quantize(*primals, fmt, method, axis), tangents[0]


def _quantize_alone(w, fmt, method, axis):
    """Quantizes behind barriers, so that the compiler rounds as it does eagerly."""
    w = jax.lax.optimization_barrier(w)
    return jax.lax.optimization_barrier(quantize(w, fmt, method, axis=axis))


def compute_dtype(x: Any, dtype: Any, param_dtype: Any) -> Any:
    """The dtype of a product: `dtype`, or Flax's promotion of inputs and parameters.

    Args:
      x: the input.
      dtype: the layer's own compute dtype; wins when given.
      param_dtype: dtype of the parameters; None leaves the dtype of `x` alone.
    """
    if dtype is not None:
        return jnp.dtype(dtype)
    if param_dtype is None:
        return x.dtype
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(x.dtype, param_dtype)


class QuantizedLayer(nnx.Module):
    """Base of layers with one quantizable weight.

    Attributes:
      format: the number format, or None when the weight stays dense.
      method: how codes are chosen.
      note: what freezing did otherwise than asked, for reports.
      qat: a `qjax.nn.qat.Training` while the weight is trained for its format, or None.
    """

    weight_name: ClassVar[str] = "kernel"
    weight_axis: ClassVar[int] = -2
    format: Format | None
    method: Method | None
    note: str = ""
    qat: Any = None

    @property
    def variable(self) -> nnx.Variable:
        """The variable that holds the weight."""
        return getattr(self, self.weight_name)

    @property
    def frozen(self) -> bool:
        """Whether the weight is stored as codes."""
        return isinstance(self.variable, QuantizedParam)

    def to_matrix(self, w: Float[Array, "..."]) -> Float[Array, "*lead in out"]:
        """The float weight as `[*lead, in, out]`, the form in which it is quantized."""
        return w

    def quantized(self, name: str = "weight", **options: Any) -> QuantizedTensor:
        """The packed weight: what is stored, or what freezing now would store.

        Args:
          name: what errors call the weight.
          **options: passed to `qjax.quantize` (`nonfinite`, `importance`, `key`).

        Raises:
          SpecError: the layer is dense; it has no format.
        """
        if self.qat is not None:
            return self.qat.packed(self, name, **options)
        value = self.variable.get_value()
        if isinstance(value, QuantizedTensor):
            return value
        if self.format is None:
            raise SpecError(
                f"{name}: this {type(self).__name__} is dense and has no format; "
                "make it with format=..., or with quantize_module"
            )
        w = self.to_matrix(value)
        axis = self.weight_axis
        return quantize(w, self.format, self.method, axis=axis, name=name, **options)

    def freeze(self, name: str = "weight", **options: Any) -> None:
        """Stores codes and drops the float weight; see `quantized`."""
        if self.qat is not None or not self.frozen:
            packed = QuantizedParam(self.quantized(name, **options))
            setattr(self, self.weight_name, packed)
            self.qat = None

    def __nnx_repr__(self) -> Iterator[Any]:
        """What is printed: settings at their defaults are left out."""
        for item in super().__nnx_repr__():
            name = getattr(item, "key", None)
            value = getattr(item, "value", item)
            if value is None:
                continue
            if isinstance(value, Format | Method):
                item = dataclasses.replace(item, value=value.name, use_raw_value=True)
            if not (self.frozen and name == "format"):
                yield item

    def weight(self) -> Any:
        """What to multiply by: packed, rounded on the fly, or dense; matrix form."""
        if self.qat is not None:
            return self.qat.weight(self)
        value = self.variable.get_value()
        if isinstance(value, QuantizedTensor):
            return value
        w = self.to_matrix(value)
        if self.format is None:
            return w
        return fake_quantize(w, self.format, self.method, self.weight_axis)


def as_variable(weight: Any) -> nnx.Variable:
    """Wraps a weight in the variable type it belongs in; variables pass through."""
    if isinstance(weight, nnx.Variable):
        return weight
    if isinstance(weight, QuantizedTensor):
        return QuantizedParam(weight)
    return nnx.Param(jnp.asarray(weight))
