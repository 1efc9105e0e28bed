"""Fitting a `KMeans` format to one matrix: tables, scales of groups, codes.

`fit` lowers the weighted squared error: exactly or nearly so for tables of columns (see
`qjax.methods.clusters`), by fitting table, scales and codes in turns for the one table
of a matrix, starting from normal quantiles and absolute maxima (learned NF4).
`fit_hessian` then lowers the output error `tr((w - v)^T H (w - v))`.

Tables and scales have the precision they are stored with wherever errors are compared,
and of all iterates the best is kept.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt8

from qjax.formats import KMeans
from qjax.formats.kmeans import lookup, nearest, normal_table
from qjax.methods.clusters import fit_tables
from qjax.methods.hessian import output_error
from qjax.methods.sweeps import descent, refit, sweep
from qjax.scales import store_scale

REFIT_STEPS = 6
"""Conjugate gradient steps per refit of a table or of scales."""


class Grid(NamedTuple):
    """Values that codes of a matrix can stand for, as stored, in float32.

    Attributes:
      table: `[levels]`, or `[levels, out]` when each column has its own.
      scale: `[groups, out]`, or None when each column has its own table.
    """

    table: Array
    scale: Any

    def values(self, codes: UInt8[Array, "in out"], group: Any) -> Array:
        """What codes stand for."""
        found = lookup(codes, self.table)
        return found if self.scale is None else found * self.rows(codes, group)

    def rows(self, like: Array, group: Any) -> Array:
        """Scales of all rows."""
        return jnp.repeat(self.scale, group, axis=0)[: like.shape[0]]

    def codes(self, w: Float[Array, "in out"], group: Any) -> UInt8[Array, "in out"]:
        """Nearest codes."""
        if self.scale is None:
            return nearest(w, self.table)
        scale = self.rows(w, group)  # 0 in groups of zeros
        return nearest(w / jnp.where(scale > 0, scale, 1.0), self.table)


def fit(
    w: Float[Array, "in out"],
    weight: Float[Array, "in out"],
    fmt: KMeans,
    iterations: int,
) -> Grid:
    """The grid with the least weighted squared error that was found."""
    if fmt.group is None:
        return Grid(
            stored_table(fit_tables(w, weight, fmt.levels, iterations), fmt), None
        )
    return _fit_shared(w, weight, fmt, iterations)


def stored_table(table: Array, fmt: KMeans) -> Array:
    """Tables of columns after the rounding of storage."""
    top = float(jnp.finfo(fmt.table_dtype).max)
    return jnp.clip(table, -top, top).astype(fmt.table_dtype).astype(jnp.float32)


def _stored(table: Array, scale: Array, fmt: KMeans) -> Grid:
    """A grid whose table ends at 1 and whose scales are rounded."""
    top = jnp.max(jnp.abs(table))
    top = jnp.where(top > 0, top, 1.0)
    return Grid(table / top, store_scale(fmt, scale * top)[1])


def _fit_shared(w, weight, fmt: KMeans, iterations) -> Grid:
    """Codes, table and scales in turns."""
    size: Any = fmt.group
    group = jnp.arange(w.shape[0]) // size
    count = fmt.grouping((w.shape[0], w.shape[1])).scale_shape[0]

    def by_group(x):
        return jax.ops.segment_sum(x, group, count, indices_are_sorted=True)

    def by_level(x, codes):
        index = codes.astype(jnp.int32).reshape(-1)
        return jax.ops.segment_sum(x.reshape(-1), index, fmt.levels)

    def step(_, state):
        best, kept, grid = state
        codes = grid.codes(w, size)
        s = grid.rows(w, size)
        error = jnp.sum(weight * jnp.square(w - lookup(codes, grid.table) * s))
        kept = jax.tree.map(lambda a, b: jnp.where(error < best, a, b), grid, kept)
        best = jnp.minimum(error, best)
        mass = by_level(weight * s * s, codes)
        mean = by_level(weight * s * w, codes) / jnp.where(mass > 0, mass, 1.0)
        table = jnp.sort(jnp.where(mass > 0, mean, grid.table))
        c = lookup(codes, table)
        top, bottom = by_group(weight * c * w), by_group(weight * c * c)
        fitted = top / jnp.where(bottom > 0, bottom, 1.0)
        scale = jnp.where((bottom > 0) & (fitted > 0), fitted, grid.scale)
        return best, kept, _stored(table, scale, fmt)

    top = jax.ops.segment_max(jnp.abs(w), group, count, indices_are_sorted=True)
    start = _stored(jnp.asarray(normal_table(fmt.bits)), top, fmt)
    state = (jnp.asarray(jnp.inf, jnp.float32), start, start)
    return jax.lax.fori_loop(0, iterations + 1, step, state)[1]


def fit_hessian(
    w: Float[Array, "in out"],
    fmt: KMeans,
    grid: Grid,
    h: Float[Array, "in in"],
    m: Float[Array, "in in"],
    rounds: int,
    fixed: Bool[Array, "in out"] | None = None,
) -> tuple[Grid, UInt8[Array, "in out"]]:
    """Grid and codes with little output error.

    Args:
      w: the weight.
      fmt: the format.
      grid: where to start.
      h: damped Hessian.
      m: its factor; see `qjax.methods.hessian.factor`.
      rounds: times that grid and codes are fitted in turns.
      fixed: weights that are kept exactly besides, whose codes do not matter.

    Returns:
      The best grid and its codes.
    """
    eye = jnp.eye(h.shape[0], dtype=h.dtype)
    back = descent(h)
    target = w if fixed is None else jnp.where(fixed, 0.0, w)

    def kept(values):
        return values if fixed is None else jnp.where(fixed, 0.0, values)

    def choose(grid):
        def pick(i, goal):
            scale = None
            if grid.scale is not None:
                scale = jax.lax.dynamic_slice_in_dim(grid.scale, i // fmt.group, 1)
            row = Grid(grid.table, scale)
            codes = row.codes(goal, 1)
            value = row.values(codes, 1)
            if fixed is not None:
                exact = jax.lax.dynamic_slice_in_dim(fixed, i, 1)
                own = jax.lax.dynamic_slice_in_dim(w, i, 1)
                value = jnp.where(exact, own, value)
            return codes[0], value

        return pick

    def better(best, grid, codes):
        """Per column, or for the matrix when columns share a table."""
        error = output_error(target - kept(grid.values(codes, fmt.group)), h)
        if fmt.group is not None:
            error = jnp.sum(error)
        less = error < best[0]
        new = (error, grid, codes)
        return jax.tree.map(lambda a, b: jnp.where(less, a, b), new, best)

    def turn(_, state):
        best, grid, codes = state
        grid, codes = _refitted(target, fmt, grid, codes, h, kept)
        best = better(best, grid, codes)
        values = grid.values(codes, fmt.group)
        values = values if fixed is None else jnp.where(fixed, w, values)
        codes, _ = sweep(w, values, back, choose(grid))
        return better(best, grid, codes), grid, codes

    codes = grid.codes(w, fmt.group)
    shape = () if fmt.group is not None else (w.shape[1],)
    first = (jnp.full(shape, jnp.inf, jnp.float32), grid, codes)
    first = better(first, grid, codes)  # what feedback has to beat
    codes, _ = sweep(w, w, m - eye, choose(grid))
    state = (better(first, grid, codes), grid, codes)
    best, _, _ = jax.lax.fori_loop(0, rounds, turn, state)
    return best[1], best[2]


def _refitted(target, fmt: KMeans, grid: Grid, codes, h, kept):
    """Least squares for the table, then for the scales of groups, codes being fixed."""
    columns = grid.scale is None
    size: Any = fmt.group

    def of_table(table):
        return kept(Grid(table, grid.scale).values(codes, size))

    table = refit(of_table, grid.table, target, h, REFIT_STEPS, columns=columns)
    order = jnp.argsort(table, axis=0)
    rank = jnp.argsort(order, axis=0)
    table = jnp.take_along_axis(table, order, axis=0)
    if columns:
        index = codes.astype(jnp.int32)
        codes = jnp.take_along_axis(rank, index, axis=0).astype(jnp.uint8)
        return Grid(stored_table(table, fmt), None), codes
    codes = rank[codes.astype(jnp.int32)].astype(jnp.uint8)

    def of_scale(scale):
        return kept(Grid(table, scale).values(codes, size))

    scale = refit(of_scale, grid.scale, target, h, REFIT_STEPS, columns=True)
    scale = jnp.where(scale > 0, scale, grid.scale)
    return _stored(table, scale, fmt), codes
