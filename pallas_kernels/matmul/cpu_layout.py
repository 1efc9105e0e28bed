"""Weights in the order in which CPU kernels read them: strip by strip of columns.

In the canonical layout the bytes of 64 columns are as far apart as the matrix is wide,
which memory serves at a fraction of its speed. Here the matrix is cut into strips of 64
columns (padded with zeros), and a strip is one run of bytes:

* "int" codes, `[*layers, strips * rows / 4, 256]`: `rows` are the canonical byte rows,
  padded so that packing units come in fours. Four units are stored byte row by byte row
  as `[64 columns, 4 units]`, so that four bytes of a column, from four neighbouring
  units, are one operand of an integer dot product;
* other codes, `[*layers, strips * rows, 64]`: the canonical byte rows;
* scale and zero, `[*layers, strips * groups, 64]`.

`unpack` is the exact inverse of `prepack`.
"""

import dataclasses

import jax.numpy as jnp

from .. import native
from ..weights import FIELDS, KernelError, Weight, WeightSpec

TAG = "cpu-strips"
TAGS = (TAG,)
STRIP = 64
"""Columns of a strip."""


def unit_rows(spec: WeightSpec) -> int:
    """Byte rows of a packing unit: the smallest run of rows in whole bytes."""
    return spec.bits if len(FIELDS.get(spec.bits, ())) > 1 else 1


def strip_shape(spec: WeightSpec) -> tuple[int, int]:
    """Stored byte rows of a strip, and how many of them lie side by side."""
    if spec.kind != "int":
        return spec.packed_k, 1
    four = 4 * unit_rows(spec)
    return -(-spec.packed_k // four) * four, 4


def strips(spec: WeightSpec) -> int:
    """Strips of the matrix."""
    return -(-spec.n // STRIP)


def obstacle(spec: WeightSpec) -> str | None:
    """Why a weight is not stored so, or None."""
    if not spec.k or not spec.n:
        return "the weight is empty"
    rows = unit_rows(spec) * 8 // spec.bits * strip_shape(spec)[1]
    if spec.groups > 1 and spec.group % rows:
        return f"groups of {spec.group} rows are not multiples of {rows}"
    return None


def prepack(weight: Weight, spec: WeightSpec) -> tuple[Weight, WeightSpec] | None:
    """A canonical weight in this layout.

    Args:
      weight: canonical arrays, with any leading axes.
      spec: what they mean.

    Returns:
      The arrays and their spec, or None where `obstacle` has a reason or native kernels
      are absent.
    """
    if spec.layout != "canonical" or obstacle(spec) or not native.status().loaded:
        return None
    rows, side = strip_shape(spec)
    codes = _strips(weight.codes, rows)
    if side > 1:
        *lead, _, _ = codes.shape
        each = unit_rows(spec)
        split = codes.reshape(*lead, -1, side, each, STRIP)
        codes = jnp.moveaxis(split, -3, -1).reshape(*lead, -1, side * STRIP)
    codes = codes.reshape(*codes.shape[:-3], -1, codes.shape[-1])
    leaves = (weight.scale, weight.zero)
    scale, zero = (v if v is None else _flat(_strips(v, spec.groups)) for v in leaves)
    made = Weight(codes, scale, zero, weight.table)
    return made, dataclasses.replace(spec, layout=TAG)


def unpack(weight: Weight, spec: WeightSpec) -> Weight:
    """Inverse of `prepack`.

    Args:
      weight: arrays as `prepack` returned them.
      spec: the spec it returned.

    Returns:
      The canonical arrays.

    Raises:
      KernelError: the weight is not in this layout.
    """
    if spec.layout != TAG:
        raise KernelError(f"unpack: layout is {spec.layout!r}, expected {TAG!r}")
    rows, side = strip_shape(spec)
    codes = weight.codes
    if side > 1:
        *lead, _, _ = codes.shape
        split = codes.reshape(*lead, -1, unit_rows(spec), STRIP, side)
        codes = jnp.moveaxis(split, -1, -3)
    leaves = (weight.scale, weight.zero)
    scale, zero = (
        v if v is None else _joined(v, spec, spec.groups, spec.groups) for v in leaves
    )
    lead = weight.codes.shape[:-2]
    codes = codes.reshape(*lead, -1, STRIP)
    return Weight(_joined(codes, spec, rows, spec.packed_k), scale, zero, weight.table)


def check(weight: Weight, spec: WeightSpec, x_shape: tuple[int, ...], *, name: str):
    """Checks a weight in this layout; as `weights.check` for the canonical one.

    Raises:
      KernelError: an argument does not fit, naming argument, got and expected.
    """
    rows, side = strip_shape(spec)
    lead = weight.codes.shape[:-2]
    count = strips(spec)
    scales = (*lead, count * spec.groups, STRIP)
    shapes = {
        "codes": (weight.codes, (*lead, count * rows // side, side * STRIP)),
        "scale": (weight.scale, scales),
        "zero": (weight.zero, scales),
    }
    if len(x_shape) != 2 or x_shape[1] != spec.k:
        raise KernelError(
            f"{name}: x has shape {list(x_shape)}, expected [m, {spec.k}]; its columns "
            "are rows of W"
        )
    for key, (array, shape) in shapes.items():
        if array is not None and tuple(array.shape) != shape:
            raise KernelError(
                f"{name}: {key} has shape {list(array.shape)}, expected {list(shape)} "
                f"in layout {TAG!r}; prepack the weight again"
            )


def _strips(leaf, rows):
    """Rows `[..., r, n]`, padded to `rows`, as strips `[..., strips, rows, 64]`."""
    *lead, have, n = leaf.shape
    pads = [(0, 0)] * len(lead) + [(0, rows - have), (0, -n % STRIP)]
    split = jnp.pad(leaf, pads).reshape(*lead, rows, -1, STRIP)
    return jnp.swapaxes(split, -2, -3)


def _flat(leaf):
    """Strips one after the other."""
    return leaf.reshape(*leaf.shape[:-3], -1, leaf.shape[-1])


def _joined(leaf, spec, stored, rows):
    """Inverse of `_strips` and `_flat`, without the padding."""
    *lead, _, _ = leaf.shape
    split = leaf.reshape(*lead, strips(spec), stored, STRIP)
    joined = jnp.swapaxes(split, -2, -3).reshape(*lead, stored, -1)
    return joined[..., :rows, : spec.n]
