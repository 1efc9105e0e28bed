"""Grouped products: arguments are checked here, once, for every backend.

Nothing is chosen here: `qjax.ops.grouped` decides which backend runs, and a backend
that cannot do what is asked raises instead of falling back.
"""

import importlib
from typing import Any

import jax.numpy as jnp

from ..weights import KernelError, Weight, WeightSpec, check
from . import reference

BACKENDS = ("tpu", "gpu", "reference")
FLOATS = ("float32", "bfloat16", "float16")


def grouped_matmul(
    x: Any,
    group_sizes: Any,
    weight: Weight,
    spec: WeightSpec,
    *,
    first: Any = None,
    bias: Any = None,
    out_dtype: Any = None,
    transpose: bool = False,
    backend: str = "tpu",
    config: Any = None,
    interpret: Any = False,
) -> Any:
    """Each group of rows times its expert's packed matrix, decoded in the kernel.

        y[i] = x[i] W[e] + bias[e]   for the rows i of expert e, else 0

    Sums are float32; the error is bounded in `reference.exact`. Only experts with rows
    are read.

    Args:
      x: `[m, k]` float32, bfloat16 or float16, sorted by expert; `[m, n]` when
        `transpose`.
      group_sizes: int32 `[experts]`, rows of each expert, zeros allowed; rows past
        their sum give zeros, and what exceeds `m` in sum is cut off.
      weight: packed arrays with a leading axis of experts.
      spec: what they mean, for one expert.
      first: int32 scalar, where the experts begin in a longer leading axis (a stack of
        layers of experts); None when the axis holds just them.
      bias: `[experts, n]` (`[experts, k]` when `transpose`) or None.
      out_dtype: dtype of the result; default that of `x`.
      transpose: multiply by `W^T`, as gradients with respect to `x` need.
      backend: "tpu", "gpu" or "reference".
      config: the backend's tiles; default its tuned table.
      interpret: run the kernel's interpreter: its parameters, or False.

    Returns:
      `[m, n]` (`[m, k]` when `transpose`).

    Raises:
      KernelError: an argument does not fit, or the backend cannot do this; the message
        names the argument or gives the reason.
    """
    name = "grouped_matmul"
    _check(name, x, group_sizes, weight, spec, first, out_dtype, transpose, backend)
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    experts, columns = group_sizes.shape[0], spec.k if transpose else spec.n
    if bias is not None and tuple(bias.shape) != (experts, columns):
        _refuse(name, "bias has shape", list(bias.shape), [experts, columns])
    if x.shape[0] == 0 or 0 in (spec.k, spec.n, experts):
        return _empty(x, group_sizes, bias, columns, out_dtype)
    if backend == "reference":
        weight = _cut(weight, first, experts)
        y = reference.grouped_matmul(
            x, group_sizes, weight, spec, bias=bias, transpose=transpose
        )
        return y.astype(out_dtype)
    return _module(name, backend, x, spec, transpose).matmul(
        x,
        group_sizes,
        (weight,),
        spec,
        first=first,
        bias=bias,
        out_dtype=out_dtype,
        transpose=transpose,
        config=config,
        interpret=interpret,
    )


def grouped_gate_up(
    x: Any,
    group_sizes: Any,
    gate: Weight,
    up: Weight,
    spec: WeightSpec,
    *,
    activation: str = "silu",
    first: Any = None,
    out_dtype: Any = None,
    backend: str = "tpu",
    config: Any = None,
    interpret: Any = False,
) -> Any:
    """`act(x Wg) * (x Wu)` per group in one pass over `x`, nothing wider than `n`.

    Args:
      x: as for `grouped_matmul`.
      group_sizes: as for `grouped_matmul`.
      gate: the weight inside the activation.
      up: the weight of the other factor; arrays like those of `gate`.
      spec: what both mean.
      activation: "silu", "gelu", "gelu_tanh" or "relu".
      first: as for `grouped_matmul`.
      out_dtype: as for `grouped_matmul`.
      backend: as for `grouped_matmul`.
      config: as for `grouped_matmul`.
      interpret: as for `grouped_matmul`.

    Returns:
      `[m, n]`.

    Raises:
      KernelError: as for `grouped_matmul`.
    """
    name = "grouped_gate_up"
    if activation not in reference.ACTIVATIONS:
        names = tuple(reference.ACTIVATIONS)
        _refuse(name, "activation is", repr(activation), f"one of {names}")
    for key, weight in (("gate", gate), ("up", up)):
        label = f"{name} ({key})"
        _check(label, x, group_sizes, weight, spec, first, out_dtype, False, backend)
    for field, a, b in zip(Weight._fields, gate, up, strict=True):
        if (a is None) != (b is None) or (a is not None and a.dtype != b.dtype):
            what = [None if v is None else str(v.dtype) for v in (a, b)]
            _refuse(name, f"{field} of gate and up are", what, "equal dtypes")
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    experts = group_sizes.shape[0]
    if x.shape[0] == 0 or 0 in (spec.k, spec.n, experts):
        return jnp.zeros((x.shape[0], spec.n), out_dtype)
    if backend == "reference":
        gate, up = (_cut(w, first, experts) for w in (gate, up))
        y = reference.gate_up(x, group_sizes, gate, up, spec, activation)
        return y.astype(out_dtype)
    return _module(name, backend, x, spec, False).matmul(
        x,
        group_sizes,
        (gate, up),
        spec,
        first=first,
        out_dtype=out_dtype,
        activation=activation,
        config=config,
        interpret=interpret,
    )


def _refuse(name, argument, got, expected):
    raise KernelError(f"{name}: {argument} {got}, expected {expected}")


def _module(name, backend, x, spec, transpose):
    """The backend, imported when it is asked for and if it can do this."""
    module = importlib.import_module(f"{__package__}.{backend}")
    reason = module.obstacle(spec, x.shape[0], x.dtype, transpose=transpose)
    if reason is not None:
        turned = ", transposed" if transpose else ""
        raise KernelError(
            f"{name}: backend {backend!r} cannot multiply {x.dtype} {list(x.shape)} by "
            f"{spec}{turned}: {reason}"
        )
    return module


def _cut(weight, first, experts):
    """The experts of a longer stack."""
    if first is None:
        return weight
    index = first + jnp.arange(experts, dtype=jnp.int32)
    return Weight(*(None if a is None else jnp.take(a, index, axis=0) for a in weight))


def _empty(x, group_sizes, bias, columns, dtype):
    """No rows, no columns, no experts, or sums over nothing."""
    if bias is None or 0 in (x.shape[0], columns, group_sizes.shape[0]):
        return jnp.zeros((x.shape[0], columns), dtype)
    ends = jnp.cumsum(group_sizes.astype(jnp.int32))
    row = jnp.arange(x.shape[0], dtype=jnp.int32)
    expert = jnp.searchsorted(ends, row, side="right")
    y = jnp.take(bias, expert, axis=0, mode="fill", fill_value=0)
    return y.astype(dtype)


def _check(name, x, group_sizes, weight, spec, first, out_dtype, transpose, backend):
    """Every argument against `spec`; backends see only what fits together."""
    if backend not in BACKENDS:
        _refuse(name, "backend is", repr(backend), f"one of {BACKENDS}")
    if getattr(x, "ndim", None) != 2:
        _refuse(name, "x has shape", list(getattr(x, "shape", ())), "two axes")
    if jnp.dtype(x.dtype).name not in FLOATS:
        _refuse(name, "x has dtype", x.dtype, FLOATS)
    if out_dtype is not None and jnp.dtype(out_dtype).name not in FLOATS:
        _refuse(name, "out_dtype is", out_dtype, FLOATS)
    if spec.group < 1:
        _refuse(name, "spec.group is", spec.group, "at least 1")
    inner = spec.n if transpose else spec.k
    if x.shape[1] != inner:
        side = "columns of W (transpose)" if transpose else "rows of W"
        expected = f"[m, {inner}], its columns the {side}"
        _refuse(name, "x has shape", list(x.shape), expected)
    if spec.layout == "canonical":
        if weight.codes.ndim != 3:
            expected = "three axes, experts first"
            _refuse(name, "codes have shape", list(weight.codes.shape), expected)
        check(weight, spec, (x.shape[0], spec.k), name=name)
    stack = weight.scale.shape[0]
    if group_sizes.ndim != 1 or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        got = f"{group_sizes.dtype}{list(group_sizes.shape)}"
        _refuse(name, "group_sizes is", got, "int32 [experts]")
    if (first is None and group_sizes.shape[0] != stack) or (
        first is not None and group_sizes.shape[0] > stack
    ):
        got = list(group_sizes.shape)
        _refuse(name, "group_sizes has shape", got, f"[{stack}], one per expert")
    if first is not None and (
        jnp.ndim(first) or not jnp.issubdtype(jnp.result_type(first), jnp.integer)
    ):
        _refuse(name, "first is", repr(first), "an int32 scalar")
    zero, table = weight.zero, weight.table
    if zero is not None and jnp.dtype(zero.dtype).name not in (*FLOATS, "uint8"):
        _refuse(name, "zero has dtype", zero.dtype, (*FLOATS, "uint8"))
    if table is not None and not jnp.issubdtype(table.dtype, jnp.floating):
        _refuse(name, "table has dtype", table.dtype, "float32")
