"""Products whose activations are rounded to 8 bits: W8A8, W4A8 and FP8.

    y = s_x * sum_g scale_g sum_{i in g} round(x_i / s_x) (code_i - zero)

`s_x` is one scale per row, `absmax / 127` (int8) or `absmax / 448` (float8_e4m3fn), or
a static one that calibration chose. Kernels multiply the codes as integers or 8-bit
floats; without one the rounded activations go through the weight-only product, which
computes the same numbers. Under `jit` with the contracted axis split over devices every
device rounds its part of a row with a scale of its own.

The gradient passes straight through the rounding: `dx = dy W^T`, by the weight-only
product; leaves of the weight see the rounded activations.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

import qjax.pallas_kernels.device as device
from qjax.errors import SpecError, UnsupportedError
from qjax.ops import blocked, kernels, product, shards
from qjax.pallas_kernels.matmul_a8 import reference

DTYPES = ("int8", "float8_e4m3fn")
PREFERENCE = {"cpu": "native", "tpu": "tpu", "cuda": "gpu"}
"""Kernel by platform."""


def obstacle(name, m, q, dtype, activation, transpose):
    """Why a kernel cannot compute a product with rounded activations, or None."""
    if transpose:
        return "the product is with the transpose"
    return kernels.obstacle(name, m, q, dtype, activation=activation)


def choose(m, q, dtype, activation, transpose):
    """The kernel for the platform, or None, and the reason why there is none."""
    name = PREFERENCE.get(device.platform())
    if name is None:
        return None, "no kernel for this platform"
    reason = obstacle(name, m, q, dtype, activation, transpose)
    return (None if reason else name), reason


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def rounded_product(x, q, x_scale, transpose, activation, backend):
    """`round(x) W` or `round(x) W^T` for a packed matrix."""
    m, dtype = x.shape[0], x.dtype
    name, reason = choose(m, q, dtype, activation, transpose)
    if backend in product.BACKENDS and backend in kernels.KINDS:
        name = backend
        reason = obstacle(backend, m, q, dtype, activation, transpose)
        if reason:
            raise UnsupportedError(
                f"matmul: backend {backend!r} cannot multiply {list(x.shape)} rounded "
                f"to {activation} by {q!r}: {reason}; use backend=None"
            )
        backend = None
    if name is None or backend is not None:
        return product.product(_rounded(x, x_scale, activation), q, transpose, backend)
    product.log(x, q, transpose, f"{name}, activations {activation}")

    def split(x, q, dtype):
        used = x if x_scale is not None else _rounded(x, None, activation)
        return blocked.contract(used.astype(dtype), product.bare(q), False, cpu=False)

    run = functools.partial(kernels.run_kernel, name, activation=activation)
    if x_scale is None:
        return run(x, q, False, split=split)
    scale = reference.spread(x_scale, m)
    codes = reference.round_to(x.astype(jnp.float32), scale, activation)
    return (run(codes, q, False, split=split) * scale).astype(dtype)


def _rounded(x, x_scale, activation):
    """The activations that their codes stand for."""
    codes, scale = reference.quantize_activations(x, activation, x_scale)
    return (codes.astype(jnp.float32) * scale).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def straight_through(x, activation, x_scale):
    """`round(x)`; its gradient is that of `x`."""
    return _rounded(x, x_scale, activation)


def _straight_forward(x, activation, x_scale):
    return straight_through(x, activation, x_scale), x_scale


def _straight_backward(activation, x_scale, dy):
    del activation
    return dy, None if x_scale is None else jnp.zeros_like(x_scale)


straight_through.defvjp(_straight_forward, _straight_backward)


def _forward(x, q, x_scale, transpose, activation, backend):
    y = rounded_product(x, q, x_scale, transpose, activation, backend)
    return y, (x, q, x_scale)


def _backward(transpose, activation, backend, residuals, dy):
    del backend  # the transpose product chooses its own
    x, q, x_scale = residuals
    dx = shards.like(product.product(dy, q, not transpose, None), x)
    used = _rounded(x, x_scale, activation)
    a, b = (dy, used) if transpose else (used, dy)
    grads = product.leaf_gradients(a, b, q)
    return dx, grads, None if x_scale is None else jnp.zeros_like(x_scale)


rounded_product.defvjp(_forward, _backward)


def rounded_result(y, scale, dtype) -> Any:
    """Codes of a float32 result for a static scale; they have no gradient."""
    scale = jnp.asarray(scale, jnp.float32).reshape(())
    return jax.lax.stop_gradient(reference.round_to(y, scale, dtype))


def check(activation, x_scale, out_dtype, out_scale):
    """Raises unless the arguments of `matmul` that are about rounding fit."""
    alone = (out_dtype is None) != (out_scale is None)
    if alone or (out_scale is not None and jnp.size(out_scale) != 1):
        raise SpecError(
            f"matmul: out_dtype is {out_dtype!r} and out_scale {out_scale!r}, expected "
            "neither, or a dtype and a scalar"
        )
    if out_dtype is not None and out_dtype not in DTYPES:
        raise SpecError(
            f"matmul: out_dtype is {out_dtype!r}, expected None or one of {DTYPES}"
        )
    if activation is None and x_scale is not None:
        raise SpecError(
            "matmul: x_scale is given, but activation is None; name a dtype"
        )
    if activation is not None and activation not in DTYPES:
        raise SpecError(
            f"matmul: activation is {activation!r}, expected None or one of {DTYPES}"
        )
