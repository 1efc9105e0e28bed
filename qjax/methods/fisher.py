"""Squared gradients of the loss: how sensitive the model is to each weight.

The diagonal of the empirical Fisher information of a weight is the sum over sequences
of its squared gradient,

    F = sum_s (d loss(s) / d w)^2.

It serves `Statistics.gradient`: weighted k-means and outlier selection use it as the
importance of each weight.

Memory: parameters, the sums (float32, the size of the weights asked for), and the
gradient and activations of one sequence.

Reference: Kim et al., SqueezeLLM, arXiv 2306.07629, section 4.1.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qjax.errors import NonFiniteError, SpecError


def fisher_gradients(
    loss_fn: Callable[[Any, Any], Any],
    params: dict[str, Any],
    batches: Iterable[Int[Array, "batch time"]],
    *,
    select: Callable[[str, Any], bool] | None = None,
) -> dict[str, Float[Array, "..."]]:
    """Sums squared gradients over sequences.

    The gradient is squared per sequence, not per batch, so the result does not depend
    on how sequences are batched.

    Args:
      loss_fn: pure function `(params, tokens [1, time])` to a scalar, such as the
        mean negative log-likelihood of the sequence.
      params: dense arrays by path.
      batches: token batches; each shape compiles once.
      select: which weights, by path and array; default all floats of rank 2 or more.

    Returns:
      Float32 sums by path, the shape of each weight.

    Raises:
      SpecError: no batch, or no weight is selected.
      NonFiniteError: a gradient is NaN or infinite; names the weight.
    """
    chosen = {p: w for p, w in params.items() if (select or _matrix)(p, w)}
    if not chosen:
        raise SpecError(
            "fisher_gradients: no weight is selected; expected float arrays of rank 2 "
            "or more, or a select= that names some"
        )
    others = {p: w for p, w in params.items() if p not in chosen}

    def add(sums, chosen, others, batch):
        def one(sums, tokens):
            slope = jax.grad(lambda w: loss_fn({**others, **w}, tokens[None]))(chosen)
            squares = {p: jnp.square(g.astype(jnp.float32)) for p, g in slope.items()}
            return {p: sums[p] + squares[p] for p in sums}, None

        return jax.lax.scan(one, sums, batch)[0]

    step = jax.jit(add, donate_argnums=0)
    sums = {p: jnp.zeros(w.shape, jnp.float32) for p, w in chosen.items()}
    count = 0
    for batch in batches:
        sums = step(sums, chosen, others, jnp.asarray(batch))
        count += 1
    if not count:
        raise SpecError("fisher_gradients: no batches; pass calibration tokens")
    for path, total in sums.items():
        if not bool(jnp.isfinite(jnp.sum(total))):
            raise NonFiniteError(
                f"fisher_gradients: the gradient of {path} is NaN or infinite; "
                "expected a finite loss for every sequence"
            )
    return sums


def _matrix(path: str, w: Any) -> bool:
    del path
    return w.ndim >= 2 and jnp.issubdtype(w.dtype, jnp.floating)
