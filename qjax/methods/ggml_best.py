"""Better blocks for llama.cpp's types: its own solution, then less weighted error.

The error of a block is the sum of `error_weights * (w - decoded)^2`, for all types and
with or without an imatrix: large weights count more than small ones, as in llama.cpp,
whose own measures differ from type to type. Two starts compete, llama.cpp's block and
one fitted to this very error. The better one is improved in rounds: other steps of the
whole block, integers near those of each group, and a least-squares fit of the steps to
the codes found; every candidate takes the codes nearest to the weights. At the end a
block replaces llama.cpp's where its error as stored is lower, so that no block, and no
tensor, gets worse.

Related: ik_llama.cpp, pull requests 295, 302 (codes) and 624 (integers of groups).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from qjax.formats.ggml import TYPES
from qjax.formats.ggml_parts import AffineParts
from qjax.formats.ggml_parts import half as half_of
from qjax.methods.ggml_bytes import groups, half, ungrouped
from qjax.methods.ggml_pack import PACK, Parts
from qjax.methods.ggml_search import Grid, affine, positive, symmetric

Blocks = Float[Array, " e *blocks"]
Bytes = UInt8[Array, " b *blocks"]

_ROUNDS = 3
_FACTORS = np.array([0.88, 0.92, 0.95, 0.98, 1.02, 1.05, 1.08, 1.12], np.float32)
_FINE = np.linspace(0.88, 1.12, 49, dtype=np.float32)  # where nothing else is searched
_GAIN = 1e-5  # relative; less is within the rounding of float32


class _Type(NamedTuple):
    """What a type can store.

    Attributes:
      group: weights that share integers.
      codes: number of codes.
      zero: the code of zero, or of the minimum.
      step, low: bytes where the step and the minimum's step begin.
      scales: least and greatest integer of a group's scale, none with one group.
      lows: greatest integer of a group's minimum.
    """

    group: int
    codes: int
    zero: int
    step: int
    low: int | None = None
    scales: tuple[int, int] = (1, 1)
    lows: int = 1


_TYPES = {
    "q4_0": _Type(32, 16, 8, 0),
    "q4_1": _Type(32, 16, 0, 0, 2),
    "q5_0": _Type(32, 32, 16, 0),
    "q5_1": _Type(32, 32, 0, 0, 2),
    "q8_0": _Type(32, 256, 128, 0),
    "q2_k": _Type(16, 4, 0, 80, 82, (0, 15), 15),
    "q3_k": _Type(16, 8, 4, 108, None, (-32, 31)),
    "q4_k": _Type(32, 16, 0, 0, 2, (0, 63), 63),
    "q5_k": _Type(32, 32, 0, 0, 2, (0, 63), 63),
    "q6_k": _Type(16, 64, 32, 208, None, (-128, 127)),
}

REFINED = frozenset(_TYPES)
"""Types that have a better encoder."""


class _State(NamedTuple):
    """Steps `[*blocks]` and integers `[groups, *blocks]`; codes follow from them."""

    step: Array
    scales: Array
    low: Array
    lows: Array


def refined(
    kind: str,
    encoder: Callable[..., Bytes],
    x: Blocks,
    importance: Float[Array, "e ..."] | None,
    *square: Float[Array, "..."] | None,
) -> Bytes:
    """Blocks whose weighted error is at most that of llama.cpp's.

    Args:
      kind: name of the type, one of `REFINED`.
      encoder: llama.cpp's; it takes the arguments that follow.
      x: weights, `[elements, *blocks]`.
      importance: see `qjax.methods.ggml_k`.
      square: see `qjax.methods.ggml_legacy`.
    """
    old = encoder(x, importance, *square)
    weight = error_weights(kind, x, importance)
    search = _Search(kind, x, weight)
    state = search.better(search.read(old), search.fitted())
    state = jax.lax.fori_loop(0, _ROUNDS, lambda _, s: search.round(s), state)
    new = search.stored(state)
    errors = [jnp.sum(weight * (_decoded(kind, b) - x) ** 2, 0) for b in (old, new)]
    return jnp.where(errors[1] < errors[0] * (1 - _GAIN), new, old)


def error_weights(
    kind: str, x: Blocks, importance: Float[Array, "e ..."] | None
) -> Blocks:
    """What squared errors are weighed by: `importance * sqrt(x^2 + mean(x^2))`.

    The mean is over the weights that share integers.

    Args:
      kind: name of the type, one of `REFINED`.
      x: weights, `[elements, *blocks]`.
      importance: the imatrix's values, broadcastable to `x`; without, all are 1.
    """
    square = groups(x * x, _TYPES[kind].group)
    weight = ungrouped(jnp.sqrt(square + jnp.mean(square, axis=0)))
    return weight if importance is None else weight * importance


def _decoded(kind: str, blocks: Bytes) -> Blocks:
    w = TYPES[kind].decode(jnp.moveaxis(blocks, 0, -1)[..., None])
    return jnp.moveaxis(w[..., 0], -1, 0)


class _Search:
    """Candidates for the blocks of a chunk."""

    def __init__(self, kind: str, x: Blocks, weight: Blocks) -> None:
        self.kind, self.type = kind, _TYPES[kind]
        self.integers = self.type.scales != (1, 1)
        self.x, self.weight = (groups(a, self.type.group) for a in (x, weight))

    def read(self, blocks: Bytes) -> _State:
        """The state of stored blocks."""
        split = TYPES[self.kind].parts
        assert split is not None
        parts = split(jnp.moveaxis(blocks, 0, -1)[..., None])
        assert isinstance(parts, AffineParts)
        scale = jnp.moveaxis(parts.scale[..., 0], -1, 0)
        step = self._half(blocks, self.type.step)
        low, lows = jnp.zeros_like(step), jnp.zeros_like(scale)
        if self.type.low is not None:
            assert parts.minimum is not None
            minimum = jnp.moveaxis(parts.minimum[..., 0], -1, 0)
            low = self._half(blocks, self.type.low)
            low = low if self.integers else -low
            lows = _quotient(minimum, low)
        scales = _quotient(scale, step)
        return self.bounded(step, scales, low, lows)

    @staticmethod
    def _half(blocks, place):
        pair = jnp.moveaxis(blocks[place : place + 2], 0, -1)[..., None]
        return half_of(pair)[..., 0, 0]

    def bounded(self, step, scales, low, lows) -> _State:
        """What can be stored of steps and real-valued integers."""
        scales = jnp.clip(jnp.round(scales), *self.type.scales)
        least = 0 if self.integers else 1
        lows = jnp.clip(jnp.round(lows), least, self.type.lows)
        return _State(half(step), scales, half(low), lows)

    def fitted(self) -> _State:
        """A start of its own: each group by itself, then their scales together."""
        kind, mass = self.type, jnp.sum(self.weight, 0)
        if kind.low is None:
            fit = symmetric(self.x, self.weight, kind.zero)
            none = jnp.zeros_like(mass[0]), jnp.zeros_like(mass)
            if not self.integers:
                return self.bounded(fit.scale[0], jnp.ones_like(mass), *none)
            both = symmetric(fit.scale, mass, -kind.scales[0])
            return self.bounded(both.scale, both.codes + kind.scales[0], *none)
        fit = affine(self.x, self.weight, Grid(kind.codes - 1, -0.9, 0.05, 36))
        if not self.integers:
            ones = jnp.ones_like(mass)
            return self.bounded(fit.scale[0], ones, fit.low[0], ones)
        step, scales = positive(fit.scale, mass, kind.scales[1])[:2]
        low, lows = positive(fit.low, mass, kind.lows)[:2]
        return self.bounded(step, scales, low, lows)

    def codes(self, state: _State) -> Array:
        """The nearest codes, from 0 on."""
        scale = state.step * state.scales
        codes = jnp.round(_quotient(self.x + state.low * state.lows, scale))
        return jnp.clip(codes + self.type.zero, 0, self.type.codes - 1)

    def errors(self, state: _State) -> Array:
        """Of every group."""
        codes = self.codes(state) - self.type.zero
        miss = state.step * state.scales * codes - state.low * state.lows - self.x
        return jnp.sum(self.weight * miss * miss, axis=0)

    def better(self, old: _State, new: _State) -> _State:
        """The better one, block by block."""
        less = jnp.sum(self.errors(new), 0) < jnp.sum(self.errors(old), 0)
        return jax.tree.map(lambda n, o: jnp.where(less, n, o), new, old)

    def round(self, state: _State) -> _State:
        """Other steps, integers nearby, and steps fitted to the codes."""
        state = self.other_steps(state)
        state = self.near(state)
        return self.better(state, self.refitted(state))

    def other_steps(self, state: _State) -> _State:
        """Steps a few percent off, with the integers that keep products."""

        def one(best, factors):
            up, low_up = factors
            step, low = half(state.step * up), half(state.low * low_up)
            scales = _quotient(state.step * state.scales, step)
            lows = _quotient(state.low * state.lows, low)
            return self.better(best, self.bounded(step, scales, low, lows)), None

        factors = _FACTORS if self.integers else _FINE
        ones = np.ones_like(factors)
        pairs = [(factors, ones)]
        if self.type.low is not None:
            pairs += [(ones, factors), (factors, factors)]
        tried = np.concatenate([np.stack(p, 1) for p in pairs])
        return jax.lax.scan(one, state, jnp.asarray(tried))[0]

    def near(self, state: _State) -> _State:
        """The best integers at most one off, group by group."""
        if not self.integers:
            return state
        span = np.arange(-1, 2)
        lows = span if self.type.low is not None else [0]
        offsets = np.array([(s, m) for s in span for m in lows], np.float32)

        def one(best, offset):
            moved = self.bounded(
                state.step, state.scales + offset[0], state.low, state.lows + offset[1]
            )
            error = self.errors(moved)
            less = error < best[0]
            new = error, moved.scales, moved.lows
            return jax.tree.map(lambda n, b: jnp.where(less, n, b), new, best), None

        first = self.errors(state), state.scales, state.lows
        _, scales, lows = jax.lax.scan(one, first, jnp.asarray(offsets))[0]
        return state._replace(scales=scales, lows=lows)

    def refitted(self, state: _State) -> _State:
        """The steps that suit the codes best."""
        a = state.scales * (self.codes(state) - self.type.zero)
        b = -state.lows
        w, x = self.weight, self.x

        def total(y):
            return jnp.sum(w * y, axis=(0, 1))

        aa, ax = total(a * a), total(a * x)
        if self.type.low is None:
            return state._replace(step=half(_quotient(ax, aa)))
        ab, bb, bx = total(a * b), total(b * b), total(b * x)
        det = aa * bb - ab * ab
        sound = det > 1e-6 * aa * bb
        step = jnp.where(sound, _quotient(ax * bb - bx * ab, det), state.step)
        low = jnp.where(sound, _quotient(bx * aa - ax * ab, det), state.low)
        return state._replace(step=half(step), low=half(low))

    def stored(self, state: _State) -> Bytes:
        """The bytes."""
        step, scales, low, lows = state
        parts = Parts(
            ungrouped(self.codes(state)),
            step,
            scales if self.integers else None,
            None if self.type.low is None else low,
            lows if self.integers else None,
        )
        return PACK[self.kind](parts)


def _quotient(top, bottom):
    """`top / bottom`, 0 for no bottom."""
    some = bottom != 0
    return jnp.where(some, top / jnp.where(some, bottom, 1.0), 0.0)
