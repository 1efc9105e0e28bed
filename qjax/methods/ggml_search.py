"""llama.cpp's four searches for the scale of a group, over many groups at once.

Arrays hold the elements of a group on axis 0, `x[n, *groups]`; lanes of the last axis
are groups. The searches follow the C code operation by operation (see `ggml_exact`), so
codes, held in float32, equal those of a llama.cpp built without fused multiply-add.

Reference: ggml `src/ggml-quants.c` (MIT): `make_qx_quants`, `make_q3_quants`,
`make_qkx2_quants`, `make_qkx3_quants`, `make_qp_quants`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qjax.formats.base import divided, rounded
from qjax.methods.ggml_exact import (
    best_of,
    extreme,
    inverse,
    power_of_two,
    quotients,
    ratio,
    total,
)

TINY = 1e-15  # groups whose largest magnitude is smaller are taken as zero


class Fit(NamedTuple):
    """What a search found: `x` is nearly `scale * codes - low`."""

    scale: Float[Array, "*groups"]
    codes: Float[Array, " n *groups"]
    low: Any = None


def error_weights(
    x: Float[Array, " e *groups"],
    importance: Float[Array, "e ..."] | None,
    share: float = 2.0,
) -> Float[Array, " e *groups"]:
    """`importance * sqrt(share * mean(x^2) + x^2)`, or `x^2` without an imatrix.

    Args:
      x: whole blocks, which the mean is over.
      importance: the imatrix's values, broadcastable to `x`.
      share: of the mean square.
    """
    square = rounded(x * x)
    if importance is None:
        return square
    mean = total(lambda a: a * a, x) * (share / x.shape[0])
    return importance * jnp.sqrt(mean + square)


def odd_codes(scale: Float[Array, " g *groups"], levels: int):
    """Codes of a block's scales, `step * (2 code + 1)` up to `code = levels`.

    Returns:
      The step and the codes.
    """
    top = jnp.max(scale, axis=0)
    step = divided(top, jnp.full_like(top, 2 * levels + 1))
    codes = jnp.round(0.5 * (rounded(inverse(step) * scale) - 1.0))
    return step, jnp.clip(codes, 0, levels)


def symmetric(
    x: Float[Array, " n *groups"], weight: Float[Array, " n *groups"], levels: int
) -> Fit:
    """`make_qx_quants`: codes 0 to `2 levels - 1`, `x = scale * (code - levels)`.

    Nineteen scales around the one that gives the extreme element the lowest code; the
    one whose least-squares fit explains most wins.

    Args:
      x: values.
      weight: of their squared errors.
      levels: largest magnitude of a code.
    """
    top = extreme(x)
    zero = jnp.abs(top) < TINY
    steps = np.array([0, *range(-9, 0), *range(1, 10)], np.float32)
    starts = -(np.float32(levels) + np.float32(0.1) * steps)
    inv = quotients(starts, jnp.where(zero, 1.0, top))

    def codes(inv, x):
        return jnp.clip(jnp.round(inv * x), -levels, levels - 1)

    def sums(x, w):
        code = codes(inv, x)
        return w * x * code, w * code * code

    lx, l2 = total(sums, x, weight)
    scale = ratio(lx, l2)

    def better(new, best):
        return (new["l2"] > 0) & (new["lx"] * new["lx"] > best["energy"] * new["l2"])

    tried = {"scale": scale, "inv": inv, "lx": lx, "l2": l2, "energy": scale * lx}
    best = best_of(better, tried)
    return Fit(
        jnp.where(zero, 0.0, best["scale"]),
        jnp.where(zero, 0.0, codes(best["inv"], x) + levels),
    )


def by_sweeps(x: Float[Array, " n *groups"], levels: int) -> Fit:
    """`make_q3_quants`: as `symmetric` with weights `x^2`, refined element by element.

    Args:
      x: values.
      levels: largest magnitude of a code.
    """
    top = extreme(x)
    zero = jnp.abs(top) < TINY
    # Eighth powers of small weights vanish; a power of two changes nothing else.
    unit = jnp.where(zero, 1.0, power_of_two(top))
    x, top = x / unit, jnp.where(zero, 1.0, top / unit)
    inv = -levels / top
    codes = jnp.clip(jnp.round(inv * x), -levels, levels - 1)
    codes, lx, l2 = _sweeps(x, x * x, codes, -levels, levels - 1)
    return Fit(
        jnp.where(zero, 0.0, ratio(lx, l2) * unit),
        jnp.where(zero, 0.0, codes + levels),
    )


def _sweeps(x, weight, codes, low: int, high: int, *, wrap: bool = False):
    """Up to five rounds of moving one code at a time to its best value.

    With `wrap`, codes that are kept from one round to the next are unsigned bytes.

    Returns:
      Codes, and the sums `lx` and `l2` whose ratio is the least-squares scale.
    """

    def element(sums, parts):
        lx, l2 = sums
        x, w, old = parts
        rest_x = lx - rounded(w * x * old)
        rest_2 = l2 - rounded(w * old * old)
        sound = (rest_x > 0) & (rest_2 > 0)
        goal = divided(x * rest_2, jnp.where(sound, rest_x, 1.0))
        new = jnp.clip(jnp.round(goal), low, high)
        new_x = rest_x + rounded(w * x * new)
        new_2 = rest_2 + rounded(w * new * new)
        more = new_x * new_x * l2 > lx * lx * new_2
        move = sound & (new != old) & more
        sums = jnp.where(move, new_x, lx), jnp.where(move, new_2, l2)
        return sums, jnp.where(move, kept(new), old)

    def kept(codes):
        return jnp.where(codes < 0, codes + 256, codes) if wrap else codes

    def round_(state):
        count, _, codes, sums = state
        sums, new = jax.lax.scan(element, sums, (x, weight, codes))
        return count + 1, jnp.any(new != codes), new, sums

    def unfinished(state):
        return (state[0] < 5) & state[1]

    sums = total(lambda x, w, c: (w * x * c, w * c * c), x, weight, codes)
    state = (0, jnp.bool_(True), kept(codes), sums)
    _, _, codes, (lx, l2) = jax.lax.while_loop(unfinished, round_, state)
    return codes, lx, l2


class Grid(NamedTuple):
    """Inverse scales that `affine` tries: `(start + step * k + levels) / range`."""

    levels: int
    start: float
    step: float
    count: int
    absolute: bool = False

    def values(self) -> np.ndarray:
        """Numerators for k = 0 .. `count`, rounded as C rounds them."""
        steps = np.arange(self.count + 1, dtype=np.float32) * np.float32(self.step)
        return (np.float32(self.start) + steps) + np.float32(self.levels)


def affine(
    x: Float[Array, " n *groups"], weight: Float[Array, " n *groups"], grid: Grid
) -> Fit:
    """`make_qkx2_quants` and `make_qkx3_quants`: `x = scale * code - low`, `low >= 0`.

    The range of each candidate starts at the best offset so far.

    Args:
      x: values.
      weight: of their errors.
      grid: what is tried; errors are squared unless `grid.absolute`.
    """
    low = jnp.minimum(jnp.min(x, axis=0), 0.0)
    high = jnp.max(x, axis=0)
    flat = high <= low
    sums = total(lambda x, w: (w, w * x), x, weight)

    def codes(inv, base):
        return jnp.clip(jnp.round(inv * (x - base)), 0, grid.levels)

    def error(scale, offset, codes):
        def term(x, w, code):
            miss = rounded(scale * code) + offset - x
            return w * (jnp.abs(miss) if grid.absolute else miss * miss)

        return total(term, x, weight, codes)

    def step(best, value):
        base = best[2]
        span = high - base
        inv = jnp.where(span == 0, 0.0, value / jnp.where(span == 0, 1.0, span))
        found = codes(inv, base)
        scale, offset, sound = _least_squares(found, x, weight, sums)
        new = (error(scale, offset, found), scale, offset, inv, base)
        better = sound & (new[0] < best[0])
        choose = lambda n, b: jnp.where(better, n, b)  # noqa: E731
        return jax.tree.map(choose, new, best), None

    inv = grid.levels / jnp.where(flat, 1.0, high - low)
    scale = inverse(inv)
    best = (error(scale, low, codes(inv, low)), scale, low, inv, low)
    best = jax.lax.scan(step, best, jnp.asarray(grid.values()))[0]
    _, scale, offset, inv, base = best
    return Fit(
        jnp.where(flat, 0.0, scale),
        jnp.where(flat, 0.0, codes(inv, base)),
        -jnp.where(flat, low, offset),
    )


def _least_squares(codes, x, weight, weight_sums):
    """Scale and offset for given codes, and where they are determined."""

    def terms(x, w, code):
        part = w * code
        return part, part * code, part * x

    l1, l2, lx = total(terms, x, weight, codes)
    mass, mean = weight_sums
    det = rounded(mass * l2) - rounded(l1 * l1)
    sound = det > 0
    det = jnp.where(sound, det, 1.0)
    scale = divided(rounded(mass * lx) - rounded(mean * l1), det)
    offset = divided(rounded(l2 * mean) - rounded(l1 * lx), det)
    above = offset > 0
    scale = jnp.where(above, ratio(lx, l2), scale)
    return scale, jnp.where(above, 0.0, offset), sound


def positive(
    x: Float[Array, " n *groups"],
    weight: Float[Array, " n *groups"],
    levels: int,
    *,
    wrap: bool = False,
) -> Fit:
    """`make_qp_quants`: codes 0 to `levels` of values that are not negative.

    Args:
      x: values, such as the scales of a block.
      weight: of their squared errors.
      levels: largest code.
      wrap: a few values are negative all the same; their codes lie below 256, where
        C's unsigned bytes keep them.
    """
    top = jnp.max(x, axis=0)
    zero = top < TINY
    steps = np.array([0, *range(-4, 0), *range(1, 5)], np.float32)
    tried = np.float32(0.1) * steps + np.float32(levels)
    inv = quotients(tried, jnp.where(zero, 1.0, top))
    scale = inverse(inv)

    def codes(inv, x):
        return jnp.minimum(jnp.round(inv * x), levels)

    first = (jnp.arange(len(steps)) == 0).reshape(-1, *[1] * top.ndim)

    def error(x, w):
        code = codes(inv, x)
        if wrap:
            code = jnp.where(first & (code < 0), code + 256, code)
        miss = x - rounded(scale * code)
        return w * miss * miss

    errors = total(error, x, weight)
    better = lambda new, best: new[0] < best[0]  # noqa: E731
    inv = best_of(better, (errors, inv))[1]
    low = -255 if wrap else 0
    found, lx, l2 = _sweeps(x, weight, codes(inv, x), low, levels, wrap=wrap)
    return Fit(
        jnp.where(zero, 0.0, ratio(lx, l2)),
        jnp.where(zero, 0.0, found),
    )
