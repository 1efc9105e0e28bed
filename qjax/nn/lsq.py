"""Learned step sizes: scales and zero-points that gradients move.

Scales `s`, and offsets `b` of formats with zero-points, are parameters beside the float
weight. With codes `n .. p` around the middle one,

    u = (w - b) / s,     w' = clip(round(u), n, p) s + b,

    dw'/dw = 1                  for n < u < p, else 0,
    dw'/ds = round(u) - u       for n < u < p, else the end that u is beyond,
    dw'/db = 0                  for n < u < p, else 1,

the last two times `1 / sqrt(N max(p, 1))` and summed over the `N` weights of a group.
`s` and `b` are in units of the weight, so that one learning rate suits all three; the
zero-point that is stored is `middle - b / s`. Gradients pass the rounding of storage.
One bit without a zero-point has levels +-s/2, and the range is `-1 < u < 1`.

Reference: Esser et al., LSQ, arXiv 1902.08153, equations 1 to 3; Bhalgat et al., LSQ+,
arXiv 2004.09576.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from qjax.errors import SpecError
from qjax.formats import Format, Int
from qjax.formats.base import divided
from qjax.methods import RTN, Method, quantize
from qjax.methods.problem import Problem
from qjax.methods.rtn import round_to_scales
from qjax.scales import store_scale
from qjax.tensor import AffineTensor, load_zero


class Spec(NamedTuple):
    """How a matrix is rounded: all that is static."""

    format: Format
    method: Method | None
    axis: int
    activation: str | None
    pool: int
    dtype: str


def first_scales(
    w: Float[Array, "*lead in out"], fmt: Format, method: Method | None, axis: int
) -> tuple[Array, Array | None]:
    """Scales and offsets that learning starts from: those of least squared error.

    Args:
      w: float weight.
      fmt: an `Int` format.
      method: the recipe's; another method than round-to-nearest is used as it is.
      axis: the contraction axis, -2 or -1.

    Returns:
      `(scale, offset)`, float32 in stored shape; no offset without zero-points.

    Raises:
      SpecError: the format is not `Int`, or the method stores more than scales.
    """
    if not isinstance(fmt, Int):
        raise SpecError(
            f"learn='lsq' learns scales of Int formats, not of {fmt.name}; use "
            "learn='none'"
        )
    if method is None or isinstance(method, RTN):
        method = RTN("mse")
    q: Any = quantize(w, fmt, method, axis=axis)
    q = q.base if axis == -1 else q
    if not isinstance(q, AffineTensor):
        raise SpecError(
            f"learn='lsq' cannot start from {method.name}, which stores a "
            f"{type(q).__name__}; use a method that stores scales alone, such as RTN"
        )
    scale = q.scales()
    if q.zero is None:
        return scale, None
    return scale, (_middle(fmt) - load_zero(q.zero)) * scale


def for_scales(w, scale, offset, spec: Spec):
    """Codes for learned scales, which are rounded as the format stores them first."""
    fmt = spec.format
    assert isinstance(fmt, Int)  # first_scales checks
    stored, effective = store_scale(fmt, scale)
    if offset is None:
        return round_to_scales(w, fmt, stored)
    zero = _middle(fmt) - divided(offset, effective)
    zero = Problem.build(w, fmt).stored_zero(zero).astype(fmt.zero_dtype)
    return round_to_scales(w, fmt, stored, zero)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def learned(
    w: Float[Array, "*lead in out"],
    scale: Float[Array, "*lead s t"],
    offset: Float[Array, "*lead s t"] | None,
    base: Any,
    spec: Spec,
) -> Float[Array, "*lead in out"]:
    """What codes for learned scales stand for, with the gradient above.

    Args:
      w: float weight.
      scale: learned scales.
      offset: learned offsets, or None.
      base: the codes, `_pack` of these.
      spec: how they were made.
    """
    del w, scale, offset, spec
    return base.dequantize(jnp.float32)


def _learned_forward(w, scale, offset, base, spec):
    return learned(w, scale, offset, base, spec), (w, base)


def _learned_backward(spec: Spec, residuals, dw):
    w, q = residuals
    while not isinstance(q, AffineTensor):  # transposed, or with rounded inputs
        q = q.base
    turn = (lambda x: jnp.swapaxes(x, -1, -2)) if spec.axis == -1 else lambda x: x
    fmt, group = q.format, q.grouping
    u = divided(group.split(turn(w)), group.load(q.scales()))
    values = fmt.decode(group.split(q.unpacked()))
    if q.zero is not None:
        u = u + (group.load(load_zero(q.zero)) - _middle(fmt))
        values = values - _middle(fmt)
    low, high = -_middle(fmt), _middle(fmt) - 1.0
    if fmt.bits == 1 and fmt.symmetric:
        low, high = -1.0, 1.0
    inside = (u > low) & (u < high)
    grouped = group.split(turn(dw))
    mask = group.mask()
    real = jnp.ones(grouped.shape[-3:], bool) if mask is None else mask
    count = jnp.sum(real.astype(jnp.float32), axis=-2, keepdims=True)
    share = lax.rsqrt(count * max(high, 1.0))

    def total(x):
        x = jnp.where(real, x, 0.0)
        return group.store(jnp.sum(x, axis=-2, keepdims=True) * share)

    dscale = total(grouped * (values - jnp.where(inside, u, 0.0)))
    doffset = None if q.zero is None else total(jnp.where(inside, 0.0, grouped))
    passed = group.join(jnp.where(inside, grouped, 0.0))
    return turn(passed), dscale, doffset, None


learned.defvjp(_learned_forward, _learned_backward)


def _middle(fmt: Int) -> float:
    """The code in the middle of the range, whose value an offset is."""
    return float(2 ** (fmt.bits - 1))
