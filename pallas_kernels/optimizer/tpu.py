"""The 8-bit updates on TPU: one pass over the rows of a matrix, in place.

A block of 256 consecutive elements is a run of 256 lanes. A grid step holds a tile in
VMEM and goes through it in slabs of 32 rows x 256 columns, one block per row: decode,
update, lane maximum, encode. Nothing is written to HBM but the results, which alias the
operands. Absolute maxima travel as `[rows, columns / 256]`; the column of a block is
picked and replaced by comparing lane numbers.

Rows whose length is no multiple of 256, where blocks would cross rows, are refused.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .. import versions
from . import dynamic, update
from .specs import SLAB, TpuConfig, rows_of, tpu_config, tpu_obstacle
from .update import BLOCK, Hyper

obstacle = tpu_obstacle


def adamw8(p: Any, g: Any, state: Any, hyper: Any, **options: Any) -> tuple[Any, ...]:
    """One AdamW step: `(p, m codes, m absmax, v codes, v absmax)`."""
    return _run("adamw8", p, g, (*state[0], *state[1]), hyper, **options)


def lion8(p: Any, g: Any, state: Any, hyper: Any, **options: Any) -> tuple[Any, ...]:
    """One Lion step: `(p, m codes, m absmax)`."""
    return _run("lion8", p, g, tuple(state[0]), hyper, **options)


def _run(name, p, g, state, hyper, *, config: TpuConfig | None = None, interpret=False):
    shape = rows_of(p.shape)
    config = config or tpu_config(*shape)
    rows, columns = config.rows, config.columns
    blocks = shape[1] // BLOCK
    maxima = (shape[0], blocks)
    flat = [x.reshape(shape if i % 2 == 0 else maxima) for i, x in enumerate(state)]
    tile = pl.BlockSpec((rows, columns), lambda i, j: (i, j))
    lanes = pl.BlockSpec((rows, blocks), lambda i, j: (i, 0))
    states = [tile, lanes] * (len(flat) // 2)
    values = pl.BlockSpec((8, 128), lambda i, j: (0, 0))
    # The interpreter pads operands to whole tiles, also those that results alias.
    alias = not interpret or (shape[0] % rows == 0)
    operands = [hyper, _tables(), g.reshape(shape), p.reshape(shape), *flat]
    new = pl.pallas_call(
        functools.partial(_kernel, name, columns // BLOCK),
        name=name,
        grid=(pl.cdiv(shape[0], rows), shape[1] // columns),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), values, tile, tile, *states],
        out_specs=[tile, *states],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands[3:]],
        input_output_aliases={i: i - 3 for i in range(3, len(operands)) if alias},
        cost_estimate=cost(p, g, state),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary")
        ),
        interpret=interpret,
    )(*operands)
    return tuple(x.reshape(y.shape) for x, y in zip(new, (p, *state), strict=True))


def cost(p: Any, g: Any, state: Any) -> pl.CostEstimate:
    """Bytes of all operands, and of all but the gradient back."""
    size = math.prod(p.shape)
    written = sum(math.prod(x.shape) * x.dtype.itemsize for x in (p, *state))
    return pl.CostEstimate(
        flops=60 * len(state) * size,
        bytes_accessed=2 * written + size * g.dtype.itemsize,
        transcendentals=size,
    )


def _kernel(name, count, hyper_ref, table_ref, g_ref, p_ref, *refs):
    """Updates a tile; `count` blocks per row."""
    half = len(refs) // 2
    olds, (p_out, *news) = refs[:half], refs[half:]
    hyper = Hyper(*(hyper_ref[i] for i in range(len(Hyper._fields))))
    first = pl.program_id(1) * count

    def slab(r, _):
        rows = pl.ds(pl.multiple_of(r * SLAB, SLAB), SLAB)
        old = [ref[rows, :] for ref in olds[1::2]]
        fresh = [
            jnp.where(first == 0, x, ref[rows, :])
            for x, ref in zip(old, news[1::2], strict=True)
        ]
        lane = lax.broadcasted_iota(jnp.int32, old[0].shape, 1)
        for b in range(count):
            at = (rows, pl.ds(b * BLOCK, BLOCK))
            here = lane == first + b
            moments = [
                _load(codes[at], absmax, here, table_ref[2 * i : 2 * i + 2, :])
                for i, (codes, absmax) in enumerate(zip(olds[::2], old, strict=True))
            ]
            step: Any = update.adamw if name == "adamw8" else update.lion
            p, *moments = step(_wide(p_ref[at]), _wide(g_ref[at]), *moments, hyper)
            p_out[at] = p.astype(p_out.dtype)
            for i, moment in enumerate(moments):
                codes, absmax = _store(moment, signed=i == 0)
                news[2 * i][at] = codes
                fresh[i] = jnp.where(here, absmax, fresh[i])
        for ref, x in zip(news[1::2], fresh, strict=True):
            ref[rows, :] = x
        return 0

    lax.fori_loop(0, p_ref.shape[0] // SLAB, slab, 0)


def _wide(x):
    return x.astype(jnp.float32)


def _tables():
    """The values of both maps, 128 per row: what lanes can pick from."""
    rows = [dynamic.table(signed).reshape(2, 128) for signed in (True, False)]
    return jnp.asarray(np.concatenate([*rows, np.zeros((4, 128), np.float32)]))


def _load(codes, absmax, here, table):
    scale = jnp.sum(jnp.where(here, absmax, 0.0), axis=1, keepdims=True)
    codes = codes.astype(jnp.int32)
    halves = [_pick(table, codes[:, at : at + 128]) for at in (0, 128)]
    return jnp.concatenate(halves, axis=1) * scale


def _pick(table, codes):
    rows = (jnp.broadcast_to(table[i : i + 1], codes.shape) for i in (0, 1))
    low, high = (versions.lookup(row, codes & jnp.int32(127), 1) for row in rows)
    return jnp.where(codes < 128, low, high)


def _store(moment, *, signed):
    absmax = jnp.max(jnp.abs(moment), axis=1, keepdims=True)
    absmax, inverse = update.reciprocal(absmax)
    codes = update.encode(moment, inverse, signed=signed)
    return codes.astype(jnp.uint8), absmax
