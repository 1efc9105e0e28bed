"""Products of int8 activations with packed integers on CPU: native code.

The definition is `reference.py`: activations are rounded to int8 with one scale per row
(in the kernel, or given), codes are multiplied as integers, exactly inside a group.
Weights are read packed; float8 activations and weights that are not "int" are refused.
"""

import jax.numpy as jnp

from ..native import call
from ..weights import KernelError, Weight, WeightSpec


def obstacle(
    spec: WeightSpec,
    m: int,
    x_dtype,
    *,
    activation: str = "int8",
    transpose: bool = False,
) -> str | None:
    """Why `matmul` cannot compute a product, or None when it can.

    Args:
      spec: the weight.
      m: rows of x.
      x_dtype: its dtype, a float or int8.
      activation: what activations are rounded to.
      transpose: whether the product is with `W^T`.

    Returns:
      The reason.
    """
    del m  # any
    if activation != "int8":
        return f"activations are {activation}, not int8"
    if transpose:
        return "the product is with the transpose"
    if jnp.dtype(x_dtype).name not in (*call.FLOATS, "int8"):
        return f"x is {jnp.dtype(x_dtype).name}, neither int8 nor one of {call.FLOATS}"
    if spec.kind != "int":
        return f"its codes are {spec.kind!r}, not integers"
    return call.obstacle(spec)


def matmul(
    x,
    w: Weight,
    spec: WeightSpec,
    *,
    activation: str = "int8",
    x_scale=None,
    layer=None,
    bias=None,
    out_dtype=None,
    config=None,
    interpret: bool = False,
):
    """`s_x * sum_g scale_g * sum x_q (code - zero) + bias`; see `reference.matmul_a8`.

    Args:
      x: float `[m, k]`, or int8 codes with `x_scale`.
      w: canonical weight or one of `matmul.cpu_layout`, possibly a stack of layers.
      spec: its static half, of kind "int".
      activation: "int8".
      x_scale: static scale of x, a scalar, `[m]` or `[m, 1]`; None: one per row.
      layer: int32 scalar, which layer of a stack.
      bias: float, one per column of the result.
      out_dtype: float dtype of the result; that of `x`, float32 for codes.
      config: unused; the code has no tiles to tune.
      interpret: unused; native code has no interpreter.

    Returns:
      The product.

    Raises:
      KernelError: an operand does not fit, or the product has an obstacle.
    """
    del config, interpret
    reason = obstacle(spec, x.shape[0], x.dtype, activation=activation)
    if reason:
        raise KernelError(f"matmul_a8: {reason}")
    coded = jnp.dtype(x.dtype).name == "int8"
    if coded and x_scale is None:
        raise KernelError("matmul_a8: x holds int8 codes; pass x_scale, their scale")
    if x_scale is not None:
        x_scale = jnp.asarray(x_scale, jnp.float32)
        if x_scale.size not in (1, x.shape[0]):
            raise KernelError(
                f"matmul_a8: x_scale has shape {list(x_scale.shape)}, expected a "
                f"scalar or [{x.shape[0]}]; activations have one scale, or one per row"
            )
        x_scale = jnp.broadcast_to(x_scale.reshape(-1), (x.shape[0],))
    return call.run(
        x,
        w,
        spec,
        name="matmul_a8",
        layer=layer,
        bias=bias,
        out_dtype=jnp.dtype(out_dtype or (jnp.float32 if coded else x.dtype)),
        x_bits=8,
        x_scale=x_scale,
    )
