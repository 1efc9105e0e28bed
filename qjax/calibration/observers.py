"""Observers: from a stream of activations to the range that static scales cover.

An observer is a rule with three pure functions, each of which can be compiled:

    state = observer.init()
    state = observer.update(state, x)              # once per batch
    low, high = observer.range(state, bits=8)
    x_scale = static_scale(observer, state)        # for qjax.ops.matmul

Those here, `MinMax`, `MovingAverage` and `MeanStd`, keep a few numbers; those of
`qjax.calibration.histograms` keep a histogram. Values that are not finite, and tokens
of weight 0, are not seen.

Reference: Krishnamoorthi, Quantizing deep convolutional networks for efficient
inference, arXiv 1806.08342.
"""

import abc
import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from qjax.errors import SpecError
from qjax.wrappers import ACTIVATIONS


class Observer(abc.ABC):
    """Chooses the range of activations: frozen, hashable, static in jit."""

    @abc.abstractmethod
    def init(self) -> Any:
        """The state that has seen nothing."""

    @abc.abstractmethod
    def update(
        self,
        state: Any,
        x: Float[Array, "*tokens features"],
        weight: Float[Array, "*tokens"] | None = None,
    ) -> Any:
        """The state that has seen a batch more.

        Args:
          state: so far.
          x: activations.
          weight: 1 for tokens that count and 0 for padding; default all count.
        """

    @abc.abstractmethod
    def range(
        self, state: Any, bits: int = 8
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Ends of the range to cover; zeros when nothing was seen.

        Args:
          state: what was seen.
          bits: width of the (symmetric) codes, for rules that weigh rounding.
        """


def static_scale(
    observer: Observer, state: Any, activation: str = "int8"
) -> Float[Array, ""]:
    """The static scale `max(-low, high) / top` of rounded activations.

    Args:
      observer: the rule.
      state: what it has seen.
      activation: `"int8"` or `"float8_e4m3fn"`. Rules that weigh rounding assume even
        steps, which suits integers.

    Returns:
      `x_scale` for `qjax.ops.matmul`; 1 when nothing (or only zeros) was seen.

    Raises:
      SpecError: `activation` is not a name.
    """
    if activation not in ACTIVATIONS:
        raise SpecError(
            f"static_scale: activation is {activation!r}, expected one of "
            f"{[*ACTIVATIONS]}"
        )
    low, high = observer.range(state, 8)
    top = jnp.maximum(-low, high)
    return jnp.where(top > 0, top / ACTIVATIONS[activation], 1.0).astype(jnp.float32)


def seen(
    x: Float[Array, "*tokens features"], weight: Float[Array, "*tokens"] | None
) -> tuple[Float[Array, "*tokens features"], Bool[Array, "*tokens features"]]:
    """Values in float32, and which of them count."""
    x = x.astype(jnp.float32)
    counts = jnp.isfinite(x)
    if weight is not None:
        counts &= jnp.reshape(weight > 0, (*x.shape[:-1], 1))
    return jnp.where(counts, x, 0.0), counts


def _extremes(x, counts):
    """Least and greatest value that counts; `(inf, -inf)` without any."""
    low = jnp.min(jnp.where(counts, x, jnp.inf), initial=jnp.inf)
    high = jnp.max(jnp.where(counts, x, -jnp.inf), initial=-jnp.inf)
    return low, high


class Extremes(NamedTuple):
    """Ends of what was seen, `(inf, -inf)` at first."""

    low: Float[Array, ""]
    high: Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class MinMax(Observer):
    """The least and the greatest value."""

    def init(self) -> Extremes:
        """See `Observer.init`."""
        return Extremes(jnp.float32(jnp.inf), jnp.float32(-jnp.inf))

    def update(self, state: Extremes, x, weight=None) -> Extremes:
        """See `Observer.update`."""
        low, high = _extremes(*seen(x, weight))
        return Extremes(jnp.minimum(state.low, low), jnp.maximum(state.high, high))

    def range(self, state: Extremes, bits: int = 8):
        """See `Observer.range`."""
        del bits
        some = state.low <= state.high
        return jnp.where(some, state.low, 0.0), jnp.where(some, state.high, 0.0)


@dataclasses.dataclass(frozen=True)
class MovingAverage(MinMax):
    """Extremes of batches, averaged: `m <- m + rate (batch - m)`.

    Attributes:
      rate: weight of a new batch, in (0, 1]; the first batch sets the average.
    """

    rate: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise SpecError(f"MovingAverage: rate is {self.rate}, expected (0, 1]")

    def update(self, state: Extremes, x, weight=None) -> Extremes:
        """See `Observer.update`."""
        new = Extremes(*_extremes(*seen(x, weight)))

        def mix(old, batch):
            mixed = jnp.where(jnp.isfinite(old), old + self.rate * (batch - old), batch)
            return jnp.where(jnp.isfinite(batch), mixed, old)

        return Extremes(mix(state.low, new.low), mix(state.high, new.high))


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations, and the extremes."""

    count: Float[Array, ""]
    mean: Float[Array, ""]
    spread: Float[Array, ""]
    ends: Extremes


@dataclasses.dataclass(frozen=True)
class MeanStd(Observer):
    """`mean +- stds * std`, never beyond the extremes.

    Attributes:
      stds: half-width in standard deviations.
    """

    stds: float = 4.0

    def __post_init__(self) -> None:
        if not self.stds > 0:
            raise SpecError(f"MeanStd: stds is {self.stds}, expected a positive number")

    def init(self) -> Moments:
        """See `Observer.init`."""
        zero = jnp.zeros((), jnp.float32)
        return Moments(zero, zero, zero, MinMax().init())

    def update(self, state: Moments, x, weight=None) -> Moments:
        """See `Observer.update`; nothing large cancels."""
        x, counts = seen(x, weight)
        count = jnp.sum(counts.astype(jnp.float32))
        mean = jnp.sum(x) / jnp.maximum(count, 1.0)
        spread = jnp.sum(jnp.where(counts, jnp.square(x - mean), 0.0))
        total = state.count + count
        part = count / jnp.maximum(total, 1.0)
        step = mean - state.mean
        low, high = _extremes(x, counts)
        ends = Extremes(
            jnp.minimum(state.ends.low, low), jnp.maximum(state.ends.high, high)
        )
        merged = state.spread + spread + jnp.square(step) * state.count * part
        return Moments(total, state.mean + step * part, merged, ends)

    def range(self, state: Moments, bits: int = 8):
        """See `Observer.range`."""
        low, high = MinMax().range(state.ends, bits)
        half = self.stds * jnp.sqrt(state.spread / jnp.maximum(state.count, 1.0))
        mean = state.mean
        return jnp.maximum(low, mean - half), jnp.minimum(high, mean + half)
