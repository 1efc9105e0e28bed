"""Definition of attention over a quantized key-value cache, in plain jnp.

A cache row holds one token of one head, key and value together, so that a single copy
of `[tokens, row]` brings both and a row of 4-bit codes is as wide as the head:

    int8, float8_e4m3fn:  codes[..., j] = key[j], codes[..., head_dim + j] = value[j]
    int4 (uint8 codes):   codes[..., j] = (key[j] + 8) | (value[j] + 8) << 4

with `key = round(K / s_k)`, `s_k = absmax(K) / top` per token and head, the same for
values; `top` is 127, 448 or 7, and an all-zero vector has scale 1. Scales are
`[..., 2, length]`: keys, then values.

    s[i, j] = cap(scale * (q_i . key_j) * s_k[j])       0 <= p_i - p_j < window
    y[i] = sum_j softmax(s)[i, j] * s_v[j] * value_j

`p` are positions; a key at position -1 is never seen, and a query that sees nothing
gives 0. With `rotate` keys (or keys and values) are multiplied by an orthonormal
Hadamard matrix H before rounding; queries are multiplied by H too, which leaves scores
as they were, and the result is multiplied by H once.

What rounding costs: `|K - s_k key| <= s_k / 2` per number for integers, so a score
moves by at most `e = scale * s_k / 2 * |q|_1` and the result by at most
`(exp(2 e) - 1) * max|V| + s_v / 2`. What a backend may add is `bound`.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

KINDS = ("int8", "float8_e4m3fn", "int4")
TOP = {"int8": 127.0, "float8_e4m3fn": 448.0, "int4": 7.0}
STORED = {"int8": "int8", "float8_e4m3fn": "float8_e4m3fn", "int4": "uint8"}
ROTATE = ("none", "keys", "both")
MASKED = -1e30


class KV(NamedTuple):
    """A quantized cache.

    Attributes:
      codes: `[*layers, batch, kv_heads, length, row]`, int8 or float8_e4m3fn with
        `row = 2 * head_dim`, or uint8 (int4) with `row = head_dim`.
      scale: float `[*layers, batch, kv_heads, 2, length]`.
    """

    codes: Any
    scale: Any

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        name = jnp.dtype(self.codes.dtype).name
        return "int4" if name == "uint8" else name

    @property
    def head_dim(self) -> int:
        """Width of a key or value."""
        row = self.codes.shape[-1]
        return row if self.kind == "int4" else row // 2

    @property
    def length(self) -> int:
        """Slots."""
        return self.codes.shape[-2]


def empty(
    batch: int,
    kv_heads: int,
    length: int,
    head_dim: int,
    kind: str,
    *,
    layers: tuple[int, ...] = (),
    scale_dtype: Any = jnp.float32,
) -> KV:
    """Returns a cache of zeros with scale 1."""
    lead = (*layers, batch, kv_heads)
    row = head_dim if kind == "int4" else 2 * head_dim
    fill = 0x88 if kind == "int4" else 0
    return KV(
        jnp.full((*lead, length, row), fill, STORED[kind]),
        jnp.ones((*lead, 2, length), scale_dtype),
    )


def hadamard(x):
    """Multiplies the last axis by a blockwise orthonormal Hadamard matrix.

    The block is the largest power of two that divides the axis; the transform is its
    own inverse.
    """
    n = x.shape[-1]
    block = n & -n
    lead, y, span = x.shape[:-1], x.astype(jnp.float32), 1
    while span < block:
        y = y.reshape(*lead, n // (2 * span), 2, span)
        even, odd = y[..., 0, :], y[..., 1, :]
        y = jnp.stack([even + odd, even - odd], axis=-2)
        span *= 2
    return (y.reshape(x.shape) * jnp.float32(block**-0.5)).astype(x.dtype)


def _encode_one(x, kind, scale_dtype):
    """Codes (float32 holding integers, or float8) and scale of vectors."""
    x = x.astype(jnp.float32)
    top = TOP[kind]
    most = jnp.max(jnp.abs(x), axis=-1)
    scale = (most / top).astype(scale_dtype)
    scale = jnp.where(scale == 0, jnp.ones_like(scale), scale)
    scaled = x / scale.astype(jnp.float32)[..., None]
    scaled = jnp.clip(scaled, -top, top)
    return (scaled if kind == "float8_e4m3fn" else jnp.round(scaled)), scale


def encode(k, v, kind: str, *, rotate: str = "none", scale_dtype=jnp.float32) -> KV:
    """Quantizes keys and values `[..., time, head_dim]`.

    Args:
      k: Keys, float.
      v: Values.
      kind: One of `KINDS`.
      rotate: "none", "keys" or "both".
      scale_dtype: Dtype of the scales; codes are chosen for scales as stored.

    Returns:
      Codes `[..., time, row]` and scales `[..., 2, time]`.
    """
    k = hadamard(k) if rotate != "none" else k
    v = hadamard(v) if rotate == "both" else v
    key, key_scale = _encode_one(k, kind, scale_dtype)
    value, value_scale = _encode_one(v, kind, scale_dtype)
    scale = jnp.stack([key_scale, value_scale], axis=-2)
    if kind == "int4":
        low = (key + 8.0).astype(jnp.uint8)
        high = (value + 8.0).astype(jnp.uint8)
        return KV(low | (high << jnp.uint8(4)), scale)
    codes = jnp.concatenate([key, value], axis=-1).astype(STORED[kind])
    return KV(codes, scale)


def decode_codes(codes, kind: str, dtype: Any = jnp.float32):
    """Returns key codes and value codes as floats `[..., head_dim]`, without scales."""
    if kind != "int4":
        return tuple(jnp.split(codes.astype(dtype), 2, axis=-1))
    eight = jnp.asarray(8, dtype)
    low = (codes & jnp.uint8(15)).astype(dtype) - eight
    return low, (codes >> jnp.uint8(4)).astype(dtype) - eight


def as_bytes(codes):
    """Returns float8 codes as uint8, others as they are.

    XLA:CPU moves float8 arrays by widening all of them first.
    """
    if codes.dtype == jnp.float8_e4m3fn:
        return lax.bitcast_convert_type(codes, jnp.uint8)
    return codes


def from_bytes(codes, kind: str):
    """Inverse of `as_bytes`."""
    if codes.dtype != jnp.dtype(STORED[kind]):
        return lax.bitcast_convert_type(codes, STORED[kind])
    return codes


def write(cache: KV, new: KV, index, layer=None) -> KV:
    """Puts encoded tokens into the slots from `index` on.

    Args:
      cache: The cache; with a leading axis if `layer` is given.
      new: `encode`'s result, `[batch, kv_heads, time, row]`.
      index: int32 first slot, the same for all rows.
      layer: int32 layer, or None.
    """
    zero = jnp.zeros((), jnp.int32)
    index = jnp.asarray(index, jnp.int32)
    lead = () if layer is None else (jnp.asarray(layer, jnp.int32),)
    codes, scale = new
    if layer is not None:
        codes, scale = codes[None], scale[None]
    place = lax.dynamic_update_slice
    at = (*lead, zero, zero, index, zero)
    placed = place(as_bytes(cache.codes), as_bytes(codes), at)
    return KV(
        from_bytes(placed, cache.kind),
        place(
            cache.scale,
            scale.astype(cache.scale.dtype),
            (*lead, zero, zero, zero, index),
        ),
    )


def seen(queries, keys, window=None):
    """Returns which keys `[batch, length]` queries `[batch, time]` see."""
    distance = queries[:, :, None] - keys[:, None, :]
    mask = (distance >= 0) & (keys >= 0)[:, None, :]
    return mask if window is None else mask & (distance < window)


def attend(
    q,
    cache: KV,
    queries,
    keys,
    *,
    scale=1.0,
    window=None,
    softcap: float | None = None,
    rotate: str = "none",
    dtype: Any = jnp.float32,
):
    """Returns attention over the whole cache at once, computed in `dtype`.

    Args:
      q: `[batch, q_heads, time, head_dim]`; head `h` reads key head `h // groups`.
      cache: Unstacked cache.
      queries: int32 `[batch, time]` positions.
      keys: int32 `[batch, length]` positions of the slots, -1 for none.
      scale: Factor of the scores.
      window: Positions seen, or None for all.
      softcap: Bound of the scores, or None.
      rotate: As the cache was written.
      dtype: float32, or float64 for comparisons.

    Returns:
      `[batch, q_heads, time, head_dim]` in `dtype`.
    """
    score, value, mask = _scores(
        q, cache, queries, keys, scale, window, softcap, rotate, dtype
    )
    weight = _softmax(score, mask)
    y = jnp.einsum("bhgts,bhsd->bhgtd", weight, value, precision="highest")
    y = y.reshape(q.shape)
    return hadamard(y) if rotate == "both" else y


def _scores(q, cache, queries, keys, scale, window, softcap, rotate, dtype):
    """Scores `[batch, kv_heads, groups, time, length]`, scaled values, mask."""
    batch, heads, time, width = q.shape
    kv_heads = cache.codes.shape[1]
    q = hadamard(q) if rotate != "none" else q
    q = q.reshape(batch, kv_heads, heads // kv_heads, time, width).astype(dtype)
    # Through float32, which holds every code: float8 has no direct way to float64.
    key, value = (x.astype(dtype) for x in decode_codes(cache.codes, cache.kind))
    scales = cache.scale.astype(dtype)
    score = jnp.einsum("bhgtd,bhsd->bhgts", q, key, precision="highest")
    score = score * scales[:, :, None, None, 0] * jnp.asarray(scale, dtype)
    if softcap is not None:
        cap = jnp.asarray(softcap, dtype)
        score = jnp.tanh(score / cap) * cap
    mask = seen(queries, keys, window)[:, None, None]
    return score, value * scales[:, :, 1, :, None], mask


def _softmax(score, mask):
    """Softmax over seen keys; zeros where nothing is seen."""
    score = jnp.where(mask, score, jnp.asarray(MASKED, score.dtype))
    top = jnp.max(score, axis=-1, keepdims=True)
    weight = jnp.where(mask, jnp.exp(score - top), jnp.zeros((), score.dtype))
    total = jnp.sum(weight, axis=-1, keepdims=True)
    return weight / jnp.where(total == 0, jnp.ones((), score.dtype), total)


def bound(
    q,
    cache,
    queries,
    keys,
    *,
    scale=1.0,
    window=None,
    rotate="none",
    softcap=None,
    compute,
):
    """Returns how far a backend may be from `attend` in exact arithmetic.

    A backend rounds q, the softmax weights and its partial results to `compute` (unit
    roundoff u), sums in float32 (roundoff f) and rounds its result to the dtype of q
    (roundoff r, smallest number a). A score then errs by
    `e = (u + (head_dim + 8) f) scale s_k sum_d |q_d key_d|`, weights by the factor
    `exp(2 e)`, and the result by

        (exp(2 e) - 1 + 2 u + (length + 16) f) sum_j w_j |V_j| + r |y| + a / 2

    with `e` the largest over seen keys. `softcap` does not raise it: its slope is at
    most 1. A rotated result mixes the numbers of a block, so their bounds add up, times
    the entries of H, and it is rounded once more.

    Args:
      q: As for `attend`.
      cache: As for `attend`.
      queries: As for `attend`.
      keys: As for `attend`.
      scale: As for `attend`.
      window: As for `attend`.
      softcap: As for `attend`.
      rotate: As for `attend`.
      compute: dtype in which the backend multiplies.

    Returns:
      Array of the result's shape, in float32.
    """
    f = 2.0**-24
    u = float(jnp.finfo(compute).eps) / 2
    width, length = q.shape[-1], cache.length
    out = float(jnp.finfo(q.dtype).eps) / 2
    # Queries are rounded again after their rotation.
    u_q = u + (out + 8 * f if rotate != "none" else 0.0)
    turned = hadamard(q) if rotate != "none" else q
    key, value = decode_codes(cache.codes, cache.kind)
    plain = KV(cache.codes, cache.scale)
    grouped = turned.reshape(
        q.shape[0], cache.codes.shape[1], -1, q.shape[2], width
    ).astype(jnp.float32)
    reach = jnp.einsum("bhgtd,bhsd->bhgts", jnp.abs(grouped), jnp.abs(key))
    reach = reach * cache.scale.astype(jnp.float32)[:, :, None, None, 0]
    mask = seen(queries, keys, window)[:, None, None]
    reach = jnp.where(mask, reach, 0.0) * jnp.abs(jnp.asarray(scale, jnp.float32))
    error = jnp.max(reach, axis=-1, keepdims=True) * (u_q + (width + 8) * f)
    score, _, _ = _scores(
        q, plain, queries, keys, scale, window, softcap, rotate,
        jnp.float32,
    )  # fmt: skip
    weight = _softmax(score, mask)
    sizes = jnp.abs(value) * cache.scale.astype(jnp.float32)[:, :, 1, :, None]
    mean = jnp.einsum("bhgts,bhsd->bhgtd", weight, sizes)
    total = (jnp.expm1(2 * error) + 2 * u + (length + 16) * f + out) * mean
    total = total.reshape(q.shape)
    if rotate == "both":
        block = width & -width
        parts = total.reshape(*total.shape[:-1], width // block, block)
        most = jnp.sum(parts, axis=-1, keepdims=True) * (block**-0.5 * (1 + out))
        mixed = jnp.broadcast_to(most, parts.shape).reshape(total.shape)
        total = mixed + out * jnp.max(mean) * width**0.5
    return total + float(jnp.finfo(q.dtype).smallest_subnormal) / 2


def positions_from_lengths(lengths, time: int, length: int):
    """Returns query and key positions of rows that fill their first `lengths` slots.

    The queries are the last `time` of them.
    """
    lengths = jnp.asarray(lengths, jnp.int32)
    slots = jnp.arange(length, dtype=jnp.int32)
    keys = jnp.where(slots[None] < lengths[:, None], slots[None], -1)
    return lengths[:, None] - time + jnp.arange(time, dtype=jnp.int32), keys


def reach(queries, keys, window=None):
    """Returns per row a first slot and one past a last: between are all that is seen.

    Rows that see nothing have (0, 0). Blocks outside need not be read.
    """
    real = queries >= 0
    high = jnp.max(queries, axis=1, keepdims=True)
    any_seen = (keys >= 0) & (keys <= high)
    if window is not None:
        low = jnp.min(jnp.where(real, queries, high), axis=1, keepdims=True)
        any_seen &= low - keys < window
    length = keys.shape[1]
    found = any_seen.any(1)
    first = jnp.argmax(any_seen, axis=1).astype(jnp.int32)
    last = length - jnp.argmax(any_seen[:, ::-1], axis=1).astype(jnp.int32)
    zero = jnp.zeros((), jnp.int32)
    return jnp.where(found, first, zero), jnp.where(found, last, zero)
