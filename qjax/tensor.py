"""Quantized weights as pytrees.

A `QuantizedTensor` holds packed codes and scales as leaves; its format, its logical
matrix `(in, out)` and its logical dtype are static. Leading axes (layers, experts,
convolution taps) are whatever leading axes the leaves have, so the same object goes
through `vmap`, `scan`, indexing, sharding and `jax.tree` maps unchanged.

Invariants, for a tensor of logical shape `[*lead, in, out]`:

* every leaf is `[*lead, ...]`;
* `AffineTensor`: `w = (code - zero) * scale`;
* `CodebookTensor`: `w = table[code] * scale + offset`, absent leaves being 1 and 0;
* `MinifloatTensor`: `w = float(code) * (scale / global_scale)`, absent leaves being 1;
* `scale` is an array or itself a `QuantizedTensor` (double quantization); so is `zero`,
  if `scale` is;
* the "flat" layout (bitsandbytes blocks that do not divide `in`) stores the row-major
  transpose as one column: codes `[*lead, packed(in * out), 1]`.

Sub-byte leaves are packed `uint8`; there are no `int4` leaves, which neither Orbax nor
safetensors can store. Constructors do not validate, because pytree operations put
arbitrary objects in the leaves; `qjax.specs` validates what is loaded.
"""

import abc
import dataclasses
import json
import math
from typing import Any, ClassVar, TypeVar

import jax
import jax.export
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from qjax.errors import SpecError
from qjax.formats.affine import Int
from qjax.formats.base import Format, divided, format_from_dict, rounded
from qjax.formats.codebook import TableFormat
from qjax.formats.grouping import Grouping
from qjax.formats.kmeans import KMeans
from qjax.formats.minifloat import (
    Cast,
    Minifloat,
    decode_e8m0,
)
from qjax.packing import pack, packed_rows, unpack

_T = TypeVar("_T")


def pytree_node(cls: type[_T]) -> type[_T]:
    """Registers a frozen dataclass as a pytree, also for `jax.export`.

    Static fields travel in exported programs as JSON.

    Args:
      cls: dataclass with array fields and static fields.

    Returns:
      `cls`.
    """
    cls = jax.tree_util.register_dataclass(cls)
    return jax.export.register_pytree_node_serialization(
        cls,
        serialized_name=f"qjax.{cls.__name__}",
        serialize_auxdata=_dump_static,
        deserialize_auxdata=_load_static,
    )


def _dump_static(static: tuple) -> bytes:
    plain = [x.to_dict() if isinstance(x, Format) else x for x in static]
    return json.dumps(plain).encode()


def _load_static(data: bytes | bytearray) -> tuple:
    values = json.loads(data)
    loads = {dict: format_from_dict, list: tuple}
    return tuple(loads.get(type(x), lambda x: x)(x) for x in values)


class QuantizedTensor(abc.ABC):
    """Base of every quantized weight: shape, size, indexing and printing.

    Subclasses are registered dataclass pytrees. `format` is the number format,
    `matrix` the logical `(in, out)`, `dtype` the logical dtype name that
    `dequantize()` returns.
    """

    format: Format
    matrix: tuple[int, int]

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Logical shape `[*lead, in, out]`."""

    @property
    def ndim(self) -> int:
        """Logical rank."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of logical weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves as stored."""
        leaves = jax.tree.leaves(self)
        return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in leaves)

    @property
    def bits_per_weight(self) -> float:
        """All stored bits, scales included, over logical weights (0 when empty)."""
        return 8 * self.nbytes / self.size if self.size else 0.0

    @abc.abstractmethod
    def dequantize(self, dtype: Any = None) -> Float[Array, "..."]:
        """The dense weight, computed in float32 and cast.

        Args:
          dtype: result dtype; default the logical dtype.

        Returns:
          Array of `shape`.
        """

    def __getitem__(self, index: Any) -> "QuantizedTensor":
        """Indexes leading axes; the matrix axes cannot be cut.

        Raises:
          SpecError: the index reaches into `in` or `out`.
        """
        parts = index if isinstance(index, tuple) else (index,)
        used = sum(1 for p in parts if p is not None and p is not Ellipsis)
        if used > self.ndim - 2 or any(p is Ellipsis for p in parts):
            raise SpecError(
                f"index {index!r} into {self!r}: only the {self.ndim - 2} leading axes "
                "can be indexed; dequantize() first to cut the matrix"
            )
        return jax.tree.map(lambda leaf: leaf[index], self)

    def __repr__(self) -> str:
        try:
            text = (
                f"{self.format.name}, {list(self.shape)}, "
                f"{self.bits_per_weight:.3f} bits/weight, {format_bytes(self.nbytes)}"
            )
        except (AttributeError, TypeError, IndexError):  # leaves are not arrays
            text = self.format.name
        return f"{type(self).__name__}({text})"


class LayoutTensor(QuantizedTensor):
    """A weight with one codes leaf: what the three storage layouts share."""

    codes: Any
    scale: Any
    dtype: str
    affine: ClassVar[bool] = False

    @property
    def vector(self) -> tuple[int, int] | None:
        """Weights along `in`, and rows of `codes`, that are only decoded together.

        None where every weight has a code of its own.
        """
        return None

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape `[*lead, in, out]`."""
        return (*self.codes.shape[:-2], *self.matrix)

    @property
    def grouping(self) -> Grouping:
        """Which weights share a scale."""
        return self.format.grouping(self.matrix)

    @property
    def flat(self) -> bool:
        """Whether codes are stored as one column over the transpose."""
        return self.grouping.kind == "flat"

    def unpacked(self) -> Shaped[Array, "*lead in out"]:
        """Codes, one per element, in matrix form (8-bit layouts: the leaf itself)."""
        bits = self.format.code_bits
        rows, cols = self.matrix
        size = rows * cols if self.flat else rows
        codes = self.codes if bits >= 8 else unpack(self.codes, bits, size)
        if self.flat:
            codes = codes.reshape(*codes.shape[:-2], cols, rows)
            codes = jnp.swapaxes(codes, -1, -2)
        return codes

    def scales(self) -> Float[Array, "*lead s t"]:
        """Effective float32 scale of each group, nested statistics decoded."""
        return load_scale(self.scale)


@pytree_node
@dataclasses.dataclass(frozen=True, repr=False)
class AffineTensor(LayoutTensor):
    """`w = (code - zero) * scale`, for `Int` formats.

    Attributes:
      codes: uint8 `[*lead, packed(in), out]`, or int8 `[*lead, in, out]` (8-bit
        symmetric).
      scale: `[*lead, s, t]`, one per group (see `Grouping.scale_shape`), or nested.
      zero: like `scale`, in code units, nested or not; None when symmetric.
      format: the `Int` format.
      matrix: logical `(in, out)`.
      dtype: logical dtype name.
    """

    codes: Any
    scale: Any
    zero: Any
    format: Int = dataclasses.field(metadata={"static": True})
    matrix: tuple[int, int] = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(default="float32", metadata={"static": True})

    def dequantize(self, dtype: Any = None) -> Float[Array, "..."]:
        """See `QuantizedTensor.dequantize`."""
        group = self.grouping
        values = group.split(self.format.decode(self.unpacked()))
        if self.zero is not None:
            values = values - group.load(load_zero(self.zero))
        values = group.join(values * group.load(self.scales()))
        return values.astype(dtype or self.dtype)


@pytree_node
@dataclasses.dataclass(frozen=True, repr=False)
class CodebookTensor(LayoutTensor):
    """`w = table[code] * scale + offset`, for table formats.

    Attributes:
      codes: uint8 `[*lead, packed(in), out]`, or flat.
      scale: `[*lead, in / block, out]` (flat: `[*lead, blocks, 1]`), or nested; None
        when every column has a table of its own.
      codebook: float32 `[*lead, 2**bits]` when learned or read from a file; None means
        the format's own table. `KMeans` without groups: float `[*lead, 2**bits, out]`.
      offset: float32 `[*lead, 1, 1]` or None; the mean that double quantization
        subtracts.
      format: a table format.
      matrix: logical `(in, out)`.
      dtype: logical dtype name.
    """

    codes: Any
    scale: Any
    codebook: Any
    offset: Any
    format: TableFormat = dataclasses.field(metadata={"static": True})
    matrix: tuple[int, int] = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(default="float32", metadata={"static": True})

    def table(self) -> Float[Array, "*lead levels"] | Float[Array, "*lead levels out"]:
        """The value of each code, float32; of each code of each column."""
        if self.codebook is None:
            return jnp.asarray(self.format.table)
        return self.codebook.astype(jnp.float32)

    @property
    def columnwise(self) -> bool:
        """Whether every output column has a table of its own."""
        return isinstance(self.format, KMeans) and self.format.columnwise

    def scales(self) -> Float[Array, "*lead s t"]:
        """Effective float32 scales."""
        if self.scale is None:
            return jnp.ones((*self.codes.shape[:-2], 1, 1), jnp.float32)
        return load_scale(self.scale)

    def dequantize(self, dtype: Any = None) -> Float[Array, "..."]:
        """See `QuantizedTensor.dequantize`."""
        group = self.grouping
        codes = self.unpacked()
        if self.codebook is None:
            values = self.format.decode(codes)
        elif self.columnwise:
            values = jnp.take_along_axis(self.table(), codes.astype(jnp.int32), -2)
        else:
            flat = codes.reshape(*codes.shape[:-2], -1).astype(jnp.int32)
            values = jnp.take_along_axis(self.codebook, flat, -1).reshape(codes.shape)
        if self.scale is not None:
            values = group.join(group.split(values) * group.load(self.scales()))
        if self.offset is not None:
            values = rounded(values) + self.offset
        return values.astype(dtype or self.dtype)


@pytree_node
@dataclasses.dataclass(frozen=True, repr=False)
class MinifloatTensor(LayoutTensor):
    """`w = float(code) * (scale / global_scale)`, for FP8, MX, NVFP4 and casts.

    Attributes:
      codes: float8 or 16-bit float `[*lead, in, out]`; uint8 `[*lead, in / 2, out]` for
        E2M1.
      scale: float, E4M3 or E8M0 (uint8) `[*lead, s, t]`; None for `Cast`.
      global_scale: float32 `[*lead, 1, 1]`, NVFP4 only; divides `scale`.
      format: a `Minifloat` or `Cast` format.
      matrix: logical `(in, out)`.
      dtype: logical dtype name.
    """

    codes: Any
    scale: Any
    global_scale: Any
    format: Minifloat | Cast = dataclasses.field(metadata={"static": True})
    matrix: tuple[int, int] = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(default="float32", metadata={"static": True})

    def scales(self) -> Float[Array, "*lead s t"]:
        """Effective float32 scales."""
        if self.scale is None:
            return jnp.ones((*self.codes.shape[:-2], 1, 1), jnp.float32)
        scale = load_scale(self.scale)
        if self.global_scale is None:
            return scale
        return divided(scale, self.global_scale)

    def dequantize(self, dtype: Any = None) -> Float[Array, "..."]:
        """See `QuantizedTensor.dequantize`."""
        values = self.format.decode(self.unpacked())
        if self.scale is not None:
            group = self.grouping
            values = group.join(group.split(values) * group.load(self.scales()))
        return values.astype(dtype or self.dtype)


def dequantize(q: QuantizedTensor, dtype: Any = None) -> Float[Array, "..."]:
    """The dense weight of a quantized tensor; see `QuantizedTensor.dequantize`."""
    return q.dequantize(dtype)


def with_dtype(q: QuantizedTensor, dtype: str) -> QuantizedTensor:
    """The same codes with another logical dtype (what `dequantize()` returns)."""
    base: Any = getattr(q, "base", None)
    if base is not None:  # a wrapper: its dtype is that of what it wraps
        return dataclasses.replace(q, base=with_dtype(base, dtype))  # pyright: ignore[reportArgumentType, reportCallIssue]
    return dataclasses.replace(q, dtype=dtype)  # pyright: ignore[reportArgumentType]


def load_scale(scale: Any) -> Float[Array, "*lead s t"]:
    """Float32 value of a stored scale: nested, E8M0 (uint8), float8 or float."""
    if isinstance(scale, QuantizedTensor):
        return scale.dequantize(jnp.float32)
    if scale.dtype == jnp.uint8:
        return decode_e8m0(scale)
    return scale.astype(jnp.float32)


def load_zero(zero: Any) -> Float[Array, "*lead s t"]:
    """Float32 value of a stored zero-point: nested, integer codes or float."""
    if isinstance(zero, QuantizedTensor):
        return zero.dequantize(jnp.float32)
    return zero.astype(jnp.float32)


def assemble(
    fmt: Format,
    codes: Shaped[Array, "*lead in out"],
    scale: Any,
    matrix: tuple[int, int],
    *,
    zero: Any = None,
    codebook: Any = None,
    offset: Any = None,
    global_scale: Any = None,
    dtype: str = "float32",
    packed: bool = False,
) -> LayoutTensor:
    """Packs unpacked codes and builds the tensor class of a format.

    Args:
      fmt: the format.
      codes: one code per weight in matrix form, as `Format.encode` returns them.
      scale: stored scale leaf, nested tensor, or None (`Cast`, tables of columns).
      matrix: logical `(in, out)`.
      zero: stored zero-point leaf of an asymmetric `Int`.
      codebook: learned tables.
      offset: offset leaf of a nested scale.
      global_scale: NVFP4's divisor.
      dtype: logical dtype name.
      packed: `codes` are the leaf already.

    Returns:
      An `AffineTensor`, `CodebookTensor` or `MinifloatTensor`.
    """
    if fmt.grouping(matrix).kind == "flat" and not packed:
        codes = jnp.swapaxes(codes, -1, -2).reshape(*codes.shape[:-2], -1, 1)
    if fmt.code_bits < 8 and not packed:
        codes = pack(codes, fmt.code_bits)
    if isinstance(fmt, Int):
        return AffineTensor(codes, scale, zero, fmt, matrix, dtype)
    if isinstance(fmt, TableFormat):
        return CodebookTensor(codes, scale, codebook, offset, fmt, matrix, dtype)
    if isinstance(fmt, Minifloat | Cast):
        return MinifloatTensor(codes, scale, global_scale, fmt, matrix, dtype)
    raise SpecError(f"format {fmt!r} has no tensor class")


def codes_shape(fmt: Format, matrix: tuple[int, int]) -> tuple[int, int]:
    """Trailing shape of the codes leaf of a matrix."""
    rows, cols = matrix
    if fmt.grouping(matrix).kind == "flat":
        rows, cols = rows * cols, 1
    bits = fmt.code_bits
    return (packed_rows(rows, bits) if bits < 8 else rows, cols)


def format_bytes(count: float) -> str:
    """Human-readable size in powers of 1000, for example `22.5 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
