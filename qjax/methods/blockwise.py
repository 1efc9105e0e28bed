"""Descent on one decoder block's output error: what block-wise methods share.

A block is a pure function `apply(weights, x)` or, with parameters that are not
quantized, `apply(weights, x, rest)`. The error of weights `w` is

    mean over counted tokens of |apply(w, x) - y|^2 / dim,

`x` what enters the block in the model quantized so far, `y` what the original block
made of its own inputs. Steps run on mini-batches inside one `lax.scan`; the error over
all samples is measured before the first step and at a few checks, and the iterate with
the least is kept, so the result is never worse than the start.

Programs are compiled once per `apply` and shapes: pass the same function object for
all blocks, and what differs between them in `rest`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from qjax.errors import NonFiniteError, SpecError

Apply = Callable[..., Any]


class BlockReport(NamedTuple):
    """Output error of a block, mean square over all calibration samples.

    Attributes:
      start: before the first step.
      best: of what was returned.
      step: the step after which that was; 0 when no check was better than the start.
      checks: the error at every check.
    """

    start: float
    best: float
    step: int
    checks: tuple[float, ...]


class Samples(NamedTuple):
    """Calibration data of one block.

    Attributes:
      inputs: what enters the block.
      targets: what should leave it.
      weight: 1 for tokens that count, 0 for padding.
      rest: what else `apply` takes; None when it takes nothing.
    """

    inputs: Float[Array, "samples time dim"]
    targets: Float[Array, "samples time dim"]
    weight: Float[Array, "samples time"]
    rest: Any

    @classmethod
    def build(cls, inputs: Any, targets: Any, mask: Any, rest: Any, where: str):
        """Checks shapes and fills in the weights.

        Raises:
          SpecError: shapes do not match.
        """
        inputs, targets = jnp.asarray(inputs), jnp.asarray(targets)
        if inputs.ndim != 3 or targets.shape[:2] != inputs.shape[:2]:
            raise SpecError(
                f"{where}: inputs {list(inputs.shape)} and targets "
                f"{list(targets.shape)}; expected [samples, time, dim] for both, with "
                "equal samples and time"
            )
        if mask is None:
            mask = jnp.ones(inputs.shape[:2], jnp.float32)
        mask = jnp.asarray(mask).astype(jnp.float32)
        if mask.shape != inputs.shape[:2]:
            raise SpecError(
                f"{where}: mask {list(mask.shape)}, expected [samples, time] = "
                f"{list(inputs.shape[:2])}"
            )
        return cls(inputs, targets, mask, rest)

    def last(self, count: int) -> "Samples":
        """The last samples."""
        return Samples(
            self.inputs[-count:], self.targets[-count:], self.weight[-count:], self.rest
        )

    def error(self, apply: Apply, weights: Any, index: Int[Array, " batch"], real=None):
        """Sum of squared errors per token, and of tokens, over some samples."""
        take = lambda x: jnp.take(x, index, axis=0)  # noqa: E731
        arguments = () if self.rest is None else (self.rest,)
        y = apply(weights, take(self.inputs), *arguments)
        miss = y.astype(jnp.float32) - take(self.targets).astype(jnp.float32)
        weight = take(self.weight)
        if real is not None:
            weight = weight * real[:, None]
        square = jnp.mean(jnp.square(miss), axis=-1)
        return jnp.sum(square * weight), jnp.sum(weight)

    def mean_error(self, apply: Apply, weights: Any, batch: int) -> Float[Array, ""]:
        """The error over all samples, `batch` of them at a time."""
        count = self.inputs.shape[0]
        turns = -(-count // batch)
        index = np.arange(turns * batch, dtype=np.int32).reshape(turns, batch)
        real = jnp.asarray(index < count, jnp.float32)
        index = jnp.asarray(np.minimum(index, count - 1))

        def one(item):
            return self.error(apply, weights, *item)

        errors, tokens = lax.map(one, (index, real))
        return jnp.sum(errors) / jnp.maximum(jnp.sum(tokens), 1.0)


def order_of(samples: int, batch: int, steps: int, seed: int) -> Int[Array, "steps b"]:
    """Which samples each step uses: shuffled epochs, every sample equally often."""
    rng = np.random.default_rng(seed)
    batch = min(batch, samples)
    epochs = -(-steps * batch // samples)
    order = np.concatenate([rng.permutation(samples) for _ in range(epochs)])
    return jnp.asarray(order[: steps * batch].reshape(steps, batch), jnp.int32)


class Kept(NamedTuple):
    """The best iterate so far."""

    values: Any
    error: Float[Array, ""]
    step: Int[Array, ""]


def descend(
    start: Any,
    state: Any,
    update: Callable[[Any, Any, Any, Any], tuple[Any, Any]],
    slope: Callable[[Any, Any], Any],
    full: Callable[[Any], Float[Array, ""]],
    order: Int[Array, "steps batch"],
    checks: int,
) -> tuple[Kept, Float[Array, " checks"], Float[Array, ""]]:
    """Runs all steps in one scan and keeps the iterate with the least full error.

    Args:
      start: values before the first step.
      state: of the optimizer.
      update: `(values, slope, state, step) -> (values, state)`.
      slope: `(values, sample indices) -> gradient` of the mini-batch error.
      full: error over all samples.
      order: sample indices of each step.
      checks: how many times `full` is measured, the last time after the last step.

    Returns:
      What was kept, the errors at the checks, and the error of `start`.
    """
    steps = order.shape[0]
    checks = min(checks, steps)
    marks = np.ceil(steps * np.arange(1, checks + 1) / checks).astype(np.int32) - 1
    slots = np.full(steps, -1, np.int32)
    slots[marks] = np.arange(checks, dtype=np.int32)
    first = full(start)
    zero = jnp.zeros((), jnp.int32)

    def check(values, kept, errors, slot, step):
        error = full(values)
        better = error < kept.error
        new = Kept(values, error, step + 1)
        kept = jax.tree.map(lambda a, b: jnp.where(better, a, b), new, kept)
        return kept, errors.at[slot].set(error)

    def one(carry, item):
        values, state, kept, errors = carry
        index, slot, step = item
        values, state = update(values, slope(values, index), state, step)
        kept, errors = lax.cond(
            slot >= 0,
            lambda: check(values, kept, errors, slot, step),
            lambda: (kept, errors),
        )
        return (values, state, kept, errors), None

    carry = (start, state, Kept(start, first, zero), jnp.zeros(checks, jnp.float32))
    items = (order, jnp.asarray(slots), jnp.arange(steps, dtype=jnp.int32))
    carry, _ = lax.scan(one, carry, items)
    return carry[2], carry[3], first


def report_of(kept: Kept, checks: Any, first: Any, where: str) -> BlockReport:
    """The report on the host.

    Raises:
      NonFiniteError: the error before the first step is not finite.
    """
    start = float(first)
    if not np.isfinite(start):
        raise NonFiniteError(
            f"{where}: the block's output error is {start} before any step; expected "
            "finite weights, inputs and targets"
        )
    errors = tuple(float(x) for x in np.asarray(checks))
    return BlockReport(start, float(kept.error), int(kept.step), errors)


def check_steps(where: str, **counts: Any) -> None:
    """Raises SpecError unless all are positive integers."""
    for name, value in counts.items():
        if type(value) is not int or value < 1:
            raise SpecError(
                f"{where}: {name} is {value!r}, expected a positive integer"
            )
