"""SmoothQuant: moves the difficulty of rounding from activations to weights.

For products whose activations are rounded too (W8A8), inputs are divided by

    s_i = max(peak_x_i, 1e-5)^alpha / max(peak_w_i, 1e-5)^(1 - alpha),

`peak` the largest magnitude of input `i` over tokens and of its weights over outputs,
and the weights multiplied by `s`: `y = (x / s) (s w)`. One `s` serves all weights that
read the input, so that the norm before them can absorb it (`qjax.methods.fold`).

With `alpha=None` the exponent is searched, per input: it minimizes a model of the
squared output error of a token

    tr(d^T H d) / tokens  +  step^2 / 12  sum_ij (s_i w_ij)^2,

`d` the error of the rounded weight and `step = top / 127` that of an 8-bit row, whose
rounding error is uniform. The largest element `top` of a row is estimated from sums per
feature: with `r_i` the root mean square of `x_i / s_i`, normal features would have
`top^2 <= (105 sum_i r_i^8)^(1/4)` on average (105 is the eighth moment), and no row
exceeds `max_i peak_x_i / s_i`; the lesser of both is taken. `s = 1` is a candidate too.
The paper's own guidance is 0.5, and 0.75 to 0.9 for models with large outliers.

Reference: Xiao et al., SmoothQuant, arXiv 2211.10438, equation 4.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.errors import SpecError
from qjax.formats import Format
from qjax.formats.base import FLOAT_SCALES, check_choice
from qjax.methods.awq import Equalized, check_inner, mean_square, output_error
from qjax.methods.base import Method
from qjax.methods.change import scale_inputs
from qjax.methods.rtn import RTN
from qjax.methods.statistics import Statistics
from qjax.tensor import QuantizedTensor
from qjax.wrappers import InputScaled

ALPHAS = tuple(i / 20 for i in range(21))
"""Exponents that a search tries."""
FLOOR = 1e-5


@dataclasses.dataclass(frozen=True)
class SmoothQuant(Method):
    """Input scales that even out activations, around another method.

    Attributes:
      inner: rounds the scaled weight.
      alpha: exponent in [0, 1], or None to search one per input.
      dtype: of the stored scales, until a norm absorbs them.

    Raises:
      SpecError: a field is out of range.
    """

    inner: Method = dataclasses.field(default_factory=RTN)
    alpha: float | None = None
    dtype: str = "float16"

    def __post_init__(self) -> None:
        check_inner("SmoothQuant", self.inner)
        check_choice("SmoothQuant", "dtype", self.dtype, FLOAT_SCALES)
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise SpecError(
                f"SmoothQuant: alpha is {self.alpha!r}, expected a number in [0, 1], "
                "or None to search one"
            )

    @property
    def needs(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Sums per feature, and what the inner method needs; see `Method.needs`."""
        return self.inner.needs | {"square"}

    @property
    def name(self) -> str:
        """`smoothquant`, or `smoothquant-gptq` and so on."""
        plain = isinstance(self.inner, RTN)
        return "smoothquant" if plain else f"smoothquant-{self.inner.name}"

    def __call__(
        self,
        w: Float[Array, "in out"],
        fmt: Format,
        *,
        importance: Float[Array, "..."] | None = None,
        key: Array | None = None,
        statistics: Statistics | None = None,
        shared: Any = None,
    ) -> QuantizedTensor:
        """See `Method.__call__`; returns `InputScaled`."""
        known = self.check_statistics(statistics)
        if shared is None:
            shared = self.prepare([w], fmt, known)
        t = shared.t.astype(jnp.float32)
        moved = scale_inputs(known, t)
        if importance is None:
            importance = mean_square(moved)
        else:
            importance = importance * jnp.square(t)[:, None]
        base = self.inner(
            w.astype(jnp.float32) / t[:, None],
            fmt,
            importance=importance,
            key=key,
            statistics=moved,
            shared=shared.inner,
        )
        return InputScaled(base, shared.t)

    def prepare(
        self,
        weights: Sequence[Float[Array, "in _"]],
        fmt: Format,
        statistics: Statistics | None,
    ) -> Equalized:
        """Chooses the scales for all weights that read the input."""
        known = self.check_statistics(statistics)
        weights = [w.astype(jnp.float32) for w in weights]
        peaks = [jnp.max(jnp.abs(w), axis=1) for w in weights]
        peak = jnp.maximum(jnp.max(jnp.stack(peaks), axis=0), FLOOR)
        if self.alpha is not None:
            t = self._stored(known, peak, jnp.float32(self.alpha))
        else:
            t = self._search(weights, fmt, known, peak)
        wide = t.astype(jnp.float32)
        scaled = [w / wide[:, None] for w in weights]
        return Equalized(t, self.inner.prepare(scaled, fmt, scale_inputs(known, wide)))

    def _search(self, weights, fmt, statistics, peak):
        def step(i, best):
            t = self._stored(statistics, peak, jnp.array(ALPHAS, jnp.float32)[i])
            error = rounded_error(weights, fmt, statistics, t)
            better = error < best[0]
            return jnp.where(better, error, best[0]), jnp.where(better, t, best[1])

        ones = jnp.ones_like(peak).astype(self.dtype)
        plain = rounded_error(weights, fmt, statistics, ones)
        return jax.lax.fori_loop(0, len(ALPHAS), step, (plain, ones))[1]

    def _stored(self, statistics, peak, alpha):
        """`1 / s` in the dtype that is stored; positive and finite."""
        x = jnp.maximum(statistics.peak, FLOOR)
        t = jnp.power(peak, 1.0 - alpha) / jnp.power(x, alpha)
        info = jnp.finfo(self.dtype)
        return jnp.clip(t, float(info.tiny), float(info.max)).astype(self.dtype)


def row_top(statistics: Statistics, t: Float[Array, " in"]) -> Float[Array, ""]:
    """Estimate of the largest element of a row of `x t`; see the module."""
    r = jnp.sqrt(statistics.square / jnp.maximum(statistics.count, 1.0)) * t
    most = jnp.max(r)
    ratio = r / jnp.maximum(most, 1e-30)
    usual = most * jnp.power(105.0 * jnp.sum(jnp.power(ratio, 8)), 0.125)
    return jnp.minimum(usual, jnp.max(statistics.peak * t))


def rounded_error(
    weights: Sequence[Float[Array, "in _"]],
    fmt: Format,
    statistics: Statistics,
    t: Float[Array, " in"],
) -> Float[Array, ""]:
    """Modelled squared output error of a token when both factors are rounded.

    Args:
      weights: all weights that read the input, float32.
      fmt: format of the weights, which are rounded to nearest.
      statistics: of the input.
      t: what activations are multiplied by before they are rounded.
    """
    t = t.astype(jnp.float32)
    tokens = jnp.maximum(statistics.count, 1.0)
    step = row_top(statistics, t) / 127.0
    error = jnp.float32(0.0)
    for w in weights:
        scaled = w / t[:, None]
        back = RTN()(scaled, fmt).dequantize(jnp.float32)
        miss = jnp.sum(output_error((back - scaled) * t[:, None], statistics))
        error += miss / tokens + jnp.square(step) / 12.0 * jnp.sum(jnp.square(scaled))
    return error
