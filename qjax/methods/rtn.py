"""Round to nearest: pick a scale per group by a rule, then round every weight.

The rule sets the range `[low, high]` of a group that the codes cover:

* `absmax`: `high = -low = max |w|`; `minmax`: `[min w, max w]` (asymmetric formats);
* `percentile`: the given percentile of `|w|` (or of `w` on both sides);
* `mean-std`: `mean +- stds * std`, never beyond the extremes;
* `mse`: the shrunken range with the least (weighted) squared error on a grid, followed
  for integer formats by alternating least squares on scale and zero-point.

The grid is a loop, not a broadcast; see `qjax.methods.problem` for memory.

Reference: Frantar et al., GPTQ, arXiv 2210.17323, section 2 (RTN baseline); Choukroun
et al., Low-bit Quantization of Neural Networks, arXiv 1902.06822 (MSE range search).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.errors import SpecError
from qjax.formats import Cast, Format, Ggml, Trellis
from qjax.formats.base import check_choice, divided
from qjax.formats.codebook import TableFormat
from qjax.methods.base import Method
from qjax.methods.fused import fused_codes, group_absmax
from qjax.methods.problem import Problem, encode, keep_better, refine
from qjax.methods.statistics import Statistics
from qjax.scales import store_scale
from qjax.tensor import QuantizedTensor, assemble, load_scale

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
            codes = encode(fmt, w.astype(jnp.float32), rounder)
            return assemble(fmt, codes, None, matrix)
        problem = Problem.build(w, fmt, importance)
        if isinstance(fmt, TableFormat) and self.rule in ("auto", "absmax"):
            return _absmax_table(problem, rounder)
        scale, zero = self.fit(problem)
        return problem.finish(scale, zero, rounder)

    def fit(self, p: Problem):
        """The `(scale, zero)` of the rule, in stored precision."""
        if self.rule == "mse":
            low, high = p.full_range()
            return refine(p, *_grid_search(p, low, high, self.shrink, self.grid))
        return p.from_range(*self._range(p))

    def _range(self, p: Problem):
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
    codes = group.join(encode(p.fmt, jnp.clip(u, -1.0, 1.0), key))
    return assemble(p.fmt, codes, kept, group.matrix)
