"""Scales of groups for methods with error feedback, and the grid that rounds to them.

Scales of a group come from its rows as they stand when the loop reaches it:

* `minmax`: the scale covers all of them;
* `mse`: of a set of shrunken ranges, the one with the least squared error, each row
  weighted by its diagonal entry of the Hessian;
* `hessian`: the one with the least error of the layer's output: for every range the
  group is rounded with error feedback, and the loss is `sum_i D_i (target_i - v_i)^2`,
  the exact share of the group in `tr((w - v)^T H (w - v))`. Integer formats then solve
  for the scale and the zero-point of the codes found, in the same metric.

Scales are compared as stored, after their own rounding.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from jaxtyping import Int as IntArray

from qjax.formats import Format, Int
from qjax.formats.base import divided
from qjax.methods.feedback import Grid, levels, run_slice
from qjax.methods.problem import Problem, keep_better, refine

RANGES = ("minmax", "mse", "hessian")
SHRINK, STEPS = 0.35, 14
"""Smallest fraction of the full range that is tried, and how many."""
REFITS = 2


class Params(NamedTuple):
    """Scale and zero-point of the rows that are being rounded, `[rows, cols]`."""

    scale: Any
    zero: Any


@dataclasses.dataclass(frozen=True)
class Scaled:
    """A format on the columns of one slice, with what its scales depend on.

    Attributes:
      fmt: the number format.
      rule: one of `RANGES`.
      weight: `[padded]`, diagonal of the Hessian in rounding order.
      d: `[padded]`, see `Curvature.d`.
      divisor: NVFP4's, `[1, 1]`.
      size: real rows; those behind are padding.
    """

    fmt: Format
    rule: str
    weight: Float[Array, " padded"]
    d: Float[Array, " padded"]
    divisor: Any
    size: int

    def fitted(self) -> Grid:
        """The grid whose scales are chosen in the loop, kept as they are stored."""
        rows, f32 = group_rows(self.fmt, self.size), jnp.float32

        def fit(target, at, m, params):
            del params
            return spread(self.fmt, self.fit(target, at, m), target.shape[1])

        def like(cols):
            code = jax.eval_shape(self.fmt.encode, jax.ShapeDtypeStruct((1, cols), f32))
            wide = self.fmt.grouping((self.size, cols)).scale_shape[1]
            stat = jax.ShapeDtypeStruct((1, wide), f32)
            return code, Params(stat, stat if _asymmetric(self.fmt) else None)

        return Grid(self.round, fit, self.kept, like, rows)

    def given(self, index: IntArray[Array, " padded"]) -> Grid:
        """The grid of known scales `[groups, cols]`; row `i` is in group `index[i]`."""

        def round_row(target, row, params):
            own = jax.tree.map(lambda leaf: leaf[index[row]][None], params)
            return self.round(target, row, own)

        return Grid(round_row)

    def round(self, target, row, params: Params):
        """Nearest codes of a row, and their values."""
        del row
        fmt = self.fmt
        if params.scale is None:  # a cast
            codes = fmt.encode(target)
            return codes, fmt.decode(codes)
        u = divided(target, params.scale)
        if params.zero is None:
            codes = fmt.encode(u)
            return codes, fmt.decode(codes) * params.scale
        assert isinstance(fmt, Int)  # only Int has zero-points
        half = float(2 ** (fmt.bits - 1))
        codes = fmt.encode(jnp.round(u + (params.zero - half)) + half)
        return codes, (fmt.decode(codes) - params.zero) * params.scale

    def kept(self, params: Params) -> Params:
        """One entry per group from one per column."""
        kind = _kind(self.fmt)
        step = self.fmt.grouping((self.size, 1 << 30)).size if kind != "in" else 1
        return jax.tree.map(lambda leaf: leaf[:1, ::step], params)

    def problem(self, target: Float[Array, "rows cols"], at: Any) -> Problem:
        """The rows of a group as a weight of their own; padding repeats a row."""
        rows = target.shape[0]
        weight = jax.lax.dynamic_slice_in_dim(self.weight, at, rows)
        if self.size % rows:
            real = jnp.minimum(jnp.arange(rows), self.size - 1 - at)
            target = target[jnp.maximum(real, 0)]
        p = Problem.build(target, self.fmt, weight[:, None])
        return p._replace(divisor=self.divisor)

    def fit(self, target, at, m) -> Params:
        """Scale and zero-point of a group, in the shape they are stored in."""
        p = self.problem(target, at)
        low, high = extremes(p)
        if self.rule == "minmax":
            found = p.from_range(low, high)
        elif self.rule == "mse" or m is None:
            found = refine(p, *_least_error(p, low, high))
        else:
            found = self._least_loss(p, target, at, m, low, high)
        return _stored(p, *found)

    def _least_loss(self, p: Problem, target, at, m, low, high):
        """Range, scale and zero-point with the least error of the layer's output."""
        sizes, _ = levels(target.shape[0], 0, 1)
        d = jax.lax.dynamic_slice_in_dim(self.d, at, target.shape[0])
        real = (at + jnp.arange(target.shape[0]) < self.size).astype(jnp.float32)
        d = (d * real / jnp.maximum(jnp.mean(d), 1e-30))[:, None]
        # Rows of a block that start from their targets: the loop within one chunk.
        index = jnp.zeros((target.shape[0],), jnp.int32)
        grid = self.given(index)

        def trial(scale, zero):
            stat = _stored(p, scale, zero)
            params = spread(self.fmt, stat, target.shape[1])
            params = jax.tree.map(lambda leaf: leaf[:1], params)
            codes, _, errors = run_slice(target, m, grid, sizes, params)
            miss = _product_rows(m, errors)
            loss = jnp.sum(d * miss * miss, axis=0, keepdims=True)
            return codes, group_sum(self.fmt, loss, p)

        def step(i, best):
            fraction = 1.0 - (1.0 - SHRINK) * i.astype(jnp.float32) / (STEPS - 1)
            scale, zero = p.from_range(low * fraction, high * fraction)
            return keep_better(best, trial(scale, zero)[1], scale, zero)

        scale, zero = p.from_range(low, high)
        start = (trial(scale, zero)[1], scale, zero)
        best = jax.lax.fori_loop(1, STEPS, step, start)
        if not isinstance(self.fmt, Int) or _kind(self.fmt) != "in":
            return best[1:]

        def refit(_, best):
            codes, _ = trial(*best[1:])
            scale, zero = _solve(p, codes, target, m, d, *best[1:])
            return keep_better(best, trial(scale, zero)[1], scale, zero)

        return jax.lax.fori_loop(0, REFITS, refit, best)[1:]


def _product_rows(m, errors):
    return jax.lax.dot_general(m, errors, (((0,), (0,)), ((), ())), precision="highest")


def _solve(p: Problem, codes, target, m, d, scale, zero):
    """Least squares for scale and zero-point of fixed codes, in the metric of `H`.

    With `y = M^T x` the metric is diagonal: minimize `sum d (Mt - s Mc - b M1)^2`.
    """
    fmt = p.fmt
    c = _product_rows(m, fmt.decode(codes))
    t = _product_rows(m, target)

    def total(x):
        return jnp.sum(d * x, axis=0, keepdims=True)[None]

    cc, ct = total(c * c), total(c * t)
    if zero is None:
        good = (cc > 0) & (ct > 0)
        return p.stored(jnp.where(good, ct / jnp.where(cc > 0, cc, 1.0), scale)), None
    one = jnp.sum(m, axis=0)[:, None]
    oo, co, ot = total(one * one), total(c * one), total(one * t)
    det = oo * cc - co * co
    slope = (oo * ct - co * ot) / jnp.where(det > 0, det, 1.0)
    scale = p.stored(jnp.where((det > 0) & (slope > 0), slope, scale))
    shift = (ot - scale * co) / (jnp.where(oo > 0, oo, 1.0) * scale)
    return scale, p.stored_zero(-shift)


def extremes(p: Problem):
    """Ends of each group; symmetric around 0 for formats without zero-points."""
    low = jnp.min(p.w, axis=-2, keepdims=True)
    high = jnp.max(p.w, axis=-2, keepdims=True)
    if p.asymmetric:
        return low, high
    top = jnp.maximum(-low, high)
    return -top, top


def fit_all(w, fmt: Format, rule: str, shared: Any, divisor: Any) -> Params:
    """Scales of all groups of a weight as it is, in the shape they are stored in.

    There is no error feedback yet, so `hessian` means `mse` here.
    """
    diagonal = shared.diagonal
    if shared.order is not None:
        diagonal = jnp.zeros_like(diagonal).at[shared.order].set(diagonal)

    def fit(w):
        p = Problem.build(w, fmt, None if rule == "minmax" else diagonal[:, None])
        p = p._replace(divisor=divisor)
        low, high = extremes(p)
        if rule == "minmax":
            return _stored(p, *p.from_range(low, high))
        return _stored(p, *refine(p, *_least_error(p, low, high)))

    return fit(w)


def _least_error(p: Problem, low, high):
    def step(i, best):
        fraction = 1.0 - (1.0 - SHRINK) * i.astype(jnp.float32) / (STEPS - 1)
        scale, zero = p.from_range(low * fraction, high * fraction)
        return keep_better(best, p.error(scale, zero), scale, zero)

    scale, zero = p.from_range(low, high)
    start = (p.error(scale, zero), scale, zero)
    return jax.lax.fori_loop(1, STEPS, step, start)[1:]


def _stored(p: Problem, scale, zero) -> Params:
    store = p.group.store
    return Params(store(scale), None if zero is None else store(zero))


def spread(fmt: Format, stat: Params, cols: int) -> Params:
    """One value per column from the stored shape: `[groups, t]` to `[groups, cols]`."""

    def one(leaf):
        if leaf.shape[1] == cols:
            return leaf
        across = cols if leaf.shape[1] == 1 else fmt.grouping((1 << 30, cols)).size
        return jnp.repeat(leaf, across, axis=1)[:, :cols]

    return jax.tree.map(one, stat)


def group_sum(fmt: Format, loss: Float[Array, "1 cols"], p: Problem):
    """Loss per group `[G, 1, N]` from the loss per column of one group of rows."""
    wide = p.group.scale_shape[1]
    cols = loss.shape[1]
    if wide != cols:
        across = -(-cols // wide) if wide == 1 else fmt.grouping(p.group.matrix).size
        loss = jnp.pad(loss, ((0, 0), (0, -cols % across)))
        loss = jnp.sum(loss.reshape(wide, across), axis=1)[None]
    return p.group.load(loss)


def group_rows(fmt: Format, size: int) -> int:
    """Rows of an `in` axis of `size` that share a scale."""
    group = fmt.grouping((size, 1 << 30))
    if group.kind in ("channel", "tensor"):
        return size
    return 1 if group.kind == "out" else group.size


def _asymmetric(fmt: Format) -> bool:
    return isinstance(fmt, Int) and not fmt.symmetric


def _kind(fmt: Format) -> str:
    return fmt.grouping((1 << 30, 1 << 30)).kind
