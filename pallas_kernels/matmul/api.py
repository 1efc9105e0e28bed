"""Weight-only products `x W`: arguments are checked here, once, for every backend.

Nothing is chosen here: `qjax.ops` decides which backend runs, and a
backend that cannot do what is asked raises instead of falling back.
"""

from typing import Any

import jax.numpy as jnp

from ..arguments import (
    BACKENDS,
    FLOATS,
    check_product,
    load_backend,
    one_of,
    refuse,
)
from ..weights import Weight, WeightSpec
from . import reference

_NAME = "quantized_matmul"


def quantized_matmul(
    x: Any,
    weight: Weight,
    spec: WeightSpec,
    *,
    bias: Any = None,
    layer: Any = None,
    out_dtype: Any = None,
    transpose: bool = False,
    backend: str = "tpu",
    config: Any = None,
    interpret: Any = False,
) -> Any:
    """`x W + bias` for a packed `W`, decoded inside the kernel.

        y[i, j] = sum_l x[i, l] (value(code[l, j]) - zero[l // group, j])
                  scale[l // group, j] + bias[j]

    Sums are float32. The error of every backend is bounded in `reference.exact`.

    Args:
      x: `[m, k]` float32, bfloat16 or float16; `[m, n]` when `transpose`.
      weight: the packed arrays, in `spec.layout`.
      spec: what they mean.
      bias: `[n]` (`[k]` when `transpose`) or None.
      layer: int32 scalar, which layer of stacked arrays; None for plain arrays. Only
        that layer is read.
      out_dtype: dtype of the result; default that of `x`.
      transpose: multiply by `W^T`, as gradients with respect to `x` need.
      backend: "tpu", "gpu", "cpu" or "reference".
      config: the backend's tiles; default its tuned table.
      interpret: run the kernel's interpreter: True or the backend's parameters.

    Returns:
      `[m, n]` (`[m, k]` when `transpose`).

    Raises:
      KernelError: an argument does not fit, or the backend cannot do this; the message
        names the argument or gives the reason.
    """
    one_of(_NAME, "backend", backend, BACKENDS)
    check_product(_NAME, x, weight, spec, bias=bias, layer=layer, transpose=transpose)
    _check_dtypes(weight, out_dtype)
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    if x.shape[0] == 0 or 0 in (spec.k, spec.n):
        return _empty(x.shape[0], spec, bias, out_dtype, transpose)
    if backend == "reference":
        y = reference.matmul(
            x, weight, spec, bias=bias, layer=layer, transpose=transpose
        )
        return y.astype(out_dtype)
    module = load_backend(
        _NAME, __package__, backend, spec, x, x.dtype, transpose=transpose
    )
    return module.matmul(
        x,
        weight,
        spec,
        layer=layer,
        bias=bias,
        out_dtype=out_dtype,
        transpose=transpose,
        config=config,
        interpret=interpret,
    )


def _empty(m, spec, bias, dtype, transpose):
    """No rows, no columns, or a sum over nothing."""
    columns = spec.k if transpose else spec.n
    if bias is None or columns == 0:
        return jnp.zeros((m, columns), dtype)
    return jnp.broadcast_to(bias.astype(dtype), (m, columns))


def _check_dtypes(weight, out_dtype):
    """The dtypes of the weight's other arrays and of the result."""
    zero, table = weight.zero, weight.table
    if out_dtype is not None:
        one_of(_NAME, "out_dtype", jnp.dtype(out_dtype).name, FLOATS)
    if zero is not None and jnp.dtype(zero.dtype).name not in (*FLOATS, "uint8"):
        refuse(_NAME, "zero has dtype", zero.dtype, (*FLOATS, "uint8"))
    if table is not None and not jnp.issubdtype(table.dtype, jnp.floating):
        refuse(_NAME, "table has dtype", table.dtype, "float32")
