"""AWQ: activation-aware scales of inputs, and clipped ranges, before any rounding.

Inputs that matter are scaled up before the weight is rounded and down again at run
time, `y = (x / s) (s w)`, which moves rounding error to inputs that matter less. With
the mean `|x|` of every input and `|w|` relative to its group's maximum, averaged over
outputs,

    s = x^r / (w^(1 - r) + 1e-4)      (duo; otherwise s = x^r)
    s = max(s, 1e-4) / sqrt(max s min s),      r = 0, 1 / grid, ..., (grid - 1) / grid,

and the `s` with the least output error `sum_w tr(d^T H d)`, `d` the error of the
weight and `H` the second moments of the input, is kept: one for all weights that read
the input, so that the norm before them can absorb it (`qjax.methods.fold`). `s = 1` is
a candidate too. Then ranges of groups are clipped, each to the fraction 1, 0.95, ...,
0.55 of its maximum with the least error of the group's own output.

Differences from the reference package, all towards lower error: the error is exact
over all calibration tokens (a quadratic form) instead of a forward pass over a sample;
the plain weight is a candidate; and a clipped weight is used only for outputs that
have less error with it. The error is that of each linear layer, not of attention.

Cost: `grid + 1` roundings of the weights and products with `H`. Memory: two float32
copies of the largest weight besides what the inner method takes.

Reference: Lin et al., AWQ, arXiv 2306.00978; AutoAWQ 0.2.9 `quantize/quantizer.py`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.errors import SpecError
from qjax.formats import Format
from qjax.formats.base import FLOAT_SCALES, check_choice
from qjax.methods import hessian
from qjax.methods.base import Method
from qjax.methods.change import scale_inputs
from qjax.methods.clip import clip_weight, clips
from qjax.methods.rtn import RTN
from qjax.methods.statistics import Statistics
from qjax.tensor import LayoutTensor, QuantizedTensor
from qjax.wrappers import InputScaled


class Equalized(NamedTuple):
    """What weights with one input share after a search of input scales.

    Attributes:
      t: what activations are multiplied by, in the dtype it is stored in.
      inner: what the inner method's `prepare` returned for the scaled weights.
    """

    t: Float[Array, " in"]
    inner: Any


@dataclasses.dataclass(frozen=True)
class AWQ(Method):
    """Activation-aware input scales around another method.

    Attributes:
      inner: rounds the scaled weight, with the statistics of the scaled input.
      grid: exponents tried.
      duo: let the weight's magnitudes take part in the scale.
      clip: search clipped ranges (formats with groups along `in`, or per channel).
      hessian: measure errors by second moments of the inputs; without, inputs count as
        uncorrelated and sums per feature are enough.
      dtype: of the stored scales, `float16` costing 16 / out bits per weight until a
        norm absorbs them.

    Raises:
      SpecError: a field is out of range.
    """

    inner: Method = dataclasses.field(default_factory=lambda: RTN("mse"))
    grid: int = 20
    duo: bool = True
    clip: bool = True
    hessian: bool = True
    dtype: str = "float16"

    def __post_init__(self) -> None:
        check_inner("AWQ", self.inner)
        check_choice("AWQ", "dtype", self.dtype, FLOAT_SCALES)
        if type(self.grid) is not int or self.grid < 1:
            raise SpecError(
                f"AWQ: grid is {self.grid!r}, expected a positive integer number of "
                "exponents (20 in the paper)"
            )

    @property
    def needs(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The Hessian or sums, and what the inner method needs; see `Method.needs`."""
        return self.inner.needs | {"hessian" if self.hessian else "square"}

    @property
    def name(self) -> str:
        """`awq`, or `awq-gptq` and so on."""
        plain = isinstance(self.inner, RTN)
        return "awq" if plain else f"awq-{self.inner.name}"

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
        """See `Method.__call__`; returns `InputScaled`.

        `importance` is passed on; without it the inner method weighs errors by the mean
        squared (scaled) activation.
        """
        known = self.check_statistics(statistics)
        if shared is None:
            shared = self.prepare([w], fmt, known)
        t = shared.t.astype(jnp.float32)
        scaled = w.astype(jnp.float32) / t[:, None]
        moved = scale_inputs(known, t)
        if importance is None:
            weights = mean_square(moved)
        else:
            weights = importance * jnp.square(t)[:, None]

        def run(w, method) -> QuantizedTensor:
            arrays = {"importance": weights, "key": key, "statistics": moved}
            return method(w, fmt, **arrays, shared=shared.inner)

        tries = [run(scaled, self.inner)]
        if self.clip and clips(fmt, scaled.shape):
            clipped = clip_weight(scaled, fmt, moved)
            tries.append(run(clipped, self.inner))
            if isinstance(self.inner, RTN) and self.inner != RTN():
                tries.append(run(clipped, RTN()))
        base = least_error(scaled, tries, moved)
        return InputScaled(base, shared.t)

    def prepare(
        self,
        weights: Sequence[Float[Array, "in _"]],
        fmt: Format,
        statistics: Statistics | None,
    ) -> Equalized:
        """Searches the scales for all weights that read the input."""
        known = self.check_statistics(statistics)
        weights = [w.astype(jnp.float32) for w in weights]
        x = known.size / jnp.maximum(known.count, 1.0)
        relative = relative_magnitude(weights, fmt)

        def candidate(i):
            ratio = i.astype(jnp.float32) / self.grid
            s = jnp.power(x, ratio)
            if self.duo:
                s = s / (jnp.power(relative, 1.0 - ratio) + 1e-4)
            s = jnp.maximum(s, 1e-4)
            s = s / jnp.sqrt(jnp.max(s) * jnp.min(s))
            return self._stored(jnp.where(jnp.isfinite(s), s, 1.0))

        def step(i, best):
            t = candidate(i)
            error = sum(_rounding_error(w, fmt, known, t) for w in weights)
            better = error < best[0]
            return jnp.where(better, error, best[0]), jnp.where(better, t, best[1])

        ones = jnp.ones_like(x).astype(self.dtype)
        plain = sum(_rounding_error(w, fmt, known, ones) for w in weights)
        _, t = jax.lax.fori_loop(0, self.grid, step, (plain, ones))
        wide = t.astype(jnp.float32)
        scaled = [w / wide[:, None] for w in weights]
        moved = scale_inputs(known, wide)
        return Equalized(t, self.inner.prepare(scaled, fmt, moved))

    def _stored(self, s):
        """`1 / s` in the dtype that is stored; positive and finite."""
        info = jnp.finfo(self.dtype)
        low, high = float(info.tiny), float(info.max)
        return jnp.clip(1.0 / s, low, high).astype(self.dtype)


def check_inner(where: str, inner: Any) -> None:
    """Raises SpecError unless a field holds a method."""
    if not isinstance(inner, Method):
        raise SpecError(
            f"{where}: inner is {inner!r}, expected a method such as RTN() or GPTQ()"
        )


def mean_square(statistics: Statistics | None) -> Float[Array, "in 1"] | None:
    """Mean squared activation of each input: what errors of its weights weigh."""
    if statistics is None:
        return None
    return (statistics.square / jnp.maximum(statistics.count, 1.0))[:, None]


def output_error(
    d: Float[Array, "in out"], statistics: Statistics
) -> Float[Array, " out"]:
    """Squared error of each output summed over tokens, `(d^T H d)_jj`.

    Without a Hessian inputs count as uncorrelated: `sum_i square_i d_ij^2`.
    """
    if statistics.hessian is None:
        return jnp.sum(jnp.square(d) * statistics.square[:, None], axis=0)
    return hessian.output_error(d, statistics.hessian)


def least_error(
    w: Float[Array, "in out"],
    candidates: Sequence[QuantizedTensor],
    statistics: Statistics | None,
) -> QuantizedTensor:
    """The candidate with the least output error; the first of equal ones.

    Chosen output by output where every leaf has a column per output, else as a whole.

    Args:
      w: what they stand for.
      candidates: tensors of one structure.
      statistics: of the inputs.
    """
    assert statistics is not None  # callers have checked
    best = candidates[0]
    leaves = jax.tree.leaves(best)
    columns = best.format.grouping(best.matrix).kind in ("in", "channel")
    columns &= isinstance(best, LayoutTensor)
    columns &= all(leaf.shape[-1:] == w.shape[-1:] for leaf in leaves)

    def error(q):
        each = output_error(q.dequantize(jnp.float32) - w, statistics)
        return each if columns else jnp.sum(each)

    if len(candidates) == 1:
        return best
    least = error(best)
    for q in candidates[1:]:
        other = error(q)
        better = other < least
        best = jax.tree.map(lambda a, b, c=better: jnp.where(c, a, b), q, best)
        least = jnp.minimum(least, other)
    return best


def relative_magnitude(
    weights: Sequence[Float[Array, "in _"]], fmt: Format
) -> Float[Array, " in"]:
    """Mean over outputs of `|w|` relative to the maximum of its group."""
    total, count = 0.0, 0
    for w in weights:
        group = fmt.grouping((w.shape[0], w.shape[1]))
        size = group.split(jnp.abs(w))
        top = jnp.max(size, axis=-2, keepdims=True)
        total = total + jnp.sum(group.join(size / (top + 1e-6)), axis=1)
        count += w.shape[1]
    return jnp.asarray(total) / count


def _rounding_error(w, fmt, statistics, t):
    """Output error of rounding `w / t` to nearest."""
    t = t.astype(jnp.float32)[:, None]
    back = RTN()(w / t, fmt).dequantize(jnp.float32) * t
    return jnp.sum(output_error(back - w, statistics))
