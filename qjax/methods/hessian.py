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
    h: Float[Array, "in in"], damp: float, tries: Any = 0
) -> Float[Array, "in in"]:
    """`H + lambda I`, `lambda = damp * 10**tries * mean(diag(H))`, no zero diagonal."""
    index = jnp.arange(h.shape[0])
    return h.at[index, index].set(_damped(jnp.diagonal(h), damp, tries))


def _damped(diagonal, damp, tries):
    """The diagonal that `damped` puts in the place of a Hessian's."""
    dead = diagonal <= 0
    live = jnp.maximum(jnp.sum((~dead).astype(jnp.float32)), 1.0)
    total = jnp.sum(jnp.where(dead, 0.0, diagonal))
    power = jnp.power(10.0, jnp.asarray(tries, jnp.float32))
    filled = jnp.where(total > 0, total / live, 1.0)
    return jnp.where(dead, filled, diagonal) + damp * total / len(diagonal) * power


def upper(
    h: Float[Array, "in in"], damp: float
) -> tuple[Float[Array, "in in"], Int[Array, ""]]:
    """Upper triangular `R` with `R R^T` the damped Hessian, and the tries it took.

    What is below the diagonal stays `H` until a try succeeded, and the next one starts
    from it: `h` is factored in place where it is donated.
    """
    exact = jnp.diagonal(h)

    def failed(state):
        r, tries = state
        finite = jnp.isfinite(jnp.diagonal(r)).all()
        return (tries < 0) | (~finite & (tries < MAX_RETRIES))

    def again(state):
        r, tries = state
        diagonal = _damped(exact, damp, tries + 1)
        return _cholesky(r, diagonal), tries + 1

    r, tries = jax.lax.while_loop(failed, again, (h, jnp.full((), -1, jnp.int32)))
    # The mask is made outside of the loop, which would keep it in memory.
    return jnp.where(_above(h.shape), r, 0.0), tries


def _above(shape):
    """Where a matrix is on its diagonal or above it."""
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return row <= jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def _cholesky(a, diagonal):
    """Upper `R` with `R R^T = H`; large matrices block by block and in place.

    `H` is the symmetric matrix that `a` holds below its diagonal, and `diagonal`. That
    part of `a` stays as it is; `R` takes the place of the rest.

    From the last block column to the first, with the columns behind it known:

        R_kk = chol(H_kk - sum_l R_kl R_kl^T),
        R_ik = (H_ik - sum_l R_il R_kl^T) R_kk^-T   for i < k, l > k.
    """
    size = a.shape[0]
    if size <= 2 * TILE or size % TILE:
        return jnp.where(_above(a.shape), _reversed(_symmetric(a, diagonal)), a)
    count = size // TILE
    above = _above((TILE, TILE))

    def tile(a, i, j):
        return jax.lax.dynamic_slice(a, (i * TILE, j * TILE), (TILE, TILE))

    def put(a, new, i, j):
        return jax.lax.dynamic_update_slice(a, new, (i * TILE, j * TILE))

    def reduced(a, left, i, k):
        def less(j, left):
            product = jnp.matmul(tile(a, i, j), tile(a, k, j).T, precision="highest")
            return left - product

        return jax.lax.fori_loop(k + 1, count, less, left)

    def column(step, a):
        k = count - 1 - step
        old = tile(a, k, k)
        own = jax.lax.dynamic_slice(diagonal, (k * TILE,), (TILE,))
        own = _reversed(reduced(a, _symmetric(old, own), k, k))
        a = put(a, jnp.where(above, own, old), k, k)
        eye = jnp.eye(TILE, dtype=a.dtype)
        inverse = jax.lax.linalg.triangular_solve(own, eye, left_side=True, lower=False)

        def row(i, a):
            left = reduced(a, tile(a, k, i).T, i, k)
            return put(a, jnp.matmul(left, inverse.T, precision="highest"), i, k)

        return jax.lax.fori_loop(0, k, row, a)

    return jax.lax.fori_loop(0, count, column, a)


def _symmetric(a, diagonal):
    """The symmetric matrix of what is below the diagonal, and a diagonal."""
    below = jnp.tril(a, -1)
    return below + below.T + jnp.diag(diagonal)


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


def damping_raised(shared: Any, name: str) -> int:
    """`check_curvature` of whatever a method's `prepare` returned; 0 without one."""
    parts = jax.tree.leaves(shared, is_leaf=lambda x: isinstance(x, Curvature))
    found = [check_curvature(p, name) for p in parts if isinstance(p, Curvature)]
    return max(found, default=0)


def singular(name: str, method: str) -> str:
    """The message for a weight that a method made NaN."""
    return (
        f"{name}: {method} gave weights that are NaN or infinite; expected finite "
        "ones. Its Hessian may be singular: give more calibration text, raise damp=, "
        "or take another method for this tensor"
    )


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
