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

from qjax.formats.base import rounded
from qjax.methods.ggml_books import Book
from qjax.methods.ggml_bytes import groups, half, half_bytes, stacked, ungrouped
from qjax.methods.ggml_exact import ratio, total
from qjax.methods.ggml_search import error_weights, odd_codes

Blocks = Float[Array, " e *blocks"]
Importance = Float[Array, "e ..."] | None
Bytes = UInt8[Array, " b *blocks"]
_BOOK = Book("iq1", 3)
_VALUES = np.array([[-0.875, 0.125, 1.125], [-1.125, -0.125, 0.875]], np.float32)
_EIGHTHS = 8  # weights of a point


class _Groups(NamedTuple):
    """Groups as they are stored.

    Attributes:
      index: of points.
      scale: of groups.
      down: which move a point has: 0 is up, 1 is down.
    """

    index: Int[Array, "p g *blocks"]
    scale: Float[Array, " g *blocks"]
    down: Int[Array, "p g *blocks"]


def iq1_s(x: Blocks, importance: Importance) -> Bytes:
    """Scales of 3 bits and moves of 32."""
    weight = groups(error_weights(x, importance), 32)
    grouped = groups(x, 32)
    moves = np.array([[0] * 4, [1] * 4])
    found = _search(grouped, weight, _split_by_runs(grouped, weight), moves, 1e-12)
    step, codes = odd_codes(found.scale, 7)
    codes = codes.astype(jnp.int32)
    high = (codes | found.down[0] << 3) << 12
    for k in range(4):
        high = high | (found.index[k] >> 8) << (3 * k)
    step = half_bytes(half(step * 1.125))
    return stacked(step, ungrouped(found.index), _pairs(high))


def iq1_m(x: Blocks, importance: Importance) -> Bytes:
    """Scales of 3 bits of 16, moves of 8, the step's bits among the scales."""
    weight = groups(error_weights(x, importance), 16)
    grouped = groups(x, 16)
    moves = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    found = _search(grouped, weight, _split_by_halves(grouped, weight), moves, 1e-7)
    step, codes = odd_codes(found.scale, 7)
    codes = codes.astype(jnp.int32)
    value = _values(found) * (2.0 * codes.astype(jnp.float32) + 1.0)
    parts = [ungrouped(a) for a in (grouped, weight, value)]
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
    index = ungrouped(found.index)
    return stacked(index, nibbles[0] | nibbles[1] << 4, _pairs(jnp.stack(words)))


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
    first = _levels(down)[0]
    parts = [groups(a, _EIGHTHS) for a in (level, x, weight)]
    index, inside = _BOOK.nearest(parts[0], scale, first, 1.0, *parts[1:])
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
    return ungrouped(jnp.where(level == 0, low, jnp.where(level == 1, mid, high)))


def _splits(size: int) -> np.ndarray:
    """Ends of the first and the second run of all splits."""
    ends = range(size + 1)
    return np.array([(i, j) for i in ends for j in ends if j >= i], np.int32)


def _running(order, x, weight, mask=None):
    """Sums of `weight * x` and of `weight` over the first 0, 1, ... sorted elements.

    Args:
      order: that sorts the elements.
      x: groups `[n, ...]`.
      weight: of their errors.
      mask: of sorted elements that count, or None for all.
    """
    x, w = (jnp.take_along_axis(a, order, 0) for a in (x, weight))
    terms = w * x, w
    if mask is not None:
        terms = tuple(jnp.where(mask, term, 0.0) for term in terms)

    def add(sums, terms):
        sums = jax.tree.map(lambda s, t: s + rounded(t), sums, terms)
        return sums, sums

    zero = jnp.zeros_like(x[0])
    sums = jax.lax.scan(add, (zero, zero), terms)[1]
    return tuple(jnp.concatenate([zero[None], s]) for s in sums)


def _split_by_runs(x, weight):
    """The best split by the sums of its runs, all points moved the same way."""
    order = jnp.argsort(x, axis=0, stable=True)
    sums = _running(order, x, weight)

    def scores(ends):
        """`lx` and `l2` of both moves."""
        runs = []
        for s in sums:
            first, second = s[ends[0]], s[ends[1]]
            runs.append((first, second - first, s[-1] - second))
        found = []
        for value in _VALUES:
            lx = [rounded(r * v) for r, v in zip(runs[0], value, strict=True)]
            # Without rounding in between, XLA would multiply the constants first.
            l2 = [
                rounded(rounded(r * v) * v) for r, v in zip(runs[1], value, strict=True)
            ]
            found.append((lx[0] + lx[1] + lx[2], l2[0] + l2[1] + l2[2]))
        return found

    return _best_split(scores, order)


def _split_by_halves(x, weight):
    """The best split by running sums of halves, which are moved in all four ways.

    Neighbouring values differ by 1, so that a half's `lx` is what it would be with all
    codes highest, less the sums up to both ends; `l2` follows from squares likewise.
    """
    order = jnp.argsort(x, axis=0, stable=True)
    first = order < _EIGHTHS
    halves = [_running(order, x, weight, mask) for mask in (first, ~first)]

    def scores(ends):
        """`lx` and `l2` of the moves up and up, up and down, down and up, both down."""
        moved = [
            [_half_sums(half, value, ends) for value in _VALUES] for half in halves
        ]
        pairs = [(a, b) for a in moved[0] for b in moved[1]]
        return [(a[0] + b[0], a[1] + b[1]) for a, b in pairs]

    return _best_split(scores, order)


def _half_sums(sums, value, ends):
    """`lx` and `l2` of one half of a group."""
    sx, sw = sums
    low, mid, high = value * value
    lx = rounded(sx[-1] * value[2]) - (sx[ends[0]] + sx[ends[1]])
    l2 = rounded(rounded(sw[-1] * value[2]) * value[2])
    l2 = l2 + rounded(sw[ends[0]] * (low - mid))
    return lx, l2 + rounded(sw[ends[1]] * (mid - high))


def _best_split(scores, order):
    """Scale, levels `[n, ...]`, move and whether there is any, of the best split.

    Args:
      scores: `lx` and `l2` of all moves for the ends of the first two runs.
      order: that sorts the weights.
    """
    splits = jnp.asarray(_splits(order.shape[0]))

    def step(best, place):
        for move, (lx, l2) in enumerate(scores(splits[place])):
            energy, _, _, _, some = best
            better = (l2 > 0) & (~some | (lx * lx > energy * l2))
            scale = ratio(lx, l2)
            new = (scale * lx, scale, place, jnp.int32(move), better)
            best = [jnp.where(better, n, b) for n, b in zip(new, best, strict=True)]
        return best, None

    none = jnp.zeros(order.shape[1:], jnp.int32)
    zero = none.astype(jnp.float32)
    start = [zero, zero, none, none, none > 0]
    places = jnp.arange(len(splits), dtype=jnp.int32)
    _, scale, place, move, some = jax.lax.scan(step, start, places)[0]
    ends = splits[place]
    rank = jnp.argsort(order, axis=0)
    above = [(rank >= ends[..., k]).astype(jnp.float32) for k in (0, 1)]
    return scale, above[0] + above[1], move, some


def _pairs(words):
    """The two bytes of 16-bit words `[g, ...]`, the lower first."""
    return ungrouped(jnp.stack([words & 255, words >> 8]))
