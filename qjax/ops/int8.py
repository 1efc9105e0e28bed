"""Float products whose operands are rounded to int8: mixed-precision training.

    y = x W,   dx = dy W^T,   dW = x^T dy

are three products, and each can run on integers: the rows of its left operand and the
columns of its right one are rounded with scales of their own, `absmax / 127`, along the
contracted axis, so that scales come out of the sum. A matrix that takes part in two
products is rounded for each. Rounding to nearest biases small gradients to zero; with a
key, `dy` is rounded up or down at random instead, so that it is right on average.

Reference: Xi et al., Jetfire, arXiv 2403.12422, and torchao's int8 mixed-precision
training (switches per product); Gupta et al., arXiv 1502.02551 (stochastic rounding).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qjax.errors import SpecError, UnsupportedError
from qjax.pallas_kernels.matmul_a8 import reference

MOST = (2**31 - 1) // 127**2
"""The longest sum of products of int8 that an int32 holds."""


def int8_matmul(
    x: Float[Array, "*batch in"],
    w: Float[Array, "in out"],
    *,
    forward: bool = True,
    dgrad: bool = True,
    wgrad: bool = True,
    key: Array | None = None,
) -> Float[Array, "*batch out"]:
    """Returns `x W`, computed on int8 operands where a switch says so.

    Args:
      x: activations.
      w: weight.
      forward: round the operands of `x W`.
      dgrad: those of `dx = dy W^T`.
      wgrad: those of `dW = x^T dy`.
      key: of stochastic rounding of `dy`; None rounds to nearest.

    Returns:
      The product in the dtype of `x`; gradients have the dtype of what they are of.

    Raises:
      SpecError: shapes do not match.
      UnsupportedError: a sum is too long for int32.

    Example:
      >>> y = int8_matmul(x, w, dgrad=False)
    """
    if w.ndim != 2 or x.ndim < 1 or x.shape[-1] != w.shape[0]:
        raise SpecError(
            f"int8_matmul: x has shape {list(x.shape)} and w {list(w.shape)}, expected "
            "[*batch, in] and [in, out] with equal `in`"
        )
    y: Any = _product(x.reshape(-1, x.shape[-1]), w, key, (forward, dgrad, wgrad))
    return y.reshape(*x.shape[:-1], w.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(x, w, key, switches):
    del key
    return _multiply(x, w, switches[0]).astype(x.dtype)


def _forward(x, w, key, switches):
    return _product(x, w, key, switches), (x, w, key)


def _backward(switches, residuals, dy):
    x, w, key = residuals
    keys = (None, None) if key is None else jax.random.split(key)
    dx = _multiply(dy, w.T, switches[1], left=keys[0])
    dw = _multiply(x.T, dy, switches[2], right=keys[1])
    return dx.astype(x.dtype), dw.astype(w.dtype), None


_product.defvjp(_forward, _backward)


def _multiply(a, b, rounds, left=None, right=None):
    """`a b` in float32; of rounded operands, with the keys of those that have one."""
    if not rounds:
        with jax.numpy_dtype_promotion("standard"):
            return jnp.matmul(a, b, preferred_element_type=jnp.float32)
    if a.shape[1] > MOST:
        raise UnsupportedError(
            f"int8_matmul: a sum of {a.shape[1]} products of int8 can exceed int32; "
            f"use at most {MOST} tokens at a time"
        )
    a, a_scale = _rounded(a, left)
    b, b_scale = _rounded(b.T, right)
    dims = (((1,), (1,)), ((), ()))
    y = jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.int32)
    return y.astype(jnp.float32) * a_scale * b_scale.T


def _rounded(
    x: Float[Array, "m k"], key: Any
) -> tuple[Int[Array, "m k"], Float[Array, "m 1"]]:
    """Codes and scales of rows."""
    codes, scale = reference.quantize_activations(x, "int8")
    if key is not None:
        u = x.astype(jnp.float32) / scale
        up = jax.random.uniform(key, x.shape, jnp.float32)
        codes = jnp.clip(jnp.floor(u + up), -127, 127).astype(jnp.int8)
    return codes, scale
