"""Some output columns of a packed weight, for tensors that hold several weights."""

import dataclasses
from typing import Any

from qjax.errors import UnsupportedError
from qjax.tensor import AffineTensor, LayoutTensor, QuantizedTensor
from qjax.wrappers import InputScaled, Permuted, Rotated, RoundedInputs


def columns(q: QuantizedTensor, index: Any) -> QuantizedTensor:
    """`q[:, index]` without unpacking.

    Args:
      q: weight `[in, out]` whose scales belong to single columns.
      index: slice or integers.

    Raises:
      UnsupportedError: blocks of the format cross columns.
    """
    if isinstance(q, InputScaled | Permuted | Rotated | RoundedInputs):
        return dataclasses.replace(q, base=columns(q.base, index))
    if not isinstance(q, LayoutTensor) or q.grouping.kind not in ("in", "channel"):
        raise UnsupportedError(
            f"{type(q).__name__} ({q.format.name}): its blocks cross output columns, "
            "so a tensor of several weights cannot be taken apart; dequantize it first"
        )
    count = len(range(q.matrix[1])[index]) if isinstance(index, slice) else len(index)

    def cut(leaf: Any) -> Any:
        if isinstance(leaf, QuantizedTensor):
            leaf = leaf.dequantize()
        return leaf[..., index]

    changes: dict[str, Any] = {"codes": q.codes[..., index], "scale": cut(q.scale)}
    if isinstance(q, AffineTensor) and q.zero is not None:
        changes["zero"] = cut(q.zero)
    changes["matrix"] = q.matrix[0], count
    return dataclasses.replace(q, **changes)  # pyright: ignore[reportArgumentType]
