"""Better blocks for llama.cpp's types: its own solution, then less weighted error.

The error of a block is the sum of `error_weights * (w - decoded)^2`, for all types and
with or without an imatrix: large weights count more than small ones, as in llama.cpp,
whose own measures differ from type to type. Two starts compete, llama.cpp's block and
one fitted to this very error. The better one is improved in rounds: other steps of the
whole block, integers near those of each group, and a least-squares fit of the steps to
the codes found; every candidate takes the codes nearest to the weights. Types of
several weights to a code keep llama.cpp's codes and get the step that suits them best.
At the end a block replaces llama.cpp's where its error as stored is lower, so that no
block, and no tensor, gets worse.

Related: ik_llama.cpp, pull requests 295, 302 (codes) and 624 (integers of groups).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qjax.methods import ggml_iq4 as iq4
from qjax.methods.ggml_bytes import groups, half, ungrouped
from qjax.methods.ggml_kinds import (
    KINDS,
    POINTS,
    Bytes,
    State,
    decoded,
    half_at,
    quotient,
    read,
    stored,
    with_step,
)
from qjax.methods.ggml_search import Grid, affine, positive, symmetric

Blocks = Float[Array, " e *blocks"]

_ROUNDS = 3
_FACTORS = np.array([0.88, 0.92, 0.95, 0.98, 1.02, 1.05, 1.08, 1.12], np.float32)
_FINE = np.linspace(0.88, 1.12, 49, dtype=np.float32)  # where nothing else is searched
_GAIN = 1e-5  # relative; less is within the rounding of float32


def refined(
    kind: str,
    encoder: Callable[..., Bytes],
    x: Blocks,
    importance: Float[Array, "e ..."] | None,
    *square: Float[Array, "..."] | None,
) -> Bytes:
    """Blocks whose weighted error is at most that of llama.cpp's.

    Args:
      kind: name of the type, one of `BETTER`.
      encoder: llama.cpp's; it takes the arguments that follow.
      x: weights, `[elements, *blocks]`.
      importance: see `qjax.methods.ggml_k`.
      square: see `qjax.methods.ggml_legacy`.
    """
    old = encoder(x, importance, *square)
    weight = error_weights(kind, x, importance)
    if kind in KINDS:
        search = _Search(kind, x, weight)
        state = search.better(read(kind, old), search.fitted())
        state = jax.lax.fori_loop(0, _ROUNDS, lambda _, s: search.round(s), state)
        new = stored(kind, state, ungrouped(search.codes(state)))
    else:
        unit = quotient(decoded(kind, old), half_at(old, 0))
        fit = jnp.sum(weight * unit * x, 0), jnp.sum(weight * unit * unit, 0)
        new = with_step(old, quotient(*fit))
    errors = [jnp.sum(weight * (decoded(kind, b) - x) ** 2, 0) for b in (old, new)]
    return jnp.where(errors[1] < errors[0] * (1 - _GAIN), new, old)


def error_weights(
    kind: str, x: Blocks, importance: Float[Array, "e ..."] | None
) -> Blocks:
    """What squared errors are weighed by: `importance * sqrt(x^2 + mean(x^2))`.

    The mean is over the weights that share integers.

    Args:
      kind: name of the type, one of `BETTER`.
      x: weights, `[elements, *blocks]`.
      importance: the imatrix's values, broadcastable to `x`; without, all are 1.
    """
    square = groups(x * x, KINDS[kind].group if kind in KINDS else POINTS[kind])
    weight = ungrouped(jnp.sqrt(square + jnp.mean(square, axis=0)))
    return weight if importance is None else weight * importance


class _Search:
    """Candidates for the blocks of a chunk."""

    def __init__(self, kind: str, x: Blocks, weight: Blocks) -> None:
        self.type = KINDS[kind]
        self.integers = self.type.integers
        self.x, self.weight = (groups(a, self.type.group) for a in (x, weight))

    def fitted(self) -> State:
        """A start of its own: each group by itself, then their scales together."""
        kind, mass = self.type, jnp.sum(self.weight, 0)
        if kind.low is None:
            if kind.table is None:
                scale = symmetric(self.x, self.weight, kind.zero).scale
            else:
                scale = iq4.search(self.x, self.weight)
            none = jnp.zeros_like(mass[0]), jnp.zeros_like(mass)
            if not self.integers:
                return kind.bounded(scale[0], jnp.ones_like(mass), *none)
            both = symmetric(scale, mass, -kind.scales[0])
            return self.type.bounded(both.scale, both.codes + kind.scales[0], *none)
        fit = affine(self.x, self.weight, Grid(kind.codes - 1, -0.9, 0.05, 36))
        if not self.integers:
            ones = jnp.ones_like(mass)
            return self.type.bounded(fit.scale[0], ones, fit.low[0], ones)
        step, scales = positive(fit.scale, mass, kind.scales[1])[:2]
        low, lows = positive(fit.low, mass, kind.lows)[:2]
        return self.type.bounded(step, scales, low, lows)

    def codes(self, state: State) -> Array:
        """The nearest codes, from 0 on."""
        return self.type.codes_of(quotient(self.x + state.minimum, state.scale))

    def errors(self, state: State) -> Array:
        """Of every group."""
        values = self.type.values(self.codes(state))
        miss = state.scale * values - state.minimum - self.x
        return jnp.sum(self.weight * miss * miss, axis=0)

    def better(self, old: State, new: State) -> State:
        """The better one, block by block."""
        less = jnp.sum(self.errors(new), 0) < jnp.sum(self.errors(old), 0)
        return jax.tree.map(lambda n, o: jnp.where(less, n, o), new, old)

    def round(self, state: State) -> State:
        """Other steps, integers nearby, and steps fitted to the codes."""
        state = self.other_steps(state)
        state = self.near(state)
        return self.better(state, self.refitted(state))

    def other_steps(self, state: State) -> State:
        """Steps a few percent off, with the integers that keep products."""

        def one(best, factors):
            up, low_up = factors
            step, low = half(state.step * up), half(state.low * low_up)
            scales = quotient(state.scale, step)
            lows = quotient(state.minimum, low)
            return self.better(best, self.type.bounded(step, scales, low, lows)), None

        factors = _FACTORS if self.integers else _FINE
        ones = np.ones_like(factors)
        pairs = [(factors, ones)]
        if self.type.low is not None:
            pairs += [(ones, factors), (factors, factors)]
        tried = np.concatenate([np.stack(p, 1) for p in pairs])
        return jax.lax.scan(one, state, jnp.asarray(tried))[0]

    def near(self, state: State) -> State:
        """The best integers at most one off, group by group."""
        if not self.integers:
            return state
        span = np.arange(-1, 2)
        lows = span if self.type.low is not None else [0]
        offsets = np.array([(s, m) for s in span for m in lows], np.float32)

        def one(best, offset):
            moved = self.type.bounded(
                state.step, state.scales + offset[0], state.low, state.lows + offset[1]
            )
            error = self.errors(moved)
            less = error < best[0]
            new = error, moved.scales, moved.lows
            return jax.tree.map(lambda n, b: jnp.where(less, n, b), new, best), None

        first = self.errors(state), state.scales, state.lows
        _, scales, lows = jax.lax.scan(one, first, jnp.asarray(offsets))[0]
        return state._replace(scales=scales, lows=lows)

    def refitted(self, state: State) -> State:
        """The steps that suit the codes best."""
        a = state.scales * self.type.values(self.codes(state))
        b = -state.lows
        w, x = self.weight, self.x

        def total(y):
            return jnp.sum(w * y, axis=(0, 1))

        aa, ax = total(a * a), total(a * x)
        if self.type.low is None:
            return state._replace(step=half(quotient(ax, aa)))
        ab, bb, bx = total(a * b), total(b * b), total(b * x)
        det = aa * bb - ab * ab
        sound = det > 1e-6 * aa * bb
        step = jnp.where(sound, quotient(ax * bb - bx * ab, det), state.step)
        low = jnp.where(sound, quotient(bx * aa - ax * ab, det), state.low)
        return state._replace(step=half(step), low=half(low))
