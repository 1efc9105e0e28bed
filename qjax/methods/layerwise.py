"""One weight under one factored Hessian: error feedback on any scalar format.

The common body of GPTQ, GPTAQ, Qronos and LDLQ, which differ in their `Curvature`.
Memory besides the weight, the factor and the packed result: about three arrays
`[in, slice]` (`qjax.methods.feedback.SLICE` output columns).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from jaxtyping import Int as IntArray

from qjax.errors import SpecError
from qjax.formats import Cast, Format, Ggml, Trellis
from qjax.formats.codebook import Dynamic8
from qjax.methods.feedback import SLICE, levels, run_slice
from qjax.methods.hessian import Curvature
from qjax.methods.ranges import (
    Params,
    Scaled,
    fit_all,
    group_rows,
    spread,
)
from qjax.packing import pack
from qjax.scales import nvfp4_divisor, store_scale
from qjax.tensor import LayoutTensor, assemble
from qjax.wrappers import Permuted

ORDERS = (False, True, "group")


def check_format(where: str, fmt: Format, w: Any) -> None:
    """Raises SpecError unless error feedback can run on a format and a weight."""
    if w.ndim != 2:
        raise SpecError(
            f"{where}: takes one matrix [in, out], got shape {list(w.shape)}; "
            "quantize the matrices of a stack one by one, each with its statistics"
        )
    if isinstance(fmt, Trellis | Ggml):
        other = "GGML" if isinstance(fmt, Ggml) else "TrellisLDLQ"
        raise SpecError(f"{where}: cannot encode {fmt.name}; use method={other}()")
    kind = fmt.grouping((w.shape[0], w.shape[1])).kind
    if kind == "flat" or isinstance(fmt, Dynamic8):
        block = getattr(fmt, "block", None)
        raise SpecError(
            f"{where}: {fmt.name} on [in={w.shape[0]}, out={w.shape[1]}] has blocks "
            "that cross output columns, which error feedback cannot round in order; "
            f"use a block that divides in={w.shape[0]} (this one is {block}), or RTN"
        )


def is_static(fmt: Format, static_groups: bool | None, size: int) -> bool:
    """Whether scales are chosen before the loop instead of during it.

    Scales of whole columns, and scales that are quantized together, always are.
    """
    nested = getattr(fmt, "double", False) or (
        getattr(fmt, "scale_dtype", "") == "uint8"
    )
    if static_groups is False and nested:
        raise SpecError(
            f"static_groups=False: the scales of {fmt.name} are quantized together, "
            "so they must be known before the first row is rounded; use "
            "static_groups=None or True"
        )
    kind = fmt.grouping((size, 1 << 30)).kind
    return bool(static_groups) or nested or kind in ("channel", "tensor")


def activation_order(
    diagonal: Float[Array, " in"], act_order: Any, fmt: Format
) -> IntArray[Array, " in"] | None:
    """The order in which inputs are rounded: largest diagonal of the Hessian first.

    Args:
      diagonal: of the Hessian.
      act_order: False keeps the order of the inputs; True sorts all inputs; `"group"`
        sorts the groups by their largest entry and the inputs inside each group, so
        that groups keep their members (a short last group stays last).
      fmt: the number format.
    """
    if act_order is False:
        return None
    size = diagonal.shape[0]
    rows = group_rows(fmt, size)
    if act_order is True or rows in (1, size):
        return jnp.argsort(-diagonal, stable=True).astype(jnp.int32)
    whole = size // rows * rows
    groups = diagonal[:whole].reshape(-1, rows)
    inner = jnp.argsort(-groups, axis=1, stable=True)
    outer = jnp.argsort(-jnp.max(groups, axis=1), stable=True)
    order = (inner + jnp.arange(whole // rows)[:, None] * rows)[outer].reshape(-1)
    tail = whole + jnp.argsort(-diagonal[whole:], stable=True)
    return jnp.concatenate([order, tail]).astype(jnp.int32)


def quantize_rows(
    w: Float[Array, "in out"],
    fmt: Format,
    shared: Curvature,
    *,
    rule: str = "minmax",
    static: bool = False,
    grouped: bool = False,
) -> LayoutTensor | Permuted:
    """Quantizes a weight with error feedback.

    Args:
      w: the weight, in the order of its inputs.
      fmt: the number format; see `check_format`.
      shared: the factored Hessian of its inputs.
      rule: how scales are chosen, one of `qjax.methods.ranges.RANGES`.
      static: choose scales before the loop.
      grouped: the order keeps groups together (`act_order="group"`).

    Returns:
      The tensor; `Permuted` when its groups are formed in the order of rounding.
    """
    size, cols = w.shape
    order = shared.order
    scaled = not isinstance(fmt, Cast)
    divisor = None
    if fmt.name == "nvfp4":
        divisor = nvfp4_divisor(jnp.max(jnp.abs(w.astype(jnp.float32))).reshape(1, 1))
    rows = group_rows(fmt, size) if scaled and not static else 0
    sizes, padded = levels(size, rows, 1)
    pad = padded - size
    own = Scaled(
        fmt,
        rule,
        jnp.pad(shared.diagonal, (0, pad)),
        jnp.pad(shared.d, (0, pad), constant_values=1.0),
        divisor,
        size,
    )
    stored, given = None, Params(None, None)
    if scaled and not rows:
        found = fit_all(w, fmt, rule, shared, divisor)
        stored, effective = store_scale(fmt, found.scale, divisor)
        given = Params(effective, found.zero)
    grid = own.fitted() if rows else own.given(_groups(fmt, size, order, pad))
    m = shared.m if pad == 0 else jnp.pad(shared.m, ((0, pad), (0, pad)))
    # Whatever the order of rounding, the codes return to the order of the inputs,
    # except where groups were formed in the order of rounding.
    restored = None
    if order is not None and (grouped or rows < 2):
        restored = jnp.argsort(order)

    def one(start, width):
        x, first = _targets(w, shared, start, width)
        x = jnp.pad(x, ((0, pad), (0, 0)))
        params = _columns(fmt, given, start, width, cols)
        codes, kept, _ = run_slice(x, m, grid, sizes, params, first)
        codes = codes[:size] if restored is None else codes[restored]
        if fmt.code_bits < 8:
            codes = pack(codes, fmt.code_bits)
        return codes, kept

    codes, kept = by_slices(one, cols, slice_width(fmt, size, cols))
    zero = given.zero
    if rows:
        found = jax.tree.map(lambda leaf: leaf[: -(-size // rows)], kept)
        if order is not None and restored is not None:
            found = jax.tree.map(lambda leaf: _back(leaf, order, rows), found)
        stored, zero = store_scale(fmt, found.scale, divisor)[0], found.zero
    if zero is not None:
        zero = zero.astype(fmt.zero_dtype)  # pyright: ignore[reportAttributeAccessIssue]
    q = assemble(
        fmt, codes, stored, (size, cols), zero=zero, global_scale=divisor, packed=True
    )
    return q if order is None or restored is not None else Permuted(q, order)


def _groups(fmt: Format, size: int, order, pad: int):
    """The group of every row in the order of rounding."""
    index = jnp.arange(size) if order is None else order
    return jnp.pad(index // group_rows(fmt, size), (0, pad)).astype(jnp.int32)


def slice_width(fmt: Format, size: int, cols: int) -> int:
    """Output columns per slice; a multiple of the columns that share a scale."""
    width = min(cols, SLICE)
    group = fmt.grouping((size, cols))
    if group.kind not in ("out", "block") or width == cols:
        return width
    aligned = max(width // group.size, 1) * group.size
    return aligned if cols % group.size == 0 and aligned < cols else cols


def by_slices(one: Callable[[Any, int], Any], cols: int, width: int) -> Any:
    """Joins `one(start, width)` over slices of the columns, each `[*, part]`.

    The last slice starts early instead of being short, and writes the same again.
    """
    if width == cols:
        return one(0, cols)
    shapes = jax.eval_shape(lambda: one(0, width))

    def wide(leaf):
        part = leaf.shape[1] * cols
        return jnp.zeros((leaf.shape[0], -(-part // width)), leaf.dtype)

    def step(i, kept):
        start = jnp.minimum(i * width, cols - width)

        def put(buffer, leaf):
            return jax.lax.dynamic_update_slice_in_dim(
                buffer, leaf, start * leaf.shape[1] // width, 1
            )

        return jax.tree.map(put, kept, one(start, width))

    return jax.lax.fori_loop(0, -(-cols // width), step, jax.tree.map(wide, shapes))


def _targets(w, shared: Curvature, start, width: int):
    """What the rows of some columns are rounded to, and row 0's exception."""
    own = jax.lax.dynamic_slice_in_dim(w, start, width, 1).astype(jnp.float32)
    x, first = own, None
    if shared.transform is not None:
        x = jnp.matmul(shared.transform, own, precision="highest")
    elif shared.order is not None:
        x = own[shared.order]
    if shared.first is not None:
        first = jnp.matmul(shared.first, own, precision="highest") - x[0]
    return x, first


def _columns(fmt, given: Params, start, width: int, cols: int):
    """Known scales of some columns, one per column."""

    def cut(leaf):
        return jax.lax.dynamic_slice_in_dim(leaf, start, width, 1)

    return jax.tree.map(cut, spread(fmt, given, cols))


def _back(leaf, order, rows: int):
    """Statistics of groups in rounding order, in the order of the groups."""
    groups = order[::rows] // rows
    return leaf[jnp.argsort(groups)]
