"""Weight-only products on CPU: native code through `jax.ffi`.

Decides nothing by itself: `obstacle` says whether `native` can multiply. Weights are
read once per 512 rows of x in their packed size and decoded panel by panel in the
first-level cache; there is no temporary of dense size, and the layer of a stack is a
pointer offset.

"int" codes multiply x in fixed point, 16 bits per activation with one step per row and
group (at most 256 rows): `|x - x_used| <= absmax(group of x) / 65024`, sums inside a
group are exact integers. All other kinds, and the transpose, multiply x itself in
float32. A row of x that holds an infinity gives NaN.
"""

import jax.numpy as jnp

from ..native import call
from ..weights import KernelError, Weight, WeightSpec


def obstacle(
    spec: WeightSpec, m: int, x_dtype, *, transpose: bool = False
) -> str | None:
    """Why `matmul` cannot compute a product, or None when it can.

    Args:
      spec: the weight.
      m: rows of x.
      x_dtype: its dtype.
      transpose: whether the product is with `W^T`.

    Returns:
      The reason.
    """
    del m  # any
    if jnp.dtype(x_dtype).name not in call.FLOATS:
        return f"x is {jnp.dtype(x_dtype).name}, not one of {call.FLOATS}"
    return call.obstacle(spec, transpose)


def matmul(
    x,
    w: Weight,
    spec: WeightSpec,
    *,
    layer=None,
    bias=None,
    out_dtype=None,
    transpose: bool = False,
    config=None,
    interpret: bool = False,
):
    """`x @ W + bias`, or `x @ W^T + bias`.

    Args:
      x: float `[m, k]`; `[m, n]` for the transpose.
      w: canonical weight or one of `cpu_layout`, possibly a stack of layers.
      spec: its static half.
      layer: int32 scalar, which layer of a stack.
      bias: float, one per column of the result.
      out_dtype: float dtype of the result; that of `x` by default.
      transpose: multiply by `W^T`.
      config: unused; the code has no tiles to tune.
      interpret: unused; native code has no interpreter.

    Returns:
      The product.

    Raises:
      KernelError: an operand does not fit, or the product has an obstacle.
    """
    del config, interpret
    if jnp.dtype(x.dtype).name not in call.FLOATS:
        raise KernelError(
            f"matmul: x has dtype {x.dtype}, expected one of {call.FLOATS}; cast it"
        )
    return call.run(
        x,
        w,
        spec,
        name="matmul",
        layer=layer,
        bias=bias,
        out_dtype=jnp.dtype(out_dtype or x.dtype),
        transpose=transpose,
    )
