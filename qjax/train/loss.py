"""Next-token loss without the logits of a whole batch.

The logits of a vocabulary of 128k take half a megabyte a token; here they exist for a
few tokens at a time, in the gradient too, which computes them again.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qjax.errors import SpecError


def token_losses(
    logits: Float[Array, "*batch vocab"], targets: Int[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """Returns `-log softmax(logits)[target]` in nats, float32.

    Args:
      logits: Scores of every token of the vocabulary.
      targets: Token ids; the loss of one outside the vocabulary means nothing.
    """
    logits = logits.astype(jnp.float32)
    # No gather: it would move logits whose vocabulary is spread over devices.
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    hit = ids == targets[..., None]
    picked = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - picked


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
      chunk: Number of tokens whose logits exist at a time.

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
        return total + jnp.sum(token_losses(model.logits(x), wanted) * weight), None

    add = jax.checkpoint(add, prevent_cse=False)
    parts = (split(hidden), split(targets), split(weights.astype(jnp.float32)))
    total, _ = jax.lax.scan(add, jnp.zeros((), jnp.float32), parts)
    return total
