"""Tiles of the 8-bit update kernels and what they can do."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from .update import BLOCK

SLAB = 32
"""Rows that the TPU kernel works on at once: a tile of 8-bit codes."""


@dataclasses.dataclass(frozen=True)
class TpuConfig:
    """Tiles of `tpu.py`.

    Attributes:
      rows: rows per grid step, a multiple of 32.
      columns: columns per grid step, a multiple of 256 that divides the row.
    """

    rows: int
    columns: int


def tpu_config(rows: int, columns: int) -> TpuConfig:
    """Default tiles: about 128k elements, 2 MB of float32 operands and 0.5 MB of codes.

    Chosen from schedules: `python benchmarks/tpu_aot.py --match adamw8`.
    """
    blocks = columns // BLOCK
    wide = max(d for d in range(1, 9) if blocks % d == 0) * BLOCK
    tall = max(SLAB, (1 << 17) // wide // SLAB * SLAB)
    return TpuConfig(min(tall, -(-rows // SLAB) * SLAB), wide)


def tpu_obstacle(shape: tuple[int, ...], p_dtype: Any, g_dtype: Any) -> str | None:
    """Why the TPU kernel cannot update a parameter; None when it can."""
    for dtype in (p_dtype, g_dtype):
        if jnp.dtype(dtype).name not in ("float32", "bfloat16"):
            return f"{jnp.dtype(dtype).name} is no vector type of a TPU"
    if len(shape) < 2:
        return "it has one axis, which would be moved to be cut into rows"
    if shape[-1] % BLOCK:
        return f"{shape[-1]} columns cut blocks of {BLOCK} at the ends of rows"
    if len(shape) > 2 and shape[-2] % SLAB:
        return f"{shape[-2]} rows of a stack are no multiple of {SLAB}"
    return None


def rows_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape as a matrix: leading axes are rows."""
    return math.prod(shape[:-1]), shape[-1]
