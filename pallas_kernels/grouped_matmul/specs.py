"""Grouped products: tiles, what kernels can do, and which tile belongs to whom.

Rows sorted by expert are cut into tiles. A *visit* is one tile with
one expert that has rows in it; a tile on a border is visited by several experts, one
after the other, and each writes its own rows. Rows behind the last group form a group
of their own that is written with zeros. Visits are listed in the order of rows, at most
`tiles + experts` of them, and only as many as there are become steps of a grid, so
experts without rows are never read.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp

from ..matmul import decode
from ..matmul import specs as dense
from ..matmul.specs import Config
from ..weights import WeightSpec

LANES = 128
MIN_ROWS = 16
"""Fewest rows of a tile: a sublane tile of bfloat16."""


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


def default(
    spec: WeightSpec,
    m: int,
    experts: int,
    x_dtype: Any,
    *,
    transpose: bool = False,
    weights: int = 1,
    chip: str | None = None,
) -> Config:
    """Tiles: those of the dense kernel for as many rows as experts have.

    Rows hold the mean group twice, so that most experts need one visit.

    Args:
      spec: the weight.
      m: rows of the activations.
      experts: number of experts.
      x_dtype: dtype of the activations.
      transpose: whether the product is with the transposes.
      weights: matrices per expert: 2 for the gated form.
      chip: generation; default that of the device at hand.

    Returns:
      The tiles.
    """
    chip = chip or dense.chip()
    mean = max(2 * m // max(experts, 1), MIN_ROWS)
    rows = min(1 << (mean - 1).bit_length(), -(-m // MIN_ROWS) * MIN_ROWS)
    found = dense.config(spec, rows, x_dtype, transpose=transpose, chip=chip)
    if weights > 1:
        found = _halved(found, spec, x_dtype, weights)
    return found


def _halved(config, spec, x_dtype, weights):
    """Narrower columns, so that several blocks cost as much as one."""
    tuned = dense.TUNED[config.chip]
    columns = config.columns
    while columns > LANES:
        found = dataclasses.replace(config, columns=columns)
        fits = weights * dense.vmem_bytes(spec, found, x_dtype, False) <= config.vmem
        if fits and (config.prefill or weights * spec.k * columns <= tuned.codes):
            break
        columns = (columns // 2 + LANES - 1) // LANES * LANES
    return dataclasses.replace(config, columns=columns)


def obstacle(
    spec: WeightSpec, m: int, x_dtype: Any, *, transpose: bool = False
) -> str | None:
    """Why the TPU kernels cannot compute this product, or None when they can.

    Args:
      spec: the weight.
      m: rows of the activations.
      x_dtype: their dtype.
      transpose: whether the product is with the transposes.

    Returns:
      The reason, in words, or None.
    """
    reason = dense.obstacle(spec, m, x_dtype, transpose=transpose)
    if reason is not None:
        return reason
    for natural in (True,) if transpose else (True, False):
        dec = decode.decoder(spec, "v5e", natural=natural, mixed=False)
        rows = decode.region(spec, dec, 1)
        stored = -(-spec.k // rows) * rows * spec.bits // 8
        if stored > decode.code_rows(spec):
            return f"k={spec.k} does not divide into pieces of {rows} rows"
    return None


class Windows(NamedTuple):
    """Rows moved apart so that no window of them crosses two experts, int32.

    Attributes:
      expert: `[most]`, expert of each window.
      source: `[most * rows]`, the row of `x` in each place (any row where none is).
      place: `[m]`, the place of each row (any place behind the last group).
      count: `[1]`, number of windows.
    """

    expert: Any
    source: Any
    place: Any
    count: Any


def windows(group_sizes: Any, m: int, rows: int) -> Windows:
    """Lists windows of `rows` places, each with rows of one expert.

    Args:
      group_sizes: int32 `[experts]`; what exceeds `m` in sum is cut off.
      m: rows of the activations.
      rows: places of a window.

    Returns:
      At most `min(experts, m) + m // rows` windows; entries from `count` on have no
      meaning but are valid indices.
    """
    experts = group_sizes.shape[0]
    most = min(experts, m) + m // rows
    end = jnp.minimum(jnp.cumsum(group_sizes.astype(jnp.int32)), m)
    start = jnp.concatenate([jnp.zeros(1, jnp.int32), end[:-1]])
    counts = -(-(end - start) // rows)
    turns = jnp.cumsum(counts)
    before = turns - counts
    index = jnp.arange(most, dtype=jnp.int32)
    expert = jnp.searchsorted(turns, index, side="right").astype(jnp.int32)
    expert = jnp.minimum(expert, experts - 1)
    first = start[expert] + (index - before[expert]) * rows
    source = first[:, None] + jnp.arange(rows, dtype=jnp.int32)
    row = jnp.arange(m, dtype=jnp.int32)
    owner = jnp.searchsorted(end, row, side="right").astype(jnp.int32)
    owner = jnp.minimum(owner, experts - 1)
    place = before[owner] * rows + row - start[owner]
    return Windows(
        expert,
        jnp.clip(source.reshape(-1), 0, max(m - 1, 0)),
        jnp.clip(place, 0, most * rows - 1),
        turns[-1:],
    )
