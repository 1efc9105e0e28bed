"""`matmul`: activations times a dense or quantized weight, with its gradient.

What runs is one of the backends of `BACKENDS`; `backend=None` takes the first of
`PREFERENCE` for the platform the program is compiled for that can do the product, and
`explain` says which and why. A packed weight is never expanded: forward and backward
decode blocks, and the residuals of the gradient are the activations and the packed
weight alone.

Wrappers are applied to activations and results, not to weights, so the same few
backends serve all of them.

Under `jit` with sharded weights the result is right for any sharding, but block loops
run along the sharded axis as well and XLA then moves blocks between devices; inside
`jax.shard_map` every device loops over its own shard.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from qjax.errors import SpecError, UnsupportedError
from qjax.formats import Cast
from qjax.ops import blocked, rows
from qjax.ops.blocks import materialize_scale, same_variance
from qjax.tensor import LayoutTensor, MinifloatTensor, QuantizedTensor
from qjax.wrappers import (
    InputScaled,
    LowRank,
    Permuted,
    Rotated,
    Transposed,
    WithOutliers,
    hadamard,
)

logger = logging.getLogger("qjax.ops")

OUTLIER_BLOCK = 1 << 20
"""Products of outliers held at a time."""


@dataclasses.dataclass(frozen=True)
class Backend:
    """One way to multiply by a packed matrix.

    Attributes:
      summary: what it does, for `explain`.
      obstacle: `(rows of x, weight, transpose)` to the reason it cannot, or None.
      run: `(x [m, k], weight, transpose)` to the product in the dtype of `x`.
    """

    summary: str
    obstacle: Callable[[int, LayoutTensor, bool], str | None]
    run: Callable[[Float[Array, "m k"], LayoutTensor, bool], Float[Array, "m n"]]


def _run_xla(x, q, transpose):
    """Block dtype and row padding differ between CPU and accelerators."""
    return lax.platform_dependent(
        x,
        q,
        cpu=functools.partial(blocked.contract, transpose=transpose, cpu=True),
        default=functools.partial(blocked.contract, transpose=transpose, cpu=False),
    )


BACKENDS: dict[str, Backend] = {
    "cpu": Backend(
        "decodes rows of the packed weight in registers, float32, exact activations",
        rows.obstacle,
        lambda x, q, transpose: rows.matvec(x, q),
    ),
    "xla": Backend(
        "decodes blocks of the weight, one matrix product per block",
        lambda m, q, transpose: None,
        _run_xla,
    ),
}
"""Backends by name."""

PREFERENCE: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "xla"), "default": ("xla",)}
"""Backends to try in order, by platform."""


def matmul(
    x: Float[Array, "*batch in"],
    w: Float[Array, "in out"] | QuantizedTensor,
    *,
    backend: str | None = None,
) -> Float[Array, "*batch out"]:
    """Multiplies activations by a weight: `y = x W`.

    Differentiable in `x` and in every float leaf of `w` (scales, zero-points, learned
    tables, outlier values, low-rank factors); integer leaves have float0 gradients.

    Args:
      x: float activations `[*batch, in]`; rank 1 is a single row.
      w: float array `[in, out]`, or a quantized tensor of that shape. Stacked weights
        are for `jax.vmap` and `jax.lax.scan`.
      backend: None picks; `"cpu"` and `"xla"` are described in `BACKENDS`;
        `"reference"` is `x @ w.dequantize()`, for comparison.

    Returns:
      `[*batch, out]` in the dtype of `x`.

    Raises:
      SpecError: shapes do not match, or `backend` is not a name.
      UnsupportedError: the named backend cannot do this product.

    Example:
      >>> y = qjax.ops.matmul(x, qjax.quantize(w, qjax.Int(4, 128)))
    """
    x = jnp.asarray(x)
    _check(x.shape, x.dtype, w, backend)
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if isinstance(w, QuantizedTensor) and backend == "reference":
        y = _dense(flat, w.dequantize(jnp.float32), False)
    else:
        y = _apply(flat, w, False, backend)
    return y.reshape(*x.shape[:-1], w.shape[-1])


def explain(x_shape: tuple[int, ...], w: Any) -> str:
    """Says which backend `matmul` would run on the default platform, and why.

    Args:
      x_shape: shape of the activations.
      w: the weight.

    Returns:
      One line, for example `cpu: decodes rows ... (1 row of x, int4-g128)`.

    Raises:
      SpecError: shapes do not match.
    """
    _check(tuple(x_shape), jnp.dtype(jnp.float32), w, None)
    wrapped, transpose = [], False
    while isinstance(w, QuantizedTensor) and not isinstance(w, LayoutTensor):
        wrapped.append(type(w).__name__)
        transpose ^= isinstance(w, Transposed)
        w = w.base  # pyright: ignore[reportAttributeAccessIssue]
    via = f" inside {', '.join(wrapped)}" if wrapped else ""
    if not isinstance(w, QuantizedTensor):
        return f"dense: one matrix product with a {w.dtype} array{via}"
    m = math.prod(x_shape[:-1])
    platform = jax.default_backend()
    name, refused = _choose(platform, m, w, transpose)  # pyright: ignore[reportArgumentType]
    because = "".join(f"; not {other}: {why}" for other, why in refused)
    count = f"{m} row{'' if m == 1 else 's'} of x"
    summary = BACKENDS[name].summary
    return f"{name}: {summary} ({count}, {w.format.name}{via}, {platform}{because})"


def _check(shape, dtype, w, backend):
    if not jnp.issubdtype(dtype, jnp.floating):
        raise SpecError(
            f"matmul: x has dtype {dtype}, expected a float dtype; cast it first"
        )
    if len(shape) < 1 or w.ndim != 2 or shape[-1] != w.shape[0]:
        hint = "; use jax.vmap or index the leading axes" if w.ndim > 2 else ""
        raise SpecError(
            f"matmul: x has shape {list(shape)} and w {list(w.shape)}, expected "
            f"[*batch, in] and [in, out] with equal `in`{hint}"
        )
    if backend is not None and backend not in (*BACKENDS, "reference"):
        names = ", ".join(map(repr, (*BACKENDS, "reference")))
        raise SpecError(
            f"matmul: backend is {backend!r}, expected None or one of {names}"
        )


def _apply(x, w, transpose, backend):
    """`x W` or `x W^T` for rows of `x`; unwraps wrappers."""
    if not isinstance(w, QuantizedTensor):
        return _array(x, w, transpose)
    if isinstance(w, LayoutTensor):
        q = materialize_scale(w)
        if x.shape[0] == 0 or not q.size:
            return jnp.zeros((x.shape[0], q.matrix[0 if transpose else 1]), x.dtype)
        x, q = same_variance((x, q))
        return _product(x, q, transpose, backend)
    if isinstance(w, Transposed):
        return _apply(x, w.base, not transpose, backend)
    if isinstance(w, LowRank):
        y = _apply(x, w.base, transpose, backend)
        first, second = (w.b.T, w.a.T) if transpose else (w.a, w.b)
        return y + _dense(_dense(x, first, False), second, False)
    if isinstance(w, WithOutliers):
        y = _apply(x, w.base, transpose, backend)
        source, target = (w.cols, w.rows) if transpose else (w.rows, w.cols)
        return _add_outliers(y, x, w.values, source, target)
    before, after = _sides(w)
    if transpose:
        return after(_apply(x, w.base, True, backend))
    return _apply(before(x), w.base, False, backend)


def _sides(w):
    """The operation on activations of `x W`, and on results of `x W^T`."""
    if isinstance(w, Permuted):
        return (
            lambda x: jnp.take(x, w.perm, axis=-1),
            lambda y: jnp.take(y, jnp.argsort(w.perm), axis=-1),
        )
    if isinstance(w, InputScaled):
        scale = lambda x: _times(x, w.s)  # noqa: E731
        return scale, scale
    if isinstance(w, Rotated):
        return (
            lambda x: _turn(_times(x, w.signs, jnp.float32), x.dtype),
            lambda y: _times(_turn(y.astype(jnp.float32), y.dtype), w.signs),
        )
    raise UnsupportedError(
        f"matmul: no rule for {type(w).__name__}; use matmul(x, w.dequantize())"
    )


def _times(x, s, dtype=None):
    return (x.astype(jnp.float32) * s.astype(jnp.float32)).astype(dtype or x.dtype)


def _turn(x, dtype):
    return hadamard(x).astype(dtype)


def _array(x, w, transpose):
    """Product with a float array.

    XLA's CPU compiler widens a whole 16-bit weight to multiply it by one row or by
    float32 activations; there it goes through the packed path as the format `Cast`.
    """
    dense = functools.partial(_dense, transpose=transpose)
    widened = x.shape[0] <= rows.MAX_ROWS or x.dtype != w.dtype
    if w.dtype.itemsize != 2 or not widened or not x.shape[0] or not w.size:
        return dense(x, w)

    def packed(x, w):
        name = w.dtype.name
        q = MinifloatTensor(w, None, None, Cast(name), w.shape, name)
        return _product(x, q, transpose, None)

    return lax.platform_dependent(*same_variance((x, w)), cpu=packed, default=dense)


def _dense(x, w, transpose):
    """Product with a float array, in the wider of the two dtypes."""
    with jax.numpy_dtype_promotion("standard"):  # strict mode has no wider dtype
        dtype = jnp.promote_types(x.dtype, w.dtype)
    dims = (((1,), (1 if transpose else 0,)), ((), ()))
    y = lax.dot_general(
        x.astype(dtype), w.astype(dtype), dims, preferred_element_type=jnp.float32
    )
    return y.astype(x.dtype)


def _add_outliers(y, x, values, source, target):
    """`y[:, target] += x[:, source] * values`, a bounded number at a time."""
    count = values.shape[0]
    size = max(min(OUTLIER_BLOCK // max(x.shape[0], 1), count), 1)

    @functools.partial(jax.checkpoint, static_argnums=2)
    def add(y, start, size):
        leaves = (values, source, target)
        v, i, j = (lax.dynamic_slice_in_dim(leaf, start, size) for leaf in leaves)
        part = x[:, i].astype(jnp.float32) * v.astype(jnp.float32)
        return y.at[:, j].add(part)

    total = y.astype(jnp.float32)
    turns, rest = divmod(count, size)
    total = lax.fori_loop(0, turns, lambda k, t: add(t, k * size, size), total)
    if rest:
        total = add(total, turns * size, rest)
    return total.astype(y.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x, q, transpose, backend):
    """`x W` or `x W^T` for a packed matrix."""
    if backend is not None:
        reason = BACKENDS[backend].obstacle(x.shape[0], q, transpose)
        if reason:
            raise UnsupportedError(
                f"matmul: backend {backend!r} cannot multiply {list(x.shape)} by "
                f"{q!r}: {reason}; use backend=None"
            )
        return _run(backend, x, q, transpose)
    choices = {
        platform: functools.partial(
            _run, _choose(platform, x.shape[0], q, transpose)[0], transpose=transpose
        )
        for platform in PREFERENCE
    }
    if choices["cpu"].args == choices["default"].args:
        return choices["cpu"](x, q)
    return lax.platform_dependent(x, q, **choices)


def _run(backend, x, q, transpose):
    logger.debug(
        "matmul x=%s w=%r%s: %s",
        list(x.shape),
        q,
        " transposed" if transpose else "",
        backend,
    )
    return BACKENDS[backend].run(x, q, transpose)


def _choose(platform, m, q, transpose):
    """First backend without obstacle, and the reasons of those before it."""
    refused = []
    for name in PREFERENCE.get(platform, PREFERENCE["default"]):
        reason = BACKENDS[name].obstacle(m, q, transpose)
        if reason is None:
            return name, refused
        refused.append((name, reason))
    raise UnsupportedError(f"matmul: no backend for {q!r}: {refused}")


def _product_fwd(x, q, transpose, backend):
    return _product(x, q, transpose, backend), (x, q)


def _product_bwd(transpose, backend, residuals, dy):
    del backend  # the transpose product chooses its own
    x, q = residuals
    dx = _product(dy, q, not transpose, None)
    a, b = (dy, x) if transpose else (x, dy)
    return dx, blocked.leaf_gradients(a, b, q)


_product.defvjp(_product_fwd, _product_bwd)
