"""The Hessian of a layer's output error, and its factor: what error feedback runs on.

For inputs with second moments `H` the output error of quantizing `w` to `v` is
`tr((w - v)^T H (w - v))`. With `H = M D M^T`, `M` unit upper triangular (in blocks),
it is the sum over rows of `D_i |(M^T (w - v))_i|^2`, so each row is rounded after the
errors of the rows before it have been added to it:

    v_i = round(w_i + sum_{j < i} M_{ji} (w_j - v_j)).

This is GPTQ's update without an inverse: one Cholesky factorization in reversed order.

Reference: Frantar et al., GPTQ, arXiv 2210.17323; Chee et al., QuIP, arXiv 2307.13304,
theorem 6 (equivalence of GPTQ and LDLQ); Tseng et al., QuIP#, arXiv 2402.04396,
section 4.1 (block LDL).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

MAX_RETRIES = 8
"""Times the damping is multiplied by ten before giving up on a singular Hessian."""


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
    diagonal = jnp.diagonal(h)
    dead = diagonal <= 0
    size = h.shape[0]
    index = jnp.arange(size)
    mean = jnp.mean(jnp.where(dead, 0.0, diagonal))
    h = h.at[index, index].set(
        jnp.where(dead, jnp.where(mean > 0, mean, 1.0), diagonal)
    )

    def attempt(tries):
        extra = damp * mean * jnp.power(10.0, tries.astype(jnp.float32))
        damped = h.at[index, index].add(extra)
        return jnp.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]

    def failed(state):
        return ~jnp.isfinite(state[0]).all() & (state[1] < MAX_RETRIES)

    def again(state):
        return attempt(state[1] + 1), state[1] + 1

    start = jnp.zeros((), jnp.int32)
    r, tries = jax.lax.while_loop(failed, again, (attempt(start), start))
    if block == 1:
        return r / jnp.diagonal(r)[None, :], tries
    tiles = r.reshape(size, size // block, block)
    own = r.reshape(size // block, block, size // block, block)
    own = own[jnp.arange(size // block), :, jnp.arange(size // block)]
    eye = jnp.broadcast_to(jnp.eye(block, dtype=r.dtype), own.shape)
    inverse = jax.lax.linalg.triangular_solve(own, eye, left_side=True, lower=False)
    m = jnp.einsum("ibk,bkl->ibl", tiles, inverse, precision="highest")
    return m.reshape(size, size), tries
