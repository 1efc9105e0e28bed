"""One leaf of an optimizer: its moments, in 8 bits or float32, and their update.

A leaf `[..., rows, columns]` is a stack of matrices, such as the layers of a run. Each
matrix, row after row, is cut into blocks of 256 elements that share one maximum, as
bitsandbytes cuts the tensor of one layer; codes have the shape of the leaf, maxima are
`[..., blocks]`. This does not depend on how the leaf is spread over devices
(`qjax.train.moment_shards`), so that a state can move from one mesh to another.

Costs: nothing of the size of a leaf beside its operands. Where blocks would cross
matrices, and on TPUs where no kernel takes the leaf, matrices are updated one by one.

Reference: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv
2110.02861.
"""

import functools
import importlib
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jaxtyping import Array

import qjax.pallas_kernels.device as device
from qjax.ops.shards import explicit
from qjax.pallas_kernels.alone import alone_or
from qjax.pallas_kernels.optimizer import api, dynamic, update
from qjax.pallas_kernels.optimizer.api import AdamW8, Lion8, Moment8
from qjax.train.moment_shards import maxima_shape, maxima_split, placed, spread

RULES = {"adamw": AdamW8, "lion": Lion8}
"""The moments of a leaf by rule; each is a `Moment8` or a float32 array."""
_ROOM = "qjax.pallas_kernels.optimizer"


class Scalars(NamedTuple):
    """What an update needs beside arrays; see `qjax.pallas_kernels.optimizer.api`."""

    learning_rate: Any
    count: Any
    b1: Any
    b2: Any
    eps: Any
    weight_decay: Any
    gradient_scale: Any


def init_leaf(p: Any, rule: str, eight: bool, where: NamedSharding | None) -> Any:
    """Returns zero moments of a leaf.

    Args:
      p: The leaf.
      rule: One of `RULES`.
      eight: Whether in 8 bits.
      where: How the leaf is split over devices, if that is known.
    """
    kind = RULES[rule]
    if not eight:
        return kind(*(jnp.zeros_like(p, jnp.float32) for _ in kind._fields))
    moments = []
    for signed, _ in zip((True, False), kind._fields, strict=False):
        codes = jnp.full_like(p, dynamic.ZERO[signed], jnp.uint8)
        maxima = jnp.zeros(maxima_shape(p.shape), jnp.float32)
        if where is not None:
            codes = placed(codes, where)
            maxima = placed(maxima, maxima_split(p.shape, where))
        moments.append(Moment8(codes, maxima))
    return kind(*moments)


def update_leaf(
    p: Array, g: Array, moments: Any, by: Scalars, where: NamedSharding | None
) -> tuple[Array, Any]:
    """Returns a leaf and its moments after a step.

    Args:
      p: The leaf.
      g: Its gradient.
      moments: As `init_leaf` or a step before gave them.
      by: The rest.
      where: How the leaf is split over devices, if that is known.
    """
    if not isinstance(moments.m, Moment8):
        return _float(p, g, moments, by)
    by = Scalars(*map(jnp.asarray, by))
    if where is None or not (any(where.spec) or explicit()):
        return _stack(p, g, moments, by)
    return spread(_stack, p, g, moments, by, where)


def _float(p, g, moments, by):
    rate, count, b1, b2, eps, decay, scale = by
    hyper = update.hyper_vector(rate, b1, b2, eps, decay, count, scale)
    rule: Any = update.adamw if isinstance(moments, AdamW8) else update.lion
    wide, slope = p.astype(jnp.float32), g.astype(jnp.float32)
    new, *moved = rule(wide, slope, *moments, update.Hyper(*hyper))
    return new.astype(p.dtype), type(moments)(*moved)


def _stack(p, g, moments, by):
    """Updates a leaf of one device by the best backend for it."""
    platform = device.platform()
    slow = functools.partial(_by_matrix if platform == "tpu" else _at_once, "xla")
    name = _kernel(platform, p, g)
    if name is None:
        return slow(p, g, moments, by)
    fast = functools.partial(_at_once, name)

    def run(*operands):
        return alone_or(fast, slow, *operands) if name == "tpu" else fast(*operands)

    # Programs can be compiled for a platform other than the one they are traced for.
    return lax.platform_dependent(p, g, moments, by, **{platform: run}, default=slow)


def _kernel(platform, p, g):
    """Name of the kernel that updates a leaf, if one does."""
    name = {"tpu": "tpu", "cuda": "gpu"}.get(platform)
    if name is None or _crossed(p) or (name == "gpu" and device.hopper_obstacle()):
        return None
    module = importlib.import_module(f"{_ROOM}.{name}")
    return None if module.obstacle(p.shape, p.dtype, g.dtype) else name


def _crossed(p):
    """Whether blocks of the whole leaf would cross matrices."""
    size = math.prod(p.shape[-2:])
    return size % update.BLOCK != 0 and p.size > size


def _at_once(backend, p, g, moments, by):
    if _crossed(p):
        return _by_matrix(backend, p, g, moments, by)
    flat = [Moment8(m.codes, m.absmax.reshape(-1)) for m in moments]
    new, moved = _call(backend, p, g, type(moments)(*flat), by)
    shape = maxima_shape(p.shape)
    back = [Moment8(m.codes, m.absmax.reshape(shape)) for m in moved]
    return new, type(moments)(*back)


def _call(backend, p, g, moments, by):
    options = by._asdict() | {"backend": backend}
    if isinstance(moments, AdamW8):
        return api.adamw8(p, g, moments, **options)
    options = {k: v for k, v in options.items() if k not in ("count", "eps")}
    return api.lion8(p, g, moments, **options)


def _by_matrix(backend, p, g, moments, by):
    """Updates one matrix after the other, in place."""
    if p.ndim < 3:
        return _call(backend, p, g, moments, by)
    matrix = p.shape[-2:]
    kind = type(moments)

    def stacked(x, tail):
        return x.reshape(-1, *tail)

    flat = [stacked(p, matrix)]
    for m in moments:
        flat += [stacked(m.codes, matrix), stacked(m.absmax, m.absmax.shape[-1:])]
    slopes = stacked(g, matrix)

    def turn(i, flat):
        def at(x):
            return lax.dynamic_index_in_dim(x, i, keepdims=False)

        one, *rest = map(at, flat)
        pairs = zip(rest[::2], rest[1::2], strict=True)
        state = kind(*(Moment8(*pair) for pair in pairs))
        new, state = _call(backend, one, at(slopes), state, by)
        found = [new, *(x for m in state for x in m)]
        return [
            lax.dynamic_update_index_in_dim(x, y, i, 0)
            for x, y in zip(flat, found, strict=True)
        ]

    new, *rest = lax.fori_loop(0, flat[0].shape[0], turn, flat)
    shape = maxima_shape(p.shape)
    pairs = zip(rest[::2], rest[1::2], strict=True)
    moved = (Moment8(c.reshape(p.shape), a.reshape(shape)) for c, a in pairs)
    return new.reshape(p.shape), kind(*moved)
