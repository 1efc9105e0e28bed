"""Error feedback: rows are rounded one after the other, each after the errors before.

    v_i = round(w_i + sum_{j < i} M_ji (w_j - v_j))

The sum is taken in blocks of blocks: rows are cut into chunks, chunks into panels and
panels into single rows (or the rows that a vector quantizer takes at once), and the
errors of one part reach the next by one matrix product. Scales that are chosen during
the loop are chosen where their group starts, from rows that hold all earlier errors.

Output columns do not interact and run in slices, so that besides the weight, `M` and
the codes only a few arrays `[in, slice]` exist.

Reference: Frantar et al., GPTQ, arXiv 2210.17323, sections 3.2 to 3.4.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SLICE = 1024
"""Output columns that are quantized at a time."""

CHUNK = 256
"""Most rows between two products with all errors so far."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """What rounds: closures over the format and its parameters.

    Attributes:
      round: `(target [unit, cols], row, params) -> (codes, values [unit, cols])`; codes
        are any pytree of arrays `[*, cols]` that pile up along the first axis.
      fit: `(values [rows, cols], row, m, params) -> params`, called where a group of
        `rows` rows starts, with the group as it reacts to the errors so far and with
        its block of the factor. None when nothing is fitted during the loop.
      keep: `params -> pytree of [1, *]` that is collected per group; the default keeps
        nothing.
      like: `cols -> (shape of a unit's codes, shapes of what is kept per group)`;
        needed where something is kept.
      rows: rows per group of `fit`.
      unit: rows rounded together; divides `rows`.
    """

    round: Callable[..., tuple[Array, Array]]
    fit: Callable[..., Any] | None = None
    keep: Callable[[Any], Any] | None = None
    like: Callable[[int], Any] | None = None
    rows: int = 0
    unit: int = 1


def levels(size: int, rows: int, unit: int) -> tuple[tuple[int, ...], int]:
    """How rows are cut: sizes of chunk, panels and unit, and the padded row count.

    Args:
      size: rows.
      rows: rows per group that is fitted in the loop, 0 for none.
      unit: rows rounded together.
    """
    step = rows or unit
    padded = -(-size // step) * step
    fits = [c for c in range(step, max(CHUNK, step) + 1, step) if padded % c == 0]
    chunk = max(fits)
    if chunk < min(CHUNK // 4, padded):
        chunk = max(CHUNK // step, 1) * step
        padded = -(-size // chunk) * chunk
    return (chunk, *_cuts(chunk, rows, unit)), padded


def _cuts(chunk: int, rows: int, unit: int) -> list[int]:
    """Sizes below a chunk, each dividing the one before, `rows` and `unit` too."""
    cuts, size = [], chunk
    for anchor in [rows, unit] if rows and rows > unit else [unit]:
        while size > 16 * anchor:
            found = [d for d in range(anchor, size // 4 + 1, anchor) if size % d == 0]
            size = max(found)
            if size > anchor:
                cuts.append(size)
        if anchor < (cuts[-1] if cuts else chunk):
            cuts.append(anchor)
        size = anchor
    return cuts


def run_slice(
    x: Float[Array, "padded cols"],
    m: Float[Array, "padded padded"],
    grid: Grid,
    sizes: tuple[int, ...],
    params: Any = None,
    first: Float[Array, " cols"] | None = None,
) -> tuple[Array, Any, Float[Array, "padded cols"]]:
    """Error feedback over all rows of some output columns.

    Args:
      x: rows in the order of rounding, padded; overwritten by the errors.
      m: unit upper factor, padded.
      grid: what rounds.
      sizes: `levels` of the rows.
      params: parameters of the grid when it fits none.
      first: added to the target of row 0 alone.

    Returns:
      Codes `[padded, cols]`, what the grid keeps per group, and the errors.
    """
    chunk = sizes[0]
    count = x.shape[0] // chunk

    def block(j, at):
        return jax.lax.dynamic_slice(m, (j * chunk, at), (chunk, chunk))

    def step(c, state):
        x, codes, kept = state
        at = c * chunk
        rows = jax.lax.dynamic_slice_in_dim(x, at, chunk)

        def add(j, target):
            errors = jax.lax.dynamic_slice_in_dim(x, j * chunk, chunk)
            return target + _product(block(j, at), errors)

        target = jax.lax.fori_loop(0, c, add, rows)
        if first is not None:
            target = target.at[0].add(jnp.where(c == 0, first, 0.0))
        own = block(c, at)
        found, errors, stats = _run(grid, sizes, rows, target, own, at, params)
        x = jax.lax.dynamic_update_slice_in_dim(x, errors, at, 0)
        return x, _put(codes, found, c), _put(kept, stats, c)

    like = _shapes(x.shape[1], grid, params)
    codes, kept = _buffers(like, count * chunk, grid)
    x, codes, kept = jax.lax.fori_loop(0, count, step, (x, codes, kept))
    return codes, kept, x


def _run(grid: Grid, sizes, rows, target, m, at, params):
    """Codes, errors and kept statistics of a block that has its target."""
    size, below = sizes[0], sizes[1:]
    stats = None
    if grid.fit is not None and size == grid.rows:
        params = grid.fit(_reaction(rows, target, m), at, m, params)
        stats = grid.keep(params) if grid.keep else None
    if not below:
        codes, values = grid.round(target, at, params)
        return codes, rows - values, stats
    part = below[0]

    def step(i, state):
        codes, errors, kept = state
        begin = i * part
        into = jax.lax.dynamic_slice(m, (0, begin), (size, part))
        inner = jax.lax.dynamic_slice_in_dim(into, begin, part)
        own = jax.lax.dynamic_slice_in_dim(rows, begin, part)
        goal = jax.lax.dynamic_slice_in_dim(target, begin, part)
        goal = goal + _product(into, errors)
        found, missed, new = _run(grid, below, own, goal, inner, at + begin, params)
        codes = _put(codes, found, i)
        errors = jax.lax.dynamic_update_slice_in_dim(errors, missed, begin, 0)
        return codes, errors, _put(kept, new, i)

    fits = grid.fit is not None and size > grid.rows
    code, kept = _shapes(rows.shape[1], grid, params)
    start = _buffers((code, kept if fits else None), size, grid)
    start = (start[0], jnp.zeros_like(rows), start[1])
    codes, errors, kept = jax.lax.fori_loop(0, size // part, step, start)
    return codes, errors, kept if stats is None else stats


def _reaction(rows, target, m):
    """A group as it would best react to the errors so far if it were not rounded.

    Targets answer the errors of earlier rows only once those of the rows between are
    known; with none of these rounded, `u - v = M^-T (target - rows) + rows - v`.
    """
    if rows.shape[0] == 1:
        return target
    return rows + jax.lax.linalg.triangular_solve(
        m, target - rows, left_side=True, lower=False, transpose_a=True
    )


def _shapes(cols: int, grid: Grid, params):
    """Shapes of a unit's codes and of what a group keeps."""
    if grid.like is not None:
        return grid.like(cols)
    unit = jax.ShapeDtypeStruct((grid.unit, cols), jnp.float32)
    row = jax.ShapeDtypeStruct((), jnp.int32)
    return jax.eval_shape(grid.round, unit, row, params)[0], None


def _buffers(like, size: int, grid: Grid):
    """Zeroed codes and statistics of `size` rows."""

    def zeros(leaf, count):
        return jnp.zeros((leaf.shape[0] * count, *leaf.shape[1:]), leaf.dtype)

    codes = jax.tree.map(lambda leaf: zeros(leaf, size // grid.unit), like[0])
    return codes, jax.tree.map(lambda leaf: zeros(leaf, size // grid.rows), like[1])


def _product(m, errors):
    """`M^T E`; errors of rows that are not rounded yet are zero."""
    return jax.lax.dot_general(m, errors, (((0,), (0,)), ((), ())), precision="highest")


def _put(kept, new, i):
    def put(buffer, leaf):
        return jax.lax.dynamic_update_slice_in_dim(buffer, leaf, i * leaf.shape[0], 0)

    return jax.tree.map(put, kept, new)
