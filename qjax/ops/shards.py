"""Products without a kernel on meshes with explicit axes: a device's own shards.

There the sharding of an array is part of its type, which loops over blocks would have
to keep. So the loops run under `jax.shard_map`: columns of the result stay split as
those of the weight are, shards along the contracted axis are summed, and rows stay
split as those of the activations are, over other axes. A weight whose shards would cut
groups or packing units, and a `Prepacked` one, is gathered, packed.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from qjax.ops import blocked
from qjax.ops.blocks import Axis, cut_step, replaced, windows
from qjax.ops.partition import axes_of, split_axes
from qjax.tensor import LayoutTensor, QuantizedTensor
from qjax.wrappers import LayerOf


def explicit() -> bool:
    """Whether shardings are part of types here."""
    return bool(jax.sharding.get_abstract_mesh().explicit_axes)


def like(value: Array, other: Array) -> Array:
    """`value`, on explicit axes split as `other` is."""
    if not explicit():
        return value
    return jax.sharding.reshard(value, jax.typeof(other).sharding.spec)


def spread(
    run: Callable[..., Array],
    x: Float[Array, "m k"],
    q: Any,
    transpose: bool,
    *plain: Array,
    independent: bool = True,
) -> Float[Array, "m n"]:
    """`run(x, q, *plain)` by shards.

    Args:
      run: the product with a weight or its transpose.
      x: activations.
      q: what backends multiply by, possibly with leading axes.
      transpose: whether the product is with the transpose.
      *plain: arrays that every device needs whole.
      independent: whether a row of the result depends on one row of `x` only.

    Returns:
      The product in the dtype of `x`.
    """
    plan = _plan(q)
    inner, outer = plan.over[::-1] if transpose else plan.over
    rows = _rows(plan, x) if independent else ()

    def local(x, q, *plain):
        y = run(x, plan.shard(q), *plain)
        if not inner:
            return y
        return jax.lax.psum(y.astype(jnp.float32), inner).astype(y.dtype)

    specs = (_spec(rows, inner), plan.specs, *(PartitionSpec() for _ in plain))
    return _mapped(local, specs, _spec(rows, outer), x, q, *plain)


def leaf_gradients(
    run: Callable[..., dict[str, Array]],
    a: Float[Array, "m in"],
    b: Float[Array, "m out"],
    q: LayoutTensor,
    *plain: Array,
    independent: bool = True,
) -> LayoutTensor:
    """The gradient of `q` when that of its matrix is `a^T b`, anywhere.

    Args:
      run: `(a, b, q, *plain)` to float32 gradients of the float leaves of `q`.
      a: activations or cotangents on the `in` side.
      b: the same on the `out` side.
      q: the weight, possibly with leading axes.
      *plain: arrays that every device needs whole.
      independent: whether gradients are sums over rows.

    Returns:
      A tensor like `q`, split as `q` is; integer leaves hold float0 zeros.
    """
    if not explicit():
        return blocked.with_gradients(q, run(a, b, q, *plain))
    plan = _plan(q)
    rows = _rows(plan, a) if independent else ()
    floats = blocked.float_leaves(q)
    found: Any = jax.tree.leaves_with_path(plan.specs)
    places = {p[-1].name: spec for p, spec in found if p[-1].name in floats}

    def local(a, b, q, *plain):
        def total(grad, spec):
            own = sum(map(axes_of, spec), ())
            axes = tuple(v for v in rows + sum(plan.over, ()) if v not in own)
            return jax.lax.psum(grad, axes) if axes else grad

        return jax.tree.map(total, run(a, b, plan.shard(q), *plain), places)

    sides = (_spec(rows, over) for over in plan.over)
    specs = (*sides, plan.specs, *(PartitionSpec() for _ in plain))
    grads = _mapped(local, specs, places, a, b, q, *plain)
    return blocked.with_gradients(q, jax.tree.map(like, grads, floats))


class _Plan(NamedTuple):
    """How a weight is split.

    Attributes:
      over: mesh axes along `in` and `out`.
      matrix: `(in, out)` of a shard.
      specs: the weight with a `PartitionSpec` for every leaf.
    """

    over: tuple[tuple[str, ...], tuple[str, ...]]
    matrix: tuple[int, int]
    specs: Any

    def shard(self, q: Any) -> Any:
        """A weight of leaves of shards."""
        if isinstance(q, LayerOf):
            return replaced(q, base=self.shard(q.base))
        return replaced(q, matrix=self.matrix) if isinstance(q, LayoutTensor) else q


def _plan(q: Any) -> _Plan:
    """Leaves stay split where their shards are weights themselves."""
    base = q.base if isinstance(q, LayerOf) else q
    matrix = list(q.matrix)
    over: list[tuple[str, ...]] = [(), ()]
    cuts: dict[str, dict[int, tuple[str, ...]]] = {}
    sides: tuple[Axis, Axis] = ("in", "out")
    for i, axis in enumerate(sides):
        if not isinstance(base, LayoutTensor) or base.flat:
            continue
        if isinstance(base.scale, QuantizedTensor):
            continue
        names = split_axes(jax.typeof(base.codes), i - 2)
        size, rest = divmod(matrix[i], _devices(names))
        if not names or rest or size % (cut_step(base, axis) or size + 1):
            continue
        for name, (where, _, _) in windows(base, axis, 0, matrix[i]).items():
            cuts.setdefault(name, {})[where] = names
        matrix[i], over[i] = size, names

    def spec(path, leaf):
        at = cuts.get(getattr(path[-1], "name", ""), {})
        lead = [()] * (leaf.ndim - 2)
        return _spec(*lead, at.get(0, ()), at.get(1, ())) if at else PartitionSpec()

    specs = jax.tree.map_with_path(spec, q)
    return _Plan((over[0], over[1]), (matrix[0], matrix[1]), specs)


def _devices(names) -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[name] for name in names)


def _rows(plan: _Plan, x: Array) -> tuple[str, ...]:
    """Mesh axes that rows are split over and the weight is not."""
    taken = sum(plan.over, ())
    return tuple(a for a in split_axes(jax.typeof(x), 0) if a not in taken)


def _spec(*axes: tuple[str, ...]) -> PartitionSpec:
    return PartitionSpec(*(a or None for a in axes))


def _mapped(run, specs, out, *operands):
    """`run` of the shards that specs say."""
    moved = jax.tree.map(jax.sharding.reshard, operands, specs)
    return jax.shard_map(run, in_specs=specs, out_specs=out, check_vma=False)(*moved)
