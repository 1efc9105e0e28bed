"""What candidates of mixed precision cost, and the best choice that a budget allows.

Reference: Frantar and Alistarh, arXiv 2208.11580, section 4 (dynamic programming over
layer-wise losses).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import SpecError
from qjax.formats import Format
from qjax.methods import Method, Statistics, needs_of, quantize

STEPS = 4096
"""Parts that the budget is cut into; sizes are rounded up to them."""


def solve(
    bits: np.ndarray, loss: np.ndarray, budget: int, steps: int = STEPS
) -> list[int]:
    """The choice per row with the least total loss within a budget.

    Args:
      bits: `[units, choices]`, cost of each choice, whole numbers.
      loss: `[units, choices]`, loss of each choice.
      budget: total cost allowed.
      steps: parts the budget is cut into; costs are rounded up to whole parts, so the
        budget holds and the result is optimal up to `units / steps` of it.

    Returns:
      Index of the choice of each unit.

    Raises:
      SpecError: even the cheapest choices exceed the budget.
    """
    if bits.min(axis=1).sum() > budget:
        least = bits.min(axis=1).sum()
        raise SpecError(
            f"allocate: the smallest candidates need {least / budget:.3f} times the "
            "budget; allow more bits, or add candidates with fewer"
        )
    # What every choice needs at least is exact; only the rest is rounded to steps.
    base = bits.min(axis=1, keepdims=True)
    spare = budget - base.sum()
    unit = max(spare / steps, 1.0)  # below `steps` bits nothing needs rounding
    steps = int(spare / unit)
    cost = np.ceil((bits - base) / unit - 1e-9).astype(np.int64)
    best = np.zeros(steps + 1)
    back = np.zeros((len(bits), steps + 1), np.int64)
    for i in range(len(bits)):
        tried = np.full((bits.shape[1], steps + 1), np.inf)
        for k in range(bits.shape[1]):
            if (c := cost[i, k]) <= steps:
                tried[k, c:] = best[: steps + 1 - c] + loss[i, k]
        back[i] = tried.argmin(axis=0)
        best = tried.min(axis=0)
    at, picked = steps, []
    for i in range(len(bits) - 1, -1, -1):
        picked.append(int(back[i, at]))
        at -= cost[i, picked[-1]]
    return picked[::-1]


@functools.cache
def packed_shapes(
    shape: tuple[int, int], fmt: Format, method: Method, table: bool = False
) -> Any:
    """A quantized matrix of `jax.ShapeDtypeStruct`s, from its shape alone.

    Args:
      shape: `[in, out]`, of a table of embeddings `[vocab, dim]`.
      fmt: the format.
      method: the method; calibrated ones get statistics that do not exist either.
      table: whether it is a table.
    """
    needs = needs_of(method)

    def run(w: Any, statistics: Any) -> Any:
        axis = -1 if table else -2
        used = statistics if needs else None
        return quantize(w, fmt, method, axis=axis, statistics=used)

    w = jax.ShapeDtypeStruct(shape, jnp.float32)
    statistics = jax.eval_shape(
        lambda: Statistics.zeros(shape[-2], hessian=True, cross=True, gradient=shape)
    )
    return jax.eval_shape(run, w, statistics)


def packed_bytes(shape: tuple[int, int], fmt: Format, method: Method) -> int:
    """Bytes of a quantized matrix, from its shape alone."""
    return packed_shapes(shape, fmt, method).nbytes
