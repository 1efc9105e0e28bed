"""What weights in wrappers do to activations before they are multiplied."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.trellis import Incoherent
from qjax.wrappers import (
    InputScaled,
    Permuted,
    Rotated,
    RoundedInputs,
    SplitInputs,
    Wrapper,
    hadamard,
)


def rounded_input(
    x: Float[Array, "*batch in"], w: Any
) -> Float[Array, "*batch _"] | None:
    """What `RoundedInputs` inside of a weight rounds when it is multiplied by `x`.

    Args:
      x: activations.
      w: weight `[in, out]`, quantized or not.

    Returns:
      The activations behind the wrappers around it, or None without `RoundedInputs`.
    """
    while isinstance(w, Wrapper):
        if isinstance(w, RoundedInputs):
            return x
        if isinstance(w, SplitInputs):
            x = without(x, w)
        elif isinstance(w, Incoherent):
            x = w.enter(x, "left")
        elif isinstance(w, InputScaled | Permuted | Rotated):
            x = sides(w)[0](x)
        w = w.base
    return None


def without(x, w: SplitInputs):
    """Activations with zeros where features have rows of their own."""
    return x.at[..., w.index].set(jnp.zeros((), x.dtype), mode="drop")


def sides(w: InputScaled | Permuted | Rotated):
    """The operation on activations of `x W`, and on results of `x W^T`."""
    if isinstance(w, Permuted):
        return (
            lambda x: jnp.take(x, w.perm, axis=-1),
            lambda y: jnp.take(y, jnp.argsort(w.perm), axis=-1),
        )
    if isinstance(w, InputScaled):
        scale = lambda x: _times(x, w.s)  # noqa: E731
        return scale, scale
    return (
        lambda x: hadamard(_times(x, w.signs, jnp.float32)).astype(x.dtype),
        lambda y: _times(hadamard(y.astype(jnp.float32)).astype(y.dtype), w.signs),
    )


def _times(x, s, dtype=None):
    return (x.astype(jnp.float32) * s.astype(jnp.float32)).astype(dtype or x.dtype)
