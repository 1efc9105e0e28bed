"""Integers of foreign checkpoints as `AffineTensor` and back, bit for bit."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.converters.words import group_order, packed_codes, reordered, repacked
from qjax.errors import FormatError, UnsupportedError
from qjax.formats import Int
from qjax.tensor import AffineTensor, QuantizedTensor, load_scale, load_zero
from qjax.wrappers import Permuted


def group_of(settings: Mapping[str, Any]) -> int | None:
    """Inputs per scale as settings say it; None for one scale per output."""
    group = settings.get("group_size", settings.get("q_group_size"))
    return group if type(group) is int and group > 0 else None


def affine(
    data: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray | None,
    *,
    bits: int,
    matrix: tuple[int, int],
    where: str,
    unpacked: bool = False,
    planes: bool = False,
    group: int | None = None,
    index: np.ndarray | None = None,
    dtype: str = "float16",
) -> QuantizedTensor:
    """A weight `(code - zero) * scale` from a bit string along `in`.

    Args:
      data: uint8 `[n, out]`, a little-endian bit string of unsigned codes per column,
        or with `unpacked` the codes themselves, `[in, out]`.
      scale: float `[groups, out]`, `[1, out]` or `[1, 1]`.
      zero: zero-points like `scale`, integers or float32 in code units; None for
        `2**(bits - 1)`.
      bits: code width, 1 to 8.
      matrix: `(in, out)`.
      where: what errors call the tensor.
      unpacked: whether `data` are codes.
      planes: whether `data` are packed as `qjax.packing` does it.
      group: inputs per scale; default as many as divide evenly.
      index: group of each input, for orders by activation.
      dtype: logical dtype.

    Raises:
      FormatError: shapes do not fit each other.
    """
    rows, cols = matrix
    groups = scale.shape[0]
    expected = (groups, 1 if groups == 1 and scale.shape[1:] == (1,) else cols)
    if scale.ndim != 2 or scale.shape != expected or groups < 1:
        raise FormatError(
            f"{where}: scales have shape {list(scale.shape)}, expected [groups, {cols}]"
        )
    if zero is not None and zero.shape != scale.shape:
        raise FormatError(
            f"{where}: zero-points have shape {list(zero.shape)}, expected "
            f"{list(scale.shape)} as the scales"
        )
    if not unpacked and len(data) * 8 < rows * bits:
        raise FormatError(
            f"{where}: {len(data)} bytes per column hold fewer than {rows} codes of "
            f"{bits} bits"
        )
    half = 2 ** (bits - 1)
    if bits == 1 and zero is None:  # `Int(1)` without zero-points means -0.5 and 0.5
        zero = np.ones(scale.shape, np.uint8)
    symmetric = zero is None or (bits > 1 and bool(np.all(zero == half)))
    size = group or -(-rows // groups)
    if groups > 1 and -(-rows // size) != groups:
        raise FormatError(
            f"{where}: {groups} scales per column, expected {-(-rows // size)} for "
            f"{rows} inputs in groups of {size}"
        )
    if index is not None and len(index) != rows:
        raise FormatError(
            f"{where}: the groups of {len(index)} inputs are given (g_idx), expected "
            f"{rows}"
        )
    order = None
    if index is not None and groups > 1:
        order = group_order(np.asarray(index), size, where)
    if unpacked:
        codes = repacked(data, bits, order)
    elif order is not None:
        codes = reordered(data, bits, order, "planes" if planes else "string")
    elif planes:
        codes = data
    else:
        codes = packed_codes(data, bits, rows)
    if bits == 8 and symmetric:
        codes = (codes ^ np.uint8(128)).view(np.int8)
    zeros = None
    if not symmetric and zero is not None:
        zeros = _stored(zero, where)
    whole = "tensor" if scale.shape[1] < cols else "channel"
    fmt = Int(
        bits,
        size if groups > 1 else whole,
        symmetric=symmetric,
        scale_dtype=scale.dtype.name,
        zero_dtype="float32" if zeros is None else zeros.dtype.name,
    )
    made = AffineTensor(codes, scale, zeros, fmt, matrix, dtype)
    return made if order is None else Permuted(made, order)


def _stored(zero: np.ndarray, where: str) -> np.ndarray:
    """Zero-points in the smallest dtype that holds them."""
    if np.issubdtype(zero.dtype, np.integer):
        if int(zero.min()) < 0:
            raise FormatError(f"{where}: a zero-point lies below the smallest code")
        return zero.astype(np.uint8 if int(zero.max()) < 256 else np.float16)
    if not np.isfinite(zero).all():
        raise FormatError(f"{where}: a zero-point is not finite")
    for small in (np.uint8, np.float16):
        with np.errstate(all="ignore"):
            made = zero.astype(small)
        if np.array_equal(made.astype(np.float32), zero):
            return made
    return zero.astype(np.float32)


def zero_of_bias(scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Zero-points of weights `code * scale + bias`: float32 `-bias / scale`.

    `-zero * scale`, rounded to the 16-bit dtype of `bias`, is `bias` again.

    Args:
      scale: float `[groups, out]`, not zero where `bias` is not.
      bias: the same shape.
    """
    wide, shift = scale.astype(np.float32), bias.astype(np.float32)
    with np.errstate(all="ignore"):  # `affine` looks for what is not finite
        return -np.divide(shift, wide, out=np.zeros_like(shift), where=wide != 0)


@dataclasses.dataclass(frozen=True)
class Integers:
    """An integer weight taken apart, `(code - zero) * scale`: what writers pack.

    Attributes:
      codes: uint8 `[in, out]`, unsigned, in the order of inputs.
      scale: float `[groups, out]`, as stored.
      zero: `[groups, out]`: int32, or float32 where a zero-point is not a whole number.
      symmetric: whether every zero-point is `2**(bits - 1)`.
      bits: code width.
      group: inputs per scale; `in` for one scale per output.
      index: int32 `[in]`, the group of each input; None when groups are contiguous.
      dtype: logical dtype.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    symmetric: bool
    bits: int
    group: int
    index: np.ndarray | None
    dtype: str


def integers(q: QuantizedTensor, where: str) -> Integers:
    """The inverse of `affine`.

    Args:
      q: an integer weight `[in, out]`, in `Permuted` or not.
      where: what errors call it.

    Raises:
      UnsupportedError: it is not an integer weight with groups along `in`.
    """
    base = q.base if isinstance(q, Permuted) else q
    if not isinstance(base, AffineTensor) or base.grouping.kind not in (
        "in",
        "channel",
        "tensor",
    ):
        raise UnsupportedError(
            f"{where}: is {q!r}; this layout holds integers with groups along `in`"
        )
    fmt, (rows, cols) = base.format, base.matrix
    codes = np.asarray(base.unpacked())
    if fmt.signed:
        codes = codes.view(np.uint8) ^ np.uint8(128)
    nested = isinstance(base.scale, QuantizedTensor)
    scale = np.asarray(load_scale(base.scale) if nested else base.scale)
    zero = np.full(scale.shape, fmt.offset, np.float32)
    if fmt.signed:
        zero = zero + 128
    if base.zero is not None:
        zero = np.asarray(load_zero(base.zero))
    whole = np.rint(zero)
    if np.array_equal(whole, zero) and np.abs(whole).max(initial=0) < 2**31:
        zero = whole.astype(np.int32)
    if base.grouping.kind == "tensor":
        scale, zero = (np.broadcast_to(a, (1, cols)) for a in (scale, zero))
    group = fmt.group if isinstance(fmt.group, int) else rows
    index = None
    if isinstance(q, Permuted):
        perm = np.asarray(q.perm)
        index = np.empty(rows, np.int32)
        index[perm] = np.arange(rows) // group
        ordered = np.empty_like(codes)
        ordered[perm] = codes
        codes = ordered
    symmetric = bool(np.all(zero == 2 ** (fmt.bits - 1)))
    return Integers(
        codes, scale, zero, symmetric, fmt.bits, min(group, rows), index, base.dtype
    )


def half_scales(q: QuantizedTensor) -> QuantizedTensor | None:
    """The same codes with scales rounded to float16.

    Returns:
      None when `q` is no integer weight, or a scale overflows or vanishes.
    """
    if isinstance(q, Permuted):
        base = half_scales(q.base)
        return None if base is None else dataclasses.replace(q, base=base)
    if not isinstance(q, AffineTensor):
        return None
    wide = np.asarray(q.scales())
    with np.errstate(over="ignore"):
        scale = wide.astype(np.float16)
    if not np.isfinite(scale).all() or np.any((scale == 0) & (wide != 0)):
        return None
    fmt = dataclasses.replace(q.format, scale_dtype="float16")
    return dataclasses.replace(q, scale=scale, format=fmt)
