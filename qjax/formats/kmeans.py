"""Learned tables: a code is an index into values fitted to the weight itself.

Without `group` every output column has a table of its own and no scale, as in
SqueezeLLM. The tables are part of the size: `2**bits` entries of `table_dtype` per
column cost `16 * 2**bits / in` bits per weight in float16, 0.06 for 4 bits and 4096
inputs, but 0.5 for 3 bits and 256 inputs.

With `group` the whole matrix shares one table and every group along `in` has a scale:
NF4 with a learned table, which kernels multiply by. Until a method learns one, the
table is the quantiles of a normal distribution (for 4 bits exactly NF4's).

Reference: Kim et al., SqueezeLLM, arXiv 2306.07629, section 4.1; Dettmers et al.,
QLoRA, arXiv 2305.14314, appendix E (quantiles of the normal distribution).
"""

import dataclasses
import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt8

from qjax.errors import SpecError
from qjax.formats.base import FLOAT_SCALES, check_choice, check_matrix
from qjax.formats.codebook import NF4, TableFormat
from qjax.formats.grouping import Grouping

_NF_OFFSET = 0.9677083  # the outermost quantile of NF4, before the table is normalized


@dataclasses.dataclass(frozen=True)
class KMeans(TableFormat):
    """A learned table of `2**bits` values, ascending but in files of SqueezeLLM.

    Bits per weight: `bits + 16 * 2**bits / in` without groups (float16 tables),
    `bits + 16 / group` with groups (float16 scales; the table is negligible).

    Attributes:
      bits: code width, 2 to 8.
      group: None for a table per output column and no scales. A number for one table
        per matrix, with a scale for each so many weights along `in`.
      scale_dtype: `float32`, `bfloat16` or `float16`: of the scales of groups.
      table_dtype: the same for tables of columns; the one table of a matrix is float32.

    Raises:
      SpecError: a field is out of range.

    Example:
      >>> KMeans(3).name, KMeans(4, 64).name
      ('kmeans3', 'kmeans4-g64')
    """

    bits: int = 4
    group: int | None = None
    scale_dtype: str = "float16"
    table_dtype: str = "float16"

    def __post_init__(self) -> None:
        where = f"KMeans({self.bits}, {self.group!r})"
        check_choice(where, "bits", self.bits, tuple(range(2, 9)))
        check_choice(where, "scale_dtype", self.scale_dtype, FLOAT_SCALES)
        check_choice(where, "table_dtype", self.table_dtype, FLOAT_SCALES)
        if self.group is not None and (type(self.group) is not int or self.group < 1):
            raise SpecError(
                f"{where}: group is {self.group!r}, expected a positive integer (one "
                "table per matrix) or None (one table per output column)"
            )

    @property
    def name(self) -> str:
        """Short name, for example `kmeans4-g64`."""
        group = "" if self.group is None else f"-g{self.group}"
        return f"kmeans{self.bits}{group}"

    @property
    def code_bits(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Stored width of a code."""
        return self.bits

    @property
    def levels(self) -> int:
        """Entries of a table."""
        return 2**self.bits

    @property
    def columnwise(self) -> bool:
        """Whether every output column has a table of its own."""
        return self.group is None

    @property
    def table(self) -> np.ndarray:
        """The table of a matrix that has none of its own: normal quantiles."""
        if self.columnwise:
            raise SpecError(
                f"{self.name}: every column has a table of its own, so codes alone "
                "mean nothing; quantize with method=Lloyd(), which learns the tables, "
                "or give the format a group for one table per matrix"
            )
        return normal_table(self.bits)

    def grouping(self, matrix: tuple[int, int]) -> Grouping:
        """Columns, or groups along `in`."""
        if self.group is None:
            return Grouping("channel", matrix)
        check_matrix(self.name, matrix, self.group, 0)
        return Grouping("in", matrix, self.group)

    def encode(self, u: Float[Array, "..."]) -> UInt8[Array, "..."]:
        """Nearest entry of `table`; on a midpoint the lower one."""
        return nearest(u, jnp.asarray(self.table))

    def neighbour(
        self, codes: UInt8[Array, "..."], up: Bool[Array, "..."]
    ) -> Shaped[Array, "..."]:
        """The adjacent entry; tables ascend."""
        moved = codes.astype(jnp.int32) + jnp.where(up, 1, -1)
        return jnp.clip(moved, 0, self.levels - 1).astype(jnp.uint8)


@functools.cache
def normal_table(bits: int) -> np.ndarray:
    """Quantiles of the standard normal distribution, scaled to [-1, 1], with a zero.

    One more level is positive than negative, as in NF4, which 4 bits return exactly.

    Args:
      bits: code width, 2 to 8.

    Returns:
      `2**bits` ascending float32 values.
    """
    if bits == 4:
        return NF4().table
    quantile = statistics.NormalDist().inv_cdf
    half = 2 ** (bits - 1)
    up = [quantile(p) for p in np.linspace(_NF_OFFSET, 0.5, half + 1)[:-1]]
    down = [-quantile(p) for p in np.linspace(_NF_OFFSET, 0.5, half)[:-1]]
    values = np.sort(np.array([*up, 0.0, *down]))
    return (values / values.max()).astype(np.float32)


def nearest(
    u: Float[Array, "*shape"], table: Float[Array, "levels ..."]
) -> UInt8[Array, "*shape"]:
    """Index of the nearest entry of an ascending table; on a midpoint the lower one.

    Args:
      u: real numbers.
      table: entries along the first axis; the others broadcast to `u`.

    Returns:
      Codes.
    """
    bounds = midpoints(table)
    if table.ndim == 1 and table.shape[0] > 16:
        return jnp.searchsorted(bounds, u, side="left").astype(jnp.uint8)

    def count(i, rank):
        return rank + (u > bounds[i]).astype(jnp.uint8)

    # A constant trip count up to 16 levels is unrolled into one elementwise pass.
    unroll = table.shape[0] <= 16
    zero = jnp.zeros(u.shape, jnp.uint8)
    return jax.lax.fori_loop(0, bounds.shape[0], count, zero, unroll=unroll)


def midpoints(
    table: Float[Array, "levels ..."],
) -> Float[Array, "bounds ..."]:
    """Where the nearest entry of an ascending table changes."""
    return 0.5 * table[:-1] + 0.5 * table[1:]


def lookup(
    codes: Int[Array, "*shape"], table: Float[Array, "levels ..."]
) -> Float[Array, "*shape"]:
    """`table[codes]`: up to 16 levels by a tree of selections, more by a gather.

    A table `[levels, n]` has one column for each place on the last axis of `codes`.
    """
    levels = table.shape[0]
    if levels > 16 or levels & (levels - 1):
        if table.ndim == 1:
            return table.at[codes.astype(jnp.int32)].get(mode="clip")
        flat = codes.reshape(-1, codes.shape[-1]).astype(jnp.int32)
        return jnp.take_along_axis(table, flat, 0).reshape(codes.shape)
    nodes: list[Shaped[Array, ...]] = [table[i] for i in range(levels)]
    bit = 1
    while len(nodes) > 1:
        odd = (codes & jnp.asarray(bit, codes.dtype)) != 0
        nodes = [
            jnp.where(odd, high, low)
            for low, high in zip(nodes[::2], nodes[1::2], strict=True)
        ]
        bit *= 2
    return jnp.broadcast_to(nodes[0], codes.shape)
