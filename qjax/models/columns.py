"""Output columns of packed weights, for tensors that hold several weights."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

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

    changes: dict[str, Any] = {"codes": q.codes[..., index]}
    if q.scale is not None:
        changes["scale"] = cut(q.scale)
    if isinstance(q, AffineTensor) and q.zero is not None:
        changes["zero"] = cut(q.zero)
    changes["matrix"] = q.matrix[0], count
    return dataclasses.replace(q, **changes)  # pyright: ignore[reportArgumentType]


def joined(pieces: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """The inverse of `columns`: weights beside one another, still packed.

    Args:
      pieces: weights `[in, out_i]` of one format.

    Raises:
      UnsupportedError: they differ in more than columns, or their blocks cross columns.
    """
    first = pieces[0]
    same = all(
        jax.tree.structure(_bare(q)) == jax.tree.structure(_bare(first)) for q in pieces
    )
    if not same:
        raise UnsupportedError(
            f"a tensor of several weights cannot be made of {list(pieces)!r}; they "
            "need one format"
        )
    if isinstance(first, InputScaled | Permuted | Rotated | RoundedInputs):
        own = {
            f.name: [getattr(q, f.name) for q in pieces]
            for f in dataclasses.fields(first)
            if f.name != "base" and not f.metadata.get("static")
        }
        if any(
            leaf is not None and not np.array_equal(leaf, leaves[0])
            for leaves in own.values()
            for leaf in leaves
        ):
            raise UnsupportedError(
                f"a tensor of several weights cannot be made of {list(pieces)!r}: "
                f"their {', '.join(own)} differ"
            )
        base = joined([q.base for q in pieces])  # pyright: ignore[reportAttributeAccessIssue]
        return dataclasses.replace(first, base=base)
    columns(first, slice(0, 1))  # refuses blocks that cross columns
    if isinstance(getattr(first, "scale", None), QuantizedTensor):
        raise UnsupportedError(
            f"a tensor of several weights cannot be made of {first!r}: its scales are "
            "codes themselves"
        )
    leaves = [jax.tree.leaves(q) for q in pieces]
    whole = [np.concatenate(same, axis=-1) for same in zip(*leaves, strict=True)]
    made = jax.tree.unflatten(jax.tree.structure(first), whole)
    return dataclasses.replace(
        made, matrix=(first.matrix[0], sum(q.matrix[1] for q in pieces))
    )


def _bare(q: QuantizedTensor) -> Any:
    """A tensor of one column: what has to be equal for weights to be joined."""
    base = getattr(q, "base", None)
    if base is not None:
        return dataclasses.replace(q, base=_bare(base))  # pyright: ignore[reportArgumentType, reportCallIssue]
    return dataclasses.replace(q, matrix=(q.matrix[0], 1))  # pyright: ignore[reportArgumentType, reportCallIssue]
