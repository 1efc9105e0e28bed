"""Table formats: a code is an index into a small table, scaled per block.

`NF4` and `FP4` are bitsandbytes' 4-bit data types and agree with its CPU implementation
bit for bit: blocks run over the row-major transpose `[out, in]` of a kernel; a weight
is multiplied by the float32 reciprocal of its block's absolute maximum (a partial last
block divides instead), and takes the nearest table value, going up only when strictly
above the midpoint. When `in` is a multiple of the block the codes keep the shape of the
matrix; otherwise the matrix is stored flat, because blocks then cross columns.

`Dynamic8` is bitsandbytes' 8-bit dynamic map, used here to store scales ("double
quantization"). Its mean offset is summed in the order PyTorch's CPU kernel uses, so
that nested statistics agree bit for bit as well.

Reference: Dettmers et al., QLoRA, arXiv 2305.14314, sections 3 and 4; Dettmers et al.,
8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861, section 2.1.
"""

import abc
import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped, UInt8

from qjax.formats.base import FLOAT_SCALES, Format, check_choice
from qjax.formats.grouping import Grouping

_GRID = 2**16 - 1
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)

_NF4_POSITIVE = (
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_NF4_NEGATIVE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
)
_FP4_MAGNITUDE = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


@dataclasses.dataclass(frozen=True)
class TableFormat(Format):
    """Base of formats whose codes index a table with values in [-1, 1]."""

    @property
    @abc.abstractmethod
    def table(self) -> np.ndarray:
        """Value of each code, float32, in code order."""

    @property
    def peak(self) -> float:
        """The tables end at 1."""
        return 1.0

    def encode(self, u: Float[Array, "..."]) -> UInt8[Array, "..."]:
        """Nearest table entry; exactly on a midpoint the lower value wins."""
        _, order, bounds = _sorted_table(self)
        rank = jnp.zeros(u.shape, jnp.uint8)
        for bound in bounds:
            rank = rank + (u > bound).astype(jnp.uint8)
        if np.array_equal(order, np.arange(len(order))):
            return rank
        return _lookup(rank, order.astype(np.uint8))

    def decode(self, codes: UInt8[Array, "..."]) -> Float[Array, "..."]:
        """Table values of codes, float32."""
        return _lookup(codes, self.table)

    def neighbour(
        self, codes: UInt8[Array, "..."], up: Bool[Array, "..."]
    ) -> Shaped[Array, "..."]:
        """The adjacent table entry in value order."""
        values, order, _ = _sorted_table(self)
        rank = _lookup(codes, np.argsort(order, kind="stable").astype(np.int32))
        moved = jnp.clip(rank + jnp.where(up, 1, -1), 0, len(values) - 1)
        return _lookup(moved, order.astype(np.uint8))


@dataclasses.dataclass(frozen=True)
class BlockTable(TableFormat):
    """Base of bitsandbytes' formats: one fixed table, one scale per block.

    Attributes:
      block: weights per scale, a power of two from 32 to 4096.
      double: store the scales as 8-bit codes themselves (double quantization).
      scale_dtype: dtype of the scales when they are not quantized.
    """

    block: int = 64
    double: bool = False
    scale_dtype: str = "float32"
    code_bits: ClassVar[int] = 4

    def __post_init__(self) -> None:
        where = type(self).__name__
        check_choice(where, "block", self.block, BLOCKS)
        check_choice(where, "scale_dtype", self.scale_dtype, FLOAT_SCALES)

    @property
    def name(self) -> str:
        """Short name, for example `nf4-b64-dq`."""
        dq = "-dq" if self.double else ""
        return f"{type(self).__name__.lower()}-b{self.block}{dq}"

    def grouping(self, matrix: tuple[int, int]) -> Grouping:
        """Blocks along `in`, or flat when `in` is not a multiple of the block."""
        aligned = matrix[0] % self.block == 0
        return Grouping("in" if aligned else "flat", matrix, self.block)


@dataclasses.dataclass(frozen=True)
class NF4(BlockTable):
    """NormalFloat4: quantiles of a normal distribution, as in QLoRA.

    Bits per weight: `4 + 32 / block`, with `double` `4 + 8 / block + 32 / (256 block)`.

    Reference: bitsandbytes `functional.get_4bit_type("nf4")`.
    """

    @property
    def table(self) -> np.ndarray:
        """The 16 NF4 values."""
        return np.array([*_NF4_NEGATIVE, 0.0, *_NF4_POSITIVE], np.float32)


@dataclasses.dataclass(frozen=True)
class FP4(BlockTable):
    """bitsandbytes' 4-bit float: bit 3 is the sign, magnitudes are not IEEE ordered.

    Reference: bitsandbytes `functional.get_4bit_type("fp4")`.
    """

    @property
    def table(self) -> np.ndarray:
        """The 16 FP4 values by bit pattern."""
        magnitude = np.array(_FP4_MAGNITUDE, np.float32) / np.float32(12.0)
        return np.concatenate([magnitude, 0.0 - magnitude])  # code 8 is +0, not -0


@dataclasses.dataclass(frozen=True)
class Dynamic8(BlockTable):
    """bitsandbytes' 8-bit dynamic map: 256 values with 0 to 6 decimal exponents.

    Attributes:
      block: values per absolute maximum, flat over the transpose.
      signed: symmetric map in [-1, 1] instead of [0, 1].
    """

    block: int = 256
    signed: bool = True
    code_bits: ClassVar[int] = 8

    @property
    def table(self) -> np.ndarray:
        """The 256 values, ascending."""
        return dynamic_map(self.signed)

    def encode(self, u: Float[Array, "..."]) -> UInt8[Array, "..."]:
        """Nearest of the 256 values; the signed map first rounds `u` to 16 bits.

        That is bitsandbytes' CPU rule: a look-up in a grid of 2**16 cells over [-1, 1].
        """
        if not self.signed:
            bounds = jnp.asarray(_sorted_table(self)[2])
            return jnp.searchsorted(bounds, u, side="left").astype(jnp.uint8)
        cell = (jnp.clip(u, -1.0, 1.0) + 1.0) * 0.5 * _GRID + 0.5
        bounds = jnp.asarray(_grid_bounds())
        rank = jnp.searchsorted(bounds, cell.astype(jnp.int32), side="right")
        return rank.astype(jnp.uint8)


@functools.cache
def dynamic_map(signed: bool) -> np.ndarray:
    """The dynamic 8-bit map: for i = 0..6, cell centres of [0.1, 1] times 10**(i-6).

    Args:
      signed: halve the cells and mirror them.

    Returns:
      256 ascending float32 values, including 0 and 1.

    Reference: bitsandbytes `functional.create_dynamic_map(signed, 7, 8)`.
    """
    values = [np.array([0.0, 1.0], np.float32)]
    for i in range(7):
        cells = 2**i if signed else 2 ** (i + 1)
        edges = _linspace(cells)
        centres = (edges[:-1] + edges[1:]) / np.float32(2.0)
        scaled = np.float32(10.0 ** (i - 6)) * centres
        values += [scaled, -scaled] if signed else [scaled]
    return np.sort(np.concatenate(values))


def _linspace(cells: int) -> np.ndarray:
    """`torch.linspace(0.1, 1, cells + 1)` in float32: from both ends, one rounding."""
    start, end = np.float32(0.1), np.float32(1.0)
    step = np.float64((end - start) / np.float32(cells))
    i = np.arange(cells + 1)
    upward, downward = start + step * i, end - step * (cells - i)
    return np.where(i < (cells + 1) // 2, upward, downward).astype(np.float32)


@functools.cache
def _grid_bounds() -> np.ndarray:
    """For each code but the last, the first of 2**16 grid cells that lies beyond it."""
    table = dynamic_map(signed=True)
    bounds = np.float32(0.5) * (table[:-1] + table[1:])
    steps = np.float32(2.0) * np.arange(_GRID + 1, dtype=np.float32)
    cells = np.float32(-1.0) + steps / np.float32(_GRID)
    return np.searchsorted(cells, bounds, side="right").astype(np.int32)


@functools.cache
def _sorted_table(fmt: TableFormat):
    table = fmt.table
    order = np.argsort(table, kind="stable")
    values = table[order]
    return values, order, (values[:-1] + values[1:]) / np.float32(2.0)


def _lookup(codes, table):
    return jnp.asarray(table).at[codes.astype(jnp.int32)].get(mode="clip")


def pytorch_mean(x: Float[Array, "*lead n"]) -> Float[Array, "*lead"]:
    """Mean over the last axis, summed in the order of PyTorch's CPU reduction.

    PyTorch adds contiguous float32 values in 4 x 8 lanes with a four-level cascade; the
    result differs in the last bits from other orders. Matching it makes the offset of
    double quantization, and with it every nested code, equal to bitsandbytes'.

    From 32768 values PyTorch also splits the sum over its threads; this is the result
    of one thread.

    Reference: PyTorch `aten/src/ATen/native/cpu/SumKernel.cpp`, `row_sum`.
    """
    n = x.shape[-1]
    lanes = 8 if n >= 8 else 1
    rows = n // (4 * lanes)
    body = x[..., : rows * 4 * lanes].reshape(*x.shape[:-1], rows, 4, lanes)
    acc = _cascade(jnp.moveaxis(body, -3, 0))
    first = acc[..., 0, :]
    for i in range(rows * 4, n // lanes):
        first = first + x[..., i * lanes : (i + 1) * lanes]
    for k in range(1, 4):
        first = first + acc[..., k, :]
    total = jnp.zeros(x.shape[:-1], jnp.float32)
    for i in range(n // lanes * lanes, n):
        total = total + x[..., i]
    for lane in range(lanes):
        total = total + first[..., lane]
    # Behind the barrier: XLA turns division by a constant into another rounding.
    return total / jax.lax.optimization_barrier(jnp.float32(max(n, 1)))


def _cascade(rows):
    """Sums axis 0 in a four-level cascade of `2**power` sequential additions."""
    count = rows.shape[0]
    power = max(4, (max(count, 1) - 1).bit_length() // 4)
    step = 1 << power
    acc = jnp.zeros(rows.shape[1:], jnp.float32)
    for _ in range(3):
        full = rows.shape[0] // step
        acc = acc + _sequential(rows[full * step :])
        chunks = rows[: full * step].reshape(full, step, *rows.shape[1:])
        rows = _sequential(jnp.moveaxis(chunks, 1, 0))
    return acc + _sequential(rows)


def _sequential(rows):
    total = jnp.zeros(rows.shape[1:], jnp.float32)
    for i in range(rows.shape[0]):
        total = total + rows[i]
    return total
