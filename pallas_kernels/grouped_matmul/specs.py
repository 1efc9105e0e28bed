"""Grouped products: tiles, what kernels can do, and which tile belongs to whom.

Rows sorted by expert are cut into tiles of `Config.rows`. A *visit* is one tile with
one expert that has rows in it; a tile on a border is visited by several experts, one
after the other, and each writes its own rows. Rows behind the last group form a group
of their own that is written with zeros. Visits are listed in the order of rows, at most
`tiles + experts` of them, and only as many as there are become steps of a grid, so
experts without rows are never read.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax.numpy as jnp

from ..weights import WeightSpec

LANES = 128
MIN_ROWS = 16
"""Fewest rows of a tile: a sublane tile of bfloat16."""
MAX_ROWS = 256
CACHED_ROWS = 64
"""Tiles of more rows than this decode an expert's block once for all of them."""
MAX_COLUMNS = 1024
VMEM_BUDGET = 36 << 20
"""Bytes that the tiles of `default` may take."""
VMEM_LIMIT = 56 << 20
"""What the compiler may take: less than the 64 MiB of v5p and 7x."""
UNROLL = 32
"""Loops up to this many turns are unrolled."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiles of the TPU kernel.

    Attributes:
      rows: rows of a tile of `x`.
      columns: columns of the result per step.
      cache: decode an expert's block once into VMEM, scaled, and reuse it for all its
        tiles; otherwise groups are scaled after their product.
      chunk: rows of the weight that one product inside a step takes at most.
    """

    rows: int
    columns: int
    cache: bool
    chunk: int = 512


class Visits(NamedTuple):
    """The list of visits, int32.

    Attributes:
      group: `[most]`, expert of each visit, `experts` for the rows behind all groups.
      expert: `[most]`, the same with those rows given to the expert read last.
      tile: `[most]`, tile of each visit.
      start: `[experts + 1]`, first row of each group.
      end: `[experts + 1]`, row behind its last.
      count: scalar, number of visits.
    """

    group: Any
    expert: Any
    tile: Any
    start: Any
    end: Any
    count: Any


def visits(group_sizes, m: int, rows: int) -> Visits:
    """Lists the visits of `m` rows in tiles of `rows`.

    Args:
      group_sizes: int32 `[experts]`; what exceeds `m` in sum is cut off.
      m: rows of the activations.
      rows: rows of a tile.

    Returns:
      The list; entries from `count` on have no meaning but are valid indices.
    """
    experts, tiles = group_sizes.shape[0], -(-m // rows)
    end = jnp.minimum(jnp.cumsum(group_sizes.astype(jnp.int32)), m)
    end = jnp.concatenate([end, jnp.full(1, tiles * rows, jnp.int32)])
    start = jnp.concatenate([jnp.zeros(1, jnp.int32), end[:-1]])
    first = start // rows
    counts = jnp.where(end > start, (end - 1) // rows - first + 1, 0)
    turns = jnp.cumsum(counts)
    place = jnp.arange(tiles + experts, dtype=jnp.int32)
    group = jnp.searchsorted(turns, place, side="right").astype(jnp.int32)
    group = jnp.minimum(group, experts)
    tile = first[group] + place - (turns - counts)[group]
    index = jnp.arange(experts, dtype=jnp.int32)
    last = jnp.max(jnp.where(end[:-1] > start[:-1], index, 0))
    expert = jnp.where(group == experts, last, group)
    return Visits(group, expert, jnp.clip(tile, 0, tiles - 1), start, end, turns[-1])


def piece(spec: WeightSpec, most: int) -> int:
    """Rows of the weight that are decoded at a time: at most `most` where possible.

    A multiple of 128, and of the group or a part of it.

    Args:
      spec: the weight.
      most: wanted maximum; never less than one whole unit.

    Returns:
      The number of rows, or 0 when there is none that divides `k`.
    """
    if spec.group % LANES == 0 or spec.group == spec.k:
        return divisor(spec.group, LANES, most)
    unit = math.lcm(spec.group, LANES)
    return unit * divisor(spec.k // unit, 1, most // unit) if spec.k % unit == 0 else 0


def divisor(size: int, unit: int, most: int) -> int:
    """Largest multiple of `unit` up to `most` that divides `size`; `unit` or 0."""
    if size % unit:
        return 0
    found = [d for d in range(unit, max(most, unit) + 1, unit) if size % d == 0]
    return found[-1] if found else 0


def default(
    spec: WeightSpec,
    m: int,
    experts: int,
    x_dtype: Any,
    *,
    transpose: bool = False,
    weights: int = 1,
) -> Config:
    """Tiles for a product: few rows and wide blocks, or many rows and a decoded block.

    Rows hold the mean group twice, so that most experts need one visit. Columns are as
    many as fit `VMEM_BUDGET`.

    Args:
      spec: the weight.
      m: rows of the activations.
      experts: number of experts.
      x_dtype: dtype of the activations in the kernel.
      transpose: whether the product is with the transposes.
      weights: matrices per expert: 2 for the gated form.

    Returns:
      The tiles.
    """
    mean = max(2 * m // max(experts, 1), MIN_ROWS)
    rows = min(1 << (mean - 1).bit_length(), MAX_ROWS, -(-m // MIN_ROWS) * MIN_ROWS)
    cache = rows > CACHED_ROWS
    size = jnp.dtype(x_dtype).itemsize
    inner, columns = (spec.n, spec.k) if transpose else (spec.k, spec.n)
    unit = math.lcm(spec.group, LANES) if transpose and spec.group < spec.k else LANES
    per = weights * inner * (2 * spec.bits / 8 + cache * size) + rows * 20
    per += 0 if transpose else weights * spec.groups * 16
    fixed = 2 * rows * inner * size
    fixed += weights * spec.groups * inner * 16 if transpose else 0
    fit = max(int((VMEM_BUDGET - fixed) / per), unit)
    width = min(MAX_COLUMNS, fit) // unit * unit or unit
    if transpose:
        width = divisor(columns, unit, width)
    return Config(rows, min(width, columns), cache)


def obstacle(
    spec: WeightSpec, m: int, x_dtype: Any, *, transpose: bool = False
) -> str | None:
    """Why the TPU kernel cannot compute this product, or None when it can.

    Args:
      spec: the weight.
      m: rows of the activations.
      x_dtype: their dtype.
      transpose: whether the product is with the transposes.

    Returns:
      The reason, in words, or None.
    """
    if jnp.dtype(x_dtype).name not in ("float32", "bfloat16", "float16"):
        return f"x is {x_dtype}, not float32, bfloat16 or float16"
    if not m or not spec.k or not spec.n:
        return "there is nothing to multiply"
    if spec.layout != "canonical":
        return f"it reads the canonical layout, not {spec.layout!r}"
    allowed = {"int": (2, 4, 8), "table": (2, 4), "e2m1": (4,)}.get(spec.kind, (8,))
    if spec.bits not in allowed:
        return f"{spec.kind} codes of {spec.bits} bits are not decoded in the kernel"
    if spec.k % LANES:
        return f"k={spec.k} is not a multiple of {LANES}"
    if not 0 < piece(spec, LANES) <= 512:
        return f"groups of {spec.group} rows do not fill pieces of {LANES}"
    if spec.group != spec.k and spec.group % 8:
        return f"groups of {spec.group} are not a multiple of 8"
    return None
