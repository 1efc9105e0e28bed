"""The product of rows with one packed or float matrix: backends, choice, gradient.

A packed weight is never expanded: forward and backward decode blocks, and the residuals
of the gradient are the activations and the packed weight alone. A new kernel joins by
an entry in `BACKENDS` and a place in `PREFERENCE`.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

import qjax.pallas_kernels.device as device
from qjax.errors import UnsupportedError
from qjax.formats import Cast
from qjax.ops import blocked, kernels, rows, shards
from qjax.ops.blocks import replaced, same_variance
from qjax.ops.prepack import Prepacked, cut
from qjax.tensor import LayoutTensor, MinifloatTensor
from qjax.wrappers import LayerOf

logger = logging.getLogger("qjax.ops")


Packed = LayoutTensor | LayerOf | Prepacked
"""What backends multiply by; everything else is a wrapper."""


@dataclasses.dataclass(frozen=True)
class Backend:
    """One way to multiply by a packed matrix.

    Attributes:
      summary: what it does, for `explain`.
      obstacle: `(rows of x, weight, dtype of x, transpose)` to the reason it cannot, or
        None.
      run: `(x [m, k], weight, transpose)` to the product in the dtype of `x`.
    """

    summary: str
    obstacle: Callable[[int, Packed, Any, bool], str | None]
    run: Callable[[Float[Array, "m k"], Packed, bool], Float[Array, "m n"]]


def _rows_obstacle(m, q, dtype, transpose):
    del dtype
    return rows.obstacle(m, _shape_of(q), transpose)


def _shape_of(q):
    """What `cut` will return, without computing it."""
    return jax.eval_shape(cut, q)


def _run_xla(x, q, transpose):
    """Block dtype and row padding differ between CPU and accelerators."""
    return lax.platform_dependent(
        x,
        cut(q),
        cpu=functools.partial(blocked.contract, transpose=transpose, cpu=True),
        default=functools.partial(blocked.contract, transpose=transpose, cpu=False),
    )


def bare(q: Packed) -> LayoutTensor:
    """`cut`, without NVFP4's divisor and a table's offset, which kernels leave out."""
    one = cut(q)
    absent = {
        name: None
        for name in ("global_scale", "offset")
        if getattr(one, name, None) is not None
    }
    return replaced(one, **absent)


def _kernel(name, summary):
    def run(x, q, transpose):
        def split(x, q, dtype):
            return blocked.contract(x.astype(dtype), bare(q), transpose, cpu=False)

        return kernels.run_kernel(name, x, q, transpose, split=split)

    return Backend(summary, functools.partial(kernels.obstacle, name), run)


BACKENDS: dict[str, Backend] = {
    "tpu": _kernel("tpu", "Pallas kernel, decodes blocks in vector memory"),
    "gpu": _kernel("gpu", "Pallas Mosaic GPU kernel, decodes in registers"),
    "native": _kernel("native", "C++ kernel, decodes in registers"),
    "cpu": Backend(
        "decodes rows of the packed weight in registers, float32, exact activations",
        _rows_obstacle,
        lambda x, q, transpose: rows.matvec(x, cut(q)),
    ),
    "xla": Backend(
        "decodes blocks of the weight, one matrix product per block",
        lambda m, q, dtype, transpose: None,
        _run_xla,
    ),
}
"""Backends by name."""

PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": ("native", "cpu", "xla"),
    "tpu": ("tpu", "xla"),
    "cuda": ("gpu", "xla"),
    "default": ("xla",),
}
"""Backends to try in order, by platform."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(x, q, transpose, backend):
    """`x W` or `x W^T` for a packed matrix."""
    m, dtype = x.shape[0], x.dtype
    if backend is not None:
        reason = BACKENDS[backend].obstacle(m, q, dtype, transpose)
        if reason:
            raise UnsupportedError(
                f"matmul: backend {backend!r} cannot multiply {list(x.shape)} by "
                f"{q!r}: {reason}; use backend=None"
            )
        log(x, q, transpose, backend)
        return _run(backend, x, q, transpose, backend)
    if shards.explicit():  # branches for other platforms would split differently
        name, _ = choose(device.platform(), m, q, dtype, transpose)
        log(x, q, transpose, name)
        return _run(name, x, q, transpose, None)
    # Programs can be compiled for a platform other than the one they are traced for;
    # of accelerators, only the one that is traced for has its kernels chosen.
    keys = {"cpu", "default", device.platform()} & set(PREFERENCE)
    names = {key: choose(key, m, q, dtype, transpose)[0] for key in sorted(keys)}
    if len(set(names.values())) == 1:
        log(x, q, transpose, names["default"])
        return BACKENDS[names["default"]].run(x, q, transpose)
    log(x, q, transpose, ", ".join(f"{v} on {k}" for k, v in names.items()))

    def run(name):
        return lambda x, q: BACKENDS[name].run(x, q, transpose)

    return lax.platform_dependent(x, q, **{k: run(v) for k, v in names.items()})


def _run(name, x, q, transpose, backend):
    """Runs a backend; on explicit axes a shard chooses again unless one was named."""
    if name in kernels.KINDS or not shards.explicit():
        return BACKENDS[name].run(x, q, transpose)

    def run(x, q) -> Any:
        return product(x, q, transpose, backend)

    return shards.spread(run, x, q, transpose)


def log(x, q, transpose, what):
    """Notes what a product of a program will run."""
    turned = " transposed" if transpose else ""
    logger.debug("matmul x=%s w=%r%s: %s", list(x.shape), q, turned, what)


def choose(platform, m, q, dtype, transpose):
    """First backend without obstacle, and the reasons of those before it."""
    refused = []
    for name in PREFERENCE.get(platform, PREFERENCE["default"]):
        reason = BACKENDS[name].obstacle(m, q, dtype, transpose)
        if reason is None:
            return name, refused
        refused.append((name, reason))
    raise UnsupportedError(f"matmul: no backend for {q!r}: {refused}")


def _forward(x, q, transpose, backend):
    return product(x, q, transpose, backend), (x, q)


def _backward(transpose, backend, residuals, dy):
    del backend  # the transpose product chooses its own
    x, q = residuals
    dx = shards.like(product(dy, q, not transpose, None), x)
    a, b = (dy, x) if transpose else (x, dy)
    return dx, leaf_gradients(a, b, q)


def leaf_gradients(a, b, q):
    """The gradient of anything that backends multiply by; see `shards`."""
    if isinstance(q, LayoutTensor):
        return shards.leaf_gradients(blocked.leaf_gradients, a, b, q)
    one, pull = jax.vjp(cut, q)  # zeros in a stack's other layers
    return pull(shards.leaf_gradients(blocked.leaf_gradients, a, b, one))[0]


product.defvjp(_forward, _backward)


def array_product(x, w, transpose):
    """Product with a float array.

    XLA's CPU compiler widens a whole 16-bit weight to multiply it by one row or by
    float32 activations; there it goes through the packed path as the format `Cast`.
    """
    dense = functools.partial(dense_product, transpose=transpose)
    widened = x.shape[0] <= rows.MAX_ROWS or x.dtype != w.dtype
    plain = w.dtype.itemsize != 2 or not widened or shards.explicit()
    if plain or not x.shape[0] or not w.size:
        return dense(x, w)

    def packed(x, w):
        name = w.dtype.name
        q = MinifloatTensor(w, None, None, Cast(name), w.shape, name)
        return product(x, q, transpose, None)

    return lax.platform_dependent(*same_variance((x, w)), cpu=packed, default=dense)


def dense_product(x, w, transpose):
    """Product with a float array, in the wider of the two dtypes."""
    with jax.numpy_dtype_promotion("standard"):  # strict mode has no wider dtype
        dtype = jnp.promote_types(x.dtype, w.dtype)
    dims = (((1,), (1 if transpose else 0,)), ((), ()))
    y = lax.dot_general(
        x.astype(dtype), w.astype(dtype), dims, preferred_element_type=jnp.float32
    )
    return y.astype(x.dtype)
