"""Integers of foreign checkpoints as `AffineTensor`, bit for bit."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.converters.words import codes_of, group_order, packed_codes, repacked
from qjax.errors import FormatError
from qjax.formats import Int
from qjax.tensor import AffineTensor, QuantizedTensor
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
    group: int | None = None,
    index: np.ndarray | None = None,
    dtype: str = "float16",
) -> QuantizedTensor:
    """A weight `(code - zero) * scale` from a bit string along `in`.

    Args:
      data: uint8 `[n, out]`, a little-endian bit string of unsigned codes per column,
        or with `unpacked` the codes themselves, `[in, out]`.
      scale: float `[groups, out]`, `[1, out]` or `[1, 1]`.
      zero: integer zero-points like `scale`; None for `2**(bits - 1)`.
      bits: code width, 1 to 8.
      matrix: `(in, out)`.
      where: what errors call the tensor.
      unpacked: whether `data` are codes.
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
    order = None
    if index is not None and groups > 1:
        order = group_order(np.asarray(index), size, where)
    if unpacked or order is not None:
        codes = data if unpacked else codes_of(data, bits, rows)
        codes = repacked(codes if order is None else codes[order], bits)
    else:
        codes = packed_codes(data, bits, rows)
    if bits == 8 and symmetric:
        codes = (codes ^ np.uint8(128)).view(np.int8)
    if zero is not None and int(zero.min()) < 0:
        raise FormatError(f"{where}: a zero-point lies below the smallest code")
    zeros = None
    if not symmetric and zero is not None:
        zeros = zero.astype(np.uint8 if int(zero.max()) < 256 else np.float16)
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
