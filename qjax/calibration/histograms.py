"""Observers that choose a range from a histogram of activations.

`Percentile`, `MSE` and `Entropy` keep a histogram of `|x|` whose range `[0, 2**e)`
doubles until a batch fits: pairs of bins are merged, which is exact. They give
symmetric ranges.

Counts are float32: a bin of more than `2**24` values is exact to about one part in
`10**7`.

Reference: Migacz, 8-bit Inference with TensorRT, GTC 2017 (entropy); Choukroun et al.,
arXiv 1902.06822 (MSE).
"""

import abc
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qjax.calibration.observers import Observer, seen
from qjax.errors import SpecError

LOWEST_EXPONENT = -120
EPSILON = 1e-4
"""What `Entropy` takes for the probability of a bin that the rounded one lacks."""


class Histogram(NamedTuple):
    """Counts of `|x|` in equal bins over `[0, 2**exponent)`, and the largest `|x|`."""

    counts: Float[Array, " bins"]
    exponent: Int[Array, ""]
    peak: Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class HistogramObserver(Observer):
    """Base of rules that choose from a histogram of `|x|`.

    Attributes:
      bins: number of bins, a power of two of at least 256.
    """

    bins: int = dataclasses.field(default=2048, kw_only=True)

    def __post_init__(self) -> None:
        if type(self.bins) is not int or self.bins < 256 or self.bins & (self.bins - 1):
            raise SpecError(
                f"{type(self).__name__}: bins is {self.bins!r}, expected a power of "
                "two of at least 256"
            )

    def init(self) -> Histogram:
        """See `Observer.init`."""
        counts = jnp.zeros((self.bins,), jnp.float32)
        return Histogram(counts, jnp.int32(LOWEST_EXPONENT), jnp.float32(0))

    def update(self, state: Histogram, x, weight=None) -> Histogram:
        """See `Observer.update`; `2**exponent` is always above the peak."""
        x, counts = seen(x, weight)
        size = jnp.abs(x)
        peak = jnp.maximum(state.peak, jnp.max(size, initial=0.0))
        exponent = jnp.maximum(jnp.frexp(peak)[1].astype(jnp.int32), state.exponent)
        shift = jnp.minimum(exponent - state.exponent, 31)
        merged = jnp.arange(self.bins, dtype=jnp.int32) >> shift
        old = jnp.zeros_like(state.counts).at[merged].add(state.counts)
        places = jnp.ldexp(size, self.bins.bit_length() - 1 - exponent)
        places = jnp.clip(places.astype(jnp.int32), 0, self.bins - 1)
        new = (
            jnp.zeros_like(old)
            .at[places.reshape(-1)]
            .add(counts.reshape(-1).astype(jnp.float32))
        )
        return Histogram(old + new, exponent, peak)

    def range(self, state: Histogram, bits: int = 8):
        """See `Observer.range`."""
        width = jnp.ldexp(jnp.float32(1.0 / self.bins), state.exponent)
        high = jnp.minimum(self.threshold(state, width, bits), state.peak)
        return -high, high

    @abc.abstractmethod
    def threshold(
        self, state: Histogram, width: Float[Array, ""], bits: int
    ) -> Float[Array, ""]:
        """Where to clip `|x|`.

        Args:
          state: the histogram.
          width: of a bin.
          bits: width of the codes.
        """


@dataclasses.dataclass(frozen=True)
class Percentile(HistogramObserver):
    """The upper edge of the bin that holds a percentile of `|x|`.

    Attributes:
      percentile: in (50, 100].
    """

    percentile: float = 99.99

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 50 < self.percentile <= 100:
            raise SpecError(
                f"Percentile: percentile is {self.percentile}, expected (50, 100]"
            )

    def threshold(self, state, width, bits):
        """See `HistogramObserver.threshold`."""
        del bits
        below = jnp.cumsum(state.counts)
        wanted = below[-1] * jnp.float32(self.percentile / 100)
        first = jnp.argmax(below >= wanted).astype(jnp.float32)
        return (first + 1.0) * width


@dataclasses.dataclass(frozen=True)
class MSE(HistogramObserver):
    """The clip with the least squared error of rounding and clipping.

    The candidates are `peak * k / grid`; values count as the centres of their bins.

    Attributes:
      grid: number of clips tried.
    """

    grid: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.grid) is not int or self.grid < 2:
            raise SpecError(f"MSE: grid is {self.grid!r}, expected an integer >= 2")

    def threshold(self, state, width, bits):
        """See `HistogramObserver.threshold`."""
        levels = float(2 ** (bits - 1) - 1)
        centres = (jnp.arange(self.bins, dtype=jnp.float32) + 0.5) * width
        steps = jnp.arange(1, self.grid + 1, dtype=jnp.float32)
        tops = state.peak * (steps / self.grid)

        def error(top):
            scale = jnp.where(top > 0, top / levels, 1.0)
            codes = jnp.minimum(jnp.round(centres / scale), levels)
            return jnp.sum(state.counts * jnp.square(codes * scale - centres))

        return tops[jnp.argmin(jax.lax.map(error, tops))]


@dataclasses.dataclass(frozen=True)
class Entropy(HistogramObserver):
    """The clip whose rounded distribution diverges least from the original one.

    For each number of bins `i`, `P` is the histogram of the first `i` bins with what
    lies beyond added to the last, and `Q` the first `i` bins merged into `2**(bits-1)`
    levels and spread evenly over those of their bins that are not empty; the `i` with
    the least `KL(P, Q)` is kept and the clip is in the middle of bin `i`.

    Attributes:
      stride: bins between candidates.
    """

    stride: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.stride) is not int or self.stride < 1:
            raise SpecError(
                f"Entropy: stride is {self.stride!r}, expected a positive integer"
            )

    def threshold(self, state, width, bits):
        """See `HistogramObserver.threshold`."""
        levels = 2 ** (bits - 1)
        if levels > self.bins:
            raise SpecError(
                f"Entropy: {bits} bits have {levels} levels, more than {self.bins} "
                "bins; use more bins"
            )
        ends = jnp.arange(levels, self.bins + 1, self.stride, dtype=jnp.int32)
        bins = jnp.arange(self.bins, dtype=jnp.int32)
        total = jnp.maximum(jnp.sum(state.counts), 1.0)

        def divergence(end):
            inside = jnp.where(bins < end, state.counts, 0.0)
            beyond = jnp.sum(state.counts) - jnp.sum(inside)
            p = inside.at[end - 1].add(jnp.maximum(beyond, 0.0)) / total
            level = jnp.minimum(bins * levels // end, levels - 1)
            some = (inside > 0).astype(jnp.float32)
            empty = jnp.zeros((levels,), jnp.float32)
            held = empty.at[level].add(inside) / jnp.maximum(
                empty.at[level].add(some), 1.0
            )
            q = held[level] * some
            q = jnp.maximum(q / jnp.maximum(jnp.sum(q), 1.0), EPSILON / total)
            terms = p * (jnp.log(jnp.maximum(p, 1e-30)) - jnp.log(q))
            return jnp.sum(jnp.where(p > 0, terms, 0.0))

        best = ends[jnp.argmin(jax.lax.map(divergence, ends))]
        return (best.astype(jnp.float32) + 0.5) * width
