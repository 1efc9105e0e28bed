"""IQ1: ternary points, moved up or down by an eighth of a step.

Encoders take blocks `x [256, *blocks]` and the imatrix's values of their inputs,
`[256, ...]` broadcastable to them, or None; they return bytes `[bytes, *blocks]`. The
best ternary codes split the sorted weights of a group in three runs; every split and
every move is tried. Points outside of the grid are then replaced, and the scale fitted
again.

Reference: ggml `src/ggml-quants.c` (MIT): `quantize_row_iq1_s_impl`,
`quantize_row_iq1_m_impl`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from qjax.formats.base import divided, rounded
from qjax.methods.ggml_books import Book
from qjax.methods.ggml_bytes import groups, half, half_bytes, stacked
from qjax.methods.ggml_search import inverse, ratio, total

Blocks = Float[Array, "e *blocks"]
Importance = Float[Array, "e ..."] | None
Bytes = UInt8[Array, "b *blocks"]
_BOOK = Book("iq1", 3)
_VALUES = np.array([[-0.875, 0.125, 1.125], [-1.125, -0.125, 0.875]], np.float32)
_EIGHTHS = 8  # weights of a point


class _Groups(NamedTuple):
    """Indices `[points, g, ...]`, scales `[g, ...]` and, per point, which move: 0 is
    up, 1 is down."""

    index: Int[Array, "p g *blocks"]
    scale: Float[Array, "g *blocks"]
    down: Int[Array, "p g *blocks"]


def iq1_s(x: Blocks, importance: Importance) -> Bytes:
    """Scales of 3 bits and moves of 32."""
    weight = groups(_weights(x, importance), 32)
    grouped = groups(x, 32)
    moves = np.array([[0] * 4, [1] * 4])
    found = _search(grouped, weight, _split_by_sums(grouped, weight), moves, 1e-12)
    step, codes = _scales(found.scale)
    high = (codes | found.down[0] << 3) << 12
    for k in range(4):
        high = high | (found.index[k] >> 8) << (3 * k)
    index = jnp.moveaxis(found.index, 0, 1).reshape(-1, *x.shape[1:])
    return stacked(half_bytes(half(step * 1.125)), index, _pairs(high))


def iq1_m(x: Blocks, importance: Importance) -> Bytes:
    """Scales of 3 bits of 16, moves of 8, the step's bits among the scales."""
    weight = groups(_weights(x, importance), 16)
    grouped = groups(x, 16)
    moves = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    found = _search(grouped, weight, _split_by_terms(grouped, weight), moves, 1e-7)
    step, codes = _scales(found.scale)
    value = _values(found) * (2.0 * codes.astype(jnp.float32) + 1.0)
    parts = [jnp.moveaxis(a, 0, 1).reshape(x.shape) for a in (grouped, weight, value)]
    lx, l2 = total(_square_terms, *parts)
    some = jnp.max(found.scale, axis=0) > 0
    step = jnp.where(l2 > 0, lx / jnp.where(l2 > 0, l2, 1.0), step)
    step = half(jnp.where(some, step, 0.0) * 1.1125)
    bits = jax.lax.bitcast_convert_type(step.astype(jnp.float16), jnp.uint16)
    words = []
    for k in range(4):
        word = (bits.astype(jnp.int32) >> (4 * k) & 15) << 12
        for j in range(4):
            word = word | codes[4 * k + j] << (3 * j)
        words.append(word)
    nibbles = found.index >> 8 | found.down << 3
    index = jnp.moveaxis(found.index, 0, 1).reshape(-1, *x.shape[1:])
    return stacked(index, nibbles[0] | nibbles[1] << 4, _pairs(jnp.stack(words)))


def _weights(x, importance):
    square = rounded(x * x)
    if importance is None:
        return square
    mean = total(lambda a: a * a, x) * (2.0 / x.shape[0])
    return importance * jnp.sqrt(mean + square)


def _square_terms(x, w, q):
    """Of a least-squares fit of `x` by a multiple of `q`."""
    return w * q * x, w * q * q


def _search(x, weight, best, moves: np.ndarray, tiny: float) -> _Groups:
    """Points for the best split of every group.

    Args:
      x: groups `[n, g, ...]`.
      weight: of their errors.
      best: scale, ternary levels and row of `moves` of the best split.
      moves: the tried moves of the points of a group.
      tiny: groups whose largest magnitude is smaller are taken as zero.
    """
    scale, level, move, some = best
    some = some & (jnp.max(jnp.abs(x), axis=0) >= tiny)
    flip = scale < 0
    level = jnp.where(flip, 2 - level, level)
    move = jnp.where(flip, len(moves) - 1 - move, move)
    scale = jnp.where(some, jnp.abs(scale), 0.0)
    down = jnp.moveaxis(jnp.asarray(moves)[move], -1, 0)
    values = rounded(scale * _levels(down))
    parts = [_by_point(a) for a in (level, x, weight)]
    index, inside = _BOOK.nearest(parts[0], values, parts[1], parts[2])
    found = _Groups(index, scale, down)
    lx, l2 = total(_square_terms, x, weight, _values(found))
    refit = jnp.any(~inside, axis=0) & (lx > 0) & (l2 > 0) & some
    return _Groups(
        jnp.where(some, index, 0),
        jnp.where(refit, ratio(lx, l2), scale),
        jnp.where(some, down, 0),
    )


def _levels(down):
    """The three values of points, on a new axis 0."""
    up, low = (jnp.asarray(row).reshape(3, *[1] * down.ndim) for row in _VALUES)
    return jnp.where(down == 1, low, up)


def _values(found: _Groups):
    """The values of all weights, `[n, g, ...]`, without the scale."""
    level = _BOOK.coordinates(found.index)
    low, mid, high = _levels(found.down)
    value = jnp.where(level == 0, low, jnp.where(level == 1, mid, high))
    return jnp.moveaxis(value, 0, 1).reshape(-1, *value.shape[2:])


def _by_point(x):
    """Elements `[n, ...]` as coordinates of points, `[8, n / 8, ...]`."""
    return jnp.moveaxis(x.reshape(-1, _EIGHTHS, *x.shape[1:]), 1, 0)


def _splits(size: int) -> np.ndarray:
    """Ends of the first and the second run of all splits."""
    ends = range(size + 1)
    return np.array([(i, j) for i in ends for j in ends if j >= i], np.int32)


def _split_by_sums(x, weight):
    """The best split by differences of running sums, all points moved the same way."""
    order = jnp.argsort(x, axis=0, stable=True)
    x, w = (jnp.take_along_axis(a, order, 0) for a in (x, weight))

    def add(sums, terms):
        sums = jax.tree.map(lambda s, t: s + rounded(t), sums, terms)
        return sums, sums

    zero = jnp.zeros_like(x[0])
    sums = jax.lax.scan(add, (zero, zero), (w * x, w))[1]
    sx, sw = (jnp.concatenate([zero[None], s]) for s in sums)
    up, down = _VALUES

    def scores(ends):
        """`lx` and `l2` of both moves."""
        runs = []
        for s in (sx, sw):
            first, second = s[ends[0]], s[ends[1]]
            runs.append((first, second - first, s[-1] - second))
        found = []
        for value in (up, down):
            lx = [rounded(r * v) for r, v in zip(runs[0], value, strict=True)]
            l2 = [rounded(r * v * v) for r, v in zip(runs[1], value, strict=True)]
            found.append((lx[0] + lx[1] + lx[2], l2[0] + l2[1] + l2[2]))
        return tuple(jnp.stack(parts) for parts in zip(*found, strict=True))

    return _best_split(scores, order, zero)


def _split_by_terms(x, weight):
    """The best split by sums over all weights, halves moved in all four ways."""
    order = jnp.argsort(x, axis=0, stable=True)
    x, w = (jnp.take_along_axis(a, order, 0) for a in (x, weight))
    down = [[0, 0, 1, 1], [0, 1, 0, 1]]  # of the first and of the second half
    picked = [jnp.asarray(_VALUES[rows].T) for rows in down]  # [levels, moves]
    picked = [p.reshape(3, 4, *[1] * x.ndim) for p in picked]
    value = jnp.where(order < _EIGHTHS, *picked)  # [levels, moves, n, ...]
    part = w * value
    terms = jnp.moveaxis(part * x, 2, 0), jnp.moveaxis(part * value, 2, 0)
    place = jnp.arange(x.shape[0])

    def scores(ends):
        level = jnp.sum(place[:, None] >= ends, axis=1, dtype=jnp.int32)

        def add(sums, parts):
            level, *terms = parts
            return [s + rounded(t[level]) for s, t in zip(sums, terms, strict=True)], 0

        zero = jnp.zeros(terms[0].shape[2:], jnp.float32)
        return tuple(jax.lax.scan(add, [zero, zero], (level, *terms))[0])

    return _best_split(scores, order, jnp.zeros_like(x[0]))


def _best_split(scores, order, zero):
    """Scale, levels `[n, ...]`, move and whether there is any, of the best split.

    Args:
      scores: `lx` and `l2` of the moves (axis 0) for the ends of runs.
      order: that sorts the weights.
      zero: of the shape of groups.
    """
    splits = jnp.asarray(_splits(order.shape[0]))

    def step(best, place):
        lx, l2 = scores(splits[place])
        for move in range(lx.shape[0]):
            energy, _, _, _, some = best
            more = lx[move] * lx[move] > energy * l2[move]
            better = (l2[move] > 0) & (~some | more)
            scale = ratio(lx[move], l2[move])
            new = (scale * lx[move], scale, place, jnp.int32(move), jnp.bool_(True))  # noqa: FBT003
            best = jax.tree.map(lambda n, b: jnp.where(better, n, b), new, best)  # noqa: B023
        return best, None

    none = jnp.zeros(zero.shape, jnp.int32)
    start = (zero, zero, none, none, none == 1)
    places = jnp.arange(len(splits), dtype=jnp.int32)
    _, scale, place, move, some = jax.lax.scan(step, start, places)[0]
    ends = splits[place]
    rank = jnp.argsort(order, axis=0)
    above = [(rank >= ends[..., k]).astype(jnp.float32) for k in (0, 1)]
    return scale, above[0] + above[1], move, some


def _scales(scale):
    """Step of a block's scales and their 3-bit codes: `step * (2 code + 1)`."""
    top = jnp.max(scale, axis=0)
    step = divided(top, jnp.full_like(top, 15.0))
    codes = jnp.round(0.5 * (rounded(inverse(step) * scale) - 1.0))
    return step, jnp.clip(codes, 0, 7).astype(jnp.int32)


def _pairs(words):
    """The two bytes of 16-bit words `[g, ...]`, the lower first."""
    pair = jnp.stack([words & 255, words >> 8], axis=1)
    return pair.reshape(-1, *words.shape[1:])
