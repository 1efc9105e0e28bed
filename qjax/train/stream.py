"""Moments in host memory on their way to the device and back, part by part.

A leaf is updated in a loop over its layers, or over groups of rows: a loop, because
compilers fetch operands as early as they can, and without one all moments of all leaves
would be on the device at once. What is fetched is a part of one leaf.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from qjax.pallas_kernels.optimizer.update import BLOCK
from qjax.train.moment_shards import maxima_shape

SPACE = jax.memory.Space
PART = 1 << 24
"""Elements of a part of a leaf that has no layers, at most."""
_ROWS = 32
"""Rows of a part are a multiple of it: a tile of 8-bit codes on TPUs."""


def on_host(x: Any) -> bool:
    """Whether an array, or what stands for one, lies in host memory."""
    return jax.typeof(x).memory_space == SPACE.Host


def any_on_host(tree: Any) -> bool:
    """Whether any array of a tree lies in host memory."""
    return any(map(on_host, jax.tree.leaves(tree)))


def fetched(tree: Any) -> Any:
    """Returns a tree on the device."""
    return jax.tree.map(
        lambda x: jax.device_put(x, SPACE.Device) if on_host(x) else x, tree
    )


def put_back(tree: Any, old: Any) -> Any:
    """Returns arrays where those of an equal tree are."""
    return jax.tree.map(
        lambda x, was: jax.device_put(x, SPACE.Host) if on_host(was) else x, tree, old
    )


def streamed(
    update: Callable[..., tuple[Array, Any]],
    p: Array,
    g: Array,
    moments: Any,
    by: Any,
    where: NamedSharding | None,
) -> tuple[Array, Any]:
    """Returns `update(p, g, moments, by, where)`, the moments being fetched in parts.

    Args:
      update: `qjax.train.moments.update_leaf`.
      p: The leaf; updated in place.
      g: Its gradient.
      moments: Its moments, any of them in host memory; the new ones are there too.
      by: A pytree of scalars.
      where: How the leaf is split over devices, if that is known.
    """
    split = tuple(where.spec) if where is not None else ()
    count, shape = _parts(p.shape, split)
    if count < 2:
        new, near = update(p, g, fetched(moments), by, where)
        return new, put_back(near, moments)
    if where is not None:  # `_parts` cuts along an axis that is not split
        where = NamedSharding(where.mesh, PartitionSpec(*split[p.ndim - len(shape) :]))
    # Maxima are small, and to cut them would be to rearrange them on the host.
    close = jax.tree.map(lambda x: x if x.shape == p.shape else fetched(x), moments)

    def cut(x):
        tail = shape if x.shape == p.shape else maxima_shape(shape)
        return x.reshape(count, *tail)

    def turn(carry, operands):
        i, whole = carry
        slope, far = operands
        part = lax.dynamic_index_in_dim(whole, i, keepdims=False)
        part, near = update(part, slope, fetched(far), by, where)
        whole = lax.dynamic_update_index_in_dim(whole, part, i, 0)
        return (i + 1, whole), put_back(near, far)

    start = (jnp.zeros((), jnp.int32), cut(p))
    operands = (cut(g), jax.tree.map(cut, close))
    (_, whole), moved = lax.scan(turn, start, operands)
    moved = jax.tree.map(lambda x, old: x.reshape(old.shape), moved, moments)
    back = jax.tree.map(
        lambda x, old: x if x.shape == p.shape else put_back(x, old), moved, moments
    )
    return whole.reshape(p.shape), back


def _parts(
    shape: tuple[int, ...], split: tuple[Any, ...]
) -> tuple[int, tuple[int, ...]]:
    """Number of parts in which a leaf is updated, and the shape of one."""
    whole = 1, shape
    if len(shape) > 2 and shape[0] > 1:
        return whole if split and split[0] else (shape[0], shape[1:])
    if len(shape) < 2 or any(split) or math.prod(shape[:-2]) != 1:
        return whole
    *_, rows, columns = shape
    least = max(-(-rows * columns // PART), 2)
    for count in range(least, rows // _ROWS + 1):
        part, rest = divmod(rows, count)
        if not rest and part % _ROWS == 0 and part * columns % BLOCK == 0:
            return count, (part, columns)
    return whole
