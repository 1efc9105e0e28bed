"""Products with a quantized matrix that decode one block at a time, on any platform.

`contract` computes `x W` or `x W^T`. Blocks run along the axis of the result, so each
one is decoded, multiplied and written once, and nothing but the result grows with the
batch. Blocks that are still large, or cannot be cut that way, are cut along the other
axis and accumulated in float32. Temporary memory is a few blocks of `BLOCK` weights.

On CPU blocks are float32; elsewhere they have the dtype of `x`, products accumulate in
float32, and fewer than 8 rows are padded to 8, because the matrix units of TPUs and
GPUs want rows and their compilers turn a single row into a slow vector reduction.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from qjax.ops.blocks import (
    Axis,
    cut_leaf,
    cut_step,
    decode,
    replaced,
    take,
    windows,
    zeros_like_sum,
)
from qjax.tensor import LayoutTensor

BLOCK = 1 << 19
"""Weights decoded at a time: 2 MB of float32."""
LANES = 128
"""A block is at least this wide where the layout allows it."""


def contract(
    x: Float[Array, "m k"], q: LayoutTensor, transpose: bool, *, cpu: bool
) -> Float[Array, "m n"]:
    """`x @ W`, or `x @ W^T`, by blocks.

    Args:
      x: activations.
      q: weight with float scales and no leading axes.
      transpose: multiply by the transpose.
      cpu: compute in float32 without padding rows.

    Returns:
      Product in the dtype of `x`.
    """
    dtype = jnp.dtype(jnp.float32) if cpu else x.dtype
    rows = x.shape[0]
    result_dtype = x.dtype
    if not cpu and rows < 8:
        x = jnp.pad(x, [(0, 8 - rows), (0, 0)])
    result: Axis = "in" if transpose else "out"
    if cut_step(q, result) is None:
        y = _accumulate(x, q, transpose, dtype)
    else:
        y = _write(x, q, transpose, dtype, result_dtype)
    return y[:rows].astype(result_dtype)


def _write(x, q, transpose, dtype, result_dtype):
    """Blocks along the axis of the result."""
    axis: Axis = "in" if transpose else "out"
    size, count, rest = _division(q, axis)

    def part(start, size):
        y = _accumulate(x, take(q, axis, start, size), transpose, dtype)
        return y.astype(result_dtype)

    if count <= 1 and not rest:
        return part(0, size)

    def step(i, y):
        return lax.dynamic_update_slice_in_dim(y, part(i * size, size), i * size, 1)

    y = zeros_like_sum((x.shape[0], count * size + rest), result_dtype, x, q.codes)
    y = lax.fori_loop(0, count, step, y)
    if rest:
        tail = part(count * size, rest)
        y = lax.dynamic_update_slice_in_dim(y, tail, count * size, 1)
    return y


def _accumulate(x, q, transpose, dtype):
    """Blocks along the contracted axis, summed in float32."""
    axis: Axis = "out" if transpose else "in"
    cast = x.size if x.dtype != dtype else 0
    small = max(q.matrix[0] * q.matrix[1], cast) < 2 * BLOCK
    if small or cut_step(q, axis) is None:
        return _dot(x.astype(dtype), decode(q).astype(dtype), transpose)
    size, count, rest = _division(q, axis)

    def part(start, size):
        block = decode(take(q, axis, start, size)).astype(dtype)
        return _dot(cut_leaf(x, start, size, 1).astype(dtype), block, transpose)

    shape = (x.shape[0], q.matrix[0 if transpose else 1])
    y = zeros_like_sum(shape, jnp.float32, x, q.codes)
    y = lax.fori_loop(0, count, lambda i, y: y + part(i * size, size), y)
    return y + part(count * size, rest) if rest else y


def _dot(x, block, transpose):
    dims = (((1,), (1 if transpose else 0,)), ((), ()))
    return lax.dot_general(x, block, dims, preferred_element_type=jnp.float32)


def _division(q: LayoutTensor, axis: Axis) -> tuple[int, int, int]:
    """`(size, count, rest)`: `count` blocks of `size`, then one of `rest`."""
    length, other = q.matrix if axis == "in" else q.matrix[::-1]
    step = cut_step(q, axis)
    assert step is not None  # callers choose an axis that can be cut
    unit = math.lcm(step, LANES) if math.lcm(step, LANES) <= max(length, 1) else step
    size = max(BLOCK // max(other, 1) // unit, 1) * unit
    count, rest = divmod(length, size)
    if rest < step and rest:  # a format may refuse a matrix smaller than its group
        count, rest = count - 1, rest + size
    return (size, count, rest) if count > 0 and size < length else (length, 1, 0)


def leaf_gradients(
    a: Float[Array, "m in"], b: Float[Array, "m out"], q: LayoutTensor
) -> dict[str, Array]:
    """Gradients of every float leaf of `q` when the weight's gradient is `a^T b`.

    The weight's gradient is formed one block of columns at a time and pulled back
    through the decoding of that block.

    Args:
      a: activations or cotangents on the `in` side.
      b: the same on the `out` side.
      q: the weight.

    Returns:
      Float32 gradients by the name of the leaf; see `with_gradients`.
    """
    floats = float_leaves(q)
    across = a.T.astype(jnp.float32)

    def part(start, size):
        block = take(q, "out", start, size)
        inputs = {name: getattr(block, name) for name in floats}
        _, pull = jax.vjp(lambda v: decode(replaced(block, **v)), inputs)
        columns = cut_leaf(b, start, size, 1).astype(jnp.float32)
        return pull(_dot(across, columns, False))[0]

    def add(total, start, size):
        where = windows(q, "out", start, size)
        return {
            name: _put(total[name], grad, where.get(name))
            for name, grad in part(start, size).items()
        }

    size, count, rest = _division(q, "out")
    total = {k: zeros_like_sum(v.shape, jnp.float32, a, v) for k, v in floats.items()}
    total = lax.fori_loop(0, count, lambda i, t: add(t, i * size, size), total)
    if rest:
        total = add(total, count * size, rest)
    return total


def float_leaves(q: LayoutTensor) -> dict[str, Array]:
    """Float leaves by name."""
    return {k: v for k, v in _leaves(q).items() if jnp.issubdtype(v.dtype, jnp.inexact)}


def with_gradients(q: LayoutTensor, grads: dict[str, Array]) -> LayoutTensor:
    """A tensor like `q` that holds gradients; integer leaves hold float0 zeros."""
    made: dict[str, Any] = {
        name: grads[name].astype(leaf.dtype)
        if name in grads
        else np.zeros(leaf.shape, jax.dtypes.float0)
        for name, leaf in _leaves(q).items()
    }
    return replaced(q, **made)


def _leaves(q):
    return {
        f.name: getattr(q, f.name)
        for f in dataclasses.fields(q)  # pyright: ignore[reportArgumentType]
        if not f.metadata.get("static") and getattr(q, f.name) is not None
    }


def _put(total, grad, window):
    """Adds a block's gradient of a leaf to the leaf's, or stores it in its place."""
    grad = grad.astype(jnp.float32)
    if window is None:
        return total + grad
    axis, start, _ = window
    return lax.dynamic_update_slice_in_dim(total, grad, start, axis)
