"""A kernel where a program runs on one device, another computation where it is split.

TPU compilers can neither split a kernel over devices nor be told how (`jax`'s
`custom_partitioning` does not reach them), and refuse programs that ask them to.
Whether a program is split is known when it is lowered, not when it is traced, so the
choice is made there.

Reference: jax issue 38196.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from . import device

_choice = Primitive("qjax_alone")
_choice.multiple_results = True


def alone_or(kernel: Callable[..., Any], other: Callable[..., Any], *operands) -> Any:
    """`kernel(*operands)`, or `other(*operands)` in a program on several devices.

    Args:
      kernel: for one device, and for the inside of `jax.shard_map`.
      other: computes the same with operations that compilers can split.
      *operands: pytrees of arrays.
    """
    if device.count() == 1 or jax.sharding.get_abstract_mesh().manual_axes:
        return kernel(*operands)
    leaves, tree = jax.tree.flatten(operands)
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    results = jax.eval_shape(other, *jax.tree.unflatten(tree, leaves))

    def flat(function):
        return lambda *a: jax.tree.leaves(function(*jax.tree.unflatten(tree, a)))

    out = _choice.bind(*leaves, kernel=flat(kernel), other=flat(other))
    return jax.tree.unflatten(jax.tree.structure(results), out)


@_choice.def_impl
def _run(*operands, **functions):
    return jax.jit(lambda *a: _choice.bind(*a, **functions))(*operands)


@_choice.def_abstract_eval
def _types(*types, kernel, other):
    del kernel
    arguments = [jax.ShapeDtypeStruct(t.shape, t.dtype) for t in types]
    results = jax.eval_shape(other, *arguments)
    return [ShapedArray(result.shape, result.dtype) for result in results]


def _batch(operands, axes, **functions):
    mapped = {name: jax.vmap(f, axes) for name, f in functions.items()}
    out = _choice.bind(*operands, **mapped)
    return out, [0] * len(out)


batching.primitive_batchers[_choice] = _batch


def _lower(ctx, *operands, kernel, other):
    where = ctx.module_context.axis_context
    if isinstance(where, mlir.SPMDAxisContext):
        alone = where.manual_axes == frozenset(where.mesh.axis_names)
    else:
        alone = getattr(where, "num_devices", 1) == 1
    chosen = kernel if alone else other
    return mlir.lower_fun(chosen, multiple_results=True)(ctx, *operands)


mlir.register_lowering(_choice, _lower)
