"""Weighted k-means in one dimension, for all columns of a matrix at once.

A column is sorted once. Up to 16 clusters start from the exact optimum over at most
`BINS` bins (dynamic programming), which is the exact optimum of the column when it has
no more values than that; more clusters start from quantiles. Lloyd iterations on the
sorted column then cost a binary search per cluster, since sums over a cluster are
differences of running sums. Every step lowers the objective

    sum_i h_i min_l (x_i - c_l)^2.

Memory: a few float32 copies of the matrix; the program's tables are held for `CHUNK`
columns at a time.

Reference: Wang and Song, Ckmeans.1d.dp: Optimal k-means Clustering in One Dimension by
Dynamic Programming, The R Journal 3(2), 2011; Lloyd, Least Squares Quantization in PCM,
IEEE Trans. Information Theory 28(2), 1982.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qjax.formats.kmeans import midpoints, nearest

BINS = 128
"""Places where the starting partition of a column may be cut."""
CHUNK = 64
"""Columns partitioned at a time."""
MAX_EXACT = 16
"""Clusters up to which the start is found by dynamic programming."""


def fit_tables(
    x: Float[Array, "n cols"],
    weight: Float[Array, "n cols"],
    levels: int,
    iterations: int,
) -> Float[Array, "levels cols"]:
    """Cluster centres of every column, ascending.

    Args:
      x: values.
      weight: non-negative weights of the squared errors; a column of zeros counts as a
        column of ones.
      levels: clusters.
      iterations: Lloyd iterations after the start.

    Returns:
      Centres; a column with fewer distinct values repeats some.
    """
    one = functools.partial(_centres, levels=levels, iterations=iterations)
    size = min(CHUNK, x.shape[1])
    start = jax.lax.map(lambda c: one(*c), (x.T, weight.T), batch_size=size).T
    return _polish(x, _normal(weight), start)


def _normal(h):
    """Weights with mean 1 along axis 0; all ones where they vanish."""
    mean = jnp.mean(h, axis=0, keepdims=True)
    return jnp.where(mean > 0, h / jnp.where(mean > 0, mean, 1.0), 1.0)


def _centres(x, h, *, levels, iterations):
    """Centres of one column."""
    h = _normal(h)
    middle = jnp.sum(h * x) / jnp.sum(h)
    x, h = jax.lax.sort((jnp.where(h > 0, x, middle), h), num_keys=1)
    centred = x - middle  # running sums of small numbers lose less
    zero = jnp.zeros((1,), jnp.float32)
    mass = jnp.concatenate([zero, jnp.cumsum(h)])
    moment = jnp.concatenate([zero, jnp.cumsum(h * centred)])
    ends = _partition(centred, h, mass, levels)

    def centres(ends):
        total = mass[ends[1:]] - mass[ends[:-1]]
        mean = moment[ends[1:]] - moment[ends[:-1]]
        mean = mean / jnp.where(total > 0, total, 1.0)
        low = centred[jnp.minimum(ends[:-1], x.shape[0] - 1)]
        high = centred[jnp.maximum(ends[1:], 1) - 1]
        return jnp.where(total > 0, jnp.clip(mean, low, jnp.maximum(low, high)), low)

    def step(_, ends):
        inner = jnp.searchsorted(centred, midpoints(centres(ends)), side="right")
        return ends.at[1:-1].set(inner.astype(jnp.int32))

    ends = jax.lax.fori_loop(0, iterations, step, ends)
    return centres(ends) + middle


def _partition(x, h, mass, levels) -> Int[Array, " ends"]:
    """Ends of the clusters to start from, in a sorted column."""
    size = x.shape[0]
    if levels > MAX_EXACT:
        at = jnp.searchsorted(_spread(x, mass), jnp.arange(1, levels) / levels)
        ends = jnp.concatenate([jnp.zeros((1,), at.dtype), at, jnp.full((1,), size)])
        return ends.astype(jnp.int32)
    bins = min(BINS, size)
    index = jnp.arange(size)
    if size > BINS:
        index = jnp.clip((_spread(x, mass) * bins).astype(jnp.int32), 0, bins - 1)
    total = jax.ops.segment_sum(h, index, bins)
    mean = jax.ops.segment_sum(h * x, index, bins) / jnp.where(total > 0, total, 1.0)
    cuts = _best_cuts(_costs(total, mean), levels)
    return jnp.searchsorted(index, cuts, side="left").astype(jnp.int32)


def _spread(x, mass):
    """Ascending places in [0, 1] that spread both weight and values evenly."""
    width = x[-1] - x[0]
    value = (x - x[0]) / jnp.where(width > 0, width, 1.0)
    return 0.5 * mass[1:] / mass[-1] + 0.5 * value


def _costs(total, mean) -> Float[Array, "end first"]:
    """Squared error of the bins `first .. end` about their mean, one bin at a time.

    Adding bin by bin (Welford's rule) does not cancel as differences of sums do.
    """
    first = jnp.arange(total.shape[0])

    def add(state, item):
        end, p, q = item
        m, mu, cost = state
        both = m + p
        share = p / jnp.where(both > 0, both, 1.0)
        there = first <= end
        gap = q - mu
        state = (
            jnp.where(there, both, 0.0),
            jnp.where(there, mu + gap * share, 0.0),
            jnp.where(there, cost + m * share * gap * gap, 0.0),
        )
        return state, jnp.where(there, state[2], jnp.inf)

    zeros = jnp.zeros(total.shape, jnp.float32)
    return jax.lax.scan(add, (zeros, zeros, zeros), (first, total, mean))[1]


def _best_cuts(cost, levels) -> Int[Array, " ends"]:
    """Bins at which the best partition in at most `levels` runs is cut."""
    bins = cost.shape[0]

    def extend(best, _):
        """From the best partitions of the bins before each end, one run more."""
        options = best[:-1] + cost
        first = jnp.argmin(options, axis=1)
        found = jnp.min(options, axis=1)
        same = jnp.arange(1, bins + 1)
        first = jnp.where(best[1:] <= found, same, first)
        best = best.at[1:].set(jnp.minimum(best[1:], found))
        return best, first

    start = jnp.full((bins + 1,), jnp.inf).at[0].set(0.0)
    _, first = jax.lax.scan(extend, start, None, length=levels)

    def back(end, row):
        before = jnp.where(end > 0, row[jnp.maximum(end, 1) - 1], 0)
        return before, before

    last = jnp.asarray(bins, first.dtype)
    _, cuts = jax.lax.scan(back, last, first, reverse=True)
    return jnp.concatenate([cuts, last[None]])


def _polish(x, h, table):
    """One Lloyd step with sums over members themselves, not differences of sums."""
    levels, cols = table.shape
    codes = nearest(x, table).astype(jnp.int32)
    place = codes * cols + jnp.arange(cols, dtype=jnp.int32)

    def total(values):
        flat = values.reshape(-1)
        return jax.ops.segment_sum(flat, place.reshape(-1), levels * cols)

    mass = total(jnp.broadcast_to(h, x.shape)).reshape(table.shape)
    offset = total(h * (x - jnp.take_along_axis(table, codes, 0))).reshape(table.shape)
    return jnp.sort(table + offset / jnp.where(mass > 0, mass, 1.0), axis=0)
