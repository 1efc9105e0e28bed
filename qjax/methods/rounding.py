"""Rounding as something to learn: an offset per weight, a range multiplier per group.

The value of a weight `w` in a group of scale `s` is

    fake(w) = (grid(w / s + zero + v d(w / s)) - zero) s,    -0.5 <= v <= 0.5,

`grid` the nearest value of the format and `d` the distance between the two values
around `w / s` (1 for integers), so that `v` chooses between the two. Symmetric formats
have one multiplier per group, `s = m s_0`; asymmetric ones move both ends of the range.
Gradients pass rounding straight through where a weight is inside the range.

The value is computed as `dequantize` computes it, from scales as stored: what is
learned is what is stored.

Reference: Cheng et al., SignRound, arXiv 2309.05516, equations 3 to 5; Esser et al.,
LSQ, arXiv 1902.08153 (gradient of the scale).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from qjax.errors import SpecError
from qjax.formats import Format, Int
from qjax.formats.base import divided, rounded
from qjax.formats.codebook import TableFormat
from qjax.formats.minifloat import Minifloat
from qjax.methods.continuous import straight_through
from qjax.methods.problem import Problem
from qjax.scales import store_scale
from qjax.tensor import LayoutTensor, assemble

_LEAST, _MOST = 0.1, 2.0
"""Bounds of the multipliers."""


class Offsets(NamedTuple):
    """What is learned for one weight.

    Attributes:
      v: rounding offsets in steps of the grid, in the grouped view.
      high: multiplier of the upper end of each group's range, or of its scale.
      low: multiplier of the lower end; None for symmetric formats.
    """

    v: Float[Array, "G g N"]
    high: Float[Array, "G 1 N"]
    low: Float[Array, "G 1 N"] | None

    def clipped(self) -> "Offsets":
        """Offsets inside their bounds."""
        bound = lambda m: jnp.clip(m, _LEAST, _MOST)  # noqa: E731
        low = None if self.low is None else bound(self.low)
        return Offsets(jnp.clip(self.v, -0.5, 0.5), bound(self.high), low)


class Rounding(NamedTuple):
    """One weight, and the scales and zero-points that learning starts from."""

    problem: Problem
    scale: Float[Array, "G 1 N"]
    zero: Float[Array, "G 1 N"] | None

    @classmethod
    def build(cls, w: Any, fmt: Format, fit: Any, importance: Any = None) -> "Rounding":
        """Starts from what a range rule fits.

        Args:
          w: float weight `[in, out]`.
          fmt: the format.
          fit: function of a `Problem` to its `(scale, zero)`.
          importance: error weights for `fit`.
        """
        problem = Problem.build(w, fmt, importance)
        scale, zero = fit(problem)
        if getattr(fmt, "scale_dtype", None) == "e8m0":
            # Powers of two round up; three quarters is the middle of what rounds there.
            scale = scale * 0.75
        return cls(problem, scale, zero)

    def start(self) -> Offsets:
        """Round to nearest: no offset, multipliers 1."""
        ones = jnp.ones_like(self.scale)
        low = None if self.zero is None else ones
        return Offsets(jnp.zeros_like(self.problem.w), ones, low)

    def fake(self, offsets: Offsets) -> Float[Array, "in out"]:
        """The weight as it would be stored, differentiable in the offsets."""
        scale, zero = self._parameters(offsets)
        grid, carrier, _ = self._grid(offsets, scale, zero)
        values = straight_through(grid, carrier)
        values = values if zero is None else values - zero
        return self.problem.group.join(values * scale)

    def freeze(self, offsets: Offsets) -> LayoutTensor:
        """The stored tensor, whose dense value is `fake`."""
        p = self.problem
        scale, zero = self._parameters(offsets)
        codes = p.group.join(self._grid(offsets, scale, zero)[2])
        stored, _ = store_scale(p.fmt, p.group.store(self._scale(offsets)), p.divisor)
        if zero is not None:
            zero = p.group.store(zero).astype(p.fmt.zero_dtype)  # pyright: ignore[reportAttributeAccessIssue]
        return assemble(
            p.fmt, codes, stored, p.group.matrix, zero=zero, global_scale=p.divisor
        )

    def _scale(self, offsets):
        """The scale before the rounding of storage."""
        if self.zero is None:
            return self.scale * offsets.high
        assert offsets.low is not None  # there is one for every zero-point
        return rounded(self.scale * 0.5) * (offsets.low + offsets.high)

    def _parameters(self, offsets):
        """Scale and zero-point as stored; gradients pass their rounding."""
        p, scale = self.problem, self._scale(offsets)
        effective = straight_through(p.stored(lax.stop_gradient(scale)), scale)
        if self.zero is None:
            return effective, None
        # The lower end moves by half the range times `1 - low`; the zero-point is its
        # distance from 0 in units of the new scale.
        half = p.fmt.levels / 2  # pyright: ignore[reportAttributeAccessIssue]
        moved = self.zero + rounded(half * (offsets.low - 1.0))
        zero = moved * divided(self.scale, effective)
        stored = p.stored_zero(lax.stop_gradient(zero))
        return effective, straight_through(stored, zero)

    def _grid(self, offsets, scale, zero):
        """Grid values, what carries their gradient, and codes, in the grouped view."""
        fmt = self.problem.fmt
        safe = jnp.where(scale > 0, scale, 1.0)  # tables may store a scale of zero
        u = divided(self.problem.w, safe)
        low, high, shift, margin = -fmt.peak, fmt.peak, 0.0, 0.5
        if isinstance(fmt, Int):
            u = u + offsets.v
            if fmt.bits > 1:
                low, high = -(2.0 ** (fmt.bits - 1)), 2.0 ** (fmt.bits - 1) - 1.0
            if zero is not None:  # codes are rounded in the signed domain
                shift = 2.0 ** (fmt.bits - 1)
                low, high = 0.0, float(fmt.levels)
                u = u + (zero - shift)
        else:
            values = _values(fmt)
            margin = float(values[-1] - values[-2]) / 2
            below, step = _around(values, lax.stop_gradient(u))
            u = u + rounded(offsets.v * step)
            # A cell wider than its neighbour must not be left for the value behind.
            bounded = jnp.where(step > 0, jnp.clip(u, below, below + step), u)
            u = u + lax.stop_gradient(bounded - u)
        fixed = lax.stop_gradient(u)
        codes = fmt.encode(jnp.round(fixed) + shift if zero is not None else fixed)
        u = u + shift
        # Values that round to an end are inside: extremes lie exactly there at first.
        inside = (u >= low - margin) & (u <= high + margin)
        return fmt.decode(codes), jnp.where(inside, u, jnp.clip(u, low, high)), codes


def check_format(where: str, fmt: Format) -> None:
    """Raises SpecError unless rounding to the format can be learned."""
    table = isinstance(fmt, TableFormat) and fmt.code_bits == 4
    small = isinstance(fmt, Minifloat) and fmt.code_bits == 4
    if not (isinstance(fmt, Int) or table or small):
        raise SpecError(
            f"{where}: cannot learn rounding to {fmt.name}; expected Int, NF4, FP4, "
            "MXFP4 or NVFP4"
        )


def _values(fmt: Format) -> np.ndarray:
    """The grid of a 4-bit format, ascending."""
    with jax.ensure_compile_time_eval():
        codes = jnp.arange(2**fmt.code_bits, dtype=jnp.uint8)
        return np.unique(np.asarray(fmt.decode(codes)))


def _around(grid: np.ndarray, u):
    """The grid value below `u` and the distance to the next; 0 beyond the ends."""
    below, step = jnp.full_like(u, float(grid[0])), jnp.zeros_like(u)
    for value, gap in zip(grid, np.append(np.diff(grid), 0.0), strict=True):
        below = jnp.where(u >= float(value), float(value), below)
        step = jnp.where(u >= float(value), float(gap), step)
    return below, step
