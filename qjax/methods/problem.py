"""One weight in groups: from ranges to scales as stored, to codes, to a tensor.

What methods that choose a scale per group share. Errors are always evaluated with the
scale as stored, after its own rounding. Memory: a few float32 copies of the weight.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.formats import Format, Grouping, Int
from qjax.formats.base import divided, rounded
from qjax.methods.fused import fused_codes, group_absmax
from qjax.scales import nvfp4_divisor, store_scale
from qjax.tensor import QuantizedTensor, assemble


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
            return encode(self.fmt, u, key)
        assert isinstance(self.fmt, Int)  # only Int has zero-points
        half = float(2 ** (self.fmt.bits - 1))
        u = u + (zero - half)  # in the signed domain, as compressed-tensors rounds
        u = u if key is not None else jnp.round(u)
        return encode(self.fmt, u + half, key)

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


def encode(fmt: Format, u, key=None):
    """Nearest codes, or with a key stochastically rounded ones."""
    return fmt.encode(u) if key is None else fmt.encode_stochastic(u, key)
