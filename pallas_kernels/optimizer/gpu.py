"""The 8-bit updates on GPU (Mosaic GPU): one warpgroup, one block after the other.

The flat arrays are cut into blocks of 256. A warpgroup holds a block as two elements
per thread, read from memory with coalesced loads, decodes, updates, reduces the
magnitude over its threads and writes everything back where it was. Many warpgroups
share a processor, so that one computes while others wait for memory; a block needs few
registers. Arithmetic decoding and encoding (`dynamic`)
keep tables out of it.

Sizes that are no multiple of 4 blocks are refused.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import dynamic, update
from .update import BLOCK, Hyper

RUN = 4
"""Blocks per program."""


def obstacle(p_shape: tuple[int, ...], p_dtype: Any, g_dtype: Any) -> str | None:
    """Why the GPU kernel cannot update a parameter; None when it can."""
    for dtype in (p_dtype, g_dtype):
        if jnp.dtype(dtype).name not in ("float32", "bfloat16"):
            return f"{jnp.dtype(dtype).name} operands are not written"
    size = math.prod(p_shape)
    if size % (BLOCK * RUN):
        return f"{size} elements are no multiple of {BLOCK * RUN}"
    return None


def adamw8(p: Any, g: Any, state: Any, hyper: Any, **options: Any) -> tuple[Any, ...]:
    """One AdamW step: `(p, m codes, m absmax, v codes, v absmax)`."""
    return _run("adamw8", p, g, (*state[0], *state[1]), hyper, **options)


def lion8(p: Any, g: Any, state: Any, hyper: Any, **options: Any) -> tuple[Any, ...]:
    """One Lion step: `(p, m codes, m absmax)`."""
    return _run("lion8", p, g, tuple(state[0]), hyper, **options)


def _run(name, p, g, state, hyper, *, config=None, interpret=False):
    del config
    arrays = (p, *state)
    refs = [jax.new_ref(x.reshape(-1)) for x in arrays]

    def body(*refs):
        _kernel(name, lax.axis_index("run"), *refs)

    call: Any = pl.kernel(
        body,
        mesh=plgpu.Mesh(grid=(p.size // BLOCK // RUN,), grid_names=("run",)),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=interpret,
        name=name,
    )
    call(hyper, g.reshape(-1), *refs)
    new = zip(refs, arrays, strict=True)
    return tuple(jax.freeze(ref).reshape(x.shape) for ref, x in new)


def _kernel(name, run, hyper_ref, g_ref, p_ref, *refs):
    hyper = Hyper(*(hyper_ref[i] for i in range(len(Hyper._fields))))
    first = run * RUN
    for r in range(RUN):
        block = first + r
        at = pl.ds(block * BLOCK, BLOCK)
        moments = []
        for i in range(len(refs) // 2):
            codes = refs[2 * i][at].astype(jnp.int32)
            values = dynamic.decode(codes, signed=i == 0)
            moments.append(values * refs[2 * i + 1][block])
        adamw = functools.partial(update.adamw, root=_root)
        step: Any = adamw if name == "adamw8" else update.lion
        p, g = (ref[at].astype(jnp.float32) for ref in (p_ref, g_ref))
        p, *moments = step(p, g, *moments, hyper)
        p_ref[at] = p.astype(p_ref.dtype)
        for i, moment in enumerate(moments):
            absmax, inverse = update.reciprocal(jnp.max(jnp.abs(moment)))
            codes = update.encode(moment, inverse, signed=i == 0)
            refs[2 * i][at] = codes.astype(jnp.uint8)
            refs[2 * i + 1][block] = absmax


def _root(x):
    """Square root by the reciprocal one, which is what Mosaic GPU has."""
    return jnp.where(x > 0, x * lax.rsqrt(x), 0.0)
