"""The search behind trellis-coded quantization: the nearest walk of every tile.

A tile is a sequence of 256 numbers, and a walk a sequence of 16-bit states, each of
which drops the high `bits` bits of the state before it and appends as many. The search
is Viterbi's: of the `2**bits` states that lead to the same low bits only the cheapest
survives. The walk has to end where it begins; the low bits there are those of the best
walk around the seam, with open ends (Tseng et al., QTIP, arXiv 2406.11235, algorithm
4), and a second search holds them fixed.

All costs are integers, so that every backend gives the same states: numbers and values
are rounded to a grid whose squares are multiples of `2**bits`, the low bits of a cost
hold the high bits of its state, and a minimum finds the lowest state among equals.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt16

from .. import device, native

STEPS = 256
STATES = 1 << 16
LARGEST = 4.5
"""Numbers beyond are treated as this one: values of states end at 4."""
AROUND = 32
"""Steps on each side of the seam from which its state is found."""
_NEVER = 1 << 30
_GRID = {1: (8, 1), 2: (9, 1), 3: (8, 2), 4: (8, 2), 5: (8, 3), 6: (8, 3)}
_FINE = (7, 4)


def obstacle() -> str | None:
    """Why the native search cannot run, or None."""
    state = native.status()
    return None if state.loaded else f"native CPU kernels are absent: {state.reason}"


def search(
    x: Float[Array, "tiles 256"],
    values: np.ndarray,
    bits: int,
    *,
    around: int = AROUND,
    backend: str | None = None,
) -> UInt16[Array, "tiles 256"]:
    """The states of the walk that is nearest to each tile.

        min over walks of  sum_t (x_t - values[state_t])^2

    Args:
      x: tiles.
      values: the value of each state, float32 `[2**16]`, within -4 and 4.
      bits: bits per step, 1 to 8.
      around: steps on each side of the seam that determine its state, 1 to 128.
      backend: "native", "xla", or None for the native search on CPUs that have it.

    Returns:
      States, the same for every backend.
    """
    grid, shift = _GRID.get(bits, _FINE)
    unit = float(2**grid)
    numbers = jnp.round(jnp.clip(x, -LARGEST, LARGEST) * unit).astype(jnp.int32)
    numbers = (numbers << shift).astype(jnp.int16)
    table = (np.round(values * unit).astype(np.int32) << shift).astype(np.int32)
    plain = functools.partial(_xla, table=table, bits=bits, around=around)
    if backend == "xla" or (backend is None and obstacle()):
        return plain(numbers)
    kernel = functools.partial(_native, table=table, bits=bits, around=around)
    if backend == "native":
        return kernel(numbers)
    return lax.platform_dependent(numbers, cpu=kernel, default=plain)


def _native(x, table, bits, around):
    call = jax.ffi.ffi_call(
        "qjax_trellis",
        jax.ShapeDtypeStruct(x.shape, jnp.uint16),
        vmap_method="sequential",
    )
    halves = jnp.asarray(table.astype(np.uint16).astype(np.uint32))
    return call(x, halves, bits=np.int64(bits), around=np.int64(around))


def _xla(x, table, bits, around):
    batch = 8 if device.platform() == "cpu" else 128
    walk = functools.partial(_walk, table=jnp.asarray(table), bits=bits, around=around)
    return lax.map(walk, x, batch_size=min(batch, max(x.shape[0], 1)))


def _walk(x: Int[Array, " 256"], table, bits, around):
    """The states of one tile."""
    size = STATES >> bits
    open_ended = jnp.zeros((size,), jnp.int32)
    seam = jnp.concatenate([x[STEPS - around :], x[:around]])
    cost, back = _forward(open_ended, seam, table, bits)
    start, _ = _backward(jnp.argmin(cost), back[around:], bits)
    only = jnp.where(jnp.arange(size) == start, 0, _NEVER).astype(jnp.int32)
    _, back = _forward(only, x, table, bits)
    return _backward(start, back, bits)[1]


def _forward(cost, x, table, bits):
    """Costs by low bits after all steps, and the survivors' high bits at each."""
    same = 1 << bits
    table = table.reshape(same, -1, same)
    high = jnp.arange(same, dtype=jnp.int32)[:, None, None]

    def step(cost, number):
        missed = number.astype(jnp.int32) - table
        total = cost.reshape(same, -1, 1) + missed * missed + high
        best = jnp.min(total, 0).reshape(-1)
        back = (best & (same - 1)).astype(jnp.uint8)
        best = best & ~jnp.int32(same - 1)
        return best - jnp.min(best), back

    return lax.scan(step, cost, x)


def _backward(low, back, bits):
    """Low bits of the state before the first step, and the states."""

    def step(low, row):
        state = (row[low].astype(jnp.int32) << (16 - bits)) | low
        return state >> bits, state.astype(jnp.uint16)

    return lax.scan(step, low.astype(jnp.int32), back, reverse=True)
