"""A packed weight as several, side by side or one below the other, without copies.

Each is made of parts of the leaves of the whole: codes, and the scales and zero-points
that belong to them. `cut_of` says which parts; a device that holds them makes its
weight of them with `local_weight`. A weight that is trained for a format can be cut if
its parts, rounded on their own, are the parts of the whole: see `training_cut`.
"""

from typing import Any

import jax

from qjax.budget import packed_shapes
from qjax.errors import UnsupportedError
from qjax.methods import RTN
from qjax.nn.base import QuantizedLayer
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


def training_cut(
    layer: QuantizedLayer, side: Any, parts: int, where: str
) -> dict[Any, dict[int, str]]:
    """Which axes of learned scales and offsets are cut with a weight in training.

    Args:
      layer: In quantization-aware training, its format one for matrices `[in, out]`.
      side: `"in"` or `"out"`.
      parts: Number of weights.
      where: What errors call the layer.

    Raises:
      UnsupportedError: Rounding one part looks at others.
    """
    fmt, training = layer.format, layer.qat
    assert fmt is not None  # it is trained for one
    method = layer.method or RTN()
    q = packed_shapes(layer.variable.get_value().shape[-2:], fmt, method)
    alone = training.scale is not None or isinstance(method, RTN)
    cuts = cut_of(q, side, parts) if isinstance(q, LayoutTensor) and alone else None
    leaves = {tuple(map(str, path)) for path, _ in jax.tree.leaves_with_path(q)}
    if cuts is None or leaves - cuts.keys():
        raise UnsupportedError(
            f"mesh: tensor={parts} cuts what {method.name} rounds together in {where}, "
            f"{fmt.name}, along its {side}puts; use fewer devices, or fsdp"
        )
    if side == "in" and training.activation is not None:
        raise UnsupportedError(
            f"mesh: tensor={parts} cuts the rows that {where} rounds to "
            f"{training.activation}; use fsdp"
        )
    axis, _, _ = windows(q, side, 0, q.matrix[side == "out"])["scale"]
    return {(): {axis - 2: "tensor"}}
