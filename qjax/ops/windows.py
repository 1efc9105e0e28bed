"""A product per expert, over windows of rows: the grouped product of any platform.

Rows sorted by expert are walked in windows that never cross two experts. A step takes
one window and the packed weight of its expert and multiplies them by
`qjax.ops.product`, whatever runs there. The number of steps is known only at run time,
`sum_e ceil(rows_e / T)` with `T` the largest window, so experts without rows cost
nothing and no step multiplies more than twice to eight times the rows it has. The last
window of an expert uses the smallest of a few sizes that holds it.

Temporary memory: the packed weight of one expert, a window of activations, and what
`product` needs.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from qjax.ops import blocked
from qjax.ops.blocks import zeros_like_sum
from qjax.tensor import LayoutTensor

SIZES = (1, 8, 64, 512)
"""Rows of a window."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where the windows lie.

    Attributes:
      sizes: static window sizes to choose from, ascending.
      ends: int32 `[experts]`, the row behind each expert's last.
      starts: int32 `[experts]`, each expert's first row.
      turns: int32 `[experts]`, windows of all experts up to and including each.
    """

    sizes: tuple[int, ...]
    ends: Int[Array, " experts"]
    starts: Int[Array, " experts"]
    turns: Int[Array, " experts"]

    def window(self, i: Any) -> tuple[Array, Array, Array]:
        """Expert, first row and number of rows of window `i`."""
        expert = jnp.searchsorted(self.turns, i, side="right").astype(jnp.int32)
        # Loops under `vmap` take turns for others that have more windows.
        expert = jnp.minimum(expert, self.ends.shape[0] - 1)
        before = jnp.where(expert > 0, self.turns[expert - 1], 0)
        first = self.starts[expert] + (i - before) * self.sizes[-1]
        return expert, first, jnp.minimum(self.ends[expert] - first, self.sizes[-1])


def plan(group_sizes: Int[Array, " experts"], rows: int) -> Plan:
    """Lays windows over `rows` rows; the largest fits the mean group twice.

    Args:
      group_sizes: rows of each expert; what exceeds `rows` in sum is cut off.
      rows: rows of the activations.

    Returns:
      The plan.
    """
    experts = group_sizes.shape[0]
    mean = max(2 * rows // max(experts, 1), SIZES[1])
    most = _first(SIZES, min(mean, rows))
    least = 0 if most <= SIZES[1] else 1
    sizes = SIZES[least : SIZES.index(most) + 1]
    ends = jnp.minimum(jnp.cumsum(group_sizes.astype(jnp.int32)), rows)
    starts = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
    return Plan(sizes, ends, starts, jnp.cumsum(-(-(ends - starts) // sizes[-1])))


def _first(sizes, rows):
    return next((size for size in sizes if size >= rows), sizes[-1])


def walk(
    x: Float[Array, "m k"],
    group_sizes: Int[Array, " experts"],
    columns: int,
    dtype: Any,
    apply: Callable[[Array, Any], Array],
    weights: Any,
) -> Float[Array, "m n"]:
    """Applies `apply(rows, their expert)` to every window.

    Args:
      x: rows sorted by expert.
      group_sizes: rows of each expert.
      columns: columns of the result.
      dtype: dtype of the result.
      apply: the product of one window.
      weights: whatever `apply` reads besides, for the type of the result.

    Returns:
      The result; zeros behind the last group.
    """
    rows = x.shape[0]
    where = plan(group_sizes, rows)
    width = where.sizes[-1]
    x = jnp.pad(x, [(0, width), (0, 0)])  # windows may reach past the last row

    def part(size):
        def run(first, expert):
            y = apply(lax.dynamic_slice_in_dim(x, first, size), expert)
            return jnp.pad(y.astype(dtype), [(0, width - size), (0, 0)])

        return run

    branches = [part(size) for size in where.sizes]

    def step(i, y):
        expert, first, count = where.window(i)
        choice = jnp.searchsorted(jnp.asarray(where.sizes), count).astype(jnp.int32)
        new = lax.switch(choice, branches, first, expert)
        # Rows past the window's own belong to later windows, which write them later.
        return lax.dynamic_update_slice_in_dim(y, new, first, 0)

    y = zeros_like_sum(
        (rows + width, columns), dtype, x, group_sizes, *jax.tree.leaves(weights)
    )
    y = lax.fori_loop(0, where.turns[-1], step, y)[:rows]
    return mask_rows(y, where.ends[-1])


def mask_rows(y: Float[Array, "m n"], count: Any) -> Float[Array, "m n"]:
    """Zeros from row `count` on."""
    row = lax.broadcasted_iota(jnp.int32, y.shape, 0)
    return jnp.where(row < count, y, jnp.zeros_like(y))


def pick(weights: Any, expert: Any) -> Any:
    """The leaves of one expert."""
    return jax.tree.map(
        lambda leaf: lax.dynamic_index_in_dim(leaf, expert, keepdims=False), weights
    )


def leaf_gradients(
    a: Float[Array, "m in"],
    b: Float[Array, "m out"],
    q: LayoutTensor,
    group_sizes: Int[Array, " experts"],
) -> dict[str, Array]:
    """`blocked.leaf_gradients` of every expert's weight, whose gradient is `a_e^T b_e`.

    Args:
      a: activations or cotangents on the `in` side, sorted by expert.
      b: the same on the `out` side.
      q: the stacked weight.
      group_sizes: rows of each expert.

    Returns:
      Float32 gradients by the name of the leaf.
    """
    where = plan(group_sizes, a.shape[0])
    width = where.sizes[-1]
    a, b = (jnp.pad(v, [(0, width), (0, 0)]) for v in (a, b))

    def step(i, totals):
        expert, first, count = where.window(i)
        a_rows, b_rows = (lax.dynamic_slice_in_dim(v, first, width) for v in (a, b))
        a_rows, b_rows = mask_rows(a_rows, count), mask_rows(b_rows, count)
        part = blocked.leaf_gradients(a_rows, b_rows, pick(q, expert))
        return {
            name: total.at[expert].add(part[name]) for name, total in totals.items()
        }

    totals = {
        k: zeros_like_sum(v.shape, jnp.float32, a, b, group_sizes, v)
        for k, v in blocked.float_leaves(q).items()
    }
    return lax.fori_loop(0, where.turns[-1], step, totals)
