"""The Hessian of a layer's output error, and its factor: what error feedback runs on.

For inputs with second moments `H` the output error of quantizing `w` to `v` is
`tr((w - v)^T H (w - v))`. With `H = M D M^T`, `M` unit upper triangular (in blocks),
it is the sum over rows of `D_i |(M^T (w - v))_i|^2`, so each row is rounded after the
errors of the rows before it have been added to it:

    v_i = round(w_i + sum_{j < i} M_{ji} (w_j - v_j)).

This is GPTQ's update without an inverse: one Cholesky factorization in reversed order.
`qjax.methods.feedback` is the loop.

Reference: Frantar et al., GPTQ, arXiv 2210.17323; Chee et al., QuIP, arXiv 2307.13304,
theorem 6 (equivalence of GPTQ and LDLQ); Tseng et al., QuIP#, arXiv 2402.04396,
section 4.1 (block LDL).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qjax.errors import NonFiniteError

MAX_RETRIES = 8
"""Times the damping is multiplied by ten before giving up on a singular Hessian."""


TILE = 256
"""Rows and columns of the blocks that a large Hessian is factored in."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Curvature:
    """A factored Hessian: what all weights with one common input share.

    Rows are in the order in which they are rounded.

    Attributes:
      m: unit upper factor of the damped Hessian, `[in, in]`.
      d: its diagonal `D`, `[in]`: what an error of one unit costs in each row once the
        rows behind it have made up for it.
      diagonal: diagonal of the Hessian itself, `[in]`, 0 for inputs that never fire.
      retries: times the damping was raised, scalar; see `check_curvature`.
      order: int32 `[in]`, the input that each row is; None for their own order.
      transform: `[in, in]`; the rows of `transform @ w` are rounded instead of those of
        `w`. None for the identity.
      first: `[in]`; the first row is rounded to `first @ w` instead, and the others
        make up for it. None for no such exception.
    """

    m: Float[Array, "in in"]
    d: Float[Array, " in"]
    diagonal: Float[Array, " in"]
    retries: Int[Array, ""]
    order: Int[Array, " in"] | None = None
    transform: Float[Array, "in in"] | None = None
    first: Float[Array, " in"] | None = None


@functools.partial(jax.jit, static_argnames=("damp", "block"))
def curvature(
    h: Float[Array, "in in"],
    order: Int[Array, " in"] | None = None,
    *,
    damp: float = 0.01,
    block: int = 1,
) -> Curvature:
    """Factors a Hessian, rows in a given order.

    Args:
      h: symmetric positive semidefinite, float32.
      order: the input that is rounded in each place; None for their own order.
      damp: share of the mean diagonal that is added to it.
      block: rows rounded together; divides `in`.
    """
    diagonal = jnp.diagonal(h)
    if order is not None:
        h, diagonal = h[order[:, None], order[None, :]], diagonal[order]
    r, retries = upper(h, damp)
    own = jnp.square(jnp.diagonal(r))
    return Curvature(_normalized(r, block), own, diagonal, retries, order)


def factor(
    h: Float[Array, "in in"], damp: float = 0.01, block: int = 1
) -> tuple[Float[Array, "in in"], Int[Array, ""]]:
    """The unit upper factor `M` of a damped Hessian.

    `H + lambda I = M D M^T` with `lambda = damp * mean(diag(H))`, where `D` has
    diagonal blocks of `block` and `M` the identity in them. Inputs that never fire
    (`H_ii = 0`) get the mean diagonal. While the factorization fails, `lambda` is
    multiplied by ten.

    Args:
      h: symmetric positive semidefinite, float32.
      damp: share of the mean diagonal that is added.
      block: rows rounded together; divides `in`.

    Returns:
      `M`, and the number of times damping was raised; all NaN when every try failed.
    """
    r, tries = upper(h, damp)
    return _normalized(r, block), tries


def damped(
    h: Float[Array, "in in"], damp: float, tries: Any = None
) -> Float[Array, "in in"]:
    """`H + lambda I`, `lambda = damp * 10**tries * mean(diag(H))`, no zero diagonal."""
    diagonal = jnp.diagonal(h)
    dead = diagonal <= 0
    live = jnp.maximum(jnp.sum((~dead).astype(jnp.float32)), 1.0)
    total = jnp.sum(jnp.where(dead, 0.0, diagonal))
    mean = total / h.shape[0]
    extra = damp * mean
    if tries is not None:
        extra = extra * jnp.power(10.0, tries.astype(jnp.float32))
    filled = jnp.where(total > 0, total / live, 1.0)
    made = jnp.where(dead, filled, diagonal) + extra
    index = jnp.arange(h.shape[0])
    return h.at[index, index].set(made)


def upper(
    h: Float[Array, "in in"], damp: float
) -> tuple[Float[Array, "in in"], Int[Array, ""]]:
    """Upper triangular `R` with `R R^T` the damped Hessian, and the tries it took."""

    def attempt(tries):
        return _cholesky(damped(h, damp, tries))

    def failed(state):
        diagonal, tries = jnp.diagonal(state[0]), state[1]
        return (tries < 0) | (~jnp.isfinite(diagonal).all() & (tries < MAX_RETRIES))

    def again(state):
        return attempt(state[1] + 1), state[1] + 1

    # The first attempt is one of the loop, so that one array is factored in place.
    start = jnp.full((), -1, jnp.int32)
    r, tries = jax.lax.while_loop(failed, again, (jnp.zeros_like(h), start))
    # What is below the diagonal is left over from H. The mask is made outside of the
    # loop, which would keep it in memory.
    row = jax.lax.broadcasted_iota(jnp.int32, h.shape, 0)
    column = jax.lax.broadcasted_iota(jnp.int32, h.shape, 1)
    return jnp.where(row <= column, r, 0.0), tries


def _cholesky(h):
    """Upper `R` with `R R^T = H`; large matrices block by block and in place.

    The part of `h` below the diagonal stays as it is.

    From the last block column to the first, with the columns behind it known:

        R_kk = chol(H_kk - sum_l R_kl R_kl^T),
        R_ik = (H_ik - sum_l R_il R_kl^T) R_kk^-T   for i < k, l > k.
    """
    size = h.shape[0]
    if size <= 2 * TILE or size % TILE:
        return _reversed(h)
    count = size // TILE

    def tile(h, i, j):
        return jax.lax.dynamic_slice(h, (i * TILE, j * TILE), (TILE, TILE))

    def put(h, new, i, j):
        return jax.lax.dynamic_update_slice(h, new, (i * TILE, j * TILE))

    def reduced(h, i, k):
        def less(j, left):
            product = jnp.matmul(tile(h, i, j), tile(h, k, j).T, precision="highest")
            return left - product

        return jax.lax.fori_loop(k + 1, count, less, tile(h, i, k))

    def column(step, h):
        k = count - 1 - step
        own = _reversed(reduced(h, k, k))
        h = put(h, own, k, k)
        eye = jnp.eye(TILE, dtype=h.dtype)
        inverse = jax.lax.linalg.triangular_solve(own, eye, left_side=True, lower=False)

        def row(i, h):
            solved = jnp.matmul(reduced(h, i, k), inverse.T, precision="highest")
            return put(h, solved, i, k)

        return jax.lax.fori_loop(0, k, row, h)

    return jax.lax.fori_loop(0, count, column, h)


def _reversed(h):
    """Upper `R` with `R R^T = H` from a library that has the lower one."""
    turned = jax.lax.linalg.cholesky(h[::-1, ::-1], symmetrize_input=False)
    return turned[::-1, ::-1]


def output_error(
    e: Float[Array, "in out"], h: Float[Array, "in in"]
) -> Float[Array, " out"]:
    """`e_o^T H e_o` of every column."""
    return jnp.sum(e * jnp.matmul(h, e, precision="highest"), axis=0)


def check_curvature(shared: Curvature, name: str) -> int:
    """Times the damping was raised for an input; call it outside of `jit`.

    Args:
      shared: what `prepare` returned.
      name: what the error calls the input.

    Raises:
      NonFiniteError: the Hessian could not be factored at all.
    """
    retries = int(shared.retries)
    if not bool(jnp.isfinite(shared.d).all()):
        raise NonFiniteError(
            f"{name}: the Hessian of the inputs has no Cholesky factor, also with its "
            f"damping raised {retries} times; expected finite second moments. Check "
            "that the activations of the calibration text are finite, or raise damp="
        )
    return retries


def _normalized(r, block: int):
    """The unit upper factor `M` of `R R^T = M D M^T`."""
    if block == 1:
        return r / jnp.diagonal(r)[None, :]
    size = r.shape[0]
    tiles = r.reshape(size, size // block, block)
    own = r.reshape(size // block, block, size // block, block)
    own = own[jnp.arange(size // block), :, jnp.arange(size // block)]
    eye = jnp.broadcast_to(jnp.eye(block, dtype=r.dtype), own.shape)
    inverse = jax.lax.linalg.triangular_solve(own, eye, left_side=True, lower=False)
    m = jnp.einsum("ibk,bkl->ibl", tiles, inverse, precision="highest")
    return m.reshape(size, size)
