"""Absorbs input scales in what produces the input, so that they cost nothing.

`InputScaled(base, s)` multiplies activations by `s` at run time. Where the activations
come from a norm, the norm's scale (and bias) can be multiplied instead, provided that
everything that reads the norm is scaled alike; where they come from a linear layer that
is still dense, its columns can. Both are exact but for float rounding; results are
float32, because a 16-bit scale would round again.

`qjax.models.fold` applies these to the layers of a decoder.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qjax.errors import SpecError, UnsupportedError
from qjax.wrappers import InputScaled


def common_scale(consumers: Sequence[Any]) -> Float[Array, "*lead in"] | None:
    """The input scale that all consumers share, float32; None if they do not.

    Args:
      consumers: everything that reads one input, arrays and quantized tensors.
    """
    scales = [c.s for c in consumers if isinstance(c, InputScaled)]
    if not scales or len(scales) != len(consumers):
        return None
    first = np.asarray(scales[0])
    if any(
        s.dtype != scales[0].dtype or not np.array_equal(np.asarray(s), first)
        for s in scales
    ):
        return None
    return jnp.asarray(scales[0]).astype(jnp.float32)


def fold_into_norm(
    scale: Float[Array, "*lead in"] | None,
    consumers: Sequence[Any],
    *,
    bias: Float[Array, "*lead in"] | None = None,
    offset: float = 0.0,
) -> tuple[Any, Any, list[Any]]:
    """Multiplies a norm by the input scale of its consumers and unwraps them.

    `norm(x) = n(x) (scale + offset) + bias` becomes `n(x) (scale + offset) s + bias s`.

    Args:
      scale: the norm's stored scale, or None if it has none.
      consumers: everything that reads the norm's output.
      bias: the norm's bias, or None.
      offset: what the norm adds to its stored scale (1 for Gemma).

    Returns:
      `(scale, bias, consumers)`: the inputs themselves if nothing can be absorbed
      (consumers are scaled differently or not at all, or the norm has no scale).
    """
    s = None if scale is None else common_scale(consumers)
    if s is None:
        return scale, bias, list(consumers)
    folded = (jnp.asarray(scale, jnp.float32) + offset) * s - offset
    moved = None if bias is None else jnp.asarray(bias, jnp.float32) * s
    return folded, moved, [c.base for c in consumers]


def fold_into_previous(
    kernel: Float[Array, "in mid"],
    consumer: Any,
    *,
    bias: Float[Array, " mid"] | None = None,
    heads: tuple[int, int] = (1, 1),
) -> tuple[Any, Any, Any]:
    """Multiplies the columns of a dense layer by the input scale of its consumer.

    `(x K + b) s W` becomes `(x (K s) + b s) W`: for an up projection (whose result is
    multiplied by a gate, not passed through an activation) and down, and for values
    and the output projection, between which attention mixes tokens but not features.

    Args:
      kernel: dense weight of the previous layer.
      consumer: the only reader of its result, `InputScaled`.
      bias: of the previous layer.
      heads: `(kv_heads, heads)` when the result is repeated over groups of heads before
        the consumer reads it.

    Returns:
      `(kernel, bias, consumer)`, the first two float32.

    Raises:
      SpecError: the consumer has no input scale, or sizes do not match.
      UnsupportedError: the kernel is quantized already, or heads that share values
        are scaled differently.
    """
    if not isinstance(consumer, InputScaled):
        raise SpecError(
            f"fold_into_previous: the consumer is {consumer!r}, expected InputScaled"
        )
    if not hasattr(kernel, "astype"):
        raise UnsupportedError(
            f"fold_into_previous: the previous layer is {kernel!r}; its codes cannot "
            "absorb a scale exactly; fold before quantizing it, or keep InputScaled"
        )
    few, many = heads
    s = jnp.asarray(consumer.s).astype(jnp.float32)
    mid = kernel.shape[-1]
    if s.shape[-1] * few != mid * many:
        raise SpecError(
            f"fold_into_previous: the consumer reads {s.shape[-1]} features, expected "
            f"{mid} times {many}/{few}, the features of the previous layer"
        )
    groups = s.reshape(few, many // few, mid // few)
    if not bool(jnp.all(groups == groups[:, :1])):
        raise UnsupportedError(
            "fold_into_previous: query heads that share a value head have different "
            "input scales, which one value column cannot absorb; keep InputScaled"
        )
    s = groups[:, 0].reshape(mid)
    moved = None if bias is None else jnp.asarray(bias, jnp.float32) * s
    return jnp.asarray(kernel, jnp.float32) * s, moved, consumer.base
