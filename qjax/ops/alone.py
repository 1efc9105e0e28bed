"""A kernel where a program runs on one device, another computation where it is split.

TPU compilers can neither split a kernel over devices nor be told how (`jax`'s
`custom_partitioning` does not reach them), and refuse programs that ask them to.
Whether a program is split is known when it is lowered, not when it is traced, so the
choice is made there.

Reference: jax issue 38196.
"""

from collections.abc import Callable

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir

_choice = Primitive("qjax_alone")


def alone_or(
    kernel: Callable[..., jax.Array], other: Callable[..., jax.Array], *operands
) -> jax.Array:
    """`kernel(*operands)`, or `other(*operands)` in a program on several devices.

    Args:
      kernel: for one device, and for the inside of `jax.shard_map`.
      other: computes the same with operations that compilers can split.
      *operands: arrays.
    """
    return _choice.bind(*operands, kernel=kernel, other=other)


@_choice.def_impl
def _run(*operands, kernel, other):
    return jax.jit(lambda *a: alone_or(kernel, other, *a))(*operands)


@_choice.def_abstract_eval
def _type(*types, kernel, other):
    del kernel
    arguments = [jax.ShapeDtypeStruct(t.shape, t.dtype) for t in types]
    result = jax.eval_shape(other, *arguments)
    return ShapedArray(result.shape, result.dtype)


def _lower(ctx, *operands, kernel, other):
    where = ctx.module_context.axis_context
    if isinstance(where, mlir.SPMDAxisContext):
        alone = where.manual_axes == frozenset(where.mesh.axis_names)
    else:
        alone = getattr(where, "num_devices", 1) == 1
    chosen = kernel if alone else other
    return mlir.lower_fun(chosen, multiple_results=False)(ctx, *operands)


mlir.register_lowering(_choice, _lower)
