"""Grouped products by the kernels of `qjax.pallas_kernels.grouped_matmul`.

What `qjax.ops.kernels` is to one matrix, this is to a stack of experts: whether a
kernel takes it, the call, and what kernels leave out (NVFP4's divisor and a table's
offset). Experts of one layer of a stack of layers are read where they lie.

Calls split over devices as `qjax.ops.partition` says; on TPUs a program that its
compiler splits runs the loop of `qjax.ops.windows`.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qjax.errors import SpecError
from qjax.ops import kernels, partition
from qjax.pallas_kernels.weights import KernelError, WeightSpec
from qjax.wrappers import LayerOf

_ROOM = "qjax.pallas_kernels.grouped_matmul"


def flat(q: Any) -> tuple[Any, Any, int]:
    """The experts of a weight: `(stack with one leading axis, first expert, count)`.

    Args:
      q: a weight with a leading axis of experts, or a layer of a stack of such.

    Returns:
      The stack, where the experts begin in it (None: at 0), and how many there are.
    """
    if not isinstance(q, LayerOf):
        return q, None, q.shape[0]
    layers, experts = q.base.shape[:2]

    def join(leaf):
        return leaf.reshape(layers * experts, *leaf.shape[2:])

    first = jnp.asarray(q.layer, jnp.int32) * experts
    return jax.tree.map(join, q.base), first, experts


def obstacle(name: str, m: int, dtype: Any, q: Any, transpose: bool) -> str | None:
    """Why a kernel backend cannot compute a product, or None when it can."""
    spec = kernels.kernel_spec(_stack_of(q))
    if isinstance(spec, str):
        return spec
    try:
        module = importlib.import_module(f"{_ROOM}.{name}")
    except ModuleNotFoundError as error:
        return str(error)
    return module.obstacle(spec, m, dtype, transpose=transpose)


def fused_obstacle(gate: Any, up: Any) -> str | None:
    """Why two weights cannot be multiplied in one pass, or None when they can."""
    stacks = [_stack_of(q) for q in (gate, up)]
    if kernels.kernel_spec(stacks[0]) != kernels.kernel_spec(stacks[1]):
        return "gate and up have different formats"
    for name in ("codes", "scale", "zero"):
        kinds = [getattr(getattr(q, name, None), "dtype", None) for q in stacks]
        if kinds[0] != kinds[1]:
            return f"gate and up have different dtypes of {name}"
    if isinstance(gate, LayerOf) != isinstance(up, LayerOf):
        return "one of gate and up is a layer of a stack"
    for q in stacks:
        for name in ("global_scale", "offset"):
            if getattr(q, name, None) is not None:
                return f"a {name} applies to each product"
    return None


def _stack_of(q):
    return q.base if isinstance(q, LayerOf) else q


def run(
    name: str,
    x: Float[Array, "m k"],
    sizes: Int[Array, " e"],
    q: Any,
    transpose: bool,
    other: Callable[..., Array],
) -> Float[Array, "m n"]:
    """The grouped product by a kernel, without obstacle.

    Args:
      name: the backend.
      x: rows sorted by expert.
      sizes: rows of each expert.
      q: the weight.
      transpose: multiply by the transposes.
      other: `(x, sizes, q)` to the same product by operations that compilers can
        split over devices.

    Returns:
      The product in the dtype of `x`.

    Raises:
      SpecError: the arrays of `q` do not fit each other.
    """
    run = functools.partial(_finished, name, transpose)
    return partition.on_one(name, run, other, x, sizes, q)


def _finished(name, transpose, x, sizes, q):
    """A kernel's product with what kernels leave out."""
    stack, first, experts = flat(q)
    divisor = getattr(stack, "global_scale", None)
    offset = getattr(stack, "offset", None)
    plain = divisor is None and offset is None
    y = _run(name, x, sizes, (stack,), first, transpose, None, plain)
    if plain:
        return y
    expert = jnp.minimum(_expert_of_row(x.shape[0], sizes), experts - 1)
    expert = expert if first is None else expert + first
    if divisor is not None:
        y = y / divisor[expert, 0]
    if offset is not None:
        inside = _expert_of_row(x.shape[0], sizes)[:, None] < experts
        total = jnp.sum(x.astype(jnp.float32), 1, keepdims=True) * offset[expert, 0]
        y = y + jnp.where(inside, total, jnp.zeros_like(total))
    return y.astype(x.dtype)


def run_gated(
    name: str,
    x: Float[Array, "m k"],
    sizes: Int[Array, " e"],
    gate: Any,
    up: Any,
    activation: str,
    other: Callable[..., Array],
) -> Float[Array, "m n"]:
    """The gated form by a kernel, without obstacle; `other` as for `run`."""

    def run(x, sizes, gate, up):
        first = flat(gate)[1]
        stacks = (flat(gate)[0], flat(up)[0])
        return _run(name, x, sizes, stacks, first, False, activation, True)

    return partition.on_one(name, run, other, x, sizes, gate, up)


def _run(name, x, sizes, stacks, first, transpose, activation, plain):
    spec = kernels.kernel_spec(stacks[0])
    assert isinstance(spec, WeightSpec)  # `obstacle` was asked
    options = {
        "out_dtype": x.dtype if plain else jnp.dtype(jnp.float32),
        "transpose": transpose,
        "activation": activation,
    }
    try:
        return partition.partitioned(
            functools.partial(_call, name, options),
            spec,
            x,
            [sizes, jnp.int32(0) if first is None else first],
            [kernels.kernel_weight(stack, spec) for stack in stacks],
            transpose=transpose,
            independent=False,
            linear=activation is None,
            told=name != "tpu",
        )
    except KernelError as error:
        raise SpecError(str(error)) from None


def _call(name, options, spec, x, sizes, first, *weights):
    module = importlib.import_module(f"{_ROOM}.{name}")
    return module.matmul(x, sizes, weights, spec, first=first, **options)


def _expert_of_row(rows, sizes):
    """The expert of each row; the number of experts behind all groups."""
    row = jnp.arange(rows, dtype=jnp.int32)
    ends = jnp.cumsum(sizes.astype(jnp.int32))
    return jnp.searchsorted(ends, row, side="right").astype(jnp.int32)
