"""Differences between supported versions of jax, one small function each."""

from typing import Any

import jax
from jax import lax

JAX = tuple(int(part) for part in jax.__version__.split(".")[:2])


def transpose_ref(ref: Any) -> Any:
    """Transposed view of a GPU kernel's matrix (a method of references since 0.12)."""
    if JAX >= (0, 12):
        return ref.transpose((1, 0))
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.transpose_ref(ref, (1, 0))


def load(ref: Any, layout: Any, *, optimized: bool = True) -> Any:
    """GPU: a reference in registers (`plgpu.load` took an index before 0.12)."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    index = () if JAX >= (0, 12) else ((),)
    return plgpu.load(ref, *index, layout=layout, optimized=optimized)


def lookup(table: Any, index: Any, axis: int) -> Any:
    """TPU: entries of `table` within a register, like `jnp.take_along_axis`.

    That one widens indices since 0.12, and the compiler wants them as wide as entries.
    """
    other = 1 - axis
    return lax.gather(
        table,
        index[..., None],
        lax.GatherDimensionNumbers(
            offset_dims=(),
            collapsed_slice_dims=(axis,),
            start_index_map=(axis,),
            operand_batching_dims=(other,),
            start_indices_batching_dims=(other,),
        ),
        slice_sizes=(1, 1),
        mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )


def result(shape: tuple[int, ...], dtype: Any, *operands: Any) -> Any:
    """Type of a kernel's result, which inside `shard_map` varies as its operands do."""
    varying = frozenset().union(
        *(jax.typeof(x).manual_axis_type.varying for x in operands)
    )
    kind = type(jax.typeof(operands[0]).manual_axis_type)
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind(varying=varying))
