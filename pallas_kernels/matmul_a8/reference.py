"""Definition of products with 8-bit activations, in plain jnp.

An activation row is rounded to 8 bits with one scale, then multiplied by the packed
weight's codes; scales come last:

    int8:            s_x = absmax(x) / 127   x_q = clip(round(x / s_x), -127, 127)
    float8_e4m3fn:   s_x = absmax(x) / 448   x_q = e4m3(clip(x / s_x, -448, 448))
    y[i, j] = s_x[i] * sum_g scale[g, j] * sum_{l in g} x_q[i, l] * v[l, j]   (+ bias)

with `v = value(code) - zero` as in `..weights`, rounding half to even. A row whose
scale would be no normal number (an all-zero row) has scale 1 and codes 0; a row that
holds a NaN or an infinity has a non-finite scale and gives non-finite results.
A static scale is given, per tensor or per row. With `out_scale` the result is
quantized again: `y_q = clip(round(y / out_scale))` in int8 or float8_e4m3fn.

What rounding activations costs against a float product: at most `s_x / 2` per element
for int8 and `2**-4 |x|` (or `s_x 2**-10`) for float8_e4m3fn. What a backend may differ
by from this definition is `bound`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..weights import FIELDS, KernelError, Weight, WeightSpec

TOP = {"int8": 127.0, "float8_e4m3fn": 448.0}
"""The greatest activation code of each type."""

TINY = 2.0**-126


def row_scale(absmax: jax.Array, dtype: str) -> jax.Array:
    """Scale of rows whose largest magnitude is known (float32, any shape)."""
    top = jnp.float32(TOP[dtype])
    return jnp.where(absmax < top * jnp.float32(TINY), jnp.float32(1), absmax / top)


def round_to(x: jax.Array, scale: jax.Array, dtype: str) -> jax.Array:
    """Codes of float32 `x` for a scale: `clip(round(x / scale))` in `dtype`."""
    top = jnp.float32(TOP[dtype])
    ratio = jnp.clip(x / scale, -top, top)
    ratio = jnp.round(ratio) if dtype == "int8" else ratio
    return lax.convert_element_type(ratio, jnp.dtype(dtype))


def quantize_activations(
    x: jax.Array, dtype: str = "int8", scale: Any = None
) -> tuple[jax.Array, jax.Array]:
    """Rounds rows to 8 bits.

    Args:
      x: `[m, k]` float.
      dtype: "int8" or "float8_e4m3fn".
      scale: static scale, a scalar or `[m]` or `[m, 1]`; None computes one per row.

    Returns:
      Codes `[m, k]` and float32 scales `[m, 1]`.
    """
    x = x.astype(jnp.float32)
    if scale is None:
        absmax = jnp.max(jnp.abs(x), axis=1, keepdims=True, initial=0)
        scale = row_scale(absmax, dtype)
    scale = spread(scale, x.shape[0])
    return round_to(x, scale, dtype), scale


def spread(scale: Any, rows: int) -> jax.Array:
    """A scalar, `[rows]` or `[rows, 1]` scale as float32 `[rows, 1]`."""
    scale = jnp.asarray(scale, jnp.float32)
    if scale.size not in (1, rows):
        raise KernelError(
            f"x_scale has shape {list(scale.shape)}, expected a scalar or [{rows}, 1]; "
            "activations have one scale, or one per row"
        )
    return jnp.broadcast_to(scale.reshape(-1, 1), (rows, 1))


def _fields(packed, bits):
    """Little-endian fields of a byte along axis -2."""
    per = 8 // bits
    shifts = jnp.arange(per, dtype=jnp.uint8)[:, None] * jnp.uint8(bits)
    fields = (packed[..., :, None, :] >> shifts) & jnp.uint8(2**bits - 1)
    return fields.reshape(*packed.shape[:-2], packed.shape[-2] * per, packed.shape[-1])


def unpack(packed: jax.Array, bits: int, rows: int) -> jax.Array:
    """Unsigned codes `[..., rows, n]` of canonical bytes."""
    if bits == 8:
        return packed
    if len(FIELDS[bits]) == 1:
        return _fields(packed, bits)[..., :rows, :]
    blocks = packed.reshape(packed.shape[0] // bits, bits, packed.shape[1])
    codes, first, shift = jnp.zeros((), jnp.uint8), 0, 0
    for width in FIELDS[bits]:
        part = _fields(blocks[:, first : first + width], width)
        codes = codes | (part << jnp.uint8(shift))
        first, shift = first + width, shift + width
    return codes.reshape(-1, packed.shape[1])[:rows]


def values(w: Weight, spec: WeightSpec) -> jax.Array:
    """`value(code) - zero` of every element of one layer, float32 `[k, n]`."""
    codes = w.codes
    if spec.kind in ("e4m3", "e5m2"):
        kind = jnp.float8_e4m3fn if spec.kind == "e4m3" else jnp.float8_e5m2
        value = lax.bitcast_convert_type(codes, kind).astype(jnp.float32)
    elif spec.kind == "e2m1":
        table = jnp.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], jnp.float32)
        value = jnp.concatenate([table, -table])[unpack(codes, 4, spec.k)]
    elif spec.kind == "table":
        value = w.table[unpack(codes, spec.bits, spec.k)]
    else:
        value = unpack(codes, spec.bits, spec.k).astype(jnp.float32)
        value = value - jnp.float32(spec.offset)
    if w.zero is not None:
        value = value - by_group(w.zero.astype(jnp.float32), spec)
    return value


def by_group(leaf: jax.Array, spec: WeightSpec) -> jax.Array:
    """A `[groups, n]` array repeated to one row per row of W."""
    return jnp.repeat(leaf, spec.group, axis=0)[: spec.k]


def scales(w: Weight) -> jax.Array:
    """Scales in float32; bytes are exponents (E8M0)."""
    if w.scale.dtype == jnp.uint8:
        return jnp.exp2(w.scale.astype(jnp.float32) - 127)
    return w.scale.astype(jnp.float32)


def pick(w: Weight, layer: Any) -> Weight:
    """One layer of a stack; the weight itself without `layer`."""
    if layer is None:
        return w
    return Weight(*(a if a is None else a[layer] for a in w))


def matmul_a8(
    x: jax.Array,
    w: Weight,
    spec: WeightSpec,
    *,
    activation: str = "int8",
    x_scale: Any = None,
    bias: Any = None,
    layer: Any = None,
    out_dtype: Any = None,
    out_scale: Any = None,
) -> jax.Array:
    """The product as the module defines it; dense, for small shapes.

    Args:
      x: `[m, k]` float, or codes of type `activation` with `x_scale`.
      w: canonical weight.
      spec: what its arrays mean.
      activation: type that activations are rounded to.
      x_scale: static scale of `x`.
      bias: `[n]`, added in float32.
      layer: which layer of a stack.
      out_dtype: float type of the result (default: that of `x`, float32 for codes), or
        "int8" or "float8_e4m3fn" with `out_scale`.
      out_scale: static scale of a quantized result.

    Returns:
      `[m, n]`.
    """
    w = pick(w, layer)
    coded = x.dtype in (jnp.dtype("int8"), jnp.dtype("float8_e4m3fn"))
    if coded:
        codes, scale = x, spread(x_scale, x.shape[0])
    else:
        codes, scale = quantize_activations(x, activation, x_scale)
    weight = values(w, spec) * by_group(scales(w), spec)
    y = jnp.dot(codes.astype(jnp.float32), weight, precision="highest") * scale
    y = y if bias is None else y + bias.astype(jnp.float32)
    default = jnp.float32 if coded else x.dtype
    out = jnp.dtype(default if out_dtype is None else out_dtype)
    if out_scale is not None:
        return round_to(y, jnp.asarray(out_scale, jnp.float32), out.name)
    return y.astype(out)


def bound(
    x: jax.Array,
    w: Weight,
    spec: WeightSpec,
    *,
    activation: str = "int8",
    x_scale: Any = None,
    bias: Any = None,
    out: Any = "float32",
    unit: float = 2.0**-24,
) -> jax.Array:
    """What any backend may differ by from the exact value of the definition.

    With `a = s_x |x_q| (|v| + 2**bits) |scale|`:

        |error| <= unit * (k + 2 groups + 8) * (a + |bias|) + 2**-p |y| + flips

    `unit` is the rounding of one addition in the accumulator: `2**-24` for float32,
    `2**-13` for the 8-bit float units of Hopper, which align products to 14 bits.
    `p` is the width of the result's significand (8 for bfloat16). `flips` counts codes
    that another order of the division may round the other way: one step of the code
    where `x / s_x` lies within `2**-20` (relative) of a tie. Results quantized by
    `out_scale` may in addition differ by one step near a tie.

    Args:
      x: as in `matmul_a8`.
      w: one layer of the weight.
      spec: what its arrays mean.
      activation: type that activations are rounded to.
      x_scale: static scale of `x`.
      bias: `[n]` or None.
      out: float type of the result.
      unit: see above.

    Returns:
      The bound, `[m, n]` float32.
    """
    coded = x.dtype in (jnp.dtype("int8"), jnp.dtype("float8_e4m3fn"))
    if coded:
        codes, scale, step = x, spread(x_scale, x.shape[0]), jnp.zeros(x.shape)
    else:
        codes, scale = quantize_activations(x, activation, x_scale)
        step = tie_steps(x.astype(jnp.float32) / scale, activation)
    v = jnp.abs(values(w, spec))
    extra = 2.0**spec.bits if spec.kind == "int" else 0.0
    s = jnp.abs(by_group(scales(w), spec))
    size = jnp.abs(codes.astype(jnp.float32)) * scale
    a = jnp.dot(size, (v + jnp.float32(extra)) * s, precision="highest")
    y = jnp.dot(size, v * s, precision="highest")
    if bias is not None:
        size = jnp.abs(bias.astype(jnp.float32))
        a, y = a + size, y + size
    flips = jnp.dot(step * scale, v * s, precision="highest")
    terms = jnp.float32(unit * (spec.k + 2 * spec.groups + 8))
    rounding = jnp.float32(float(jnp.finfo(jnp.dtype(out)).eps) / 2)
    return terms * a + rounding * y + flips


def tie_steps(ratio: jax.Array, dtype: str) -> jax.Array:
    """The step of the code where `ratio` is near a tie, else 0."""
    size = jnp.abs(ratio)
    if dtype == "int8":
        step = jnp.ones_like(size)
    else:
        exponent = jnp.floor(jnp.log2(jnp.maximum(size, 2.0**-6)))
        step = jnp.exp2(exponent - 3)
    away = jnp.abs(size / step - jnp.floor(size / step) - 0.5)
    return jnp.where(away * step <= size * 2.0**-20, step, 0.0)
