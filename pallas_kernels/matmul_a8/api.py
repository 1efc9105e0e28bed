"""Products with 8-bit activations: arguments are checked here, once, for every backend.

Nothing is chosen here: `qjax.ops` decides which backend runs, and a backend that cannot
do what is asked raises instead of falling back.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ..arguments import (
    BACKENDS,
    FLOATS,
    check_activations,
    check_product,
    load_backend,
    one_of,
    refuse,
)
from ..weights import Weight, WeightSpec
from . import reference, specs

_NAME = "matmul_a8"


def quantize_activations(
    x: jax.Array,
    dtype: str = "int8",
    scale: Any = None,
    *,
    backend: str = "reference",
) -> tuple[jax.Array, jax.Array]:
    """Rounds rows of `x` to 8 bits: `codes = clip(round(x / scale))`.

    Plain jnp on every backend: XLA makes it one or two fused passes over `x`, and a
    row's scale is not known before the row was read. The TPU kernel does it itself.

    Args:
      x: `[m, k]` float32, bfloat16 or float16.
      dtype: "int8" or "float8_e4m3fn".
      scale: static scale, a scalar, `[m]` or `[m, 1]`; None computes one per row.
      backend: one of `BACKENDS`; all compute the same.

    Returns:
      Codes `[m, k]` and float32 scales `[m, 1]`.

    Raises:
      KernelError: an argument does not fit; the message names it.
    """
    one_of(_NAME, "backend", backend, BACKENDS)
    one_of(_NAME, "dtype", str(dtype), specs.ACTIVATIONS)
    check_activations(_NAME, x, FLOATS)
    return reference.quantize_activations(x, str(dtype), scale)


def matmul_a8(
    x: jax.Array,
    weight: Weight,
    spec: WeightSpec,
    *,
    activation: str = "int8",
    x_scale: Any = None,
    bias: Any = None,
    layer: Any = None,
    out_dtype: Any = None,
    out_scale: Any = None,
    backend: str = "tpu",
    config: Any = None,
    interpret: Any = False,
) -> jax.Array:
    """`x W + bias` with `x` rounded to 8 bits and a packed `W`.

        y[i, j] = s_x[i] sum_g scale[g, j] sum_{l in g} x_q[i, l] v[l, j] + bias[j]

    Sums of int8 products are exact within a group; see `reference.bound`.

    Args:
      x: `[m, k]` float, rounded here, or int8 or float8_e4m3fn codes with `x_scale`.
      weight: the packed arrays, in `spec.layout`.
      spec: what they mean.
      activation: "int8" or "float8_e4m3fn"; ignored for codes.
      x_scale: scale of the codes, or a static scale for floats: a scalar, `[m]` or
        `[m, 1]`. None: one per row, absmax / 127 or / 448.
      bias: `[n]` or None.
      layer: int32 scalar, which layer of stacked arrays; only that one is read.
      out_dtype: float32, bfloat16 or float16 (default that of `x`, float32 for codes);
        with `out_scale` "int8" or "float8_e4m3fn".
      out_scale: scalar; the result is `clip(round(y / out_scale))`.
      backend: "tpu", "gpu", "cpu" or "reference".
      config: the backend's tiles; default its table.
      interpret: run the kernel's interpreter: True or the backend's parameters.

    Returns:
      `[m, n]`.

    Raises:
      KernelError: an argument does not fit, or the backend cannot do this; the message
        names the argument or gives the reason.
    """
    one_of(_NAME, "backend", backend, BACKENDS)
    one_of(_NAME, "activation", activation, specs.ACTIVATIONS)
    dtypes = (*FLOATS, *specs.ACTIVATIONS)
    check_product(_NAME, x, weight, spec, bias=bias, layer=layer, dtypes=dtypes)
    _check_scales(x, x_scale, out_dtype, out_scale)
    activation = specs.activation_of(x.dtype) or activation
    float_in = specs.activation_of(x.dtype) is None
    out = jnp.dtype(out_dtype or (x.dtype if float_in else jnp.float32))
    options = {
        "activation": activation,
        "x_scale": x_scale,
        "bias": bias,
        "layer": layer,
        "out_dtype": out,
        "out_scale": out_scale,
    }
    if 0 in (x.shape[0], spec.n):
        return jnp.zeros((x.shape[0], spec.n), out)
    if backend == "reference" or spec.k == 0:
        return reference.matmul_a8(x, weight, spec, **options)
    chip = getattr(config, "chip", None)
    known = {"chip": chip} if backend == "tpu" and chip else {}
    module = load_backend(
        _NAME, __package__, backend, spec, x, activation, activation=activation, **known
    )
    if backend == "cpu":  # its results are floats; quantized ones are made behind it
        del options["out_scale"]
        options["out_dtype"] = jnp.dtype("float32") if out_scale is not None else out
    y = module.matmul(x, weight, spec, config=config, interpret=interpret, **options)
    if backend == "cpu" and out_scale is not None:
        return reference.round_to(y, jnp.asarray(out_scale, jnp.float32), out.name)
    return y


def _check_scales(x, x_scale, out_dtype, out_scale):
    """Scales of the activations and of the result."""
    if specs.activation_of(x.dtype) and x_scale is None:
        refuse(_NAME, "x_scale is", None, f"the scale of the {x.dtype} codes")
    if x_scale is not None and jnp.size(x_scale) not in (1, x.shape[0]):
        refuse(_NAME, "x_scale has shape", list(jnp.shape(x_scale)), [x.shape[0], 1])
    name = None if out_dtype is None else jnp.dtype(out_dtype).name
    if out_scale is None:
        if name is not None and name not in FLOATS:
            refuse(
                _NAME, "out_dtype is", repr(name), f"one of {FLOATS} without out_scale"
            )
        return
    if name not in specs.ACTIVATIONS:
        refuse(
            _NAME, "out_dtype is", repr(name), f"one of {specs.ACTIVATIONS}: out_scale"
        )
    if jnp.size(out_scale) != 1:
        refuse(_NAME, "out_scale has shape", list(jnp.shape(out_scale)), "a scalar")
