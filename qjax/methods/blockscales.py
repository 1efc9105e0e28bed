"""Tuning the continuous leaves of one quantized block, for models too big for more.

The same as `qjax.methods.tune`, block by block: Adam on scales, zero-points, tables and
factors minimizes the squared error of the block's output. Codes stay. Only the block
and its calibration samples are in memory.

Reference: Chen et al., EfficientQAT, arXiv 2407.11062, section 3.2, here with fixed
codes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from qjax.errors import SpecError
from qjax.methods.blockwise import (
    Apply,
    BlockReport,
    Samples,
    check_steps,
    descend,
    order_of,
    report_of,
)
from qjax.methods.continuous import Continuous, adam


def tune_block_scales(
    apply: Apply,
    qweights: Any,
    inputs: Float[Array, "samples time dim"],
    targets: Float[Array, "samples time dim"],
    *,
    steps: int = 64,
    lr: float = 2e-3,
    batch: int = 8,
    checks: int = 4,
    held_out: float = 0.125,
    vectors: bool = False,
    seed: int = 0,
    rest: Any = None,
    mask: Any = None,
) -> tuple[Any, BlockReport]:
    """Tunes scales and other continuous leaves of one block against the original.

    The last samples are held out: errors of the report are over them, and they decide
    which iterate is kept.

    Args:
      apply: pure function `(qweights, x)`, or `(qweights, x, rest)` when `rest` is
        given, to the block's output, for any batch. Pass the same function object for
        all blocks: it is compiled once per function, options and shapes.
      qweights: pytree with quantized tensors, for example a block's leaves by path.
      inputs: what enters the block in the model quantized so far.
      targets: what the original block returned for its own inputs.
      steps: Adam steps, with a cosine decay of the learning rate to zero.
      lr: first learning rate, relative to the size of each value.
      batch: samples per step.
      checks: how many times the held-out error is measured.
      held_out: share of the samples that is held out, at least one; 0 trains on all
        and chooses by the error over all.
      vectors: also tune float leaves of rank 1 in `qweights`: norms and biases.
      seed: of the order of samples.
      rest: pytree for `apply`, not tuned.
      mask: 1 for tokens that count, 0 for padding, `[samples, time]`.

    Returns:
      The tuned weights, of the same structure, shapes and dtypes, and a report.

    Raises:
      SpecError: an option is out of range, shapes do not match, nothing can be tuned.
      NonFiniteError: the error is not finite.
    """
    where = "tune_block_scales"
    check_steps(where, steps=steps, batch=batch, checks=checks)
    if not (lr > 0 and 0 <= held_out < 1):
        raise SpecError(
            f"{where}: lr is {lr!r} and held_out {held_out!r}, expected lr > 0 and "
            "0 <= held_out < 1"
        )
    samples = Samples.build(inputs, targets, mask, rest, where)
    count = samples.inputs.shape[0]
    kept = max(1, round(count * held_out)) if held_out else 0
    if kept >= count:
        raise SpecError(
            f"{where}: {count} samples, {kept} of them held out, leave none to train "
            "on; pass more samples, or held_out=0"
        )
    split = Continuous.split(qweights, vectors=vectors, where=where)
    order = order_of(count - kept, batch, steps, seed)
    best, found, errors, first = _tune(
        split, samples, order, apply, float(lr), checks, kept
    )
    return best, report_of(found, errors, first, where)


@functools.partial(jax.jit, static_argnames=("apply", "lr", "checks", "held_out"))
def _tune(split: Continuous, samples: Samples, order, apply, lr, checks, held_out):
    count, size = samples.inputs.shape[0], order.shape[1]
    rule = adam(lr, order.shape[0])
    judges = samples.last(held_out or count)

    def slope(deltas, index):
        def error(deltas):
            weights = split.merge(deltas, stored=False)
            total, tokens = samples.error(apply, weights, index)
            return total / jnp.maximum(tokens, 1.0)

        return jax.grad(error)(deltas)

    def full(deltas):
        return judges.mean_error(apply, split.merge(deltas, stored=True), size)

    def update(deltas, slopes, state, step):
        del step
        updates, state = rule.update(slopes, state)
        return optax.apply_updates(deltas, updates), state

    start = split.zeros()
    kept, errors, first = descend(
        start, rule.init(start), update, slope, full, order, checks
    )
    best = split.merge(kept.values, stored=True)
    return best, kept._replace(values=None), errors, first
