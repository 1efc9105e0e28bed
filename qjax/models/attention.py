"""Causal attention with grouped heads, sliding windows, soft-caps and a cache.

Plain JAX: float32 scores and softmax, no materialised repetition of key heads. Long
calls are split over queries so that no more than `MAX_SCORES` scores exist at a time;
each part sees all keys, so the result is the same. Quantized caches are read by
`qjax.ops.attention`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from qjax.models.cache import FloatKV, LayerCache, Positions, QuantizedKV
from qjax.models.config import ModelConfig
from qjax.models.layers import Leaves, Norm, below, linear
from qjax.models.rope import apply_rope
from qjax.nn.linear import kept
from qjax.ops.attention import cached_attention, float_attention
from qjax.ops.self_attention import self_attention

MAX_SCORES = 2**26
MASKED = -1e30  # finite: a row that sees nothing averages instead of giving NaN


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerNumbers:
    """Numbers in which the layers of a run differ; None where they agree.

    Attributes:
        window: Sliding window; `2**30` for full attention.
        rope: Index of the rotary table.
        scale: Factor of the scores.
    """

    window: Int[Array, "*layers"] | None = None
    rope: Int[Array, "*layers"] | None = None
    scale: Float[Array, "*layers"] | None = None


def layer_numbers(config: ModelConfig, start: int, stop: int) -> LayerNumbers:
    """Returns the numbers of layers `start` to `stop`, stacked for a scan."""
    windows = [w or 2**30 for w in config.windows[start:stop]]
    scales = [config.attention_scale / (i + 1) for i in range(start, stop)]
    ropes = config.rope_layers[start:stop]
    by_layer = config.attention_scale_by_layer
    return LayerNumbers(
        jnp.asarray(np.array(windows, np.int32)) if windows else None,
        jnp.asarray(np.array(ropes, np.int32)) if ropes else None,
        jnp.asarray(np.array(scales, np.float32)) if by_layer else None,
    )


def attend(
    q: Float[Array, "batch time kv_heads groups head_dim"],
    k: Float[Array, "batch kv_heads length head_dim"],
    v: Float[Array, "batch kv_heads length head_dim"],
    queries: Int[Array, "batch time"],
    keys: Int[Array, "batch length"],
    *,
    scale: float | Float[Array, ""],
    window: Int[Array, ""] | None = None,
    softcap: float | None = None,
    segments: tuple[Int[Array, "batch time"], Int[Array, "batch length"]] | None = None,
) -> Float[Array, "batch time kv_heads groups head_dim"]:
    """Returns softmax(cap(scale q k^T) + mask) v.

    A query at position p sees keys at positions max(0, p - window + 1) to p; cap(s) =
    softcap * tanh(s / softcap).

    Args:
        q: Queries, grouped by the key head they share.
        k: Keys.
        v: Values.
        queries: Positions of queries.
        keys: Positions of keys; -1 is never seen.
        scale: Factor of the scores.
        window: Number of positions seen, or None for all.
        softcap: Bound of the scores, or None.
        segments: Samples of queries and of keys, which see their own only.

    Returns:
        The weighted values, in the dtype of `q`.
    """
    scores = jnp.einsum(
        "bthgd,bhsd->bhgts", q, k.astype(q.dtype), preferred_element_type=jnp.float32
    )
    scores = scores * scale
    if softcap is not None:
        scores = jnp.tanh(scores / softcap) * softcap
    distance = queries[:, :, None] - keys[:, None, :]
    seen = (distance >= 0) & (keys >= 0)[:, None, :]
    if window is not None:
        seen &= distance < window
    if segments is not None:
        seen &= segments[0][:, :, None] == segments[1][:, None, :]
    scores = jnp.where(seen[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return jnp.einsum("bhgts,bhsd->bthgd", weights, v.astype(q.dtype))


def _attend_in_parts(q, k, v, queries, keys, segments=None, **options):
    """Does what `attend` does, a bounded number of queries at a time.

    A gradient computes the scores again, so they are never stored.
    """
    time, length = q.shape[1], k.shape[2]
    heads = q.shape[0] * q.shape[2] * q.shape[3]
    part = max(1, MAX_SCORES // (heads * length))

    @jax.checkpoint
    def one(items):
        q, queries, own = items
        pair = None if own is None or segments is None else (own, segments)
        return attend(q, k, v, queries, keys, segments=pair, **options)

    if time <= part:
        return one((q, queries, segments))
    count = -(-time // part)
    spare = count * part - time
    q = jnp.pad(q, [(0, 0), (0, spare)] + [(0, 0)] * 3)
    queries = jnp.pad(queries, [(0, 0), (0, spare)], constant_values=-1)
    own = None if segments is None else jnp.pad(segments, [(0, 0), (0, spare)])

    def split(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(x.shape[0], count, part, *x.shape[2:]), 1, 0)

    done = jax.lax.map(one, jax.tree.map(split, (q, queries, own)))
    done = jnp.moveaxis(done, 0, 1)
    return done.reshape(q.shape)[:, :time]


class Attention(nnx.Module):
    """Multi-head attention of one block (or of stacked blocks, sliced by a scan)."""

    def __init__(self, leaves: Leaves, config: ModelConfig):
        self.config = config
        self.q = linear(below(leaves, "q"))
        self.k = linear(below(leaves, "k"))
        self.v = linear(below(leaves, "v"))
        self.o = linear(below(leaves, "o"))
        norms = config.qk_norm
        self.q_norm = Norm(below(leaves, "q_norm"), config, "rms") if norms else None
        self.k_norm = Norm(below(leaves, "k_norm"), config, "rms") if norms else None

    def __call__(
        self,
        x: Float[Array, "batch time dim"],
        positions: Positions,
        numbers: LayerNumbers,
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, "batch time dim"], LayerCache | None]:
        """Attends to the cache, or without one to `x` itself.

        Args:
            x: Normalized input.
            positions: Shared positions and rotary tables.
            numbers: This layer's numbers.
            cache: This layer's cache; the new keys are written first.

        Returns:
            The output and the updated cache.
        """
        config = self.config
        shape = (*x.shape[:2], -1, config.head_dim)
        q, k = self.q(x).reshape(shape), self.k(x).reshape(shape)
        v = jnp.swapaxes(self.v(x).reshape(shape), 1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if positions.cos is not None and positions.sin is not None:
            table = 0 if numbers.rope is None else numbers.rope
            cos, sin = positions.cos[table], positions.sin[table]
            q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        k = jnp.swapaxes(k, 1, 2)
        if cache is not None:
            cache = cache.write(k, v, positions.index)
        mixed = kept(self._mix(q, k, v, positions, numbers, cache))
        return self.o(mixed.reshape(*x.shape[:2], config.q_dim)), cache

    def _mix(
        self,
        q: Float[Array, "batch time heads head_dim"],
        k: Float[Array, "batch kv_heads time head_dim"],
        v: Float[Array, "batch kv_heads time head_dim"],
        positions: Positions,
        numbers: LayerNumbers,
        cache: LayerCache | None,
    ) -> Float[Array, "batch time *heads head_dim"]:
        """Attends to what the cache holds, or to `k` and `v`."""
        config = self.config
        options: dict[str, Any] = {
            "scale": config.attention_scale if numbers.scale is None else numbers.scale,
            "window": numbers.window,
            "softcap": config.attention_softcap,
        }
        stored = None if cache is None else cache.stored
        if cache is not None and isinstance(stored, QuantizedKV):
            options |= {"layer": cache.layer, "rotate": stored.rotate}
            where = (positions.queries, positions.keys, positions.index)
            turned = jnp.swapaxes(q, 1, 2)
            mixed = cached_attention(turned, k, v, stored.kv, *where, **options)
            return jnp.swapaxes(mixed, 1, 2)
        where = (positions.queries, positions.keys)
        softcap = options["softcap"]

        def plain(q, k, v, queries, keys, scale, window, segments=None):
            groups = config.heads // config.kv_heads
            q = q.reshape(*q.shape[:2], config.kv_heads, groups, config.head_dim)
            options = {"scale": scale, "window": window, "softcap": softcap}
            options |= {"segments": segments}
            return _attend_in_parts(q, k, v, queries, keys, **options)

        if cache is None or not isinstance(stored, FloatKV):

            def alone(q, k, v, at, segments, scale, window):
                return plain(q, k, v, at, at, scale, window, segments).reshape(q.shape)

            how = (positions.segments, options["scale"], options["window"], softcap)
            return self_attention(alone, q, k, v, positions.queries, *how)

        def layer_wise(q, keys, values, queries, positions, layer, scale, window):
            k, v = FloatKV(keys, values).read(layer)
            q = jnp.swapaxes(q, 1, 2)
            mixed = plain(q, k, v, queries, positions, scale, window)
            return jnp.swapaxes(mixed.reshape(q.shape), 1, 2)

        turned = jnp.swapaxes(q, 1, 2)
        arrays = (turned, stored.keys, stored.values, *where, cache.layer)
        mixed = float_attention(layer_wise, *arrays, **options)
        return jnp.swapaxes(mixed, 1, 2)
