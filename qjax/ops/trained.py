"""Products with a weight that is being trained for its format.

The value is the product of the packed weight, by the very kernel that a frozen layer
runs; the gradient is that of `y = x' W'`, `W'` the float weight that the codes stand
for and `x'` the rounded activations. Where nothing is differentiated the float product
is never computed.

A learned static scale `s` of activations has the gradient of learned step sizes,

    dx' / dx = 1 inside of the range and 0 outside,
    dx' / ds = (round(x / s) - x / s) inside, and the end of the range outside,

times `1 / sqrt(features * top)`, `top` the greatest code.

Reference: Bengio et al., arXiv 1308.3432 (straight-through estimator); Esser et al.,
LSQ, arXiv 1902.08153, section 2.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax.ops import activations
from qjax.ops.int8 import int8_matmul
from qjax.ops.product import dense_product
from qjax.pallas_kernels.matmul_a8.reference import TOP, round_to
from qjax.wrappers import RoundedInputs, Trained


@jax.custom_jvp
def instead(value: Any, carrier: Any) -> Any:
    """Returns `value` exactly, with the gradient of `carrier`.

    `carrier + stop_gradient(value - carrier)` would round twice: in bfloat16 small
    values next to large carriers are lost.

    Args:
      value: the result.
      carrier: of the same shape and dtype.
    """
    del carrier
    return value


@instead.defjvp
def _of_carrier(primals, tangents):
    return instead(*primals), tangents[1]


def product(apply: Callable[..., Any], x, w: Trained, transpose, how) -> Any:
    """`round(x) W` or `round(x) W^T` for rows of `x`.

    Args:
      apply: multiplies rows by the base; see `qjax.ops.matmul`.
      x: rows.
      w: the weight.
      transpose: multiply by the transpose.
      how: for `apply`.
    """
    own, base, dense = x, w.base, w.dense.astype(x.dtype)
    x = _inputs(x, w, how)
    if w.backward:
        matrix = dense.T if transpose else dense
        dgrad, wgrad = "dgrad" in w.backward, "wgrad" in w.backward
        carrier = int8_matmul(x, matrix, forward=False, dgrad=dgrad, wgrad=wgrad)
    else:
        carrier = dense_product(x, dense, transpose)
    fixed = lax.stop_gradient((own, base, dense))

    def rounded(x, base, dense):
        del dense
        return apply(x, base, transpose, how)

    def free(x, base, dense):
        del base
        return dense_product(x, dense, transpose)

    if w.active is None:
        return instead(rounded(*fixed), carrier)
    return instead(lax.cond(w.active, rounded, free, *fixed), carrier)


def rows(look_up: Callable[..., Any], w: Trained, ids, transpose) -> Any:
    """Rows `ids` of `W` or of its transpose; see `qjax.ops.embed`."""
    carrier = look_up(w.dense, ids, transpose)
    value = look_up(lax.stop_gradient(w.base), ids, transpose).astype(carrier.dtype)
    if w.active is not None:
        value = jnp.where(w.active, value, lax.stop_gradient(carrier))
    return instead(value, carrier)


def _inputs(x, w: Trained, how) -> Any:
    """The activations that the weight is multiplied by, differentiable."""
    base = w.base
    used: Any
    if how.activation is not None:
        used = activations.straight_through(x, how.activation, how.x_scale)
    elif not isinstance(base, RoundedInputs):
        return x
    elif w.inputs is None:
        used = activations.straight_through(x, base.activation, base.scale)
    else:
        used = learned_inputs(x, w.inputs, base.activation)
    return used if w.active is None else jnp.where(w.active, used, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def learned_inputs(x: Any, scale: Any, activation: str) -> Any:
    """Activations rounded with a static scale that is learned.

    Args:
      x: rows.
      scale: positive float32 scalar.
      activation: `"int8"` or `"float8_e4m3fn"`.

    Returns:
      `round(x / scale) scale`, in the dtype of `x`.
    """
    return activations.straight_through(x, activation, scale)


def _learned_forward(x, scale, activation):
    return learned_inputs(x, scale, activation), (x, scale)


def _learned_backward(activation, residuals, dy):
    x, scale = residuals
    top = TOP[activation]
    u = x.astype(jnp.float32) / scale
    inside = jnp.abs(u) < top
    codes = round_to(x.astype(jnp.float32), scale, activation)
    moved = codes.astype(jnp.float32) - jnp.where(inside, u, 0.0)
    share = (x.shape[-1] * top) ** -0.5
    dscale = jnp.sum(dy.astype(jnp.float32) * moved) * share
    return jnp.where(inside, dy, jnp.zeros_like(dy)), dscale.reshape(scale.shape)


learned_inputs.defvjp(_learned_forward, _learned_backward)
