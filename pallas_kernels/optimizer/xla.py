"""The 8-bit updates on any platform: a loop over chunks, in place.

Each turn slices a chunk of every flat operand, updates it and writes it back, so what
lives beside the operands is a chunk: with donated operands a step needs no second copy
of anything. Written as one expression over the whole array the same update costs five
to eight float32 copies of the parameter.

On TPU flattening a matrix moves it in memory; there `tpu.py` is the way.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax

from . import dynamic, update
from .update import BLOCK, Hyper

CHUNKS = {"cpu": 1 << 18, "other": 1 << 24}
"""Elements per turn: what a cache holds, or what makes launching it negligible."""
PIECES = 2
"""Pieces of a turn."""


def obstacle(p_shape: tuple[int, ...], p_dtype: Any, g_dtype: Any) -> str | None:
    """None: every shape and dtype that `api` admits."""
    del p_shape, p_dtype, g_dtype
    return None


def adamw8(p: Any, g: Any, state: Any, hyper: Any, **_: Any) -> tuple[Any, ...]:
    """One AdamW step: `(p, m codes, m absmax, v codes, v absmax)`."""
    return _by_platform(_adamw, p, g, (*state[0], *state[1]), hyper)


def lion8(p: Any, g: Any, state: Any, hyper: Any, **_: Any) -> tuple[Any, ...]:
    """One Lion step: `(p, m codes, m absmax)`."""
    return _by_platform(_lion, p, g, tuple(state[0]), hyper)


def _by_platform(step, *operands):
    if operands[0].size <= CHUNKS["cpu"]:
        return _loop(step, CHUNKS["cpu"], *operands)
    cpu, other = (functools.partial(_loop, step, n) for n in CHUNKS.values())
    return lax.platform_dependent(*operands, cpu=cpu, default=other)


def _loop(step, chunk, p, g, state, hyper):
    """Applies `step` to chunks `[blocks, 256]` of flat operands."""
    size = p.size
    turns = size // chunk
    grad = g.reshape(-1)
    flat = (p.reshape(-1), *(x.reshape(-1) for x in state))
    turn = functools.partial(_turn, step, Hyper(*hyper), grad)
    if turns:
        flat = lax.fori_loop(0, turns, lambda i, x: turn(x, i * chunk, chunk), flat)
    if rest := size % chunk:
        flat = turn(flat, turns * chunk, rest)
    shapes = (p.shape, *(x.shape for x in state))
    return tuple(x.reshape(s) for x, s in zip(flat, shapes, strict=True))


def _turn(step, hyper, grad, flat, start, count):
    """Updates `count` elements from `start` of the flat operands."""
    blocks = -(-count // BLOCK)

    def read(x, whole, zero=0):
        if whole:
            part = lax.dynamic_slice(x, (start,), (count,))
            if count % BLOCK:  # what fills the last block must not be its maximum
                pad = (0, blocks * BLOCK - count)
                part = jnp.pad(part, pad, constant_values=zero)
            return part.reshape(blocks, BLOCK)
        return lax.dynamic_slice(x, (start // BLOCK,), (blocks,))

    def write(x, part, whole):
        if whole:
            part = part.reshape(-1)[:count].astype(x.dtype)
            return lax.dynamic_update_slice(x, part, (start,))
        return lax.dynamic_update_slice(x, part, (start // BLOCK,))

    whole = (True, *(i % 2 == 0 for i in range(len(flat) - 1)))
    zeros = (0, dynamic.ZERO[True], 0, dynamic.ZERO[False], 0)
    parts = [read(x, w, z) for x, w, z in zip(flat, whole, zeros)]  # noqa: B905
    new = _scan(step, hyper, (parts[0], read(grad, True), *parts[1:]))
    return tuple(write(x, y, w) for x, y, w in zip(flat, new, whole, strict=True))


def _scan(step, hyper, parts):
    """Updates a chunk in pieces.

    A loop takes its operands as buffers of their own. Without it XLA reads the flat
    array again wherever a slice is used and, to be able to, copies all of it in every
    turn before it writes.
    """
    blocks = parts[0].shape[0]
    if blocks % PIECES:
        return step(*parts, hyper)
    cut = [x.reshape(PIECES, blocks // PIECES, *x.shape[1:]) for x in parts]
    new = lax.map(lambda x: step(*x, hyper), tuple(cut))
    return [x.reshape(blocks, *x.shape[2:]) for x in new]


def _adamw(p, g, m_codes, m_absmax, v_codes, v_absmax, hyper):
    m = _load(m_codes, m_absmax, True)
    v = _load(v_codes, v_absmax, False)
    p, m, v = update.adamw(_wide(p), _wide(g), m, v, hyper)
    return (p, *_store(m, True), *_store(v, False))


def _lion(p, g, m_codes, m_absmax, hyper):
    p, m = update.lion(_wide(p), _wide(g), _load(m_codes, m_absmax, True), hyper)
    return (p, *_store(m, True))


def _wide(x):
    return x.astype(jnp.float32)


def _load(codes, absmax, signed):
    values = dynamic.decode(codes.astype(jnp.int32), signed=signed)
    return values * absmax[:, None]


def _store(moment, signed):
    absmax, inverse = update.reciprocal(_row_max(moment))
    codes = update.encode(moment, inverse[:, None], signed=signed)
    return codes, absmax


def _row_max(x):
    """Largest magnitude of each row: halves first, which CPUs do many at a time."""
    x = jnp.abs(x)
    while x.shape[-1] > 16:
        half = x.shape[-1] // 2
        x = jnp.maximum(x[:, :half], x[:, half:])
    return jnp.max(x, axis=-1)
