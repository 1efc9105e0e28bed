"""The product of groups of rows with stacked packed matrices: backends and gradient.

What `qjax.ops.product` is to one matrix, this is to a stack of experts: kernels over
the stack where the device has one, else the loop of `qjax.ops.windows`, and gradients
that decode again. The gated form is one kernel forward; its gradient computes both
products again from `x`.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

import qjax.pallas_kernels.device as device
from qjax.errors import UnsupportedError
from qjax.ops import grouped_kernels, shards, windows
from qjax.ops.prepack import cut
from qjax.ops.product import Packed, product
from qjax.tensor import LayoutTensor
from qjax.wrappers import LayerOf

logger = logging.getLogger("qjax.ops")

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}
"""Functions of the gate, by name."""


@dataclasses.dataclass(frozen=True)
class Backend:
    """One way to multiply groups of rows by stacked packed matrices.

    Attributes:
      summary: what it does, for `explain_grouped`.
      obstacle: `(rows of x, dtype of x, weight, transpose)` to the reason it cannot,
        or None.
      run: `(x [m, k], group_sizes, weight, transpose)` to the product in the dtype of
        `x`.
      gated: `(x, group_sizes, gate, up, activation)` to the gated form in one pass, or
        None.
    """

    summary: str
    obstacle: Callable[[int, Any, Packed, bool], str | None]
    run: Callable[[Array, Array, Packed, bool], Array]
    gated: Callable[[Array, Array, Packed, Packed, str], Array] | None = None


def _run_windows(x, group_sizes, q, transpose):
    if shards.explicit():

        def again(x, q, group_sizes):
            return _run_windows(x, group_sizes, q, transpose)

        return shards.spread(again, x, q, transpose, group_sizes, independent=False)
    columns = q.matrix[0 if transpose else 1]
    stack, first, _ = grouped_kernels.flat(q)

    def apply(rows, expert) -> Any:
        expert = expert if first is None else expert + first
        return product(rows, LayerOf(stack, expert), transpose, None)

    return windows.walk(x, group_sizes, columns, x.dtype, apply, stack)


def _kernel(name, summary):
    def run(x, group_sizes, q, transpose):
        def other(x, group_sizes, q):
            return _run_windows(x, group_sizes, q, transpose)

        return grouped_kernels.run(name, x, group_sizes, q, transpose, other)

    def gated(x, group_sizes, gate, up, activation):
        other = functools.partial(two, activation, "windows")
        return grouped_kernels.run_gated(
            name, x, group_sizes, gate, up, activation, other
        )

    obstacle = functools.partial(grouped_kernels.obstacle, name)
    return Backend(summary, obstacle, run, gated)


BACKENDS: dict[str, Backend] = {
    "tpu": _kernel("tpu", "Pallas kernel over the experts that have rows"),
    "gpu": _kernel("gpu", "Pallas Mosaic GPU kernel over the experts that have rows"),
    "windows": Backend(
        "multiplies windows of rows by one expert at a time",
        lambda m, dtype, q, transpose: None,
        _run_windows,
    ),
}
"""Backends by name."""

PREFERENCE: dict[str, tuple[str, ...]] = {
    "tpu": ("tpu", "windows"),
    "cuda": ("gpu", "windows"),
    "default": ("windows",),
}
"""Backends to try in order, by platform."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def packed(x, group_sizes, q, transpose, backend) -> Any:
    """The grouped product with a stacked packed matrix or its transpose."""
    m = x.shape[0]
    if backend is not None:
        reason = BACKENDS[backend].obstacle(m, x.dtype, q, transpose)
        if reason:
            raise UnsupportedError(
                f"grouped_matmul: backend {backend!r} cannot multiply {list(x.shape)} "
                f"by {q!r}: {reason}; use backend=None"
            )
        return BACKENDS[backend].run(x, group_sizes, q, transpose)
    names = _names(m, x.dtype, q, transpose)
    logger.debug("grouped_matmul x=%s w=%r: %s", list(x.shape), q, names)

    def run(name):
        return lambda x, sizes, q: BACKENDS[name].run(x, sizes, q, transpose)

    return _by_platform(names, run, x, group_sizes, q)


def _names(m, dtype, q, transpose):
    """What runs on each platform that the program may be compiled for.

    Of accelerators, only the one that is traced for has its kernels chosen.
    """
    platform = device.platform()
    if shards.explicit():  # branches for other platforms would split differently
        return {"default": choose(platform, m, dtype, q, transpose)[0]}
    keys = {"default", platform} & set(PREFERENCE)
    return {key: choose(key, m, dtype, q, transpose)[0] for key in sorted(keys)}


def _by_platform(names, run, *operands):
    if len(set(names.values())) == 1:
        return run(names["default"])(*operands)
    branches = {key: run(name) for key, name in names.items()}
    return lax.platform_dependent(*operands, **branches)


def choose(
    platform: str, m: int, dtype: Any, q: Packed, transpose: bool
) -> tuple[str, list[tuple[str, str]]]:
    """First backend without obstacle, and the reasons of those before it."""
    refused = []
    for name in PREFERENCE.get(platform, PREFERENCE["default"]):
        reason = BACKENDS[name].obstacle(m, dtype, q, transpose)
        if reason is None:
            return name, refused
        refused.append((name, reason))
    raise UnsupportedError(f"grouped_matmul: no backend for {q!r}: {refused}")


def _packed_forward(x, group_sizes, q, transpose, backend):
    y = packed(x, group_sizes, q, transpose, backend)
    return y, (x, group_sizes, q)


def _packed_backward(transpose, backend, residuals, dy):
    del backend  # the transpose product chooses its own
    x, group_sizes, q = residuals
    dx: Any = packed(dy, group_sizes, q, not transpose, None)
    a, b = (dy, x) if transpose else (x, dy)

    def leaves(q):
        run = windows.leaf_gradients
        return shards.leaf_gradients(run, a, b, q, group_sizes, independent=False)

    if isinstance(q, LayoutTensor):
        grads = leaves(q)
    else:
        one, pull = jax.vjp(cut, q)  # zeros in a stack's other layers
        grads = pull(leaves(one))[0]
    return shards.like(dx, x), _no_gradient(group_sizes), grads


packed.defvjp(_packed_forward, _packed_backward)


def _no_gradient(leaf):
    return np.zeros(leaf.shape, jax.dtypes.float0)


@functools.partial(jax.checkpoint, static_argnums=(0, 1))
def two(activation, backend, x, group_sizes, gate, up):
    """The gated form by two products, computed again in the gradient."""
    g: Any = packed(x, group_sizes, gate, False, backend)
    u: Any = packed(x, group_sizes, up, False, backend)
    y = ACTIVATIONS[activation](g.astype(jnp.float32)) * u.astype(jnp.float32)
    return y.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def fused(x, group_sizes, gate, up, activation, backend) -> Any:
    """The gated form of two packed matrices, in one pass where a kernel can."""
    m, dtype = x.shape[0], x.dtype
    if backend is not None:
        names = {"default": backend}
    else:
        found = [_names(m, dtype, w, False) for w in (gate, up)]
        same = found[0] == found[1]
        names = found[0] if same else dict.fromkeys(found[0], "windows")
    apart = grouped_kernels.fused_obstacle(gate, up)
    logger.debug(
        "grouped_gate_up x=%s w=%r: %s (%s)", list(x.shape), gate, names, apart
    )

    def run(name):
        gated = BACKENDS[name].gated
        if gated is None or apart is not None:
            return functools.partial(two, activation, backend)
        return lambda x, sizes, gate, up: gated(x, sizes, gate, up, activation)

    return _by_platform(names, run, x, group_sizes, gate, up)


def _fused_forward(x, group_sizes, gate, up, activation, backend):
    y = fused(x, group_sizes, gate, up, activation, backend)
    return y, (x, group_sizes, gate, up)


def _fused_backward(activation, backend, residuals, dy):
    x, group_sizes, gate, up = residuals

    def again(x, gate, up):
        return two(activation, backend, x, group_sizes, gate, up)

    dx, dgate, dup = jax.vjp(again, x, gate, up)[1](dy)
    return dx, _no_gradient(group_sizes), dgate, dup


fused.defvjp(_fused_forward, _fused_backward)
