"""Attention over a quantized cache, and writing to it: the public functions.

Decides nothing about which backend is best (`qjax.ops.attention` does); checks the
arguments, picks tiles and calls the backend named.

Refuses, naming the argument: shapes that do not belong together, unknown kinds, and
calls that `specs.obstacle` has a reason against.
"""

import importlib
from typing import Any

import jax.numpy as jnp

from . import cpu, reference, specs
from .reference import KV


class AttentionError(ValueError):
    """An argument does not fit; the message names it."""


def decode_attention(
    q,
    cache: KV,
    lengths=None,
    *,
    positions=None,
    queries=None,
    layer=None,
    window=None,
    softcap: float | None = None,
    scale: Any = 1.0,
    rotate: str = "none",
    backend: str = "reference",
    config: specs.Config | None = None,
    interpret: Any = False,
):
    """Returns attention of a few queries over a quantized cache.

    The equation is that of `reference`.

    Args:
      q: `[batch, heads, time, head_dim]`; head `h` reads key head `h // groups`.
      cache: Codes and scales; stacked if `layer` is given.
      lengths: int32 `[batch]`: slots 0 to `lengths - 1` hold tokens, of which the
        queries are the last. Or give `positions` and `queries`.
      positions: int32 `[batch, length]` of the slots, -1 for none.
      queries: int32 `[batch, time]` positions of the queries, -1 sees nothing.
      layer: int32 layer of a stacked cache: only that layer is read.
      window: Positions seen (may be traced), or None for all.
      softcap: Bound of the scores, or None.
      scale: Factor of the scores; may be traced.
      rotate: As the cache was written: "none", "keys" or "both".
      backend: "tpu", "gpu", "native" (CPU) or "reference".
      config: Tiles of a Pallas kernel; tuned ones by default.
      interpret: Passed to the kernel's `pallas_call`.

    Returns:
      `[batch, heads, time, head_dim]` in the dtype of `q`.

    Raises:
      AttentionError: An argument does not fit.
    """
    _check(q, cache, layer, rotate)
    if positions is None or queries is None:
        if lengths is None:
            raise AttentionError(
                "decode_attention: lengths is None, expected [batch]; or pass "
                "positions and queries"
            )
        queries, positions = reference.positions_from_lengths(
            lengths, q.shape[2], cache.length
        )
    _check_positions(q, cache, queries, positions)
    if backend == "reference":
        one = cache if layer is None else KV(cache.codes[layer], cache.scale[layer])
        y = reference.attend(
            q, one, queries, positions, scale=scale, window=window, softcap=softcap,
            rotate=rotate,
        )  # fmt: skip
        return y.astype(q.dtype)
    problem = specs.Problem.of(q, cache)
    if backend not in ("tpu", "gpu", "native"):
        raise AttentionError(
            f"decode_attention: backend is {backend!r}, expected 'tpu', 'gpu', "
            "'native' or 'reference'; choose one"
        )
    if reason := specs.obstacle(backend, problem):
        raise AttentionError(f"decode_attention: backend {backend!r}: {reason}")
    turned = reference.hadamard(q) if rotate != "none" else q
    options = {"layer": layer, "window": window, "softcap": softcap, "scale": scale}
    if backend == "native":
        y = cpu.attention(turned, cache, queries, positions, **options)
    else:
        module = importlib.import_module(f"{__package__}.{backend}")
        options |= {"config": config, "interpret": interpret}
        y = module.attention(turned, cache, queries, positions, **options)
    return reference.hadamard(y) if rotate == "both" else y


def write_kv(
    k,
    v,
    cache: KV,
    index,
    *,
    layer=None,
    rotate: str = "none",
    backend: str = "reference",
    interpret: Any = False,
) -> KV:
    """Returns the cache with keys and values quantized into slots from `index` on.

    In place where the cache is donated or a loop's carry: codes of the call's tokens
    are computed and placed in the caller's buffer. On some TPUs XLA copies a packed
    buffer to update it; the kernel of backend "tpu" rewrites the tiles it must.

    Args:
      k: Keys `[batch, kv_heads, time, head_dim]`, float.
      v: Values, the same shape.
      cache: What to write to; stacked if `layer` is given.
      index: int32 first slot, the same for all rows; the caller keeps
        `index + time <= length`.
      layer: int32 layer of a stacked cache.
      rotate: "none", "keys" or "both".
      backend: "tpu", or "reference" for plain jnp (CPU, GPU).
      interpret: Passed to the kernel's `pallas_call`.

    Raises:
      AttentionError: An argument does not fit.
    """
    _check(k, cache, layer, rotate, name="k")
    if k.shape != v.shape:
        raise AttentionError(
            f"write_kv: v has shape {list(v.shape)}, expected {list(k.shape)}, that "
            "of k"
        )
    if backend == "tpu":
        if reason := specs.write_obstacle(cache):
            raise AttentionError(f"write_kv: backend 'tpu': {reason}")
        from .tpu import write

        return write(
            k, v, cache, index, layer=layer, rotate=rotate, interpret=interpret
        )
    scale_dtype = cache.scale.dtype
    new = reference.encode(k, v, cache.kind, rotate=rotate, scale_dtype=scale_dtype)
    return reference.write(cache, new, index, layer)


def _check(q, cache: KV, layer, rotate: str, name: str = "q") -> None:
    """Raises unless `q` (or keys) and a cache belong together."""

    def refuse(argument, got, expected, hint):
        raise AttentionError(
            f"attention: {argument} {got}, expected {expected}; {hint}"
        )

    rank = 4 if layer is None else 5
    codes, scale = cache
    if cache.kind not in reference.KINDS:
        refuse("codes have dtype", codes.dtype, "int8, float8_e4m3fn or uint8", "cast")
    if codes.ndim != rank:
        hint = "pass layer for a stacked cache only"
        refuse("codes have shape", list(codes.shape), f"rank {rank}", hint)
    wanted = (*codes.shape[:-2], 2, codes.shape[-2])
    if tuple(scale.shape) != wanted:
        refuse("scale has shape", list(scale.shape), list(wanted), "see `KV`")
    if not jnp.issubdtype(scale.dtype, jnp.floating):
        refuse("scale has dtype", scale.dtype, "a float dtype", "cast it")
    if not jnp.issubdtype(q.dtype, jnp.floating):
        refuse(f"{name} has dtype", q.dtype, "a float dtype", "cast it")
    batch, kv_heads = codes.shape[-4:-2]
    width = cache.head_dim
    if q.ndim != 4 or q.shape[0] != batch or q.shape[3] != width:
        want = f"[{batch}, heads, time, {width}]"
        refuse(f"{name} has shape", list(q.shape), want, "as the cache was made")
    if q.shape[1] % kv_heads or (name == "k" and q.shape[1] != kv_heads):
        want = f"{kv_heads}" if name == "k" else f"a multiple of {kv_heads}"
        refuse(f"{name} has heads", q.shape[1], want, "the cache's key heads")
    if name == "k" and q.shape[2] > cache.length:
        refuse("k has tokens", q.shape[2], f"at most {cache.length}", "slots")
    if rotate not in reference.ROTATE:
        refuse("rotate is", repr(rotate), reference.ROTATE, "choose one")
    if rotate != "none" and width % 2:
        refuse("rotate is", repr(rotate), "'none'", f"heads of {width} do not rotate")


def _check_positions(q, cache, queries, positions):
    for name, got, expected in (
        ("queries", queries.shape, (q.shape[0], q.shape[2])),
        ("positions", positions.shape, (q.shape[0], cache.length)),
    ):
        if tuple(got) != expected:
            raise AttentionError(
                f"attention: {name} have shape {list(got)}, expected {list(expected)}"
            )
