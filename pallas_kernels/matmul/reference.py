"""Weight-only product, the definition: decode, multiply, add.

The decoder is written from the description of the layout in `..weights` alone and
shares no code with `qjax.packing`, so that each checks the other. It expands the weight
and is meant for tests and for explaining, not for speed.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from ..weights import FIELDS, Weight, WeightSpec

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = E2M1 + tuple(-v for v in E2M1)
"""Value of each e2m1 code."""

UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-9, "float16": 2.0**-12}
"""Unit roundoff of each activation dtype (2**-12 leaves half a bit for float16)."""


def codes(packed, spec: WeightSpec):
    """Unsigned codes `[..., k, n]` of canonical bytes.

    Code `i` collects its fields: a field of `w` bits lies in byte row `i // (8 // w)`
    of its plane at bit `(i % (8 // w)) w`; for widths of several planes the planes of
    each 8 rows follow one another.
    """
    if spec.bits == 8:
        return packed
    fields, rows = FIELDS[spec.bits], np.arange(spec.k)
    planar = len(fields) > 1
    total: Any = None
    shift = first = 0
    for width in fields:
        per = 8 // width
        byte = rows // per
        if planar:
            byte = rows // 8 * spec.bits + first + rows % 8 // per
        bit = (rows % per * width).astype(np.uint8)[:, None]
        field = (packed[..., byte, :] >> bit) & jnp.uint8(2**width - 1)
        field = field << jnp.uint8(shift)
        total = field if total is None else total | field
        shift, first = shift + width, first + width
    return total


def values(weight: Weight, spec: WeightSpec):
    """What each code stands for, float32 `[..., k, n]`, before zero and scale."""
    code = codes(weight.codes, spec)
    if spec.kind in ("e4m3", "e5m2"):
        float8 = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}[spec.kind]
        if code.dtype == jnp.uint8:
            code = lax.bitcast_convert_type(code, float8)
        return code.astype(jnp.float32)
    if spec.kind == "int":
        return code.astype(jnp.float32) - jnp.float32(spec.offset)
    index = code.astype(jnp.int32)
    if spec.kind == "e2m1":
        return jnp.asarray(E2M1, jnp.float32)[index]
    assert weight.table is not None  # `check` saw it
    flat = index.reshape(*index.shape[:-2], -1)
    found = jnp.take_along_axis(weight.table.astype(jnp.float32), flat, -1)
    return found.reshape(index.shape)


def scales(scale):
    """Float32 value of stored scales; uint8 is E8M0, `2**(code - 127)`."""
    if scale.dtype == jnp.uint8:
        return jnp.ldexp(jnp.float32(1), scale.astype(jnp.int32) - 127)
    return scale.astype(jnp.float32)


def per_row(array, spec: WeightSpec):
    """One row per group to one row per weight row."""
    return array[..., np.arange(spec.k) // spec.group, :]


def pick(weight: Weight, layer) -> Weight:
    """The arrays of one layer of a stack; all of them where `layer` is None."""
    if layer is None:
        return weight
    arrays = [
        None if a is None else lax.dynamic_index_in_dim(a, layer, 0, keepdims=False)
        for a in weight
    ]
    return Weight(*arrays)


def dense(weight: Weight, spec: WeightSpec):
    """`W [..., k, n]` in float32: `(value - zero) scale`."""
    value = values(weight, spec)
    if weight.zero is not None:
        value = value - per_row(weight.zero.astype(jnp.float32), spec)
    return value * per_row(scales(weight.scale), spec)


def matmul(
    x, weight: Weight, spec: WeightSpec, *, bias=None, layer=None, transpose=False
):
    """`x W + bias` (or `x W^T + bias`) with float32 products and sums.

    Args:
      x: `[m, k]`, or `[m, n]` when `transpose`.
      weight: canonical arrays.
      spec: their meaning.
      bias: `[n]` (`[k]` when `transpose`) or None.
      layer: index into the leading axis of the arrays, or None.
      transpose: multiply by the transpose.

    Returns:
      float32 `[m, n]`, or `[m, k]`.
    """
    w = dense(pick(weight, layer), spec)
    dims = (((1,), (1 if transpose else 0,)), ((), ()))
    y = lax.dot_general(x.astype(jnp.float32), w, dims, precision=lax.Precision.HIGHEST)
    return y if bias is None else y + bias.astype(jnp.float32)


def exact(
    x, weight: Weight, spec: WeightSpec, *, bias=None, layer=None, transpose=False
):
    """`matmul` in float64, in NumPy, and the error bound of every backend.

    With `T = |x| (|value| + |offset| + |zero|) |scale|` (the size of the terms before
    they cancel; `offset` because a kernel may subtract it after the product), `u` the
    unit roundoff of the activations' dtype, `v` of the result's and `s` the number of
    terms of a sum,

        |y - exact| <= (4 u_w + s 2**-24) T + v |exact| + tiny,

    where `u_w = u` for 16-bit activations (a decoded weight rounds once per operation:
    subtraction, scale and their product) and `2**-20` for float32 ones.

    Args:
      x: as for `matmul`, concrete.
      weight: as for `matmul`.
      spec: as for `matmul`.
      bias: as for `matmul`.
      layer: as for `matmul`.
      transpose: as for `matmul`.

    Returns:
      The float64 result and the bound without the term `v |exact|`, both `[m, n]`
      (`[m, k]`); `tolerance` adds that term.
    """
    chosen = pick(weight, layer)
    value = np.asarray(values(chosen, spec), np.float64)
    scale = np.asarray(per_row(scales(chosen.scale), spec), np.float64)
    size = np.abs(value) + abs(spec.offset)
    if chosen.zero is not None:
        zero = np.asarray(per_row(chosen.zero.astype(jnp.float32), spec), np.float64)
        value, size = value - zero, size + np.abs(zero)
    w, size = value * scale, size * np.abs(scale)
    if transpose:
        w, size = w.T, size.T
    unit = 2.0**-20 if x.dtype == jnp.float32 else UNIT[jnp.dtype(x.dtype).name]
    x = np.asarray(x.astype(jnp.float32), np.float64)
    y, terms = x @ w, np.abs(x) @ size
    if bias is not None:
        b = np.asarray(bias.astype(jnp.float32), np.float64)
        y, terms = y + b, terms + np.abs(b)
    return y, (4 * unit + x.shape[1] * 2.0**-24) * terms + 1e-30


def tolerance(y, bound, out_dtype):
    """The bound of `exact` with the rounding of the result to `out_dtype`."""
    return bound + 2 * UNIT[jnp.dtype(out_dtype).name] * np.abs(y)
