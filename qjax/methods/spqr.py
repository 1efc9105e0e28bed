"""SpQR: three-bit weights in tiny groups, quantized statistics, and a few outliers.

Groups of 16 weights along `in`; their scales and zero-points are themselves quantized,
16 neighbouring outputs at a time, to 3 bits with a 16-bit scale and zero-point. Rows
are rounded with error feedback. A weight is an outlier when rounding it would cost more
than `t` in the layer's output error, `D_i (target_i - v_i)^2 > t`; it is then kept in
16 bits. Before a group gets its scale, weights without which the others would fit
better by more than `t` (leave one out) are taken out of the fit.

The original sets `t` relative to the mean of `var(w) D`. Here the number of outliers is
fixed, because shapes must be known: a first pass without outliers gives `t`, the
matching quantile of all costs; a second pass by the rules above gives the outliers,
those that cost most; a third rounds with them.

Reference: Dettmers et al., SpQR: A Sparse-Quantized Representation for Near-Lossless
LLM Weight Compression, arXiv 2306.03078, algorithm 1; its repository's
`spqr_engine.py`.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.errors import SpecError
from qjax.formats import Format, Int
from qjax.methods.base import Method
from qjax.methods.feedback import SLICE, Grid, levels, run_slice
from qjax.methods.gptq import GPTQ
from qjax.methods.hessian import Curvature
from qjax.methods.layerwise import by_slices, check_format
from qjax.methods.problem import Problem
from qjax.methods.statistics import Statistics
from qjax.packing import pack
from qjax.tensor import AffineTensor, QuantizedTensor
from qjax.wrappers import Permuted, WithOutliers


@dataclasses.dataclass(frozen=True)
class SpQR(Method):
    """Error feedback with quantized scales and sparse outliers, on `Int` groups.

    Attributes:
      outliers: share of the weights that are kept in 16 bits, in [0, 0.5].
      scale_bits: bits of scales and zero-points, 1 to 8.
      scale_group: neighbouring outputs whose scales are quantized together.
      damp: share of the mean diagonal of the Hessian that is added to it.
      act_order: round inputs by falling diagonal of the Hessian: False, or True for a
        `Permuted` result.

    Raises:
      SpecError: a field is out of range.
    """

    outliers: float = 0.01
    scale_bits: int = 3
    scale_group: int = 16
    damp: float = 0.1
    act_order: bool = True
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    def __post_init__(self) -> None:
        GPTQ(damp=self.damp, act_order=bool(self.act_order))
        if not 0 <= self.outliers <= 0.5:
            raise SpecError(f"SpQR: outliers is {self.outliers!r}, expected 0 to 0.5")
        if type(self.act_order) is not bool:
            raise SpecError(
                f"SpQR: act_order is {self.act_order!r}, expected True or False"
            )
        self.statistics_format()

    @property
    def name(self) -> str:
        """`spqr`."""
        return "spqr"

    def statistics_format(self) -> Int:
        """Format of the scales and of the zero-points."""
        sixteen = {"scale_dtype": "float16", "zero_dtype": "float16"}
        return Int(
            self.scale_bits, self.scale_group, symmetric=False, axis="out", **sixteen
        )

    def prepare(
        self,
        weights: Sequence[Float[Array, "in _"]],
        fmt: Format,
        statistics: Statistics | None,
    ) -> Curvature:
        """The factored Hessian, in the order of rounding."""
        self.check_statistics(statistics)
        plain = GPTQ(damp=self.damp, act_order=self.act_order)
        return plain.prepare(weights, fmt, statistics)

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
        """See `Method.__call__`; `importance` is what the Hessian stands for."""
        del importance, key
        check_format("spqr", fmt, w)
        if not isinstance(fmt, Int) or fmt.symmetric or type(fmt.group) is not int:
            raise _wrong_format(fmt)
        if fmt.axis != "in":
            raise _wrong_format(fmt)
        if shared is None:
            shared = self.prepare([w], fmt, statistics)
        return _quantize(w, fmt, self, shared)


def _wrong_format(fmt: Format) -> SpecError:
    return SpecError(
        f"spqr: needs integer groups along `in` with zero-points, got {fmt.name}; use "
        "Int(3, 16, symmetric=False)"
    )


class _Nested(NamedTuple):
    """One row of groups' statistics, quantized: codes, and their scale and zero."""

    codes: Any
    scale: Any
    zero: Any


class _Fitted(NamedTuple):
    """A group's effective statistics `[1, cols]`, and how they are stored."""

    scale: Any
    zero: Any
    stored: Any


@dataclasses.dataclass(frozen=True)
class _Rounder:
    """Grid of one slice: `Int` groups whose statistics are quantized."""

    fmt: Int
    inner: Int
    d: Float[Array, " padded"]
    size: int
    limit: Any
    mask: Any = None

    def grid(self) -> Grid:
        rows = self.fmt.group
        assert isinstance(rows, int)  # checked by the method

        def like(cols):
            f32, wide = jnp.float32, self.inner.grouping((1, cols)).scale_shape[1]
            row = jax.ShapeDtypeStruct((1, cols), f32)
            byte = jax.ShapeDtypeStruct((1, cols), jnp.uint8)
            stat = jax.ShapeDtypeStruct((1, wide), f32)
            nested = _Nested(byte, stat, stat)
            return (byte, row, row), (nested, nested)

        return Grid(self.round, self.fit, lambda params: params.stored, like, rows)

    def round(self, target, row, params: _Fitted):
        """Codes, corrections and costs of a row; outliers have their exact value."""
        value, codes = self.nearest(target, params)
        miss = target - value
        cost = self.d[row] * miss * miss
        if self.mask is None:
            outlier = cost > self.limit
        else:
            outlier = jax.lax.dynamic_slice_in_dim(self.mask, row, 1)
        extra = jnp.where(outlier, miss, 0.0)
        extra = extra.astype(jnp.float16).astype(jnp.float32)
        return (codes, extra, cost), value + extra

    def nearest(self, target, params: _Fitted):
        codes = self.fmt.encode(target / params.scale + params.zero)
        return (self.fmt.decode(codes) - params.zero) * params.scale, codes

    def fit(self, values, at, m, params) -> _Fitted:
        """Statistics of a group, without the weights that do not fit it."""
        del m, params
        keep = self.fitting(values, at)
        plain = self.plain(values, keep)
        scale, stored = self.nest(plain.scale)
        low = -plain.zero * plain.scale
        zero, stored_zero = self.nest(-low / scale)
        return _Fitted(scale, zero, (stored, stored_zero))

    def fitting(self, values, at):
        """Which weights of a group its statistics are made for."""
        rows = values.shape[0]
        d = jax.lax.dynamic_slice_in_dim(self.d, at, rows)[:, None]
        real = (jnp.arange(rows) < self.size - at)[:, None]
        real = jnp.broadcast_to(real, values.shape)

        if self.mask is not None:
            keep = real & ~jax.lax.dynamic_slice_in_dim(self.mask, at, rows)
            return jnp.where(jnp.any(keep, 0, keepdims=True), keep, real)

        def cost(keep):
            miss = values - self.nearest(values, self.plain(values, keep))[0]
            return jnp.sum(jnp.where(keep, d * miss * miss, 0.0), 0, keepdims=True)

        def without(i):
            return cost(real & (jnp.arange(rows) != i)[:, None])

        gain = cost(real) - jax.lax.map(without, jnp.arange(rows))[:, 0]
        keep = real & (gain <= self.limit)
        return jnp.where(jnp.any(keep, 0, keepdims=True), keep, real)

    def plain(self, values, keep) -> _Fitted:
        """Min-max statistics of the weights to keep, not quantized yet."""
        low = jnp.min(jnp.where(keep, values, jnp.inf), 0, keepdims=True)
        high = jnp.max(jnp.where(keep, values, -jnp.inf), 0, keepdims=True)
        scale = (high - low) / self.fmt.levels
        flat = jnp.where(low != 0, jnp.abs(low), 1.0)
        scale = jnp.where(scale > 0, scale, flat)
        return _Fitted(scale, -low / scale, None)

    def nest(self, stat):
        """Statistics of one row of groups: their values as stored, and how."""
        p = Problem.build(stat, self.inner)
        low = jnp.min(p.w, axis=-2, keepdims=True)
        high = jnp.max(p.w, axis=-2, keepdims=True)
        # No finer than zero-points reach in 16 bits, for nearly equal statistics.
        least = jnp.maximum(jnp.abs(low), jnp.abs(high)) / 2.0**14
        scale = p.stored(jnp.maximum((high - low) / self.inner.levels, least))
        zero = p.stored_zero(-low / scale)
        codes = p.codes(scale, zero)
        value = p.group.join((self.inner.decode(codes) - zero) * scale)
        store = p.group.store
        return value, _Nested(p.group.join(codes), store(scale), store(zero))


def _quantize(w, fmt: Int, method: SpQR, shared: Curvature) -> QuantizedTensor:
    size, cols = w.shape
    assert isinstance(fmt.group, int)  # checked by the method
    inner = method.statistics_format()
    inner.grouping((1, cols))  # a group larger than `out` is reported here
    sizes, padded = levels(size, fmt.group, 1)
    pad, groups = padded - size, -(-size // fmt.group)
    m = shared.m if pad == 0 else jnp.pad(shared.m, ((0, pad), (0, pad)))
    d = jnp.pad(shared.d, (0, pad))
    width = _width(cols, method.scale_group)
    count = math.ceil(method.outliers * size * width)

    def one(start, width):
        x = jax.lax.dynamic_slice_in_dim(w, start, width, 1).astype(jnp.float32)
        x = x if shared.order is None else x[shared.order]
        x = jnp.pad(x, ((0, pad), (0, 0)))

        def run(limit, mask=None):
            grid = _Rounder(fmt, inner, d, size, limit, mask).grid()
            return run_slice(x, m, grid, sizes)[:2]

        def costliest(limit):
            costs = run(jnp.asarray(limit, jnp.float32))[0][2][:size]
            return jax.lax.top_k(costs.reshape(-1), count)

        found, mask = (), None
        if count:
            index = costliest(costliest(jnp.inf)[0][-1])[1]
            mask = jnp.zeros((padded * width,), bool).at[index].set(True)
            mask = mask.reshape(padded, width)
        (codes, extra, _), kept = run(jnp.asarray(jnp.inf, jnp.float32), mask)
        if count:
            values = extra.reshape(-1)[index].astype(jnp.float16)
            rows, columns = index // width, index % width + start
            found = tuple(v[None] for v in (values, rows, columns))
        stats = [_stored(nested, inner, groups) for nested in kept]
        return pack(codes[:size], fmt.bits), stats, found

    codes, stats, found = by_slices(one, cols, width)
    scale, zero = (AffineTensor(c, s, z, inner, (groups, cols)) for c, s, z in stats)
    q: Any = AffineTensor(codes, scale, zero, fmt, (size, cols))
    if count:
        q = WithOutliers(q, *(leaf[0] for leaf in found))
    return q if shared.order is None else Permuted(q, shared.order)


def _width(cols: int, group: int) -> int:
    """Columns per slice: they divide `cols` in whole groups, or are all of them."""
    fits = [n for n in range(group, min(SLICE, cols) + 1, group) if cols % n == 0]
    return fits[-1] if fits and fits[-1] >= SLICE // 8 else cols


def _stored(nested: _Nested, inner: Int, groups: int):
    """Leaves of the tensor that holds the statistics of a slice."""
    codes = pack(nested.codes[:groups], inner.bits)
    half = jnp.dtype(inner.scale_dtype)
    return codes, nested.scale[:groups].astype(half), nested.zero[:groups].astype(half)
