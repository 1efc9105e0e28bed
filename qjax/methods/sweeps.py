"""Choosing codes under a Hessian: sweeps over rows, and least squares for the rest.

Both lower `tr((w - v)^T H (w - v))`. `sweep` visits units of rows in order and gives
each the value nearest to

    w_i + sum_j C_ji (w_j - v_j),

which with `C = M - I` of `qjax.methods.hessian.factor` and `v = w` to start from is
error feedback (GPTQ), and with `C = H D^-1`, `D` the diagonal blocks of `H`, is
coordinate descent: the best value of the unit while all others stay. `refit` solves for
everything that the matrix is linear in (tables, scales, codebooks) by conjugate
gradients.

Reference: Frantar et al., GPTQ, arXiv 2210.17323; Kim et al., GuidedQuant, arXiv
2505.07004, section 4 (coordinate descent and least squares for tables in turns).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

BLOCK = 128
"""Rows whose effect on each other is updated one by one, and on the rest together."""

Choose = Callable[[Any, Array], tuple[Array, Array]]
"""`(unit, target [rows, out])` to the unit's codes and its value `[rows, out]`."""


def descent(h: Float[Array, "in in"], unit: int = 1) -> Float[Array, "in in"]:
    """`C` of coordinate descent: `H D^-1` without its diagonal blocks."""
    size = h.shape[0]
    if unit == 1:
        c = h / jnp.diagonal(h)[None, :]
        return c - jnp.eye(size, dtype=h.dtype)
    blocks = diagonal_blocks(h, unit)
    eye = jnp.broadcast_to(jnp.eye(unit, dtype=h.dtype), blocks.shape)
    inverse = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(blocks), True), eye)
    tiles = h.reshape(size, size // unit, unit)
    c = jnp.einsum("ibk,bkl->ibl", tiles, inverse, precision="highest")
    index = jnp.arange(size) // unit
    return jnp.where(index[:, None] == index[None, :], 0.0, c.reshape(size, size))


def diagonal_blocks(
    h: Float[Array, "in in"], unit: int
) -> Float[Array, "units unit unit"]:
    """The diagonal blocks of a matrix."""
    count = h.shape[0] // unit
    index = jnp.arange(count)
    return h.reshape(count, unit, count, unit)[index, :, index]


def sweep(
    w: Float[Array, "in out"],
    v: Float[Array, "in out"],
    coupling: Float[Array, "in in"],
    choose: Choose,
    unit: int = 1,
) -> tuple[Array, Float[Array, "in out"]]:
    """One pass over all units of rows; see the module for the rule.

    Args:
      w: the weight.
      v: values to start from.
      coupling: `C`, zero inside units.
      choose: picks a unit's codes.
      unit: rows chosen together; divides `in`.

    Returns:
      Codes `[units, ...]` stacked over units, and the values they stand for.
    """
    rows = w.shape[0]
    block = max(min(BLOCK, rows) // unit, 1) * unit
    count, pad = -(-rows // block), -rows % block
    grown = [(0, pad), (0, 0)]
    w, error = jnp.pad(w, grown), jnp.pad(w - v, grown)
    coupling = jnp.pad(coupling, [(0, pad), (0, pad)])
    units = block // unit

    def one(b, error):
        start = b * block
        columns = jax.lax.dynamic_slice_in_dim(coupling, start, block, 1)
        own = jax.lax.dynamic_slice_in_dim(columns, start, block, 0)
        old = jax.lax.dynamic_slice_in_dim(error, start, block, 0)
        target = jax.lax.dynamic_slice_in_dim(w, start, block, 0)
        target = target + jnp.matmul(columns.T, error, precision="highest")

        def step(new, i):
            at = i * unit
            part = jax.lax.dynamic_slice_in_dim(own, at, unit, 1)
            change = jnp.matmul(part.T, new - old, precision="highest")
            goal = jax.lax.dynamic_slice_in_dim(target, at, unit, 0) + change
            codes, value = choose(b * units + i, goal)
            here = jax.lax.dynamic_slice_in_dim(w, start + at, unit, 0)
            new = jax.lax.dynamic_update_slice_in_dim(new, here - value, at, 0)
            return new, codes

        index = jnp.arange(units, dtype=jnp.int32)
        new, codes = jax.lax.scan(step, old, index)
        return jax.lax.dynamic_update_slice_in_dim(error, new, start, 0), codes

    blocks = jnp.arange(count, dtype=jnp.int32)
    error, codes = jax.lax.scan(lambda e, b: one(b, e), error, blocks)
    codes = codes.reshape(count * units, *codes.shape[2:])
    return codes[: rows // unit], (w - error)[:rows]


def refit(
    decode: Callable[[Array], Array],
    start: Array,
    w: Float[Array, "in out"],
    h: Float[Array, "in in"],
    steps: int,
    *,
    columns: bool = False,
) -> Array:
    """Minimizes `tr((w - decode(p))^T H (w - decode(p)))` over `p`.

    Conjugate gradients, preconditioned by the diagonal of `H` where a parameter acts.

    Args:
      decode: linear in `p`, with non-overlapping 0-1 (or scaled) dependence.
      start: `p` to start from; never left for a worse one in exact arithmetic.
      w: the weight.
      h: the Hessian, positive definite.
      steps: iterations.
      columns: the last axis of `p` is the columns of `w`, which are independent.

    Returns:
      The parameters, shaped like `start`.
    """
    _, pull = jax.vjp(decode, start)

    def down(e):
        return pull(jnp.matmul(h, e, precision="highest"))[0]

    def dot(a, b):
        axes = tuple(range(a.ndim - 1)) if columns else None
        return jnp.sum(a * b, axis=axes, keepdims=columns)

    ones = jnp.ones_like(start)
    mass = pull(jnp.diagonal(h)[:, None] * decode(ones))[0]
    scale = jnp.where(mass > 0, 1.0 / jnp.where(mass > 0, mass, 1.0), 0.0)

    def step(_, state):
        p, r, z, d, rz = state
        image = down(decode(d))
        curve = dot(d, image)
        length = jnp.where(curve > 0, rz / jnp.where(curve > 0, curve, 1.0), 0.0)
        p, r = p + length * d, r - length * image
        z = scale * r
        new = dot(r, z)
        turn = jnp.where(rz > 0, new / jnp.where(rz > 0, rz, 1.0), 0.0)
        return p, r, z, z + turn * d, new

    r = down(w - decode(start))
    z = scale * r
    state = (start, r, z, z, dot(r, z))
    return jax.lax.fori_loop(0, steps, step, state)[0]
