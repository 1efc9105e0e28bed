"""Round to nearest: pick a scale per group by a rule, then round every weight.

The rule sets the range `[low, high]` of a group that the codes cover:

* `absmax`: `high = -low = max |w|`; `minmax`: `[min w, max w]` (asymmetric formats);
* `percentile`: the given percentile of `|w|` (or of `w` on both sides);
* `mean-std`: `mean +- stds * std`, never beyond the extremes;
* `mse`: the shrunken range with the least (weighted) squared error on a grid, followed
  for integer formats by alternating least squares on scale and zero-point.

Errors are always evaluated with the scale as stored, after its own rounding. Memory: a
few float32 copies of the weight; the grid is a loop, not a broadcast.

Reference: Frantar et al., GPTQ, arXiv 2210.17323, section 2 (RTN baseline); Choukroun
et al., Low-bit Quantization of Neural Networks, arXiv 1902.06822 (MSE range search).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.errors import SpecError
from qjax.formats import Cast, Format, Ggml, Grouping, Int, Trellis
from qjax.formats.base import check_choice, divided, rounded
from qjax.formats.codebook import TableFormat
from qjax.methods.base import Method
from qjax.methods.fused import fused_codes, group_absmax
from qjax.methods.statistics import Statistics
from qjax.scales import nvfp4_divisor, store_scale
from qjax.tensor import (
    QuantizedTensor,
    assemble,
    load_scale,
)

_CLAMP = 1e-38  # bitsandbytes' smallest absolute maximum of a partial block
RULES = ("auto", "absmax", "minmax", "percentile", "mean-std", "mse")


@dataclasses.dataclass(frozen=True)
class RTN(Method):
    """Round-to-nearest with a choice of range rule.

    Attributes:
      rule: one of `auto` (`absmax`, or `minmax` for asymmetric formats), `absmax`,
        `minmax`, `percentile`, `mean-std`, `mse`.
      percentile: for `percentile`, in (50, 100].
      stds: for `mean-std`, half-width of the range in standard deviations.
      shrink: for `mse`, the smallest fraction of the full range that is tried.
      grid: for `mse`, number of fractions tried between `shrink` and 1.
      stochastic: round up or down at random, unbiased; needs a `key`.

    Raises:
      SpecError: a field is out of range.
    """

    rule: str = "auto"
    percentile: float = 99.9
    stds: float = 3.0
    shrink: float = 0.4
    grid: int = 20
    stochastic: bool = False

    def __post_init__(self) -> None:
        check_choice("RTN", "rule", self.rule, RULES)
        if not 50 < self.percentile <= 100:
            raise SpecError(f"RTN: percentile {self.percentile} is not in (50, 100]")
        whole = type(self.grid) is int and self.grid >= 2
        if not (0 < self.shrink < 1 and whole and self.stds > 0):
            raise SpecError(
                f"RTN: needs 0 < shrink < 1, integer grid >= 2, stds > 0; got {self}"
            )

    @property
    def name(self) -> str:
        """`rtn`, or `rtn-mse` and so on."""
        return "rtn" if self.rule == "auto" else f"rtn-{self.rule}"

    def __call__(
        self,
        w: Float[Array, "*lead in out"],
        fmt: Format,
        *,
        importance: Float[Array, "..."] | None = None,
        key: Array | None = None,
        statistics: Statistics | None = None,
        shared: Any = None,
    ) -> QuantizedTensor:
        """See `Method.__call__`."""
        del statistics, shared
        if self.stochastic and key is None:
            raise SpecError("RTN(stochastic=True) needs a random key: pass key=")
        if isinstance(fmt, Trellis | Ggml):
            other = "GGML" if isinstance(fmt, Ggml) else "TrellisLDLQ"
            raise SpecError(f"RTN cannot encode {fmt.name}; use method={other}()")
        matrix = (w.shape[-2], w.shape[-1])
        rounder = key if self.stochastic else None
        if isinstance(fmt, Cast):
            codes = _encode(fmt, w.astype(jnp.float32), rounder)
            return assemble(fmt, codes, None, matrix)
        problem = Problem.build(w, fmt, importance)
        if isinstance(fmt, TableFormat) and self.rule in ("auto", "absmax"):
            return _absmax_table(problem, rounder)
        scale, zero = self.fit(problem)
        return problem.finish(scale, zero, rounder)

    def fit(self, p: "Problem"):
        """The `(scale, zero)` of the rule, in stored precision."""
        if self.rule == "mse":
            low, high = p.full_range()
            return refine(p, *_grid_search(p, low, high, self.shrink, self.grid))
        return p.from_range(*self._range(p))

    def _range(self, p: "Problem"):
        """Ends of the covered range, `[*lead, G, 1, N]`."""
        if self.rule == "absmax" and p.asymmetric:
            top = jnp.max(jnp.abs(p.w), axis=-2, keepdims=True)
            return -top, top
        low, high = p.full_range()
        if self.rule == "percentile":
            values = p.w if p.asymmetric else jnp.abs(p.w)
            q = jnp.array([100 - self.percentile, self.percentile], jnp.float32)
            cut = jnp.percentile(values, q, axis=-2, keepdims=True)
            return (cut[0], cut[1]) if p.asymmetric else (-cut[1], cut[1])
        if self.rule == "mean-std":
            mean = jnp.mean(p.w, axis=-2, keepdims=True)
            spread = self.stds * jnp.std(p.w, axis=-2, keepdims=True)
            return jnp.maximum(low, mean - spread), jnp.minimum(high, mean + spread)
        return low, high


class Problem(NamedTuple):
    """One weight in grouped form, with what is needed to fit and finish it."""

    w: Float[Array, "*lead G g N"]
    weight: Float[Array, "*lead G g N"] | None
    fmt: Format
    group: Grouping
    divisor: Any
    full: Float[Array, "*lead in out"]

    @classmethod
    def build(cls, w, fmt: Format, importance=None) -> "Problem":
        """Groups a weight `[*lead, in, out]` and its error weights."""
        full, w = w, w.astype(jnp.float32)
        group = fmt.grouping((w.shape[-2], w.shape[-1]))
        weight = None
        if importance is not None:
            weight = jnp.broadcast_to(importance.astype(jnp.float32), w.shape)
            weight = group.split(weight)
        mask = group.mask()
        if mask is not None:
            real = mask.astype(jnp.float32)
            weight = real if weight is None else weight * real
        divisor = None
        if fmt.name == "nvfp4":
            divisor = nvfp4_divisor(jnp.max(jnp.abs(w), axis=(-2, -1), keepdims=True))
        return cls(group.split(w), weight, fmt, group, divisor, full)

    @property
    def asymmetric(self) -> bool:
        """Whether the format stores zero-points."""
        return isinstance(self.fmt, Int) and not self.fmt.symmetric

    def full_range(self):
        """Extremes of each group; symmetric around 0 for symmetric formats."""
        if not self.asymmetric:
            top = group_absmax(self.full, self.fmt)
            if top is not None:
                top = self.group.load(top)
                return -top, top
        low = jnp.min(self.w, axis=-2, keepdims=True)
        high = jnp.max(self.w, axis=-2, keepdims=True)
        if self.asymmetric:
            return low, high
        top = jnp.maximum(-low, high)
        return -top, top

    def from_range(self, low, high):
        """Stored-precision `(scale, zero)` whose codes cover `[low, high]`.

        `scale = (high - low) / levels`, `zero = -low / scale`. Groups without spread
        are exact: all-zero groups get scale 1, constant groups the constant itself.
        """
        if not self.asymmetric:
            top = jnp.maximum(jnp.abs(low), jnp.abs(high))
            scale = top / jnp.float32(self.fmt.peak)
            return self.stored(jnp.where(top > 0, scale, 1.0)), None
        fmt = self.fmt
        assert isinstance(fmt, Int)  # asymmetric implies Int
        if fmt.zero_dtype == "uint8":  # integer zero-points: 0 must be representable
            low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
        scale = rounded(high / fmt.levels) - rounded(low / fmt.levels)
        flat = jnp.where(low != 0, jnp.abs(low), 1.0)
        scale = self.stored(jnp.where(scale > 0, scale, flat))
        return scale, self.stored_zero(-low / scale)

    def stored(self, scale):
        """A scale after the rounding of storage, `[*lead, G, 1, N]`."""
        effective = store_scale(self.fmt, self.group.store(scale), self.divisor)[1]
        return self.group.load(effective)

    def stored_zero(self, zero):
        """A zero-point after the rounding of storage."""
        fmt = self.fmt
        assert isinstance(fmt, Int)  # only called for asymmetric formats
        if fmt.zero_dtype == "uint8":
            return jnp.clip(jnp.round(zero), 0, fmt.levels)
        top = float(jnp.finfo(fmt.zero_dtype).max)
        zero = jnp.clip(zero, -top, top)
        return zero.astype(fmt.zero_dtype).astype(jnp.float32)

    def codes(self, scale, zero, key=None):
        """Nearest (or stochastically rounded) codes for a scale and zero-point."""
        u = divided(self.w, scale)
        if zero is None:
            return _encode(self.fmt, u, key)
        assert isinstance(self.fmt, Int)  # only Int has zero-points
        half = float(2 ** (self.fmt.bits - 1))
        u = u + (zero - half)  # in the signed domain, as compressed-tensors rounds
        u = u if key is not None else jnp.round(u)
        return _encode(self.fmt, u + half, key)

    def levels(self, scale, zero):
        """Decoded codes relative to the zero-point: the weight in units of scale."""
        values = self.fmt.decode(self.codes(scale, zero))
        return values if zero is None else values - zero

    def error(self, scale, zero):
        """Weighted squared error of each group, `[*lead, G, 1, N]`."""
        miss = jnp.square(self.w - self.levels(scale, zero) * scale)
        if self.weight is not None:
            miss = miss * self.weight
        return jnp.sum(miss, axis=-2, keepdims=True)

    def finish(self, scale, zero, key=None) -> QuantizedTensor:
        """Codes for fitted parameters, packed."""
        stored, effective = store_scale(self.fmt, self.group.store(scale), self.divisor)
        codes = None
        if zero is None and key is None:
            codes = fused_codes(self.full, self.fmt, effective)
        packed = codes is not None
        if codes is None:
            codes = self.group.join(self.codes(self.group.load(effective), zero, key))
        if zero is not None:
            assert isinstance(self.fmt, Int)  # only Int has zero-points
            zero = self.group.store(zero).astype(self.fmt.zero_dtype)
        return assemble(
            self.fmt,
            codes,
            stored,
            self.group.matrix,
            zero=zero,
            global_scale=self.divisor,
            packed=packed,
        )


def round_to_scales(
    w: Float[Array, "*lead in out"],
    fmt: Format,
    scale: Any,
    zero: Any = None,
    global_scale: Any = None,
) -> QuantizedTensor:
    """Nearest codes of a weight for scales that are already known.

    Args:
      w: float weight.
      fmt: a format with scales.
      scale: the scale leaf as stored: shape `Grouping.scale_shape`, the format's dtype.
      zero: the zero-point leaf of an asymmetric `Int`, in unsigned code units.
      global_scale: NVFP4's divisor, `[*lead, 1, 1]`.

    Returns:
      The tensor that holds exactly these scales.
    """
    p = Problem.build(w, fmt)
    matrix = p.group.matrix
    effective = load_scale(scale)
    if global_scale is not None:
        effective = divided(effective, global_scale)
    offset = None if zero is None else p.group.load(zero.astype(jnp.float32))
    codes = p.group.join(p.codes(p.group.load(effective), offset))
    return assemble(fmt, codes, scale, matrix, zero=zero, global_scale=global_scale)


def _grid_search(p: Problem, low, high, shrink: float, grid: int):
    """Best of `grid` ranges `f * [low, high]`, `f` from 1 down to `shrink`."""

    def step(i, best):
        fraction = 1.0 - (1.0 - shrink) * i.astype(jnp.float32) / (grid - 1)
        scale, zero = p.from_range(low * fraction, high * fraction)
        return keep_better(best, p.error(scale, zero), scale, zero)

    scale, zero = p.from_range(low, high)
    start = (p.error(scale, zero), scale, zero)
    _, scale, zero = jax.lax.fori_loop(1, grid, step, start)
    return scale, zero


def refine(p: Problem, scale, zero, steps: int = 4):
    """Alternating least squares on integer grids: fix codes, solve scale and zero.

    With codes `c` fixed, `min_{s, z} sum h (w - (c - z) s)^2` is a 2 x 2 linear problem
    (1 x 1 when symmetric). A step is kept per group only if the re-rounded error falls.
    """
    if not isinstance(p.fmt, Int):
        return scale, zero

    def total(x):
        x = x if p.weight is None else x * p.weight
        return jnp.sum(x, axis=-2, keepdims=True)

    def solve(scale, zero):
        c = p.levels(scale, zero)
        cc, cw = total(c * c), total(c * p.w)
        if zero is None:
            new = jnp.where((cc > 0) & (cw > 0), cw / jnp.where(cc > 0, cc, 1.0), scale)
            return p.stored(new), None
        n, c1, w1 = total(jnp.ones_like(c)), total(c), total(p.w)
        det = n * cc - c1 * c1
        slope = (n * cw - c1 * w1) / jnp.where(det > 0, det, 1.0)
        new = p.stored(jnp.where((det > 0) & (slope > 0), slope, scale))
        # w = (c - dz) s  with  dz = (c1 s - w1) / (n s), added to the old zero-point
        shift = (c1 * new - w1) / (jnp.where(n > 0, n, 1.0) * new)
        return new, p.stored_zero(zero + shift)

    def step(_, best):
        scale, zero = solve(*best[1:])
        return keep_better(best, p.error(scale, zero), scale, zero)

    start = (p.error(scale, zero), scale, zero)
    _, scale, zero = jax.lax.fori_loop(0, steps, step, start)
    return scale, zero


def keep_better(best, error, scale, zero):
    """Per group, the old or the new `(error, scale, zero)`, whichever errs less."""
    better = error < best[0]

    def pick(new, old):
        return jnp.where(better, new, old)

    kept = None if zero is None else pick(zero, best[2])
    return pick(error, best[0]), pick(scale, best[1]), kept


def _absmax_table(p: Problem, key) -> QuantizedTensor:
    """The 4-bit rule of bitsandbytes, bit for bit: see `qjax.formats.codebook`."""
    group = p.group
    exact = p.fmt.scale_dtype == "float32"  # pyright: ignore[reportAttributeAccessIssue]
    top = None if key is not None else group_absmax(p.full, p.fmt)
    if top is not None:
        kept, scale = store_scale(p.fmt, top)
        scale = None if exact else jnp.where(scale > 0, scale, 1.0)
        codes = fused_codes(p.full, p.fmt, scale)
        return assemble(p.fmt, codes, kept, group.matrix, packed=True)  # pyright: ignore[reportArgumentType]
    absmax = jnp.max(jnp.abs(p.w), axis=-2, keepdims=True)
    size = group.matrix[0] * group.matrix[1]
    partial = group.kind == "flat" and size % group.size != 0
    stat = absmax
    if partial:  # bitsandbytes clamps the partial block's statistic
        last = absmax[..., -1:, :, :]
        stat = stat.at[..., -1:, :, :].set(jnp.where(last > 0, last, _CLAMP))
    kept, effective = store_scale(p.fmt, group.store(stat))
    scale = absmax if exact else group.load(effective)
    scale = jnp.where(scale > 0, scale, 1.0)
    u = p.w * (1.0 / scale) if exact else divided(p.w, scale)
    if exact and partial:  # ... and divides by it instead of multiplying
        u = u.at[..., -1:, :, :].set(divided(p.w, scale)[..., -1:, :, :])
    codes = group.join(_encode(p.fmt, jnp.clip(u, -1.0, 1.0), key))
    return assemble(p.fmt, codes, kept, group.matrix)


def _encode(fmt, u, key):
    return fmt.encode(u) if key is None else fmt.encode_stochastic(u, key)
