"""llama.cpp's blocks under the Hessian of a layer's inputs: less error of its output.

The error of a column is `e^T H e` with `e = w - decoded`: that of the layer's outputs
on the calibration text, where an imatrix is `H` without the products of two inputs.
llama.cpp's blocks give the steps and the integers of groups. Error feedback (GPTQ, all
scales known, inputs by falling diagonal of `H`) chooses the codes; then, in rounds,
conjugate gradients solve for the scales of groups and for the steps, which the weights
are linear in, and coordinate descent chooses codes again. Types of several weights to a
code keep llama.cpp's codes; their steps are solved for. The best of all, as stored,
replaces a column of llama.cpp's blocks where its error is lower.

Reference: Frantar et al., GPTQ, arXiv 2210.17323; Kim et al., GuidedQuant, arXiv
2505.07004, section 4 (coordinate descent and least squares in turns).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from qjax.formats import Ggml
from qjax.formats.ggml import TYPES
from qjax.methods.feedback import Grid, levels, run_slice
from qjax.methods.ggml_kinds import (
    KINDS,
    State,
    decoded,
    half_at,
    quotient,
    read,
    stored,
    with_step,
)
from qjax.methods.hessian import Curvature, damped, output_error
from qjax.methods.layerwise import by_slices, slice_width
from qjax.methods.sweeps import descent, refit, sweep

DAMP = 1.0
"""Share of the mean diagonal that is added to a Hessian.

More than GPTQ's 0.01: it keeps blocks near the weight too, which texts other than the
calibration's need, and at three and four bits the calibration's own.
"""

_ROUNDS = 4
_STEPS = 6  # of conjugate gradients


def fed_back(
    name: str,
    w: Float[Array, "in out"],
    blocks: UInt8[Array, "b out"],
    shared: Curvature,
    hessian: Float[Array, "in in"],
) -> UInt8[Array, "b out"]:
    """Blocks whose output error is at most that of llama.cpp's, column by column.

    Args:
      name: of the type, one of `BETTER`.
      w: the weight, float32.
      blocks: llama.cpp's; see `qjax.methods.ggml_encode`.
      shared: the factored Hessian.
      hessian: the Hessian itself, of any scale.
    """
    size, cols = w.shape
    damp = damped(hessian, DAMP)
    back = descent(damp) if name in KINDS else None
    search = _Search(name, shared, hessian, damp, back)

    def one(start, width):
        own = jax.lax.dynamic_slice_in_dim(w, start, width, 1)
        old = jax.lax.dynamic_slice_in_dim(blocks, start, width, 1)
        turned = jnp.swapaxes(old.reshape(-1, TYPES[name].bytes, width), 0, 1)
        new = search.better(own, turned)
        return jnp.swapaxes(new, 0, 1).reshape(old.shape)

    return by_slices(one, cols, slice_width(Ggml(name), size, cols))


@dataclasses.dataclass(frozen=True)
class _Search:
    """Candidates under one Hessian; codes are `[in, out]`, blocks `[in / e, out]`."""

    name: str
    shared: Curvature
    h: Array
    damped: Array
    back: Any

    @property
    def kind(self):
        """What the type can store."""
        return KINDS[self.name]

    def better(self, w, blocks):
        """The better blocks `[bytes, in / e, out]` of every column."""
        change = self.improved if self.name in KINDS else self.restepped
        new = change(w, blocks)
        errors = [
            self.error(w, self.rows(decoded(self.name, b))) for b in (blocks, new)
        ]
        return jnp.where(errors[1] < errors[0], new, blocks)

    def restepped(self, w, blocks):
        """The same codes with other steps."""
        step = half_at(blocks, 0)
        unit = quotient(decoded(self.name, blocks), step)
        found = self.solved(w, lambda step: self.rows(step * unit), step)
        return with_step(blocks, found)

    def improved(self, w, blocks):
        """Other codes, integers and steps."""
        state = read(self.name, blocks)
        codes = self.feedback(w, state)
        first = self.error(w, self.values(state, codes)), state, codes

        def turn(_, best):
            _, state, codes = best
            state = self.other_steps(w, self.other_scales(w, state, codes), codes)
            codes = self.descended(w, state, codes)
            new = self.error(w, self.values(state, codes)), state, codes
            less = new[0] < best[0]
            return jax.tree.map(lambda n, b: jnp.where(less, n, b), new, best)

        _, state, codes = jax.lax.fori_loop(0, _ROUNDS, turn, first)
        return stored(self.name, state, self.elements(codes, state))

    def error(self, w, values):
        """Of every column."""
        return output_error(w - values, self.h)

    def rows(self, x):
        """From `[n, in / e, out]` to `[in / e * n, out]`."""
        return jnp.swapaxes(x, 0, 1).reshape(-1, x.shape[-1])

    def elements(self, x, state: State):
        """Inverse of `rows`."""
        return jnp.swapaxes(x.reshape(len(state.step), -1, x.shape[-1]), 0, 1)

    def scales(self, state: State):
        """Scale and, where there is one, minimum of all groups, `[1 or 2, g, out]`."""
        own = [state.scale] if self.kind.low is None else [state.scale, state.minimum]
        return jnp.stack([self.rows(a) for a in own])

    def values(self, state: State, codes):
        """The weights."""
        return self.spread(self.scales(state), self.kind.values(codes))

    def spread(self, scales, values):
        """Weights of the values of codes."""
        scale, *low = jnp.repeat(scales, self.kind.group, axis=1)
        return scale * values - sum(low)

    def choose(self, target, scales):
        """Nearest codes of a row, and their values."""
        scale, *low = scales
        codes = self.kind.codes_of(quotient(target + sum(low), scale))
        return codes, scale * self.kind.values(codes) - sum(low)

    def feedback(self, w, state: State):
        """Codes in one pass, each input rounded after the errors of those before."""
        order = self.shared.order
        assert order is not None  # see `GGML.prepare`
        sizes, padded = levels(len(w), 0, 1)
        pad = (0, padded - len(w))
        group = jnp.pad(order // self.kind.group, pad)

        def round_row(target, row, scales):
            return self.choose(target, scales[:, group[row]][:, None])

        x, m = jnp.pad(w[order], (pad, (0, 0))), jnp.pad(self.shared.m, (pad, pad))
        codes, _, _ = run_slice(x, m, Grid(round_row), sizes, self.scales(state))
        return codes[: len(w)][jnp.argsort(order)]

    def descended(self, w, state: State, codes):
        """Codes in one pass, each the best one while all others stay."""
        scales = self.scales(state)

        def pick(i, target):
            own = jax.lax.dynamic_slice_in_dim(scales, i // self.kind.group, 1, 1)
            found, value = self.choose(target, own)
            return found[0], value

        return sweep(w, self.values(state, codes), self.back, pick)[0]

    def other_scales(self, w, state: State, codes) -> State:
        """The integers nearest to the scales and minima that suit the codes best."""
        if not self.kind.integers:
            return state
        values = self.kind.values(codes)
        found = self.solved(w, lambda p: self.spread(p, values), self.scales(state))
        scale, *low = (self.elements(a, state) for a in found)
        lows = quotient(low[0], state.low) if low else state.lows
        return self.kind.bounded(
            state.step, quotient(scale, state.step), state.low, lows
        )

    def other_steps(self, w, state: State, codes) -> State:
        """The steps that suit codes and integers best."""
        values = self.kind.values(codes)

        def with_steps(steps):
            return state._replace(**dict(zip(("step", "low"), steps, strict=False)))

        def weights(steps):
            return self.spread(self.scales(with_steps(steps)), values)

        count = 1 if self.kind.low is None else 2
        start = jnp.stack([state.step, state.low][:count])
        return self.kind.bounded(*with_steps(self.solved(w, weights, start)))

    def solved(self, w, weights, start):
        """Least squares for what the weights are linear in."""
        return refit(weights, start, w, self.damped, _STEPS, columns=True)
