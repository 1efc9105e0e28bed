"""`matmul`: activations times a dense or quantized weight, with its gradient.

What runs is one of the backends of `qjax.ops.product`; `backend=None` takes the first
of those preferred on the platform the program is compiled for that can do the product,
and `explain` says which and why.

Wrappers are applied to activations and results, not to weights, so the same few
backends serve all of them.

Under `jit` with sharded weights the result is right for any sharding, but block loops
run along the sharded axis as well and XLA then moves blocks between devices; inside
`jax.shard_map` every device loops over its own shard.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

import qjax.pallas_kernels.device as device
from qjax.errors import SpecError, UnsupportedError
from qjax.ops import activations, trained
from qjax.ops.blocks import materialize_scale, same_variance
from qjax.ops.inputs import sides, without
from qjax.ops.prepack import Prepacked, cut
from qjax.ops.product import (
    BACKENDS,
    Packed,
    array_product,
    choose,
    dense_product,
    product,
)
from qjax.tensor import QuantizedTensor
from qjax.trellis import Incoherent
from qjax.wrappers import (
    InputScaled,
    LayerOf,
    LowRank,
    Permuted,
    Rotated,
    RoundedInputs,
    RowParts,
    SplitInputs,
    Trained,
    Transposed,
    WithOutliers,
)

OUTLIER_BLOCK = 1 << 20
"""Products of outliers held at a time."""


def matmul(
    x: Float[Array, "*batch in"],
    w: Float[Array, "in out"] | QuantizedTensor,
    *,
    backend: str | None = None,
    activation: str | None = None,
    x_scale: Any = None,
    out_dtype: str | None = None,
    out_scale: Any = None,
) -> Shaped[Array, "*batch out"]:
    """Multiplies activations by a weight: `y = x W`, or `y = round(x) W`.

    Differentiable in `x` and in every float leaf of `w` (scales, zero-points, learned
    tables, outlier values, low-rank factors); integer leaves have float0 gradients.

    Args:
      x: float activations `[*batch, in]`; rank 1 is a single row.
      w: float array `[in, out]`, or a quantized tensor of that shape. Stacked weights
        are for `jax.vmap` and `jax.lax.scan`.
      backend: None picks; the names in `qjax.ops.product.BACKENDS` (`"tpu"`,
        `"gpu"`, `"native"`, `"cpu"`, `"xla"`) are described there;
        `"reference"` is `x @ w.dequantize()`, for comparison.
      activation: round the activations to `"int8"` or `"float8_e4m3fn"`, one scale per
        row (W8A8, W4A8); the gradient passes straight through. None keeps them.
      x_scale: static scale of the rounded activations instead, float32, a scalar or one
        per row; it has no gradient.
      out_dtype: `"int8"` or `"float8_e4m3fn"` rounds the result, which is computed in
        float32: `clip(round(y / out_scale))`, by XLA behind the product. None keeps it.
      out_scale: static scale of a rounded result, a positive scalar.

    Returns:
      `[*batch, out]` in the dtype of `x`, or codes of `out_dtype`, without gradient.

    Raises:
      SpecError: shapes do not match, an argument is missing that another needs, or
        one is not a name.
      UnsupportedError: the named backend cannot do this product.

    Example:
      >>> y = qjax.ops.matmul(x, qjax.quantize(w, qjax.Int(4, 128)))
    """
    x = jnp.asarray(x)
    _check(x.shape, x.dtype, w, backend)
    activations.check(activation, x_scale, out_dtype, out_scale)
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if out_dtype is not None:
        flat = flat.astype(jnp.float32)
    if isinstance(w, QuantizedTensor) and backend == "reference":
        dense = w.dequantize(jnp.float32)
        y: Any = _apply(flat, dense, False, How(None, activation, x_scale))
    else:
        y = _apply(flat, w, False, How(backend, activation, x_scale))
    if out_dtype is not None:
        y = activations.rounded_result(y, out_scale, out_dtype)
    return y.reshape(*x.shape[:-1], w.shape[-1])


def explain(
    x_shape: tuple[int, ...],
    w: Any,
    dtype: Any = jnp.float32,
    activation: str | None = None,
) -> str:
    """Says which backend `matmul` would run on the default platform, and why.

    Args:
      x_shape: shape of the activations.
      w: the weight.
      dtype: dtype of the activations.
      activation: what they are rounded to, as in `matmul`.

    Returns:
      One line, for example `cpu: decodes rows ... (1 row of x, int4-g128)`.

    Raises:
      SpecError: shapes do not match.
    """
    _check(tuple(x_shape), jnp.dtype(jnp.float32), w, None)
    wrapped, transpose = [], False
    while isinstance(w, QuantizedTensor) and not isinstance(w, Packed):
        wrapped.append(type(w).__name__)
        transpose ^= isinstance(w, Transposed)
        if isinstance(w, RoundedInputs):
            activation = activation or w.activation
        if isinstance(w, RowParts):
            wrapped[-1] += f" (the first of {len(w.parts)})"
            w = w.parts[0]
        else:
            w = w.base  # pyright: ignore[reportAttributeAccessIssue]
    via = f" inside {', '.join(wrapped)}" if wrapped else ""
    if not isinstance(w, QuantizedTensor):
        return f"dense: one matrix product with a {w.dtype} array{via}"
    m = math.prod(x_shape[:-1])
    platform = device.platform()
    q = jax.eval_shape(_float_scale, w)
    rounded = ""
    if activation is not None:
        args = (m, q, jnp.dtype(dtype), activation, transpose)
        kernel, reason = activations.choose(*args)
        if kernel:
            summary = BACKENDS[kernel].summary
            return f"{kernel}: {summary}, activations {activation} ({w.format.name})"
        rounded = f", activations {activation} as floats: {reason}"
    name, refused = choose(platform, m, q, jnp.dtype(dtype), transpose)
    because = "".join(f"; not {other}: {why}" for other, why in refused)
    count = f"{m} row{'' if m == 1 else 's'} of x"
    what = f"{count}, {w.format.name}{via}, {platform}{because}{rounded}"
    return f"{name}: {BACKENDS[name].summary} ({what})"


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


class How(NamedTuple):
    """How rows are multiplied by a weight inside its wrappers."""

    backend: str | None = None
    activation: str | None = None
    x_scale: Any = None


def _apply(x, w: Any, transpose, how: How):
    """`x W` or `x W^T` for rows of `x`; unwraps wrappers."""
    if not isinstance(w, QuantizedTensor):
        if how.activation is not None:
            x = activations.straight_through(x, how.activation, how.x_scale)
        return array_product(x, w, transpose)
    if isinstance(w, Packed):
        q = _float_scale(w)
        if x.shape[0] == 0 or not q.size:
            return jnp.zeros((x.shape[0], q.matrix[0 if transpose else 1]), x.dtype)
        x, q = same_variance((x, q))
        if how.activation is None:
            return product(x, q, transpose, how.backend)
        return activations.rounded_product(
            x, q, how.x_scale, transpose, how.activation, how.backend
        )
    if isinstance(w, Transposed):
        return _apply(x, w.base, not transpose, how)
    if isinstance(w, RoundedInputs):
        if how.activation is None:
            how = how._replace(activation=w.activation, x_scale=w.scale)
        return _apply(x, w.base, transpose, how)
    if isinstance(w, Trained):
        return trained.product(_apply, x, w, transpose, how)
    if isinstance(w, LowRank):
        y = _apply(x, w.base, transpose, how)
        first, second = (w.b.T, w.a.T) if transpose else (w.a, w.b)
        return y + dense_product(dense_product(x, first, False), second, False)
    if isinstance(w, WithOutliers):
        y = _apply(x, w.base, transpose, how)
        source, target = (w.cols, w.rows) if transpose else (w.rows, w.cols)
        return _add_outliers(y, x, w.values, source, target)
    if isinstance(w, SplitInputs):
        return _split(x, w, transpose, how)
    if isinstance(w, RowParts):
        return _parts(x, w, transpose, how)
    if isinstance(w, Incoherent):
        first, second = ("right", "left") if transpose else ("left", "right")
        return w.leave(_apply(w.enter(x, first), w.base, transpose, how), second)
    if not isinstance(w, InputScaled | Permuted | Rotated):
        raise UnsupportedError(
            f"matmul: no rule for {type(w).__name__}; use matmul(x, w.dequantize())"
        )
    before, after = sides(w)
    if transpose:
        return after(_apply(x, w.base, True, how))
    return _apply(before(x), w.base, False, how)


def _split(x, w: SplitInputs, transpose, how: How):
    """Some features by rows of their own, the rest by the base."""
    if transpose:
        own = dense_product(x, w.rows, True)
        return _apply(x, w.base, True, how).at[:, w.index].set(own, mode="drop")
    own = jnp.take(x, w.index, axis=1, mode="fill", fill_value=0)
    rest = _apply(without(x, w), w.base, False, how)
    return rest + dense_product(own, w.rows, False)


def _parts(x: Any, w: RowParts, transpose, how: How):
    """The products of all parts, added in float32."""
    if how.activation is not None:  # one scale for the whole row, not one per part
        x = activations.straight_through(x, how.activation, how.x_scale)
        how = How(how.backend)
    rows, cols = w.matrix
    y = jnp.zeros((x.shape[0], rows if transpose else cols), jnp.float32)
    for at, part in w.windows():
        own: Any = _apply(x if transpose else x[:, at], part, transpose, how)
        y = y.at[:, at if transpose else slice(None)].add(own.astype(jnp.float32))
    return y.astype(x.dtype)


def _float_scale(w):
    """Decodes a nested scale, which no backend reads; that of a layer, out of it."""
    if isinstance(w, LayerOf):
        return cut(w) if isinstance(w.base.scale, QuantizedTensor) else w
    return w if isinstance(w, Prepacked) else materialize_scale(w)


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
