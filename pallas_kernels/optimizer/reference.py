"""The definition of the 8-bit updates: whole arrays, look-ups in the 256 values.

Error BOUNDS of a backend against this, for finite input: stored absolute maxima and
parameters agree to `BOUND` relative to the size of the terms (a few roundings: sums may
be contracted, division and square root need not be correctly rounded); codes are equal
unless the moment lies within `BOUND` of a midpoint, where they are neighbours.
"""

from typing import Any

import jax.numpy as jnp

from . import dynamic, update
from .update import BLOCK, Hyper

BOUND = 1e-5


def load(codes: Any, absmax: Any, *, signed: bool) -> Any:
    """A stored moment as float32, in the shape of its codes."""
    values = jnp.asarray(dynamic.table(signed))[codes.reshape(-1).astype(jnp.int32)]
    scale = jnp.repeat(absmax, BLOCK)[: values.size]
    return (values * scale).reshape(codes.shape)


def store(moment: Any, *, signed: bool) -> tuple[Any, Any]:
    """Nearest codes and absolute maxima, blocks of 256 over the row-major array."""
    flat = moment.reshape(-1)
    blocks = jnp.pad(flat, (0, -flat.size % BLOCK)).reshape(-1, BLOCK)
    absmax, inverse = update.reciprocal(jnp.max(jnp.abs(blocks), axis=-1))
    values = jnp.asarray(dynamic.table(signed))
    bounds = (values[:-1] + values[1:]) * 0.5
    codes = jnp.searchsorted(bounds, blocks * inverse[:, None], side="left")
    codes = codes.astype(jnp.uint8).reshape(-1)[: flat.size]
    return codes.reshape(moment.shape), absmax


def adamw8(p: Any, g: Any, state: Any, hyper: Any) -> tuple[Any, ...]:
    """One AdamW step: `(p, m codes, m absmax, v codes, v absmax)`."""
    m = load(*state[0], signed=True)
    v = load(*state[1], signed=False)
    new, m, v = update.adamw(_wide(p), _wide(g), m, v, Hyper(*hyper))
    return (new.astype(p.dtype), *store(m, signed=True), *store(v, signed=False))


def lion8(p: Any, g: Any, state: Any, hyper: Any) -> tuple[Any, ...]:
    """One Lion step: `(p, m codes, m absmax)`."""
    m = load(*state[0], signed=True)
    new, m = update.lion(_wide(p), _wide(g), m, Hyper(*hyper))
    return (new.astype(p.dtype), *store(m, signed=True))


def _wide(x):
    return x.astype(jnp.float32)
