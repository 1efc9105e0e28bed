"""Grouped product, the definition: every row times the matrix of its expert.

    y[i] = x[i] W[e] + bias[e]     for start[e] <= i < start[e] + group_sizes[e]
    y[i] = 0                       behind the last group

with `start` the running sum of `group_sizes`. The gated form is
`act(x[i] Wg[e]) * (x[i] Wu[e])`. Experts are decoded whole, one after the other, by
`..matmul.reference`; this is for tests and for explaining.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..matmul import reference as single
from ..weights import Weight, WeightSpec

ACTIVATIONS: dict[str, Callable] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}
"""What may be applied to the gate, by name; all have slopes within [-0.2, 1.2]."""
SLOPE = 1.2


def grouped_matmul(
    x, group_sizes, weight: Weight, spec: WeightSpec, *, bias=None, transpose=False
):
    """The definition in float32.

    Args:
      x: `[m, k]` sorted by expert, or `[m, n]` when `transpose`.
      group_sizes: int32 `[experts]`, in sum at most `m`.
      weight: canonical arrays with a leading axis of experts.
      spec: their meaning.
      bias: `[experts, n]` (`[experts, k]` when `transpose`) or None.
      transpose: multiply by the transposes.

    Returns:
      float32 `[m, n]`, or `[m, k]`.
    """
    ends = jnp.cumsum(group_sizes.astype(jnp.int32))
    row = jnp.arange(x.shape[0], dtype=jnp.int32)
    expert = jnp.searchsorted(ends, row, side="right")
    columns = spec.k if transpose else spec.n
    start = jnp.zeros((x.shape[0], columns), jnp.float32)

    def add(e, y):
        offset = None if bias is None else bias[e]
        part = single.matmul(x, weight, spec, bias=offset, layer=e, transpose=transpose)
        return jnp.where((expert == e)[:, None], part, y)

    return lax.fori_loop(0, group_sizes.shape[0], add, start)


def gate_up(x, group_sizes, gate: Weight, up: Weight, spec: WeightSpec, activation):
    """The gated form in float32; arguments as for `grouped_matmul`."""
    g, u = (grouped_matmul(x, group_sizes, w, spec) for w in (gate, up))
    return ACTIVATIONS[activation](g) * u


def exact(
    x, group_sizes, weight: Weight, spec: WeightSpec, *, bias=None, transpose=False
):
    """`grouped_matmul` in float64 and the error bound of every backend.

    The bound of a row is that of `..matmul.reference.exact` with the row's expert;
    rows behind the last group are exactly zero.

    Returns:
      The float64 result and the bound, without the rounding of the result.
    """
    columns = spec.k if transpose else spec.n
    y, bound = np.zeros((2, x.shape[0], columns))
    start = 0
    for e, size in enumerate(np.asarray(group_sizes)):
        rows = slice(start, start + size)
        offset = None if bias is None else bias[e]
        y[rows], bound[rows] = single.exact(
            x[rows], weight, spec, bias=offset, layer=e, transpose=transpose
        )
        start += size
    return y, bound


def exact_gate_up(
    x, group_sizes, gate: Weight, up: Weight, spec: WeightSpec, activation
):
    """`gate_up` in float64 and its error bound.

    With `dg` and `du` the bounds of the two products and `a` the activation, whose
    slope is at most `s = 1.2`: `|y - exact| <= s dg (|u| + du) + |a(g)| du` and
    `2**-20` of the size of the terms for the activation's own arithmetic.
    """
    g, dg = exact(x, group_sizes, gate, spec)
    u, du = exact(x, group_sizes, up, spec)
    a = _activation(g, activation)
    bound = SLOPE * dg * (np.abs(u) + du) + np.abs(a) * du
    return a * u, bound + 2.0**-20 * np.abs(g) * np.abs(u)


def _activation(x, name):
    """The activation in float64."""
    with np.errstate(over="ignore"):
        if name == "silu":
            return x / (1 + np.exp(-x))
        if name == "gelu_tanh":
            inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
            return 0.5 * x * (1 + np.tanh(inner))
        if name == "gelu":
            return 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2.0)))
    return np.maximum(x, 0)
