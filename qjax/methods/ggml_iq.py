"""IQ2 and IQ3: signs, and magnitudes from the points of a grid.

Encoders take blocks `x [256, *blocks]` and the imatrix's values of their inputs,
`[256, ...]` broadcastable to them, or None; they return bytes `[bytes, *blocks]`. A
group is rounded for a number of scales, the least-squares fit that explains most wins,
and points that were not in the grid are chosen once more for its scale.

Where a block of IQ3_S has a group of zeros only, llama.cpp (ggml 0.25.1) writes the
groups that follow to wrong places; here they are where decoders look for them.

Reference: ggml `src/ggml-quants.c` (MIT): `quantize_row_iq2_*_impl`,
`quantize_row_iq3_*_impl`.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from qjax.formats.base import divided, rounded
from qjax.methods.ggml_books import Book
from qjax.methods.ggml_bytes import (
    groups,
    half,
    half_bytes,
    joined,
    stacked,
    ungrouped,
)
from qjax.methods.ggml_exact import best_of, inverse, ratio, total
from qjax.methods.ggml_search import TINY, error_weights, odd_codes, positive

Blocks = Float[Array, " e *blocks"]
Importance = Float[Array, "e ..."] | None
Bytes = UInt8[Array, " b *blocks"]


@dataclasses.dataclass(frozen=True)
class _Kind:
    """How the groups of a type are searched.

    Attributes:
      book: the grid.
      size: weights of a group.
      share: of the mean square in the weights of errors.
      count: scales that are tried on either side of the plain one.
      step: between them.
      even: of 8 signs only 7 are stored: the number of minuses is even.
      tiny: groups whose largest magnitude is smaller are taken as zero.
      again: which points are chosen once more for the final scale: `off` (those that
        were not in the grid), `any` (all of a group with such points) or `all`.
    """

    book: Book
    size: int
    share: float
    count: int
    step: float
    even: bool
    tiny: float
    again: str

    def numerators(self) -> np.ndarray:
        """Of the inverse scales, rounded as C rounds them."""
        steps = np.arange(-self.count, self.count + 1, dtype=np.float32)
        return np.float32(2 * self.book.levels - 1) + steps * np.float32(self.step)


class _Groups(NamedTuple):
    """Groups as they are stored.

    Attributes:
      index: of points.
      signs: a byte for 8 weights.
      scale: of groups.
    """

    index: Int[Array, "p g *blocks"]
    signs: Int[Array, "s g *blocks"]
    scale: Float[Array, " g *blocks"]


_XXS2 = _Kind(Book("iq2_xxs", 2), 32, 1.0, 6, 0.1, even=True, tiny=TINY, again="all")
_XS2 = _Kind(Book("iq2_xs", 2), 16, 1.0, 9, 0.1, even=True, tiny=TINY, again="off")
_S2 = _Kind(Book("iq2_s", 1), 16, 2.0, 9, 0.1, even=False, tiny=1e-8, again="off")
_XXS3 = _Kind(Book("iq3_xxs", 2), 32, 2.0, 15, 0.2, even=True, tiny=1e-8, again="off")
_S3 = _Kind(Book("iq3_s", 3), 32, 2.0, 9, 0.2, even=False, tiny=0.0, again="any")


def iq2_xxs(x: Blocks, importance: Importance) -> Bytes:
    """Points of 8, seven signs each, 4-bit scales of 32."""
    found = _search(x, error_weights(x, importance, _XXS2.share), _XXS2)
    step, scales = _scales(found.scale, 1.0)
    rest = _word_bytes(_signs_and_scale(found.signs, scales), 4)
    return stacked(step, ungrouped(stacked(found.index, rest)))


def iq2_xs(x: Blocks, importance: Importance) -> Bytes:
    """Points of 8, seven signs each, 4-bit scales of 16."""
    found = _search(x, error_weights(x, importance, _XS2.share), _XS2)
    step, scales = _scales(found.scale, 1.0)
    pairs = ungrouped(_word_bytes(ungrouped(found.index | found.signs << 9), 2))
    return stacked(step, pairs, joined(scales, 4))


def iq2_s(x: Blocks, importance: Importance) -> Bytes:
    """Points of 8, a sign per weight, 4-bit scales of 16."""
    if importance is None:
        mean = total(lambda a: a * a, x) * (2.0 / x.shape[0])
        weight = 0.25 * mean + rounded(x * x)
    else:
        weight = error_weights(x, importance, _S2.share)
    found = _search(x, weight, _S2)
    step, scales = _scales(found.scale, 0.9875)
    index, signs = ungrouped(found.index), ungrouped(found.signs)
    return stacked(step, index, signs, joined(index >> 8, 2), joined(scales, 4))


def iq3_xxs(x: Blocks, importance: Importance) -> Bytes:
    """Points of 4, seven signs per 8, 4-bit scales of 32."""
    found = _search(x, error_weights(x, importance, _XXS3.share), _XXS3)
    step, scales = _scales(found.scale, 1.0125)
    rest = ungrouped(_word_bytes(_signs_and_scale(found.signs, scales), 4))
    return stacked(step, ungrouped(found.index), rest)


def iq3_s(x: Blocks, importance: Importance) -> Bytes:
    """Points of 4, a sign per weight, 4-bit scales of 32."""
    found = _search(x, error_weights(x, importance, _S3.share), _S3)
    step, scales = _scales(found.scale, 1.033)
    index, signs = ungrouped(found.index), ungrouped(found.signs)
    return stacked(step, index, joined(index >> 8, 1), signs, joined(scales, 4))


def _search(x, weight, kind: _Kind) -> _Groups:
    """Indices, signs and scales of all groups."""
    x, weight = groups(x, kind.size), groups(weight, kind.size)
    signs, size = _magnitudes(x, weight, even=kind.even)
    top = jnp.max(size, axis=0)
    some = (top >= kind.tiny) & (top > 0)
    if kind.again == "all":
        largest = 3.0 * positive(size, weight, 4, wrap=True).scale
        some = some & (largest > 0)
    else:
        largest = top
    largest = jnp.where(some, largest, 1.0)
    index, scale = _points(size, weight, largest, kind)
    signs = jnp.where(scale < 0, signs ^ (127 if kind.even else 255), signs)
    return _Groups(
        jnp.where(some, index, 0),
        jnp.where(some, signs, 0),
        jnp.where(some, jnp.abs(scale), 0.0),
    )


def _magnitudes(x, weight, *, even: bool):
    """Bytes of signs `[n / 8, ...]`, and `x` without them `[n, ...]`.

    Where the number of minuses must be even, the weight that matters least changes its
    sign if need be: its magnitude is negative.
    """
    parts, w = groups(x, 8), groups(weight, 8)
    minus, size = parts < 0, jnp.abs(parts)
    place = jnp.arange(8).reshape(8, *[1] * (parts.ndim - 1))
    if even:
        odd = jnp.sum(minus, axis=0, dtype=jnp.int32) % 2 == 1
        cost = w * parts * parts
        tried = cost, jnp.broadcast_to(place, cost.shape)
        least = best_of(lambda new, best: new[0] < best[0], tried)[1]
        flip = odd & (place == least)
        minus, size = minus ^ flip, jnp.where(flip, -size, size)
    signs = jnp.sum(minus.astype(jnp.int32) << place, axis=0)
    return signs & (127 if even else 255), ungrouped(size)


def _points(x, weight, largest, kind: _Kind):
    """The points of the best scale, and the scale."""
    book = kind.book
    parts, root = (groups(a, book.dims) for a in (x, jnp.sqrt(weight)))

    def project(inv, scale):
        """Points for a scale, and which were in the grid."""
        level = jnp.round(0.5 * (rounded(inv * parts) - 1.0))
        level = jnp.clip(level, 0, book.levels - 1)
        return book.nearest(level, scale, 1.0, 2.0, parts, root)

    def sums(index):
        """Of least squares for the values of points."""
        value = ungrouped(2.0 * book.coordinates(index) + 1.0)
        return total(lambda x, w, q: (w * x * q, w * q * q), x, weight, value)

    def step(best, value):
        inv = value / largest
        index, inside = project(inv, inverse(inv))
        lx, l2 = sums(index)
        better = (l2 > 0) & (lx * lx > best[0] * l2)
        scale = ratio(lx, l2)
        new = (scale * lx, scale, index, inside)
        return jax.tree.map(lambda n, b: jnp.where(better, n, b), new, best), None

    none = jnp.zeros(parts.shape[1:], jnp.int32)
    plain = divided(largest, jnp.full_like(largest, 2 * book.levels - 1))
    inside = jnp.full(none.shape, kind.again != "any")
    best = (jnp.zeros_like(plain), plain, none, inside)
    best = jax.lax.scan(step, best, jnp.asarray(kind.numerators()))[0]
    _, scale, index, inside = best
    again = ~inside
    if kind.again == "any":
        again = jnp.broadcast_to(jnp.any(again, axis=0), again.shape)
    again = again | (kind.again == "all")
    again = again & (scale > 0)
    index = jnp.where(again, project(inverse(scale), scale)[0], index)
    lx, l2 = sums(index)
    refit = jnp.any(again, axis=0) & (l2 > 0)
    return index, jnp.where(refit, ratio(lx, l2), scale)


def _scales(scale, factor: float):
    """Bytes of the step of a block's scales, times `factor`, and their codes."""
    step, codes = odd_codes(scale, 15)
    return half_bytes(half(step * factor)), codes


def _signs_and_scale(signs, scales):
    """Four fields of 7 signs and a 4-bit scale in words of 32 bits."""
    word = scales.astype(jnp.uint32) << 28
    for k in range(4):
        word = word | signs[k].astype(jnp.uint32) << (7 * k)
    return word


def _word_bytes(word, count: int):
    """The bytes of unsigned integers on a new axis 0, the lowest first."""
    return jnp.stack([(word >> (8 * k)).astype(jnp.uint8) for k in range(count)])
