"""Learned rotations: gradient descent on orthogonal matrices.

A rotation that is folded into weights (`qjax.models.rotate`, R1) costs nothing at run
time whatever it is, so it can be learned. `learn_rotation` minimizes any differentiable
loss `L(R)` by Cayley steps, which stay orthogonal: with `G = dL/dR` and the skew
`A = G R^T - R G^T`,

    R <- (I + a/2 A)^-1 (I - a/2 A) R,      a = rate_k / |A|,

`rate_k` falling linearly to 0 and `|A|` the spectral norm, so that a step turns no
plane by more than about `rate_k`. The best iterate is kept.

`rounding_loss` is a loss for it: the error that rounding the rotated weights to nearest
leaves in a layer's output, measured by the second moments of the layer's inputs.
Rounding to nearest is piecewise constant in the codes, so its gradient is that of the
scales with the codes held, which is exact almost everywhere.

Reference: Liu et al., SpinQuant, arXiv 2405.16406, section 3.2; Li et al., Efficient
Riemannian Optimization on the Stiefel Manifold via the Cayley Transform,
arXiv 2002.01113.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.errors import SpecError
from qjax.formats import Format
from qjax.methods.problem import Problem

POWER_STEPS = 8
"""Iterations of the estimate of a spectral norm."""


def learn_rotation(
    loss: Callable[[Float[Array, "n n"]], Float[Array, ""]],
    start: Float[Array, "n n"],
    *,
    steps: int = 100,
    rate: float = 0.1,
    momentum: float = 0.9,
) -> tuple[Float[Array, "n n"], Float[Array, " steps"]]:
    """Minimizes a loss over orthogonal matrices by Cayley SGD with momentum.

    Args:
      loss: differentiable function of the matrix; jit-able.
      start: orthogonal, such as `qjax.models.rotate.random_rotation(n, seed)`.
      steps: gradient steps.
      rate: largest angle of the first step, in radians.
      momentum: of the gradient, in [0, 1).

    Returns:
      The matrix with the least loss, orthogonal to float rounding, and the loss before
      each step.

    Raises:
      SpecError: an argument is out of range, or `start` is not orthogonal.
    """
    n = start.shape[0]
    eye = jnp.eye(n, dtype=jnp.float32)
    start = jnp.asarray(start, jnp.float32)
    if steps < 1 or not (rate > 0 and 0 <= momentum < 1):
        raise SpecError(
            "learn_rotation: needs steps >= 1, rate > 0 and momentum in [0, 1); got "
            f"steps={steps}, rate={rate}, momentum={momentum}"
        )
    off = float(jnp.max(jnp.abs(_dot(start, start.T) - eye)))
    if not off < 1e-3:
        raise SpecError(
            f"learn_rotation: start is not orthogonal (R R^T differs from the identity "
            f"by {off:.3g}); start from random_rotation(n, seed) or the identity"
        )

    def step(state, k):
        r, velocity, best, least = state
        value, gradient = jax.value_and_grad(loss)(r)
        better = value < least
        best = jnp.where(better, r, best)
        least = jnp.where(better, value, least)
        velocity = momentum * velocity + gradient
        product = _dot(velocity, r.T)
        a = product - product.T
        angle = rate * (1.0 - k.astype(jnp.float32) / steps)
        a = a * (0.5 * angle / jnp.maximum(_spectral(a), 1e-30))
        r = jnp.linalg.solve(eye + a, _dot(eye - a, r))
        return (r, velocity, best, least), value

    @jax.jit
    def run(start):
        first = (start, jnp.zeros_like(start), start, jnp.float32(jnp.inf))
        (r, _, best, least), values = jax.lax.scan(step, first, jnp.arange(steps))
        best = jnp.where(loss(r) < least, r, best)
        # One Newton step to the nearest orthogonal matrix removes accumulated rounding.
        return 1.5 * best - 0.5 * _dot(best, _dot(best.T, best)), values

    return run(start)


def rounding_loss(
    readers: Sequence[tuple[Float[Array, "n _"], Float[Array, "n n"] | None]],
    writers: Sequence[tuple[Float[Array, "_ n"], Float[Array, "_ _"] | None]],
    fmt: Format,
) -> Callable[[Float[Array, "n n"]], Float[Array, ""]]:
    """The relative output error of rounding weights in a rotated basis.

    A reader `w` of second moments `H` becomes `R^T w`, of `R^T H R`; a writer becomes
    `w R` and keeps its inputs. Each contributes `tr(d^T H d) / tr(w^T H w)`, `d` what
    rounding to nearest changes.

    Args:
      readers: weights that read the rotated stream, norm scales folded in, each with
        the second moments of its (unscaled) input, or None for the identity.
      writers: weights that write it.
      fmt: the format they will have.

    Returns:
      A function of `R` for `learn_rotation`.
    """

    def size(w, h):
        return jnp.sum(w * (w if h is None else _dot(h, w)))

    sizes = [size(w, h) for w, h in (*readers, *writers)]

    def miss(w):
        p = Problem.build(w, fmt)
        scale, zero = p.from_range(*p.full_range())
        return p.group.join(p.levels(scale, zero) * scale) - w

    def loss(r):
        total, known = jnp.float32(0), iter(sizes)
        for w, h in readers:  # tr(d^T R^T H R d): the error back in the old basis
            total += size(_dot(r, miss(_dot(r.T, w))), h) / next(known)
        for w, h in writers:
            total += size(miss(_dot(w, r)), h) / next(known)
        return total / max(len(sizes), 1)

    return loss


def _dot(a: Any, b: Any) -> Array:
    return jnp.matmul(a, b, precision="highest")


def _spectral(a: Float[Array, "n n"]) -> Float[Array, ""]:
    """Largest singular value of a skew matrix, by power iteration."""
    v = jnp.cos(jnp.arange(a.shape[0], dtype=jnp.float32))  # fixed, so deterministic

    def step(_, v):
        v = _dot(a.T, _dot(a, v))
        return v / jnp.maximum(jnp.linalg.norm(v), 1e-30)

    v = jax.lax.fori_loop(0, POWER_STEPS, step, v)
    return jnp.linalg.norm(_dot(a, v)) / jnp.maximum(jnp.linalg.norm(v), 1e-30)
