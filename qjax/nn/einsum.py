"""`QEinsum`: an einsum with a kernel, computed as a product with a packed matrix.

It also stands in for `nnx.LinearGeneral`, whose products are einsums; see
`qjax.nn.equation` for which einsums can be computed so.
"""

from collections.abc import Sequence
from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Num

from qjax.formats import Format
from qjax.methods import Method
from qjax.nn.base import QuantizedLayer, as_variable, compute_dtype
from qjax.nn.equation import Equation, parse_einsum
from qjax.nn.linear import multiply, reshard


class QEinsum(QuantizedLayer):
    """`y = einsum(equation, x, kernel) (+ b)`, the kernel quantized as a matrix.

    Args:
      equation: `"x,kernel->out"`, a batched product with a matrix.
      kernel: float array of the shape the equation says, or a `QuantizedTensor` of
        shape `[*batch, contracted, features]`, or a variable.
      bias: the kernel axes of the result, or None.
      kernel_shape: shape of the kernel without scanned axes; needed when it is packed.
      dtype: compute dtype; by default that of `x`, promoted with `param_dtype`.
      param_dtype: takes part in promotion as Flax does; None leaves `x` alone.
      precision: `jax.lax.Precision` of the products.
      preferred_element_type: dtype of the result, when it differs from the compute one.
      format: quantize a float kernel on the fly to this format.
      method: how codes are chosen.

    Raises:
      UnsupportedError: the equation is not a batched product with a matrix.

    Example:
      >>> layer = QEinsum("btd,dhk->bthk", kernel, format=qjax.Int(4, 128))
    """

    def __init__(
        self,
        equation: str | Equation,
        kernel: Any,
        bias: Any = None,
        *,
        kernel_shape: Sequence[int] | None = None,
        dtype: Any = None,
        param_dtype: Any = None,
        precision: Any = None,
        preferred_element_type: Any = None,
        format: Format | None = None,
        method: Method | None = None,
    ):
        if isinstance(equation, str):
            equation = parse_einsum(equation)
        self.equation = equation
        self.kernel = as_variable(kernel)
        self.bias = nnx.data(None) if bias is None else as_variable(bias)
        shape = self.kernel.get_value().shape if kernel_shape is None else kernel_shape
        self.kernel_shape = tuple(shape)
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.preferred_element_type = preferred_element_type
        self.format = format
        self.method = method

    def to_matrix(self, w: Float[Array, "..."]) -> Float[Array, "*lead in out"]:
        """See `Equation.to_matrix`."""
        return self.equation.to_matrix(w, self.kernel_shape)

    def __call__(
        self, x: Num[Array, "..."], *, out_sharding: Any = None
    ) -> Float[Array, "..."]:
        """Computes the einsum; the result has the compute dtype.

        Args:
          x: input.
          out_sharding: sharding of the result.
        """
        x = x.astype(compute_dtype(x, self.dtype, self.param_dtype))
        bias = None if self.bias is None else self.bias.get_value()
        y = contract(self.equation, x, self.weight(), bias, self.kernel_shape, self)
        return reshard(y, out_sharding)


def contract(
    equation: Equation,
    x: Float[Array, "..."],
    w: Any,
    bias: Any,
    kernel_shape: Sequence[int],
    layer: Any,
) -> Float[Array, "..."]:
    """`einsum(equation, x, kernel) + bias` in the dtype of `x`.

    Args:
      equation: the product.
      x: input, in the compute dtype.
      w: kernel in matrix form, dense or packed.
      bias: the kernel axes of the result, or None.
      kernel_shape: shape of the kernel.
      layer: has `precision` and `preferred_element_type`, or not.
    """
    y = equation.apply(x, w, kernel_shape, lambda x, w: multiply(x, w, layer))
    if bias is None:
        return y
    return y + equation.spread(bias.astype(x.dtype).astype(y.dtype), x.ndim)
