"""One tile of the 8-bit updates: decode, update, encode; shared by every backend.

AdamW, in float32, with decoupled weight decay as `optax.adamw` has it (decay reads the
parameter before the step, and both are scaled by the learning rate):

    m = b1 m + (1 - b1) g              v = b2 v + (1 - b2) g^2
    p = p - lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + wd p)

`g` is the gradient times `scale`, with which a caller clips without a copy of it.

Lion, as `optax.lion`: `p = p - lr (sign(b1 m + (1 - b1) g) + wd p)`, then
`m = b2 m + (1 - b2) g`. Moments enter decoded and leave unrounded into the step: only
what is stored is rounded.

A gradient that is not finite makes its own parameter NaN, as in optax. Where the second
moment (Lion: the moment) would not be finite both are stored as 0; no neighbour in the
block is touched. A block whose largest magnitude is below the least normal float32 is
stored as zeros.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from . import dynamic

BLOCK = 256
_MAX = float(np.finfo(np.float32).max)
_TINY = float(np.finfo(np.float32).tiny)


class Hyper(NamedTuple):
    """Scalars of a step: Python floats, traced float32 scalars, or reads of SMEM.

    `c1` and `c2` are `1 / (1 - b1^t)` and `1 / (1 - b2^t)`; Lion ignores both and eps.
    """

    lr: Any
    b1: Any
    b2: Any
    c1: Any
    c2: Any
    eps: Any
    decay: Any
    scale: Any


def hyper_vector(lr, b1, b2, eps, decay, count, scale=1.0) -> Any:
    """The fields of `Hyper` for step `count` (from 1) as one float32 vector."""
    given = (lr, b1, b2, eps, decay, count, scale)
    lr, b1, b2, eps, decay, count, scale = (
        jnp.asarray(x).astype(jnp.float32) for x in given
    )
    # 1 - b**t without the cancellation.
    c1, c2 = (-1.0 / jnp.expm1(count * jnp.log1p(b - 1.0)) for b in (b1, b2))
    return jnp.stack([lr, b1, b2, c1, c2, eps, decay, scale])


def adamw(
    p: Any, g: Any, m: Any, v: Any, h: Hyper, root: Any = jnp.sqrt
) -> tuple[Any, Any, Any]:
    """New `(p, m, v)` of float32 arrays; `root` is the backend's square root."""
    g = g * h.scale
    m = h.b1 * m + (1.0 - h.b1) * g
    v = h.b2 * v + (1.0 - h.b2) * (g * g)
    step = (m * h.c1) / (root(v * h.c2) + h.eps) + h.decay * p
    kept = v <= _MAX
    return p - h.lr * step, jnp.where(kept, m, 0.0), jnp.where(kept, v, 0.0)


def lion(p: Any, g: Any, m: Any, h: Hyper) -> tuple[Any, Any]:
    """New `(p, m)` of float32 arrays."""
    g = g * h.scale
    step = sign(h.b1 * m + (1.0 - h.b1) * g) + h.decay * p
    m = h.b2 * m + (1.0 - h.b2) * g
    return p - h.lr * step, jnp.where(jnp.abs(m) <= _MAX, m, 0.0)


def sign(x: Any) -> Any:
    """-1, 0 or 1; NaN stays."""
    one = jnp.where(x > 0, 1.0, jnp.where(x < 0, -1.0, x))
    return one.astype(jnp.float32)


def reciprocal(absmax: Any) -> tuple[Any, Any]:
    """`(absmax, 1 / absmax)`, both 0 for a block too small to scale."""
    kept = absmax >= _TINY
    inverse = 1.0 / jnp.where(kept, absmax, 1.0)
    return jnp.where(kept, absmax, 0.0), jnp.where(kept, inverse, 0.0)


def encode(moment: Any, inverse: Any, *, signed: bool) -> Any:
    """int32 codes of finite moments, given `1 / absmax` of their blocks."""
    return dynamic.encode(moment * inverse, signed=signed)
