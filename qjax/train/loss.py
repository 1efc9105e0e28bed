"""Next-token loss without the logits of a whole batch.

The logits of a vocabulary of 128k take half a megabyte a token; here they exist for a
few tokens at a time, in the gradient too.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qjax.errors import SpecError


@jax.custom_vjp
def token_losses(
    logits: Float[Array, "*batch vocab"], targets: Int[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """Returns `-log softmax(logits)[target]` in nats, float32.

    Its gradient, `softmax(logits) - [target]`, is one pass over the logits.

    Args:
      logits: Scores of every token of the vocabulary.
      targets: Token ids; the loss of one outside the vocabulary means nothing.
    """
    return _forward(logits, targets)[0]


def _hit(logits: Array, targets: Array) -> Array:
    # No gather: it would move logits whose vocabulary is spread over devices.
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return ids == targets[..., None]


def _forward(logits, targets):
    wide = logits.astype(jnp.float32)
    picked = jnp.sum(jnp.where(_hit(logits, targets), wide, 0.0), axis=-1)
    total = jax.nn.logsumexp(wide, axis=-1)
    return total - picked, (logits, targets, total)


def _backward(kept, g):
    logits, targets, total = kept
    p = jnp.exp(logits.astype(jnp.float32) - total[..., None])
    p = jnp.where(_hit(logits, targets), p - 1.0, p)
    return (g[..., None] * p).astype(logits.dtype), None


token_losses.defvjp(_forward, _backward)


def chunked_loss(
    model: Any,
    hidden: Float[Array, "batch time dim"],
    targets: Int[Array, "batch time"],
    weights: Float[Array, "batch time"],
    chunk: int = 512,
) -> Float[Array, ""]:
    """Returns `sum(weights * token_losses(model.logits(hidden), targets))`.

    Args:
      model: Anything with `logits`, differentiated through.
      hidden: What `model.logits` takes.
      targets: The next token of every position.
      weights: Weight of every loss; 0 where a target does not count.
      chunk: Number of tokens whose logits exist at a time; a gradient computes them
        again, except where one chunk is all.

    Raises:
      SpecError: `chunk` is not positive.
    """
    if chunk < 1:
        raise SpecError(f"loss_chunk is {chunk}; expected at least 1 token")
    rows, time = targets.shape
    part = min(max(chunk // rows, 1), time)
    count = -(-time // part)
    spare = count * part - time

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, spare)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, count, part, *x.shape[2:]), 1, 0)

    def add(total: Array, items: tuple[Array, Array, Array]) -> tuple[Array, None]:
        x, wanted, weight = items
        weight = weight.astype(jnp.float32)
        return total + jnp.sum(token_losses(model.logits(x), wanted) * weight), None

    if count == 1:
        return add(jnp.zeros((), jnp.float32), (hidden, targets, weights))[0]
    add = jax.checkpoint(add, prevent_cse=False)
    parts = (split(hidden), split(targets), split(weights))
    total, _ = jax.lax.scan(add, jnp.zeros((), jnp.float32), parts)
    return total
