"""What the arrays of a packed matrix mean: shared by every kernel.

A weight `W [k, n]` is a `Weight` (arrays) and a `WeightSpec` (static):

    W[i, j] = (value(code[i, j]) - zero[i // group, j]) * scale[i // group, j]

`value` is the code minus `spec.offset` for "int", a table entry for "table", the
number a bit pattern stands for in "e2m1", "e4m3" and "e5m2". In the canonical layout
codes lie along `k` as in `qjax.packing`: `8 // bits` neighbouring rows share a byte,
the first in the low bits; 3, 5, 6 and 7 bits are cut into fields of 4, 2 and 1 bits,
and 8 rows are stored as one run of byte rows per field, low bits first. Rows are padded
to whole bytes (to 8 rows for fields). Every array may have one leading axis, the
layers of a stack, from which `layer` picks.

Other layouts are made from the canonical one by a kernel's `layout.py` and named in
`spec.layout`; `check` knows the canonical one.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp

KINDS = ("int", "table", "e2m1", "e4m3", "e5m2")
FIELDS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}
FLOAT_SCALES = ("float32", "bfloat16", "float16")
STORED_SCALES = (*FLOAT_SCALES, "uint8", "float8_e4m3fn")


class KernelError(ValueError):
    """An argument that no kernel can work with; the message names it."""


@dataclasses.dataclass(frozen=True)
class WeightSpec:
    """The static half of a packed matrix.

    Attributes:
      k: rows, the contracted axis.
      n: columns.
      kind: what codes are: "int", "table", "e2m1", "e4m3" or "e5m2".
      bits: stored width of a code, 1 to 8.
      group: rows that share a scale; `k` for one scale per column. The last group may
        be short.
      offset: subtracted from "int" codes (the implied zero-point).
      layout: "canonical", or the tag of a prepacked layout.
    """

    k: int
    n: int
    kind: str = "int"
    bits: int = 4
    group: int = 128
    offset: float = 0.0
    layout: str = "canonical"

    @property
    def groups(self) -> int:
        """Scales per column."""
        return -(-self.k // self.group) if self.group else 0

    @property
    def packed_k(self) -> int:
        """Byte rows of the canonical codes."""
        if self.bits == 8:
            return self.k
        per = 8 if self.bits not in (1, 2, 4) else 8 // self.bits
        return -(-self.k // per) * per * self.bits // 8


class Weight(NamedTuple):
    """The arrays of a packed matrix.

    Attributes:
      codes: uint8 `[*layers, packed_k, n]`; 8-bit codes may be int8 or float8.
      scale: `[*layers, groups, n]`, float32, bfloat16, float16, float8_e4m3fn, or uint8
        (E8M0: `2**(code - 127)`).
      zero: like `scale` (float or uint8 integers), in units of codes, or None.
      table: float32 `[*layers, 2**bits]` for "table", else None.
    """

    codes: Any
    scale: Any
    zero: Any = None
    table: Any = None

    @property
    def nbytes(self) -> int:
        """Stored bytes of all arrays."""
        return sum(x.size * x.dtype.itemsize for x in self if x is not None)


def check(weight: Weight, spec: WeightSpec, x_shape: tuple[int, ...], *, name: str):
    """Checks a canonical weight against its spec and the activations.

    Args:
      weight: the arrays.
      spec: what they should be.
      x_shape: `[m, k]` of the activations.
      name: the operation, for messages.

    Raises:
      KernelError: an argument does not fit, naming argument, got and expected.
    """

    def refuse(argument, got, expected, hint):
        raise KernelError(f"{name}: {argument} {got}, expected {expected}; {hint}")

    if spec.kind not in KINDS:
        refuse("spec.kind is", repr(spec.kind), f"one of {KINDS}", "choose one")
    if not 1 <= spec.bits <= 8:
        refuse("spec.bits is", spec.bits, "1 to 8", "choose another width")
    if len(x_shape) != 2 or x_shape[1] != spec.k:
        refuse(
            "x has shape", list(x_shape), f"[m, {spec.k}]", "its columns are rows of W"
        )
    lead = weight.codes.shape[:-2]
    shapes = {
        "codes": (weight.codes, (*lead, spec.packed_k, spec.n)),
        "scale": (weight.scale, (*lead, spec.groups, spec.n)),
        "zero": (weight.zero, (*lead, spec.groups, spec.n)),
        "table": (weight.table, (*lead, 2**spec.bits)),
    }
    if len(lead) > 1:
        refuse("codes have shape", list(weight.codes.shape), "rank 2 or 3", "reshape")
    for key, (array, shape) in shapes.items():
        optional = key == "zero" or (key == "table" and spec.kind != "table")
        if array is None and not optional:
            refuse(f"{key} is", None, f"an array {list(shape)}", "pass it")
        if array is not None and tuple(array.shape) != shape:
            what = f"{spec.bits}-bit [{spec.k}, {spec.n}] in groups of {spec.group}"
            refuse(f"{key} has shape", list(array.shape), list(shape), f"W is {what}")
    wide = {"int": ("uint8", "int8"), "table": ("uint8",)}
    codes = {"e4m3": ("float8_e4m3fn",), "e5m2": ("float8_e5m2",)} | wide
    allowed = codes.get(spec.kind, ("uint8",)) if spec.bits == 8 else ("uint8",)
    if jnp.dtype(weight.codes.dtype).name not in allowed:
        refuse("codes have dtype", weight.codes.dtype, allowed, "view them as that")
    if jnp.dtype(weight.scale.dtype).name not in STORED_SCALES:
        refuse("scale has dtype", weight.scale.dtype, STORED_SCALES, "cast it")
