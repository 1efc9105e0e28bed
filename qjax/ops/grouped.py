"""Products of ragged groups of rows, each group with its own weight: experts.

Rows of `x` are sorted by expert and `group_sizes` says how many each expert has
(`sort_by_expert` makes both); rows behind the last group give zeros. What runs is one
of `qjax.ops.grouped_product.BACKENDS`: a kernel over the stacked packed weight, or,
anywhere, the loop of `qjax.ops.windows`.

As in `qjax.ops.product`, a packed weight is never expanded and the residuals of the
gradient are activations and packed weights alone. Float arrays go to `lax.ragged_dot`,
and so do gradients of weights that are trained for a format (`qjax.ops.trained`).
Outliers (`WithOutliers`) have no grouped rule and are refused.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

import qjax.pallas_kernels.device as device
from qjax.errors import SpecError, UnsupportedError
from qjax.ops import windows
from qjax.ops.blocks import materialize_scale, same_variance
from qjax.ops.grouped_product import ACTIVATIONS, BACKENDS, choose, fused, packed
from qjax.ops.prepack import Prepacked, cut
from qjax.ops.product import Packed
from qjax.ops.trained import instead
from qjax.tensor import QuantizedTensor
from qjax.trellis import Incoherent
from qjax.wrappers import (
    InputScaled,
    LayerOf,
    LowRank,
    Permuted,
    Rotated,
    RowParts,
    SplitInputs,
    Trained,
    Transposed,
    hadamard,
)


def sort_by_expert(
    expert_ids: Int[Array, "*assignments"], experts: int
) -> tuple[Int[Array, " m"], Int[Array, " experts"], Int[Array, " m"]]:
    """Orders (token, expert) assignments by expert.

    `flat[order]` is ascending for `flat = expert_ids.reshape(-1)`; assignments of one
    expert keep their order. An id outside `0 .. experts - 1` drops its assignment: it
    is sorted behind all groups and counted in none.

    Args:
      expert_ids: expert of each assignment, any shape, for example `[tokens, top_k]`.
      experts: number of experts.

    Returns:
      `(order, group_sizes, inverse)`: rows to gather, rows of each expert, and where
      each assignment went (`inverse[order[i]] = i`), all int32.

    Example:
      >>> order, sizes, inverse = sort_by_expert(ids, 8)  # ids [tokens, top_k]
      >>> y = grouped_matmul(x[order // top_k], sizes, w)[inverse]
    """
    flat = expert_ids.reshape(-1).astype(jnp.int32)
    flat = jnp.where((flat < 0) | (flat >= experts), experts, flat)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    sizes = jnp.zeros(experts, jnp.int32).at[flat].add(1, mode="drop")
    places = jnp.arange(flat.shape[0], dtype=jnp.int32)
    return order, sizes, jnp.zeros_like(order).at[order].set(places)


def grouped_matmul(
    x: Float[Array, "m k"],
    group_sizes: Int[Array, " experts"],
    w: Float[Array, "experts k n"] | QuantizedTensor,
    *,
    backend: str | None = None,
) -> Float[Array, "m n"]:
    """Multiplies each group of rows by its expert's weight.

    `y[i] = x[i] W[e]` for the rows `i` of expert `e`; zeros for rows behind the last
    group. Differentiable in `x` and in every float leaf of `w`.

    Args:
      x: float rows sorted by expert.
      group_sizes: int32 rows of each expert, in sum at most `m`; zeros are fine.
      w: float array, or quantized tensor stacked over experts.
      backend: None picks; a name of `BACKENDS`; `"reference"` multiplies by
        `w.dequantize()`, for comparison.

    Returns:
      `[m, out]` in the dtype of `x`.

    Raises:
      SpecError: shapes or dtypes do not match, or `backend` is not a name.
      UnsupportedError: no grouped rule for a wrapper, or the named backend cannot.

    Example:
      >>> y = qjax.ops.grouped_matmul(x, sizes, qjax.quantize(w, qjax.Int(4, 128)))
    """
    x, group_sizes = jnp.asarray(x), jnp.asarray(group_sizes)
    _check("grouped_matmul", x, group_sizes, w, backend)
    return _product(x, group_sizes, w, backend)


def grouped_gate_up(
    x: Float[Array, "m k"],
    group_sizes: Int[Array, " experts"],
    gate: Float[Array, "experts k n"] | QuantizedTensor,
    up: Float[Array, "experts k n"] | QuantizedTensor,
    *,
    activation: str = "silu",
    backend: str | None = None,
) -> Float[Array, "m n"]:
    """The first half of a gated expert: `act(x Wg) * (x Wu)` per group.

    The gradient computes both products again from `x`; nothing between is kept.

    Args:
      x: as for `grouped_matmul`.
      group_sizes: as for `grouped_matmul`.
      gate: the weight inside the activation.
      up: the weight of the other factor, of the same shape.
      activation: a name of `ACTIVATIONS`.
      backend: as for `grouped_matmul`.

    Returns:
      `[m, out]` in the dtype of `x`.

    Raises:
      SpecError: shapes or dtypes do not match, or a name is unknown.
      UnsupportedError: as for `grouped_matmul`.
    """
    x, group_sizes = jnp.asarray(x), jnp.asarray(group_sizes)
    for w in (gate, up):
        _check("grouped_gate_up", x, group_sizes, w, backend)
    if _shape(gate) != _shape(up):
        raise SpecError(
            f"grouped_gate_up: gate has shape {list(_shape(gate))} and up "
            f"{list(_shape(up))}, expected equal shapes"
        )
    if activation not in ACTIVATIONS:
        names = ", ".join(map(repr, ACTIVATIONS))
        raise SpecError(
            f"grouped_gate_up: activation is {activation!r}, expected one of {names}"
        )
    return _gated(activation, backend, x, group_sizes, gate, up)


def gated_experts(
    x: Float[Array, "tokens in"],
    expert_ids: Int[Array, "tokens top"],
    weights: Float[Array, "tokens top"],
    gate: Any,
    up: Any,
    down: Any,
    *,
    activation: str = "silu",
    backend: str | None = None,
) -> Float[Array, "tokens out"]:
    """A layer of gated experts after routing.

    `y[t] = sum_j weights[t, j] * (act(x[t] Wg[e]) * (x[t] Wu[e])) Wd[e]` with
    `e = expert_ids[t, j]`; ids outside the experts drop their term.

    Args:
      x: one row per token.
      expert_ids: experts of each token.
      weights: factor of each of them; gradients reach it.
      gate: weights `[experts, in, hidden]`, dense or quantized.
      up: the same.
      down: weights `[experts, hidden, out]`.
      activation: a name of `ACTIVATIONS`.
      backend: as for `grouped_matmul`.

    Returns:
      `[tokens, out]` in the dtype of `x`; the sum over experts is float32.

    Raises:
      SpecError: shapes or dtypes do not match, or a name is unknown.
      UnsupportedError: as for `grouped_matmul`.
    """
    x = jnp.asarray(x)
    tokens, top = expert_ids.shape if expert_ids.ndim == 2 else (-1, 1)
    if x.ndim != 2 or tokens != x.shape[0] or weights.shape != expert_ids.shape:
        raise SpecError(
            f"gated_experts: x has shape {list(x.shape)}, expert_ids "
            f"{list(expert_ids.shape)} and weights {list(weights.shape)}, expected "
            "[tokens, in], [tokens, top] and [tokens, top]"
        )
    order, sizes, inverse = sort_by_expert(expert_ids, _shape(gate)[0])
    rows = jnp.take(x, order // top, axis=0) if x.shape[0] else x
    hidden = grouped_gate_up(
        rows, sizes, gate, up, activation=activation, backend=backend
    )
    y = grouped_matmul(hidden, sizes, down, backend=backend)
    y = jnp.take(y, inverse, axis=0).reshape(tokens, top, y.shape[-1])
    factor = weights.astype(jnp.float32)[..., None]
    return jnp.sum(y.astype(jnp.float32) * factor, 1).astype(x.dtype)


def explain_grouped(rows: int, w: Any, dtype: Any = jnp.float32) -> str:
    """Says which backend `grouped_matmul` would run on the default platform, and why.

    Args:
      rows: rows of the activations.
      w: the stacked weight.
      dtype: dtype of the activations.

    Returns:
      One line.
    """
    transpose = False
    while isinstance(w, QuantizedTensor) and not isinstance(w, Packed):
        transpose ^= isinstance(w, Transposed)
        w = w.parts[0] if isinstance(w, RowParts) else w.base  # pyright: ignore[reportAttributeAccessIssue]
    if not isinstance(w, QuantizedTensor):
        return f"dense: lax.ragged_dot with a {w.dtype} array"
    platform = device.platform()
    base: Any = w
    name, refused = choose(platform, rows, dtype, base, transpose)
    because = "".join(f"; not {other}: {why}" for other, why in refused)
    summary = BACKENDS[name].summary
    return f"{name}: {summary} ({rows} rows, {w.format.name}, {platform}{because})"


def _shape(w):
    """Shape `[experts, in, out]` of a weight, also of a layer of a stack of them."""
    if isinstance(w, LayerOf):
        return (*w.base.shape[1:-2], *w.matrix)
    if isinstance(w, QuantizedTensor) and not isinstance(w, Packed):
        base = w.parts[0] if isinstance(w, RowParts) else w.base  # pyright: ignore[reportAttributeAccessIssue]
        return (*_shape(base)[:-2], *w.matrix)
    return tuple(w.shape)


def _check(name, x, group_sizes, w, backend):
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise SpecError(
            f"{name}: x has dtype {x.dtype}, expected a float dtype; cast it first"
        )
    shape = _shape(w)
    if x.ndim != 2 or len(shape) != 3 or x.shape[-1] != shape[1]:
        raise SpecError(
            f"{name}: x has shape {list(x.shape)} and w {list(shape)}, expected "
            "[m, in] and [experts, in, out] with equal `in`"
        )
    integer = jnp.issubdtype(group_sizes.dtype, jnp.integer)
    if not integer or group_sizes.shape != (shape[0],):
        raise SpecError(
            f"{name}: group_sizes is {group_sizes.dtype}{list(group_sizes.shape)}, "
            f"expected integers [{shape[0]}], one per expert"
        )
    if backend is not None and backend not in (*BACKENDS, "reference"):
        names = ", ".join(map(repr, (*BACKENDS, "reference")))
        raise SpecError(
            f"{name}: backend is {backend!r}, expected None or one of {names}"
        )


def _product(x, group_sizes, w, backend) -> Array:
    if isinstance(w, QuantizedTensor) and backend == "reference":
        return _dense(x, group_sizes, w.dequantize(jnp.float32), False)
    return _apply(x, group_sizes, w, False, backend)


def _apply(x, group_sizes, w: Any, transpose, backend) -> Array:
    """The grouped product of rows; unwraps wrappers onto rows."""
    if not isinstance(w, QuantizedTensor):
        return _dense(x, group_sizes, w, transpose)
    if isinstance(w, Packed):
        q = _float_scale(w)
        if x.shape[0] == 0 or not q.size:
            return jnp.zeros((x.shape[0], q.matrix[0 if transpose else 1]), x.dtype)
        x, group_sizes, q = same_variance((x, group_sizes, q))
        return packed(x, group_sizes, q, transpose, backend)
    if isinstance(w, Transposed):
        return _apply(x, group_sizes, w.base, not transpose, backend)
    if isinstance(w, LowRank):
        y = _apply(x, group_sizes, w.base, transpose, backend)
        first, second = (w.b, w.a) if transpose else (w.a, w.b)
        inner = _dense(x, group_sizes, first, transpose)
        return y + _dense(inner, group_sizes, second, transpose)
    if isinstance(w, SplitInputs):
        return _split(x, group_sizes, w, transpose, backend)
    if isinstance(w, RowParts):
        return _parts(x, group_sizes, w, transpose, backend)
    if isinstance(w, Trained):
        return _trained(x, group_sizes, w, transpose, backend)
    if not isinstance(w, Incoherent | InputScaled | Permuted | Rotated):
        raise UnsupportedError(
            f"grouped_matmul: no rule for {type(w).__name__}; multiply expert by "
            "expert with qjax.ops.matmul"
        )
    expert = _expert_of_row(x.shape[0], group_sizes)
    if isinstance(w, Incoherent):
        first, second = ("right", "left") if transpose else ("left", "right")
        y = _apply(w.enter(x, first, expert), group_sizes, w.base, transpose, backend)
        return w.leave(y, second, expert)
    if transpose:
        y = _apply(x, group_sizes, w.base, True, backend)
        return _rowwise(y, w, expert, True)
    return _apply(_rowwise(x, w, expert, False), group_sizes, w.base, False, backend)


def _split(x, group_sizes, w: SplitInputs, transpose, backend):
    """Some features by rows of their own, the rest by the base."""
    index = w.index[_expert_of_row(x.shape[0], group_sizes)]
    at = (jnp.arange(x.shape[0], dtype=jnp.int32)[:, None], index)
    if transpose:
        own = _dense(x, group_sizes, w.rows, True)
        y = _apply(x, group_sizes, w.base, True, backend)
        return y.at[at].set(own, mode="drop")
    own = x.at[at].get(mode="fill", fill_value=0)
    rest = x.at[at].set(jnp.zeros((), x.dtype), mode="drop")
    y = _apply(rest, group_sizes, w.base, False, backend)
    return y + _dense(own, group_sizes, w.rows, False)


def _parts(x, group_sizes, w: RowParts, transpose, backend):
    """The products of all parts, added in float32."""
    rows, cols = w.matrix
    y = jnp.zeros((x.shape[0], rows if transpose else cols), jnp.float32)
    for at, part in w.windows():
        own = _apply(
            x if transpose else x[:, at], group_sizes, part, transpose, backend
        )
        y = y.at[:, at if transpose else slice(None)].add(own.astype(jnp.float32))
    return y.astype(x.dtype)


def _trained(x, group_sizes, w: Trained, transpose, backend):
    """The product of the codes, with the gradient of that of the float weight."""
    if w.backward:
        raise UnsupportedError(
            f"grouped_matmul: experts have no int8 gradients, {w.backward}; train them "
            "with backward=()"
        )
    carrier = _dense(x, group_sizes, w.dense.astype(x.dtype), transpose)
    fixed, base = lax.stop_gradient((x, w.base))
    value = _apply(fixed, group_sizes, base, transpose, backend)
    if w.active is not None:
        on = w.active[_expert_of_row(x.shape[0], group_sizes)][:, None]
        value = jnp.where(on, value, lax.stop_gradient(carrier))
    return instead(value, carrier)


def _float_scale(w):
    """Decodes a nested scale, which no backend reads; that of a layer, out of it."""
    if isinstance(w, LayerOf):
        return cut(w) if isinstance(w.base.scale, QuantizedTensor) else w
    return w if isinstance(w, Prepacked) else materialize_scale(w)


def _rowwise(x, w, expert, after):
    """A wrapper's operation on the rows of each expert; see `qjax.ops.matmul`."""
    if isinstance(w, Permuted):
        perm = jnp.argsort(w.perm, axis=-1) if after else w.perm
        return jnp.take_along_axis(x, perm[expert], axis=1)
    if isinstance(w, InputScaled):
        return (x.astype(jnp.float32) * w.s.astype(jnp.float32)[expert]).astype(x.dtype)
    signs = w.signs.astype(jnp.float32)[expert]
    wide = x.astype(jnp.float32)
    return (hadamard(wide) * signs if after else hadamard(wide * signs)).astype(x.dtype)


def _expert_of_row(rows, group_sizes):
    """The expert of each row; the last one for rows behind all groups."""
    ends = jnp.cumsum(group_sizes.astype(jnp.int32))
    row = jnp.arange(rows, dtype=jnp.int32)
    found = jnp.searchsorted(ends, row, side="right").astype(jnp.int32)
    return jnp.minimum(found, group_sizes.shape[0] - 1)


def _dense(x, group_sizes, w, transpose):
    """`lax.ragged_dot` in the wider dtype; zeros behind the last group."""
    with jax.numpy_dtype_promotion("standard"):  # strict mode has no wider dtype
        dtype = jnp.promote_types(x.dtype, w.dtype)
    w = jnp.swapaxes(w, -1, -2) if transpose else w
    if x.shape[0] == 0 or not w.size:
        return jnp.zeros((x.shape[0], w.shape[-1]), x.dtype)
    sizes = group_sizes.astype(jnp.int32)
    y = lax.ragged_dot(
        x.astype(dtype), w.astype(dtype), sizes, preferred_element_type=jnp.float32
    )
    return windows.mask_rows(y, jnp.sum(sizes)).astype(x.dtype)


def _gated(activation, backend, x, group_sizes, gate, up):
    """The gated form: one pass where a kernel can, else two products."""
    plain = all(isinstance(w, Packed) for w in (gate, up))
    if not plain or backend == "reference" or not x.shape[0]:
        return _two(activation, backend, x, group_sizes, gate, up)
    gate, up = _float_scale(gate), _float_scale(up)
    x, group_sizes, gate, up = same_variance((x, group_sizes, gate, up))
    return fused(x, group_sizes, gate, up, activation, backend)


@functools.partial(jax.checkpoint, static_argnums=(0, 1))
def _two(activation, backend, x, group_sizes, gate, up):
    """Both products of any weights; computed again in the gradient."""
    g = _product(x, group_sizes, gate, backend).astype(jnp.float32)
    u = _product(x, group_sizes, up, backend).astype(jnp.float32)
    return (ACTIVATIONS[activation](g) * u).astype(x.dtype)
