"""Clipped ranges of groups, chosen by the error of the group's own output.

For formats with groups along `in` (or one per output) a group contributes
`x_g^T (w_g - v_g)` to its output, with second moments of that error `e^T H_g e`, `H_g`
the group's diagonal block of the Hessian. AutoAWQ measures the same on a sample of
tokens.

Reference: Lin et al., AWQ, arXiv 2306.00978; AutoAWQ 0.2.9 `_compute_best_clip`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.formats import Cast, Format
from qjax.methods.problem import Problem, keep_better
from qjax.methods.statistics import Statistics

CLIP_STEPS, CLIP_STEP = 10, 0.05


def clips(fmt: Format, matrix: tuple[int, ...]) -> bool:
    """Whether ranges of groups can be searched by the error of a group's output."""
    if isinstance(fmt, Cast):
        return False
    return fmt.grouping((matrix[0], matrix[1])).kind in ("in", "channel")


def clip_weight(
    w: Float[Array, "in out"], fmt: Format, statistics: Statistics | None
) -> Float[Array, "in out"]:
    """The weight clipped, group by group, where that lowers the group's output error.

    For the group's weights `w`, of maximum `m`, and its block `H_g` of the second
    moments, the fraction `f` in 1, 0.95, ..., 0.55 with the least `e^T H_g e`, `e` the
    error of rounding `clip(w, -f m, f m)`, is kept.

    Args:
      w: weight.
      fmt: a format with groups along `in`, or per channel.
      statistics: of the inputs.

    Returns:
      The clipped weight, float32.
    """
    assert statistics is not None  # callers have checked
    p = Problem.build(w, fmt)
    low, high = p.full_range()
    top = jnp.maximum(-low, high)

    def fitted(fraction):
        edge = top * fraction
        return p.from_range(jnp.maximum(low, -edge), jnp.minimum(high, edge))

    error = _group_error(p, statistics)

    def step(i, best):
        fraction = 1.0 - CLIP_STEP * i.astype(jnp.float32)
        new = jnp.full_like(top, fraction)
        return keep_better(best, error(*fitted(fraction)), new, None)

    start = (error(*fitted(1.0)), jnp.ones_like(top), None)
    _, fraction, _ = jax.lax.fori_loop(1, CLIP_STEPS, step, start)
    edge = top * fraction
    return p.group.join(jnp.clip(p.w, -edge, edge))


def _group_error(p: Problem, statistics: Statistics):
    """`(scale, zero)` to the output error of each group, `[G, 1, N]`."""
    count, size = p.w.shape[0], p.w.shape[1]
    h = statistics.hessian
    if h is None:
        square = p.group.split(statistics.square[:, None])
        mask = p.group.mask()
        square = square if mask is None else square * mask.astype(jnp.float32)

        def diagonal(scale, zero):
            d = p.w - p.levels(scale, zero) * scale
            return jnp.sum(d * d * square, axis=-2, keepdims=True)

        return diagonal
    spare = count * size - h.shape[0]
    h = jnp.pad(h, [(0, spare), (0, spare)])  # padded inputs have no error
    blocks = h.reshape(count, size, count, size)
    blocks = blocks[jnp.arange(count), :, jnp.arange(count)]

    def quadratic(scale, zero):
        d = p.w - p.levels(scale, zero) * scale
        turned = jnp.einsum("gij,gjn->gin", blocks, d, precision="highest")
        return jnp.sum(d * turned, axis=-2, keepdims=True)

    return quadratic
