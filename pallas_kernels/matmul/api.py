"""Weight-only products `x W`: arguments are checked here, once, for every backend.

Backends are imported when they are asked for, so that a machine without a GPU never
loads its compiler. Nothing is chosen here: `qjax.ops` decides which backend runs, and a
backend that cannot do what is asked raises instead of falling back.
"""

import importlib
from typing import Any

import jax.numpy as jnp

from ..weights import KernelError, Weight, WeightSpec, check
from . import reference

BACKENDS = ("tpu", "gpu", "cpu", "reference")
ACTIVATIONS = ("float32", "bfloat16", "float16")
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
    if backend not in BACKENDS:
        raise KernelError(
            f"{_NAME}: backend is {backend!r}, expected one of {BACKENDS}"
        )
    _check(x, weight, spec, bias, layer, out_dtype, transpose)
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    if x.shape[0] == 0 or 0 in (spec.k, spec.n):
        return _empty(x.shape[0], spec, bias, out_dtype, transpose)
    if backend == "reference":
        y = reference.matmul(
            x, weight, spec, bias=bias, layer=layer, transpose=transpose
        )
        return y.astype(out_dtype)
    module = importlib.import_module(f"{__package__}.{backend}")
    reason = module.obstacle(spec, x.shape[0], x.dtype, transpose=transpose)
    if reason is not None:
        turned = ", transposed" if transpose else ""
        raise KernelError(
            f"{_NAME}: backend {backend!r} cannot multiply {x.dtype} {list(x.shape)} "
            f"by {spec}{turned}: {reason}"
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


def _refuse(argument, got, expected):
    raise KernelError(f"{_NAME}: {argument} {got}, expected {expected}")


def _check(x, weight, spec, bias, layer, out_dtype, transpose):
    """Every argument against `spec`; backends see only what fits together."""
    if getattr(x, "ndim", None) != 2:
        _refuse("x has shape", list(getattr(x, "shape", ())), "two axes")
    if jnp.dtype(x.dtype).name not in ACTIVATIONS:
        _refuse("x has dtype", x.dtype, ACTIVATIONS)
    if out_dtype is not None and jnp.dtype(out_dtype).name not in ACTIVATIONS:
        _refuse("out_dtype is", out_dtype, ACTIVATIONS)
    if spec.group < 1:
        _refuse("spec.group is", spec.group, "at least 1 (k for one scale per column)")
    inner, columns = (spec.n, spec.k) if transpose else (spec.k, spec.n)
    if x.shape[1] != inner:
        side = "columns of W (transpose)" if transpose else "rows of W"
        _refuse("x has shape", list(x.shape), f"[m, {inner}], its columns the {side}")
    if spec.layout == "canonical":
        check(weight, spec, (x.shape[0], spec.k), name=_NAME)
    zero, table = weight.zero, weight.table
    if zero is not None and jnp.dtype(zero.dtype).name not in (*ACTIVATIONS, "uint8"):
        _refuse("zero has dtype", zero.dtype, (*ACTIVATIONS, "uint8"))
    if table is not None and not jnp.issubdtype(table.dtype, jnp.floating):
        _refuse("table has dtype", table.dtype, "float32")
    if bias is not None and tuple(bias.shape) != (columns,):
        _refuse("bias has shape", list(bias.shape), [columns])
    if bias is not None and not jnp.issubdtype(bias.dtype, jnp.floating):
        _refuse("bias has dtype", bias.dtype, "a float")
    stacked = weight.codes.ndim == 3
    if stacked and layer is None:
        _refuse("layer is", None, "an int32 scalar, because codes have a layer axis")
    if layer is not None:
        if not stacked:
            _refuse("layer is", "given", "None, because codes have no layer axis")
        if jnp.ndim(layer) or not jnp.issubdtype(jnp.result_type(layer), jnp.integer):
            _refuse("layer is", repr(layer), "an int32 scalar")
