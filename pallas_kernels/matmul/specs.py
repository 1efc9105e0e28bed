"""Tiles of the TPU kernels, and what those kernels refuse.

The table was filled by compiling for each generation and reading the schedules:

    python benchmarks/tpu_aot.py --match tune

There is no timing in it: no TPU was at hand. For 4096 x 14336 codes in groups of 128
that gives, in bundles per block of 1024 columns,

    rows of x                     16     64    128    256    512
    v6e, decoded for one pass   2012   2427   4411
    v6e, decoded into a panel          3827   4194   7814  11893
    7x, decoded for one pass    1308   2369   4379
    7x, decoded into a panel           3518   3574   4358

where a panel's decoding is paid once per block, however many rows there are. Wide
blocks win because prologue and pipeline cost 100 to 200 bundles per grid step; the
blocks span all of `k`, so that no accumulator is carried and `k` is never ragged at a
block's edge.
"""

import dataclasses
import functools

import jax.numpy as jnp

from .. import device
from ..weights import FIELDS, KernelError, WeightSpec
from . import decode, layout

PARTS = {"bfloat16": 1, "float16": 2, "float32": 3}
"""Terms of 8 bits that add up to a number of each dtype."""


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What is known about a generation.

    Attributes:
      depth: rows that a product of small groups should reach together. More than 128
        do not pay on 256-row matrix units: groups of 128 would need copies of `x`.
      decode: rows of `x` up to which the weight is decoded for one pass over it.
      columns: widest block of columns, in either regime.
      codes: most codes of a block in the decode regime (its schedule is unrolled).
      rows: rows of `x` per step when the weight is decoded once for many.
      vmem: bytes of VMEM to use.
    """

    depth: int
    decode: int
    columns: tuple[int, int]
    codes: int
    rows: int
    vmem: int


MIB = 1 << 20
SCALES = 1 << 17
"""Most scales of a block in the decode regime: each is a few lines of the program."""
TUNED = {
    "v5e": Tuned(128, 64, (1024, 1024), 4 * MIB, 256, 100 * MIB),
    "v5p": Tuned(128, 64, (1024, 512), 4 * MIB, 256, 52 * MIB),
    "v6e": Tuned(128, 64, (1024, 1024), 4 * MIB, 256, 100 * MIB),
    "7x": Tuned(128, 64, (2048, 512), 8 * MIB, 256, 52 * MIB),
}
"""Filled by the command in the module's docstring."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiles of one product.

    Attributes:
      chip: generation, which decides how codes are decoded.
      prefill: whether the weight is decoded once for many rows of `x`, with scales
        applied before the product; else scales are applied after it.
      rows: rows of `x` per block, a multiple of 16.
      columns: columns of the weight per block, a multiple of 128.
      vmem: bytes of VMEM to ask for.
    """

    chip: str
    prefill: bool
    rows: int
    columns: int
    vmem: int


def chip(kind: str | None = None) -> str:
    """Generation of a device.

    Args:
      kind: its `device_kind`; default that of the device that is traced for, or,
        where that is no TPU (programs are also made elsewhere), the oldest generation.

    Returns:
      A key of `TUNED`.

    Raises:
      KernelError: a TPU that the kernels do not know.
    """
    if kind is None:
        kind = device.device_kind()
        if not kind.startswith("TPU"):
            return "v5e"
    known = device.TPU_GENERATIONS
    if kind not in known:
        raise KernelError(f"TPU kernels know {sorted(known)}, not {kind!r}")
    return known[kind]


def obstacle(
    spec: WeightSpec, m: int, x_dtype, *, transpose: bool = False, chip: str = "v5p"
) -> str | None:
    """Why the TPU kernels cannot do a product, or None.

    Args:
      spec: the weight.
      m: rows of `x`.
      x_dtype: dtype of `x`.
      transpose: whether the weight is transposed.
      chip: generation; the default has the least memory to spare.

    Returns:
      The reason.
    """
    bits, kind = spec.bits, spec.kind
    if jnp.dtype(x_dtype).name not in PARTS:
        return f"activations are {jnp.dtype(x_dtype).name}"
    if kind == "table" and bits > 4:
        return f"a table of {2**bits} entries does not fit a register; at most 16 do"
    if (kind == "e2m1" and bits != 4) or (kind in decode.FLOAT8 and bits != 8):
        return f"{kind} codes are stored in {bits} bits"
    planes = len(FIELDS.get(bits, ())) > 1
    if spec.layout not in ("canonical", layout.TAG):
        return f"the layout is {spec.layout!r}"
    if planes != (spec.layout == layout.TAG):
        return f"{bits}-bit codes are read in another layout; layout.prepack makes it"
    dec = decode.decoder(spec, chip, natural=transpose, mixed=False)
    if decode.region(spec, dec, 1) > 2048:
        return f"groups of {spec.group} rows do not align with {bits}-bit registers"
    try:
        config(spec, m, x_dtype, transpose=transpose, chip=chip)
    except KernelError as error:
        return str(error)
    return None


@functools.lru_cache(maxsize=4096)
def config(
    spec: WeightSpec, m: int, x_dtype, *, transpose: bool = False, chip: str
) -> Config:
    """Tiles for a product: the tuned ones, made smaller until they fit.

    Args:
      spec: the weight.
      m: rows of `x`.
      x_dtype: dtype of `x`.
      transpose: whether the weight is transposed.
      chip: generation.

    Returns:
      The tiles.

    Raises:
      KernelError: not even the smallest blocks fit in VMEM.
    """
    tuned = TUNED[chip]
    prefill = m > tuned.decode
    widths = _halvings(min(tuned.columns[prefill], -(-spec.n // 128) * 128), 128)
    heights = _halvings(min(tuned.rows * (2 if transpose else 1), -(-m // 16) * 16), 16)
    if not prefill:
        short = [
            c for c in widths if spec.k * c <= tuned.codes and spec.groups * c <= SCALES
        ]
        widths = short or widths[-1:]  # a long program rather than none
    tiles = [(heights[0], c) for c in widths]
    tiles += [(r, c) for r in heights[1:] for c in widths[-2:]]
    for rows, columns in tiles:
        found = Config(chip, prefill, rows, columns, tuned.vmem)
        if vmem_bytes(spec, found, x_dtype, transpose) <= 0.9 * tuned.vmem:
            return _even(found, spec)
    raise KernelError(f"{spec.k} rows do not fit in VMEM ({tuned.vmem} bytes)")


def _halvings(size, unit):
    """`size`, about its half, and so on, in multiples of `unit`."""
    found = [size]
    while found[-1] > unit:
        found.append(-(-found[-1] // (2 * unit)) * unit)
    return found


def _even(found, spec):
    """The same number of column blocks, but of like width where 128 divides."""
    steps = -(-spec.n // found.columns)
    columns = -(-spec.n // (steps * 128)) * 128
    return dataclasses.replace(found, columns=columns)


def vmem_bytes(spec: WeightSpec, tiles: Config, x_dtype, transpose: bool) -> int:
    """Estimate of the VMEM of a product: double-buffered blocks and scratch."""
    parts = PARTS[jnp.dtype(x_dtype).name]
    k = -(-spec.k // 512) * 512
    rows, columns = tiles.rows, tiles.columns
    codes = k * spec.bits // 8 * columns
    groups = -(-spec.groups // 32) * 32
    scales = 3 * groups * columns * 4  # two buffers and a float32 copy, and zeros
    if transpose:
        x, y = rows * columns * 4, rows * k * (4 + 2 * 4)
        return 2 * (codes + x + scales) + y + 512 * columns * 8
    small = spec.groups > 1 and spec.group < 256
    copies = parts * (256 // spec.group + 1 if small and not tiles.prefill else 1)
    x, y = rows * copies * k * 2, rows * columns * 4
    terms = parts if spec.kind == "table" else 1
    panel = terms * k * columns * 2 if tiles.prefill else 0
    return 2 * (codes + x + y + scales) + panel + 512 * columns * 8
