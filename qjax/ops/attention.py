"""Attention over a quantized key-value cache: who computes it, and the XLA path.

Decides: calls of up to `DECODE_TOKENS` tokens read keys and values from the cache, with
the kernel of the platform where it can; longer calls (prefill) read what earlier calls
left in the cache and, exactly, the keys and values they bring themselves.

The XLA path loops over blocks of slots with an online softmax: only the slots between
the first and the last that any row sees are read, and no more than one block of codes
is ever a float array. Costs: `BLOCK_BYTES` of decoded keys and values, and scores of
one block.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

import qjax.pallas_kernels.device as device
from qjax.errors import SpecError, UnsupportedError
from qjax.ops.blocks import same_variance
from qjax.pallas_kernels.alone import alone_or
from qjax.pallas_kernels.attention import api, cpu, reference, specs
from qjax.pallas_kernels.attention.reference import KV

logger = logging.getLogger("qjax.ops")

DECODE_TOKENS = 8
BLOCK_BYTES = 1 << 22
MAX_SCORES = 1 << 26

BACKENDS = {
    "tpu": "Pallas kernel over blocks of slots, decoded in vector memory",
    "gpu": "Pallas Mosaic GPU kernel, split over slots, decoded once per block",
    "native": "C++ kernel, decodes a block of slots at a time",
    "xla": "a loop over blocks of slots, each decoded once",
    "reference": "the whole cache as floats, for comparison",
}
"""Backends by name, with what they do."""

PREFERENCE = {
    "cpu": ("native", "xla"),
    "tpu": ("tpu", "xla"),
    "cuda": ("gpu", "xla"),
    "default": ("xla",),
}
"""Backends to try in order, by platform."""


def choose(platform: str, problem: specs.Problem) -> tuple[str, list[tuple[str, str]]]:
    """Returns the backend for a platform and why those preferred to it refuse.

    Args:
      platform: "cpu", "tpu" or "cuda".
      problem: Shapes and dtypes of the call.
    """
    refused = []
    for name in PREFERENCE.get(platform, PREFERENCE["default"]):
        reason = None if name == "xla" else specs.obstacle(name, problem)
        if name == "gpu":
            reason = reason or device.hopper_obstacle()
        if reason is None:
            return name, refused
        refused.append((name, reason))
    raise UnsupportedError(f"attention: no backend on {platform}: {refused}")


def decode_attention(
    q: Float[Array, "batch heads time head_dim"],
    cache: KV,
    queries: Int[Array, "batch time"],
    keys: Int[Array, "batch length"],
    *,
    layer: Int[Array, ""] | None = None,
    scale: float | Float[Array, ""] = 1.0,
    window: int | Int[Array, ""] | None = None,
    softcap: float | None = None,
    rotate: str = "none",
    backend: str | None = None,
) -> Float[Array, "batch heads time head_dim"]:
    """Returns attention of a few queries over a quantized cache.

    The equation is that of `qjax.pallas_kernels.attention.reference`.

    Args:
      q: Queries; head `h` reads key head `h // (heads // kv_heads)`.
      cache: Codes and scales, with a leading axis if `layer` is given.
      queries: Positions of queries; -1 sees nothing.
      keys: Positions of slots; -1 is never seen.
      layer: Which layer of a stacked cache.
      scale: Factor of the scores.
      window: Positions seen, or None for all.
      softcap: Bound of the scores, or None.
      rotate: As the cache was written: "none", "keys" or "both".
      backend: None picks by platform; else one of `BACKENDS`.

    Returns:
      The weighted values, in the dtype of `q`; 0 for a query that sees nothing.

    Raises:
      SpecError: `backend` is not a name.
      UnsupportedError: The named backend cannot do it.
    """
    problem = specs.Problem.of(q, cache)
    options = {"softcap": softcap, "rotate": rotate}

    def run(name):
        def call(q, cache, queries, keys, layer, scale, window):
            both = dict(scale=scale, window=window, **options)
            if name == "xla":
                return _blockwise(q, cache, queries, keys, layer, **both)
            y = api.decode_attention(
                q, cache, positions=keys, queries=queries, layer=layer,
                backend=name, **both,
            )  # fmt: skip
            return same_variance((y, q, cache, queries, keys))[0]

        if name in ("xla", "reference"):
            return call
        return functools.partial(alone_or, call, run("xla"))

    arrays = (q, cache, queries, keys, layer, scale, window)
    if backend is not None:
        if backend not in BACKENDS:
            raise SpecError(
                f"attention: backend {backend!r}; expected one of {sorted(BACKENDS)}"
            )
        plain = backend in ("xla", "reference")
        if reason := None if plain else specs.obstacle(backend, problem):
            raise UnsupportedError(
                f"attention: backend {backend!r} cannot do {problem}: {reason}; "
                "use backend=None"
            )
        return run(backend)(*arrays)
    # As for products: of accelerators, only the one traced for has its kernels chosen.
    platforms = {"cpu", "default", device.platform()} & set(PREFERENCE)
    names = {key: choose(key, problem)[0] for key in sorted(platforms)}
    logger.debug("attention %s: %s", problem, names)
    if len(names) == 1 or set(names.values()) == {"xla"}:
        return run(names["default"])(*arrays)
    return lax.platform_dependent(*arrays, **{k: run(v) for k, v in names.items()})


def cached_attention(
    q: Float[Array, "batch heads time head_dim"],
    k: Float[Array, "batch kv_heads time head_dim"],
    v: Float[Array, "batch kv_heads time head_dim"],
    cache: KV,
    queries: Int[Array, "batch time"],
    keys: Int[Array, "batch length"],
    index: Int[Array, ""],
    **options: Any,
) -> Float[Array, "batch heads time head_dim"]:
    """Returns attention of a call's tokens, already written, over the cache.

    Up to `DECODE_TOKENS` tokens see themselves as the cache holds them; more see their
    own call's keys and values exactly and earlier ones as the cache holds them.

    Args:
      q: Queries.
      k: The call's keys.
      v: The call's values.
      cache: The cache with the call's tokens in the slots from `index` on.
      queries: Positions of the call's tokens.
      keys: Positions of all slots.
      index: First slot that the call wrote.
      **options: `layer, scale, window, softcap, rotate, backend` of `decode_attention`.
    """
    if q.shape[2] <= DECODE_TOKENS:
        return decode_attention(q, cache, queries, keys, **options)
    options.pop("backend", None)
    before = jnp.arange(keys.shape[1], dtype=jnp.int32) < index
    keys = jnp.where(before, keys, jnp.int32(-1))
    layer = options.pop("layer", None)
    if layer is not None and device.platform() == "tpu":
        # XLA lays codes out anew to slice them: better one layer than the stack.
        cache = KV(*(lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in cache))
        layer = None
    return _blockwise(q, cache, queries, keys, layer, fresh=(k, v), **options)


def float_attention(
    other: Callable[..., Array],
    q: Float[Array, "batch heads time head_dim"],
    keys: Float[Array, "layers batch kv_heads length head_dim"],
    values: Float[Array, "layers batch kv_heads length head_dim"],
    queries: Int[Array, "batch time"],
    positions: Int[Array, "batch length"],
    layer: Int[Array, ""],
    scale: float | Float[Array, ""],
    window: Int[Array, ""] | None,
    softcap: float | None,
) -> Float[Array, "batch heads time head_dim"]:
    """Returns attention of a call's tokens over a cache of floats.

    Up to `DECODE_TOKENS` tokens on CPU run the native kernel, which reads the layer in
    its stack; everything else, and gradients, `other`.

    Args:
      other: computes `other(q, keys, values, queries, positions, layer, scale, window)`
        by operations that XLA knows.
      q: Queries.
      keys: Keys of all layers.
      values: Values of all layers.
      queries: Positions of queries; -1 sees nothing, and its result means nothing.
      positions: Positions of slots; -1 is never seen.
      layer: Which layer.
      scale: Factor of the scores.
      window: Positions seen, or None for all.
      softcap: Bound of the scores, or None.
    """
    arrays = (q, keys, values, queries, positions, layer, scale, window)
    name = keys.dtype.name
    reason = cpu.obstacle(q.shape[-1], name, q.dtype.name, "float32")
    if q.shape[2] > DECODE_TOKENS or values.dtype != keys.dtype or reason:
        return other(*arrays)
    kernel = functools.partial(alone_or, functools.partial(_native, softcap), other)
    run = jax.custom_vjp(
        lambda *arrays: lax.platform_dependent(*arrays, cpu=kernel, default=other)
    )

    def backward(arrays, dy):
        floats, rest = arrays[:3], arrays[3:]
        _, pull = jax.vjp(lambda *floats: other(*floats, *rest), *floats)
        return (*pull(dy), *[None] * len(rest))

    run.defvjp(lambda *arrays: (run(*arrays), arrays), backward)
    return run(*arrays)


def _native(softcap, q, keys, values, queries, positions, layer, scale, window):
    y = cpu.attention(
        q, (keys, values), queries, positions, layer=layer, scale=scale,
        window=window, softcap=softcap,
    )  # fmt: skip
    return same_variance((y, q, keys, values, queries, positions))[0]


def write_kv(
    k: Float[Array, "batch kv_heads time head_dim"],
    v: Float[Array, "batch kv_heads time head_dim"],
    cache: KV,
    index: Int[Array, ""],
    *,
    layer: Int[Array, ""] | None = None,
    rotate: str = "none",
) -> KV:
    """Returns the cache with keys and values quantized into the slots from `index` on.

    Args:
      k: Keys.
      v: Values.
      cache: Codes and scales, updated in place where the caller gives them up.
      index: First slot, the same for all rows.
      layer: Which layer of a stacked cache.
      rotate: "none", "keys" or "both".
    """

    def run(backend):
        def call(k, v, cache, index, layer):
            return api.write_kv(
                k, v, cache, index, layer=layer, rotate=rotate, backend=backend
            )

        return call

    arrays = (k, v, cache, jnp.asarray(index, jnp.int32), layer)
    if device.platform() != "tpu" or specs.write_obstacle(cache):
        return run("reference")(*arrays)
    kernel = functools.partial(alone_or, run("tpu"), run("reference"))
    return lax.platform_dependent(*arrays, tpu=kernel, default=run("reference"))


def _blockwise(
    q, cache, queries, keys, layer, *, scale=1.0, window=None, softcap=None,
    rotate="none", fresh=None,
):  # fmt: skip
    """Online softmax over blocks of the cache, then over blocks of `fresh`."""
    batch, heads, time, width = q.shape
    kv_heads = cache.codes.shape[-3]
    shape = (batch, kv_heads, heads // kv_heads, time, width)
    dtype = q.dtype

    def absorb(q, state, key, value, scales, positions):
        top, total, mixed = state
        score = jnp.einsum(
            "bhgtd,bhsd->bhgts", q, key, preferred_element_type=jnp.float32
        )
        if scales is not None:
            score = score * scales[:, :, None, None, 0]
        score = score * scale
        if softcap is not None:
            score = jnp.tanh(score / softcap) * softcap
        mask = reference.seen(queries, positions, window)[:, None, None]
        score = jnp.where(mask, score, reference.MASKED)
        new = jnp.maximum(top, jnp.max(score, axis=-1, keepdims=True))
        weight = jnp.where(mask, jnp.exp(score - new), 0.0)
        fade = jnp.exp(top - new)
        total = total * fade + jnp.sum(weight, axis=-1, keepdims=True)
        if scales is not None:
            weight = weight * scales[:, :, None, None, 1]
        more = jnp.einsum(
            "bhgts,bhsd->bhgtd",
            weight.astype(dtype),
            value,
            preferred_element_type=jnp.float32,
        )
        return new, total, mixed * fade + more

    zeros = jnp.zeros((*shape[:-1], 1), jnp.float32)
    state = (zeros + reference.MASKED, zeros, jnp.zeros(shape, jnp.float32))
    state, q, cache, queries, keys = same_variance((state, q, cache, queries, keys))
    turned = (reference.hadamard(q) if rotate != "none" else q).reshape(shape)
    block = _block_size(batch * kv_heads, width, batch * heads * time, cache.length)

    def step(i, state):
        start = jnp.minimum(i * block, cache.length - block)
        codes, scales = _cut(cache, layer, start, block)
        where = lax.dynamic_slice_in_dim(keys, start, block, axis=1)
        # The last block overlaps the one before it where the length is ragged.
        own = start + jnp.arange(block, dtype=jnp.int32) >= i * block
        where = jnp.where(own, where, jnp.int32(-1))
        key, value = reference.decode_codes(codes, cache.kind, dtype)
        return absorb(turned, state, key, value, scales.astype(jnp.float32), where)

    first, last = reference.reach(queries, keys, window)
    first = jnp.min(jnp.where(last > 0, first, cache.length)) // block
    last = (jnp.max(last) + block - 1) // block
    state = lax.fori_loop(jnp.minimum(first, last), last, step, state)
    if rotate == "both":
        state = (*state[:2], reference.hadamard(state[2]))
    if fresh is not None:
        state = _absorb_fresh(absorb, q.reshape(shape), state, fresh, queries, block)
    _, total, mixed = state
    y = mixed / jnp.where(total == 0, 1.0, total)
    return y.astype(dtype).reshape(q.shape)


def _absorb_fresh(absorb, q, state, fresh, queries, block):
    """Goes on with keys and values that are still floats."""
    k, v = (x.astype(q.dtype) for x in fresh)
    time = k.shape[2]
    count = -(-time // block)
    spare = count * block - time
    k, v = (jnp.pad(x, [(0, 0), (0, 0), (0, spare), (0, 0)]) for x in (k, v))
    keys = jnp.pad(queries, [(0, 0), (0, spare)], constant_values=-1)

    def step(i, state):
        cut = lax.dynamic_slice_in_dim
        key, value = cut(k, i * block, block, 2), cut(v, i * block, block, 2)
        return absorb(q, state, key, value, None, cut(keys, i * block, block, 1))

    return lax.fori_loop(0, count, step, state)


def _cut(cache, layer, start, block):
    """Codes `[batch, kv_heads, block, row]` and scales of one block of one layer."""
    zero = jnp.zeros((), jnp.int32)
    codes, scale = cache
    if cache.kind == "float8_e4m3fn":
        # Tied to the loop: hoisted, the view as bytes becomes a copy of the cache.
        codes, start = lax.optimization_barrier((codes, start))
    at = (zero, zero, start, zero), (zero, zero, zero, start)
    sizes = [list(codes.shape), list(scale.shape)]
    sizes[0][-2] = sizes[1][-1] = block
    if layer is not None:
        at = tuple((layer, *a) for a in at)
        sizes = [[1, *s[1:]] for s in sizes]
    arrays = (reference.as_bytes(codes), scale)
    parts = [
        lax.dynamic_slice(x, a, s) for x, a, s in zip(arrays, at, sizes, strict=True)
    ]
    codes, scale = parts if layer is None else [x[0] for x in parts]
    return reference.from_bytes(codes, cache.kind), scale


def _block_size(rows: int, width: int, queries: int, length: int) -> int:
    """Slots per block: bounded by decoded bytes and by scores."""
    by_bytes = BLOCK_BYTES // (8 * rows * width)
    by_scores = MAX_SCORES // queries
    return min(length, max(16, min(by_bytes, by_scores, 1024)))
