"""Other weights in the format, and the wrappers, of a quantized weight.

Codes are chosen anew by rounding to nearest (llama.cpp's blocks and trellises by their
own methods); what a wrapper knows of inputs stays: the order of activation order, the
scales of activations, signs of rotations, places of outliers, low-rank factors.

QA-LoRA needs no rounding over integers with a real zero-point: what it adds to a group
is one number for each column, which is taken off the zero-point.

Reference: Xu et al., QA-LoRA, arXiv 2309.14717, section 3.3.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from qjax.converters.peft_settings import Factors
from qjax.errors import SpecError, UnsupportedError
from qjax.formats import KMeans
from qjax.methods import Lloyd, quantize
from qjax.methods.rotation import turn
from qjax.tensor import AffineTensor, QuantizedTensor, with_dtype
from qjax.trellis import Incoherent
from qjax.wrappers import (
    InputScaled,
    LowRank,
    Permuted,
    Rotated,
    RoundedInputs,
    RowParts,
    SplitInputs,
    Transposed,
    WithOutliers,
    Wrapper,
)


def requantize(q: Any, w: Any, name: str = "weight") -> Any:
    """Quantizes `w` as `q` is quantized.

    Args:
      q: a quantized weight `[in, out]`, in wrappers or not.
      w: the new weight `[in, out]`, NumPy or JAX.
      name: what errors call it.

    Returns:
      A weight of the structure and logical dtype of `q`; a trellis gets random signs of
      its own.

    Raises:
      UnsupportedError: codes of this format cannot be chosen without calibration.
      NonFiniteError: `w` holds NaN or infinity.
    """
    w = jnp.asarray(w, jnp.float32)
    if isinstance(q, RowParts):
        return _in_parts(q, w, name)
    if isinstance(q, WithOutliers):
        return _with_outliers(q, w, name)
    if isinstance(q, Wrapper) and not isinstance(q, Incoherent):
        fields, inner = _unwrapped(q, w, name)
        return dataclasses.replace(q, base=requantize(q.base, inner, name), **fields)
    method = Lloyd() if isinstance(q.format, KMeans) else None
    try:
        return with_dtype(quantize(w, q.format, method, name=name), q.dtype)
    except SpecError as error:
        raise UnsupportedError(
            f"{name}: cannot be rounded to {q.format.name} again ({error}); merge with "
            "mode 'dequantized', and quantize the result"
        ) from None


def _unwrapped(q: Wrapper, w: Any, name: str) -> tuple[dict[str, Any], Any]:
    """What changes in a wrapper, and the weight that is left for its base."""
    if isinstance(q, Transposed):
        return {}, jnp.swapaxes(w, -1, -2)
    if isinstance(q, Permuted):
        return {}, jnp.take(w, jnp.asarray(q.perm), axis=-2)
    if isinstance(q, InputScaled):
        s = jnp.asarray(q.s).astype(jnp.float32)[:, None]
        return {}, jnp.where(s == 0, 0.0, w / jnp.where(s == 0, 1.0, s))
    if isinstance(q, Rotated):
        return {}, turn(w, jnp.asarray(q.signs))
    if isinstance(q, RoundedInputs):
        return {}, w
    if isinstance(q, LowRank):
        return {}, w - (q.compose(jnp.zeros(q.matrix, jnp.float32)))
    if isinstance(q, SplitInputs):
        index = jnp.asarray(q.index)
        rows = jnp.take(w, index, axis=0, mode="fill", fill_value=0)
        return {"rows": rows.astype(q.rows.dtype)}, w.at[index].set(0.0, mode="drop")
    raise UnsupportedError(f"{name}: {type(q).__name__} cannot be quantized again")


def _with_outliers(q: WithOutliers, w: Any, name: str) -> WithOutliers:
    """Outliers stay where they are; the base is rounded as if they were ordinary."""
    places = (jnp.asarray(q.rows), jnp.asarray(q.cols))
    used = jnp.asarray(q.values) != 0  # others fill the list up, all at one place
    ordinary = q.base.dequantize(jnp.float32)[places]
    base = requantize(
        q.base, w.at[places].add(jnp.where(used, ordinary - w[places], 0.0)), name
    )
    left = (w - base.dequantize(jnp.float32))[places]
    values = jnp.where(used, left, 0.0).astype(q.values.dtype)
    return dataclasses.replace(q, base=base, values=values)


def _in_parts(q: RowParts, w: Any, name: str) -> RowParts:
    """Part by part, each for what those before it have left."""
    parts = []
    for rows, part in q.windows():
        made = requantize(part, w[rows], name)
        w = w.at[rows].add(-made.dequantize(jnp.float32))
        parts.append(made)
    return dataclasses.replace(q, parts=tuple(parts))


def into_zero(q: Any, own: Factors) -> QuantizedTensor | None:
    """The weight with an adapter in its zero-points; None where that is not possible.

    Args:
      q: a quantized weight `[in, out]`.
      own: the adapter of the layer; it fits if it averages whole groups of `q`.
    """
    if own.pool == 1 or own.magnitude is not None or not isinstance(q, AffineTensor):
        return None
    group, zero = q.format.group, q.zero
    if zero is None or isinstance(zero, QuantizedTensor) or zero.dtype == jnp.uint8:
        return None
    if q.format.axis != "in" or not isinstance(group, int) or own.pool % group:
        return None
    a = jnp.asarray(own.a).astype(jnp.float32)
    delta = jnp.matmul(a, jnp.asarray(own.b).astype(jnp.float32), precision="highest")
    delta = jnp.repeat(delta * (own.scaling / own.pool), own.pool // group, axis=0)
    scale = q.scales()
    moved = jnp.where(scale == 0, 0.0, delta / jnp.where(scale == 0, 1.0, scale))
    made = jnp.asarray(zero).astype(jnp.float32) - moved
    return dataclasses.replace(q, zero=made.astype(zero.dtype))
