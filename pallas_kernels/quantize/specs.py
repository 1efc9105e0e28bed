"""Tiles of the encoders and what they can do."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from ..weights import WeightSpec
from .rules import unit_rows

LANES = 128
BYTE_ROWS = 32
"""Rows of a tile of bytes on TPU: what is stored at once is a multiple."""
TILE_BYTES = 2 << 20
GPU_COLUMNS = 128
"""Columns of a GPU program: one per thread of a warpgroup."""
GPU_GROUP = 256
"""Longest group whose scales the GPU kernel finds: caches hold those in progress."""


@dataclasses.dataclass(frozen=True)
class TpuConfig:
    """Tiles of `tpu.py`.

    Attributes:
      rows: rows of the weight per grid step, a multiple of `slab_rows`.
      columns: columns per grid step.
    """

    rows: int
    columns: int


def slab_rows(spec: WeightSpec) -> int:
    """Rows that become whole tiles of bytes and hold whole groups.

    A group that is the whole column puts no bound: its scales are given.
    """
    rows = BYTE_ROWS * 8 // math.gcd(spec.bits, 8)
    return rows if spec.groups == 1 else math.lcm(rows, spec.group)


def tpu_config(spec: WeightSpec, item_bytes: int = 4) -> TpuConfig:
    """Default tiles: 2 MB of floats; a block of scales is 8 rows or all of them.

    Chosen from schedules: `python benchmarks/tpu_aot.py --match encode`.
    """
    slab = slab_rows(spec)
    rows = slab if spec.groups == 1 else math.lcm(slab, 8 * spec.group)
    height = -(-spec.k // slab) * slab
    if spec.groups > 1 and rows > height:
        rows = height
    fit = max(TILE_BYTES // item_bytes // rows // LANES, 1)
    columns = min(fit * LANES, 512, -(-spec.n // LANES) * LANES)
    if spec.groups == 1:
        rows = min(max(TILE_BYTES // item_bytes // columns // slab, 1) * slab, height)
    return TpuConfig(rows, columns)


def tpu_obstacle(spec: WeightSpec, w_dtype: Any) -> str | None:
    """Why the TPU kernel cannot encode a weight; None when it can."""
    if jnp.dtype(w_dtype).name not in ("float32", "bfloat16"):
        return f"{jnp.dtype(w_dtype).name} is no vector type of a TPU"
    unit = unit_rows(spec.bits)
    if spec.k % unit:
        return f"{spec.k} rows cut a packing unit of {unit}"
    if spec.groups > 1 and spec.group % (8 * unit):
        return f"groups of {spec.group} are no multiple of {8 * unit} rows"
    if spec.groups > 1 and math.lcm(slab_rows(spec), spec.group) > 4096:
        return f"groups of {spec.group} make tiles of more than 4096 rows"
    return None


def gpu_rows(spec: WeightSpec) -> int:
    """Rows that a GPU program holds in registers; 8-bit codes need more beside."""
    return min(spec.group, spec.k, 64 if spec.bits == 8 else 128)


def gpu_chunks(spec: WeightSpec) -> int:
    """Runs of `gpu_rows` that cover a group."""
    return -(-min(spec.group, spec.k) // gpu_rows(spec))


def gpu_obstacle(spec: WeightSpec, w_dtype: Any) -> str | None:
    """Why the GPU kernel cannot encode a weight; None when it can."""
    if jnp.dtype(w_dtype).name not in ("float32", "bfloat16"):
        return f"{jnp.dtype(w_dtype).name} weights are not written"
    group, unit = min(spec.group, spec.k), unit_rows(spec.bits)
    if group % unit:
        return f"groups of {group} cut packing units of {unit} rows"
    if spec.k % group:
        return f"{spec.k} rows leave a short group of {group}"
    if spec.n < GPU_COLUMNS:
        return f"{spec.n} columns are less than the {GPU_COLUMNS} threads of a program"
    return None
