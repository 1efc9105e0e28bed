"""The definition of encoding a weight: absolute maximum, nearest code, packing.

Written for reading: whole arrays, no blocks, nearest entries by distance. Backends must
give the same scales and codes bit for bit, so the error BOUND is zero; where division
is not correctly rounded (TPU), a code may be the neighbour when `w / scale` lies within
two units in the last place of a midpoint.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from ..weights import FIELDS, Weight, WeightSpec
from .rules import FLOAT8, encode_values, multiplier, scale_of, stored_dtype, unit_rows

BOUND = 0.0


def encode(
    w: Any,
    spec: WeightSpec,
    *,
    table: np.ndarray | None = None,
    scale: Any = None,
    across: int = 1,
) -> Weight:
    """See `api.encode`.

    Args:
      w: float `[*layers, k, n]`.
      spec: what the codes will be.
      table: the values of "table" codes.
      scale: float32 `[*layers, groups, n]`, or None for the absmax rule.
      across: columns that share a scale under the absmax rule.

    Returns:
      The packed weight.
    """
    w = finite(w)
    groups = jnp.arange(spec.k) // max(spec.group, 1)
    own = scale is None
    if own:
        scale = scale_of(absmax(w, spec, across), spec)
    each = jnp.take(scale, groups, axis=-2)
    u = w * multiplier(each) if own and spec.kind == "table" else divided(w, each)
    codes = encode_values(u, spec, table)
    return Weight(pack(codes, spec), scale, None, weight_table(spec, table, w.shape))


def finite(w: Any) -> Any:
    """Float32 weights; NaN and infinities count as 0."""
    w = w.astype(jnp.float32)
    return jnp.where(jnp.abs(w) <= jnp.finfo(jnp.float32).max, w, 0.0)


def divided(w: Any, scale: Any) -> Any:
    """`w / scale`, correctly rounded.

    XLA makes division by a broadcast value a product with its reciprocal, which rounds
    twice. A divisor that depends on `w` is not a broadcast.
    """
    return w / jnp.where(w == w, scale, 1.0)


def absmax(w: Any, spec: WeightSpec, across: int = 1) -> Any:
    """Largest magnitude of each group, `[*layers, groups, n]`."""
    *lead, k, n = w.shape
    group = spec.group
    body = k // group * group if group else 0
    size = jnp.abs(w)
    parts = []
    if body:
        blocks = size[..., :body, :].reshape(*lead, body // group, group, n)
        parts.append(jnp.max(blocks, axis=-2))
    if k > body:
        parts.append(jnp.max(size[..., body:, :], axis=-2, keepdims=True))
    top = jnp.concatenate(parts, axis=-2) if parts else jnp.zeros((*lead, 0, n))
    return spread(top, across)


def spread(top: Any, across: int) -> Any:
    """The maximum of every `across` columns, repeated over them."""
    n = top.shape[-1]
    if across == 1 or n == 0:
        return top
    cut = [jnp.max(top[..., i : i + across], -1) for i in range(0, n, across)]
    return jnp.repeat(jnp.stack(cut, -1), across, axis=-1)[..., :n]


def pack(codes: Any, spec: WeightSpec) -> Any:
    """int32 codes `[*layers, k, n]` to the canonical layout."""
    dtype = stored_dtype(spec)
    if spec.kind in FLOAT8:
        return lax.bitcast_convert_type(codes.astype(jnp.uint8), dtype)
    if spec.bits == 8:
        return codes.astype(dtype)
    *lead, k, n = codes.shape
    unit = unit_rows(spec.bits)
    pad = [(0, 0)] * len(lead) + [(0, -k % unit), (0, 0)]
    count = -(-k // unit)
    blocks = jnp.pad(codes, pad).reshape(*lead, count, unit, n)
    rows, shift = [], 0
    for width in FIELDS[spec.bits]:
        field = (blocks >> jnp.int32(shift)) & jnp.int32(2**width - 1)
        places = jnp.arange(8 // width, dtype=jnp.int32)[:, None] * jnp.int32(width)
        field = field.reshape(*lead, count, unit * width // 8, 8 // width, n) << places
        rows.append(jnp.sum(field, axis=-2, dtype=jnp.int32))
        shift += width
    packed = jnp.concatenate(rows, axis=-2).astype(jnp.uint8)
    return packed.reshape(*lead, spec.packed_k, n)


def weight_table(spec: WeightSpec, table: Any, shape: tuple[int, ...]) -> Any:
    """The table leaf of a packed weight: one per layer, or None."""
    if spec.kind != "table":
        return None
    return jnp.broadcast_to(
        jnp.asarray(table, jnp.float32), (*shape[:-2], 2**spec.bits)
    )
