"""Tiles of products with 8-bit activations, and what each chip can multiply.

TPU tiles hold all of `k`: a row of activations is rounded once, when its tile is first
visited, and stays in VMEM for all columns. `default` was chosen by the compiler's own
schedules, with no TPU at hand:

    python benchmarks/tpu_aot.py --match matmul_a8

GPU tiles likewise by registers and spills:

    python benchmarks/gpu_aot.py --match matmul_a8
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from .. import device
from ..weights import WeightSpec

ACTIVATIONS = ("int8", "float8_e4m3fn")
LANES = 128


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a TPU generation has.

    Attributes:
      vmem: bytes of VMEM of a core that a kernel may take.
      cores: cores that share one program (megacore).
      multiplies: activation types of its matrix unit.
    """

    vmem: int
    cores: int
    multiplies: tuple[str, ...]


CHIPS = {
    "v5e": Chip(100 << 20, 1, ("int8",)),
    "v5p": Chip(52 << 20, 2, ("int8",)),
    "v6e": Chip(100 << 20, 1, ("int8",)),
    "7x": Chip(52 << 20, 1, ("float8_e4m3fn",)),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiles of the TPU kernel.

    Attributes:
      rows: rows of `x` per tile.
      columns: columns of the result per step.
      strip: columns whose sums are held at a time.
      chip: name of the chip, a key of `CHIPS`.
      unroll: write out the loop over groups; otherwise it is a loop, which keeps the
        program of large tiles small.
    """

    rows: int
    columns: int
    strip: int
    chip: str
    unroll: bool


def chip() -> str | None:
    """The TPU generation that is traced for, None if unknown."""
    return device.TPU_GENERATIONS.get(device.device_kind())


def default(
    spec: WeightSpec, m: int, activation: str, chip_name: str | None = None
) -> Config:
    """Tiles for a product.

    Few rows: one tile of rows, and columns so that a step brings about 2 MiB of codes,
    7 MiB on 7x. There a step's fixed work weighs more: at 4096 x 14336, g128, it takes
    0.88 of the transfer's time, with 4 MiB 0.94. The price is that the first transfer,
    a fourth of all, is not hidden; there are never fewer steps than four unless columns
    run out. Many rows: tiles of up to 512 rows that fit VMEM beside the weight's block.

    Args:
      spec: the weight.
      m: rows of the activations.
      activation: their 8-bit type.
      chip_name: key of `CHIPS`; default that of the first device, else by activation.

    Returns:
      The tiles.
    """
    fallback = "v6e" if activation == "int8" else "7x"
    name = chip_name or chip() or fallback
    few = m <= 64
    strip = 512 if few else 256
    block = (7 << 20) if name == "7x" and few else (2 << 20)
    columns = block // max(spec.packed_k, 1) // strip * strip
    most = max(ceil(spec.n // 4, strip), strip) if few else 1024
    columns = min(max(columns, 2 * LANES), most, ceil(spec.n, LANES))
    rows = ceil(m, 16) if few else min(512, ceil(m, 32))
    while rows > 64 and _bytes(spec, rows, columns) > CHIPS[name].vmem * 3 // 4:
        rows = ceil(rows // 2, 32)
    strip = min(columns, strip)
    columns = columns // strip * strip
    return Config(rows, columns, strip, name, few and _products(spec) <= 64)


def ceil(size: int, unit: int) -> int:
    """`size` rounded up to a multiple of `unit`, at least `unit`."""
    return max(-(-size // unit), 1) * unit


def _products(spec):
    """Products per strip of columns."""
    return spec.k // min(max(spec.group, LANES), 4 * LANES, spec.k)


def _bytes(spec, rows, columns):
    """VMEM of one step: buffers twice, codes of x, sums, and the decoded block."""
    x = rows * spec.k * (2 * 4 + parts(spec)) + rows * spec.groups * 4 * LANES
    weight = 2 * columns * (spec.packed_k + 8 * spec.groups) + columns * spec.k
    return x + weight + rows * columns * 16


def parts(spec: WeightSpec) -> int:
    """Groups that share one product of 128 rows: each has its own copy of `x`."""
    return max(LANES // spec.group, 1) if spec.group < spec.k else 1


def tpu_obstacle(
    spec: WeightSpec, activation: str, chip_name: str | None
) -> str | None:
    """Why the TPU kernel cannot compute a product, or None when it can.

    Args:
      spec: the weight.
      activation: 8-bit type of the activations.
      chip_name: key of `CHIPS`, or None where no chip is known (interpreter).

    Returns:
      The reason, in words, or None.
    """
    if spec.layout != "canonical":
        return f"it reads the canonical layout, not {spec.layout!r}"
    if chip_name and activation not in CHIPS[chip_name].multiplies:
        able = CHIPS[chip_name].multiplies[0]
        return f"{chip_name} has no {activation} matrix unit; use {able} activations"
    reason = pair_obstacle(spec, activation)
    if reason is not None:
        return reason
    if spec.kind == "int" and spec.bits not in (2, 4, 8):
        return f"{spec.bits}-bit codes are not decoded in the kernel"
    if spec.k % LANES:
        return f"k={spec.k} is not a multiple of {LANES}"
    if spec.group < spec.k and spec.group % LANES and spec.group not in (16, 32, 64):
        return f"groups of {spec.group} are not 16, 32, 64 or a multiple of {LANES}"
    if _bytes(spec, 16, 2 * LANES) > CHIPS[chip_name or "7x"].vmem:
        return f"k={spec.k} rows do not fit VMEM"
    return None


def pair_obstacle(spec: WeightSpec, activation: str) -> str | None:
    """Why no 8-bit unit multiplies these codes exactly, or None."""
    if activation not in ACTIVATIONS:
        return f"activation {activation!r} is not one of {ACTIVATIONS}"
    if activation == "int8" and spec.kind != "int":
        return f"int8 activations do not multiply {spec.kind} codes"
    if activation == "float8_e4m3fn":
        if spec.kind not in ("int", "e4m3"):
            return f"{spec.kind} codes are not decoded to float8_e4m3fn"
        if spec.kind == "int" and spec.bits > 4:
            return f"{spec.bits}-bit integers are not exact in float8_e4m3fn"
    return None


def activation_of(x_dtype: Any) -> str | None:
    """The 8-bit type of coded activations, None for floats."""
    name = jnp.dtype(x_dtype).name
    return name if name in ACTIVATIONS else None


@dataclasses.dataclass(frozen=True)
class GpuConfig:
    """Tiles of the Hopper kernel.

    Attributes:
      tokens: rows of `x` per tile, 8 to 256.
      warpgroups: warpgroups that multiply, 64 columns each.
      rows: rows of the weight per step, 128 or a multiple.
      stages: steps in flight.
      split: blocks share tiles; partial sums are added afterwards.
      blocks: persistent blocks, one per multiprocessor.
      operand: decode through shared memory (the interpreter needs it).
    """

    tokens: int
    warpgroups: int = 2
    rows: int = LANES
    stages: int = 4
    split: bool = True
    blocks: int = 132
    operand: bool = False


SHARED = (227 << 10) - 2048
"""Bytes of shared memory of a block, less what barriers take."""


def gpu_default(
    spec: WeightSpec, m: int, narrow: bool, rest: bool = False
) -> GpuConfig:
    """Tiles for a product on Hopper.

    Up to 64 rows all tokens are one tile and blocks share columns' sums; the ring holds
    as much as fits, up to twelve steps. Above, tiles of 128 columns are written whole
    when the result has 16 bits: by 256 tokens; by 128 with groups, whose float32 sums
    need the registers; by 64 with zero-points, which need a second accumulator.

    Args:
      spec: the weight.
      m: rows of the activations.
      narrow: whether the result has 16 bits.
      rest: whether sums of the activations are needed.

    Returns:
      The tiles.
    """
    few, rows = m <= 64, ceil(spec.k, LANES)
    single = spec.group >= spec.k
    wide = 256 if single and spec.bits == 8 else 128
    tokens = ceil(m, 8) if few else min(64 if rest else wide, ceil(m, 64))
    deep = 2 * LANES if few else LANES
    whole = single or spec.group % deep == 0 or deep % spec.group == 0
    deep = deep if rows % deep == 0 and whole else LANES
    stage = deep * (tokens + LANES * spec.bits // 8)
    stage += 0 if single else max(deep // spec.group, 1) * LANES * 8
    whole_tiles = narrow and not few
    space = SHARED - (32 << 10 if whole_tiles else 0)
    return GpuConfig(tokens, 2, deep, min(12, space // stage), not whole_tiles)
