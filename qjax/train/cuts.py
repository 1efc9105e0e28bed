"""A packed weight as several, side by side or one below the other, without copies.

Each is made of parts of the leaves of the whole: codes, and the scales and zero-points
that belong to them. `cut_of` says which parts; a device that holds them makes its
weight of them with `local_weight`.
"""

from typing import Any

import jax

from qjax.ops.blocks import cut_step, replaced, windows
from qjax.tensor import LayoutTensor, QuantizedTensor


def cut_of(q: LayoutTensor, side: Any, parts: int) -> dict[Any, dict[int, str]] | None:
    """Which axes of which leaves of a weight are cut into weights, or None if none can.

    A quantized scale that cannot be cut with it stays whole.

    Args:
      q: A weight, with or without leading axes.
      side: `"in"` or `"out"`.
      parts: Number of weights.
    """
    length = q.matrix[0 if side == "in" else 1]
    size, rest = divmod(length, parts)
    step = cut_step(q, side)
    if rest or step is None or size % step:
        return None
    made: dict[Any, dict[int, str]] = {}
    for name, (axis, _, _) in windows(q, side, 0, length).items():
        leaf = getattr(q, name)
        if not isinstance(leaf, QuantizedTensor):
            made[(f".{name}",)] = {axis - 2: "tensor"}
            continue
        inner = cut_of(leaf, side, parts) if isinstance(leaf, LayoutTensor) else None
        for path, axes in (inner or {}).items():
            made[(f".{name}", *path)] = axes
    return made


def local_weight(q: LayoutTensor, side: Any, parts: int, index: Any) -> LayoutTensor:
    """The weight made of a device's leaves.

    Args:
      q: A weight whose leaves are cut as `cut_of` says, and whose `matrix` is not.
      side: `"in"` or `"out"`.
      parts: Number of weights.
      index: Which of them this is.
    """
    matrix = list(q.matrix)
    matrix[0 if side == "in" else 1] //= parts
    made = {}
    for name, (axis, _, _) in windows(q, side, 0, q.matrix[side == "out"]).items():
        leaf = getattr(q, name)
        if not isinstance(leaf, LayoutTensor):
            continue
        if cut_of(leaf, side, parts) is not None:
            made[name] = local_weight(leaf, side, parts, index)
        else:
            whole = leaf.dequantize("float32")
            size = whole.shape[axis - 2] // parts
            made[name] = jax.lax.dynamic_slice_in_dim(
                whole, index * size, size, axis - 2
            )
    return replaced(q, matrix=tuple(matrix), **made)
