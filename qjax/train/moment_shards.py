"""Leaves of an optimizer on several devices: who updates what.

Devices update their own shards where these hold whole blocks of 256: always along
leading axes; along columns where a shard has a multiple of 256; along rows where a
shard's elements are one. Along any other axis the leaf is gathered for its update, and
comes out split as it was. Maxima are not split along columns; each device takes those
of its own.

How a leaf is split is known on meshes with explicit axes, where it is part of its type;
with automatic axes a caller says it, or the compiler splits the update as it will.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from qjax.ops.partition import axes_of
from qjax.ops.shards import explicit
from qjax.pallas_kernels.optimizer.api import Moment8
from qjax.pallas_kernels.optimizer.update import BLOCK


def where_of(p: Any, given: NamedSharding | None) -> NamedSharding | None:
    """Returns how a leaf is split, if that is known."""
    return jax.typeof(p).sharding if explicit() else given


def placed(x: Array, where: NamedSharding) -> Array:
    """Returns an array split in a given way."""
    if explicit():
        return jax.sharding.reshard(x, where.spec)
    return lax.with_sharding_constraint(x, where)


def maxima_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of the maxima of a leaf: leading axes, and blocks."""
    return (*shape[:-2], -(-math.prod(shape[-2:]) // BLOCK))


def maxima_split(shape: tuple[int, ...], where: NamedSharding) -> NamedSharding:
    """Returns how the maxima of a leaf are split, given how the leaf is."""
    return NamedSharding(where.mesh, _plan(shape, where).maxima)


class _Plan(NamedTuple):
    """How a leaf is split while it is updated.

    Attributes:
      leaf: Its split.
      maxima: That of its maxima.
      columns: Mesh axes along columns.
      count: Number of shards along columns.
    """

    leaf: PartitionSpec
    maxima: PartitionSpec
    columns: tuple[str, ...]
    count: int


def _plan(shape: tuple[int, ...], where: NamedSharding) -> _Plan:
    def shards(axes):
        return math.prod(where.mesh.shape[a] for a in axes)

    spec = (*where.spec, *(None,) * len(shape))[: len(shape)]
    names = [axes_of(axis) for axis in spec]
    # A matrix, of a column where the leaf is a vector.
    rows, columns = (*shape, 1, 1)[:2] if len(shape) < 2 else shape[-2:]
    *lead, along_rows, along_columns = names if len(shape) > 1 else (*names, (), ())[:2]
    if columns // shards(along_columns) % BLOCK:
        along_columns = ()
    size = rows // shards(along_rows) * (columns // shards(along_columns))
    if size % BLOCK:
        along_rows = ()
    leaf = (*lead, along_rows, along_columns)[: len(shape)]
    return _Plan(
        PartitionSpec(*(axes or None for axes in leaf)),
        PartitionSpec(*(axes or None for axes in (*lead, along_rows))),
        along_columns,
        shards(along_columns),
    )


def spread(
    run: Callable[..., Any],
    p: Array,
    g: Array,
    moments: Any,
    by: Any,
    where: NamedSharding,
) -> tuple[Array, Any]:
    """Returns `run(p, g, moments, by)`, computed by shards.

    Args:
      run: Updates a leaf, or a shard of it.
      p: The leaf.
      g: Its gradient.
      moments: Its moments, a named tuple of `Moment8`.
      by: A pytree of scalars.
      where: How the leaf is split.
    """
    plan, kind = _plan(p.shape, where), type(moments)

    def local(p, g, moments, by):
        own = kind(*(_own(plan, m) for m in moments))
        new, own = run(p, g, own, by)
        return new, kind(*(_shared(plan, m) for m in own))

    states = kind(*(Moment8(plan.leaf, plan.maxima) for _ in moments))
    scalars = jax.tree.map(lambda _: PartitionSpec(), by)
    specs, operands = (plan.leaf, plan.leaf, states, scalars), (p, g, moments, by)
    if explicit():
        operands = jax.tree.map(jax.sharding.reshard, operands, specs)
    new, moved = jax.shard_map(
        local,
        mesh=where.mesh,
        in_specs=specs,
        out_specs=(plan.leaf, states),
        check_vma=False,
    )(*operands)
    moved = (Moment8(placed(m.codes, where), m.absmax) for m in moved)
    return placed(new, where), kind(*moved)


def _own(plan: _Plan, moment: Moment8) -> Moment8:
    """The moment with the maxima of the columns that this device has."""
    codes, maxima = moment
    if plan.count == 1:
        return moment
    table = maxima.reshape(*codes.shape[:-1], plan.count, -1)
    mine = lax.axis_index(plan.columns)
    table = lax.dynamic_index_in_dim(table, mine, table.ndim - 2, keepdims=False)
    return Moment8(codes, table.reshape(maxima_shape(codes.shape)))


def _shared(plan: _Plan, moment: Moment8) -> Moment8:
    """The moment with the maxima of all columns."""
    codes, maxima = moment
    if plan.count == 1:
        return moment
    table = maxima.reshape(*codes.shape[:-1], -1)
    table = lax.all_gather(table, plan.columns, axis=table.ndim - 1, tiled=True)
    return Moment8(codes, table.reshape(*codes.shape[:-2], -1))
