"""FP8, MXFP4, MXFP8 and NVFP4 of foreign checkpoints as `MinifloatTensor`, as they are.

Most formats store them the same way, `[out, in]`: FP8 codes one to a byte with a scale
per tensor, output or tile of 128 x 128; E2M1 codes two to a byte along `in`, the first
in the low nibble, which is the order of `qjax.packing` after a transposition; MX scales
as E8M0 exponents, one byte per 32 inputs; NVFP4 scales as E4M3, one per 16 inputs,
under one float32 divisor.
"""

from typing import Any

import numpy as np

from qjax.converters.words import transposed
from qjax.errors import FormatError, UnsupportedError
from qjax.formats import FP8, MXFP4, MXFP8, NVFP4
from qjax.tensor import MinifloatTensor

FLOATS = ("float32", "bfloat16", "float16")
ELEMENTS = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}


def shape_of(weight: Any) -> tuple[int, int]:
    """`(out, in)` of codes `[out, n]`; two codes lie in a uint8."""
    rows, cols = weight.shape
    return rows, cols * (2 if weight.dtype == np.uint8 else 1)


def by_inputs(leaf: np.ndarray) -> np.ndarray:
    """`[..., a, b]` as `[..., b, a]`; `[out]` or one alone as `[1, out]`."""
    wide = leaf if leaf.ndim > 1 else leaf.reshape(-1, 1)
    if wide.ndim == 2:
        return transposed(wide)
    return np.stack([transposed(one) for one in wide])


def fp8(
    weight: np.ndarray,
    scale: np.ndarray,
    where: str,
    granularity: str | None = None,
    dtype: str | None = None,
) -> MinifloatTensor:
    """An FP8 weight with a scale per tensor, output or tile of 128 x 128.

    Args:
      weight: float8 `[*lead, out, in]`.
      scale: `[*lead, out tiles, in tiles]` or `[*lead, out, 1]`; without leading axes
        also `[out]`, or one number.
      where: what errors call the layer.
      granularity: `tensor`, `channel` or `block`; None to see it from the scale.
      dtype: logical dtype; default that of the scale.

    Raises:
      FormatError: a scale is not a float.
      UnsupportedError: another element, or scales for other parts of the weight.
    """
    codes, scale = by_inputs(weight), _multiplier(scale, where)
    element = ELEMENTS.get(codes.dtype.name)
    lead, matrix = codes.shape[:-2], codes.shape[-2:]
    single = scale.size == 1 and not lead and granularity != "block"
    scale = by_inputs(scale.reshape(1, 1) if single else scale)
    kinds = ("tensor", "channel", "block") if granularity is None else (granularity,)
    shapes = {k: FP8("e4m3", k).grouping(matrix).scale_shape for k in kinds}
    found = next((k for k in kinds if scale.shape == (*lead, *shapes[k])), None)
    if found is None or element is None:
        raise UnsupportedError(
            f"{where}: {codes.dtype} {list(weight.shape)} with scales "
            f"{_stored(scale)} is not read; expected float8_e4m3fn or float8_e5m2 with "
            "a scale per tensor, output or block of 128 x 128"
        )
    fmt = FP8(element, found, scale.dtype.name)
    return MinifloatTensor(codes, scale, None, fmt, matrix, dtype or fmt.scale_dtype)


def _multiplier(scale: np.ndarray, where: str) -> np.ndarray:
    """A scale as it is; E8M0 as float32."""
    if scale.dtype.name == "float8_e8m0fnu":
        return scale.astype(np.float32)
    if scale.dtype.name not in FLOATS:
        raise FormatError(f"{where}: has scales of {scale.dtype}, expected floats")
    return scale


def mxfp8(weight: np.ndarray, scale: np.ndarray, where: str) -> MinifloatTensor:
    """An MXFP8 weight.

    Args:
      weight: float8 `[out, in]`.
      scale: E8M0 `[out, in / 32]`.
      where: what errors call the layer.

    Raises:
      FormatError: shapes or dtypes do not fit.
    """
    element = ELEMENTS.get(weight.dtype.name)
    if element is None:
        raise FormatError(f"{where}: codes are {weight.dtype}, expected float8")
    codes = by_inputs(weight)
    fmt = MXFP8(element)
    scale = _exponents(scale, fmt, codes.shape, where)
    return MinifloatTensor(codes, scale, None, fmt, codes.shape, "bfloat16")


def fp4(
    packed: np.ndarray, scale: np.ndarray, divisor: Any, where: str
) -> MinifloatTensor:
    """An NVFP4 weight, or without a divisor an MXFP4 one.

    Args:
      packed: bytes `[*lead, out, in / 2]`, the first of two codes in the low nibble.
      scale: E4M3 `[*lead, out, in / 16]`, in float8 or as bytes; or E8M0
        `[*lead, out, in / 32]`.
      divisor: the one number that divides all scales, or None.
      where: what errors call the layer.

    Raises:
      FormatError: shapes or dtypes do not fit.
    """
    if packed.dtype.itemsize != 1 or packed.ndim < 2:
        raise FormatError(
            f"{where}: codes are {packed.dtype} {list(packed.shape)}, expected bytes "
            "[out, in / 2]"
        )
    codes = by_inputs(packed.view(np.uint8))
    matrix = (codes.shape[-2] * 2, codes.shape[-1])
    if divisor is None:
        fmt = MXFP4()
        scale = _exponents(scale, fmt, matrix, where, codes.shape[:-2])
        return MinifloatTensor(codes, scale, None, fmt, matrix, "bfloat16")
    fmt, scale = NVFP4(), by_inputs(scale)
    expected = (*codes.shape[:-2], *fmt.grouping(matrix).scale_shape)
    if scale.shape != expected or scale.dtype.name != "float8_e4m3fn":
        raise FormatError(
            f"{where}: has scales {scale.dtype} {_stored(scale)}, expected "
            f"float8_e4m3fn {[*expected[:-2], *expected[:-3:-1]]}"
        )
    whole = np.asarray(divisor)
    with np.errstate(over="ignore"):
        whole = whole.astype(np.float32)
    if whole.size != 1 or not (np.isfinite(whole).all() and (whole > 0).all()):
        raise FormatError(
            f"{where}: the scale of all scales is {whole.reshape(-1)[:4]}, expected "
            "one positive number"
        )
    whole = np.broadcast_to(whole.reshape(1, 1), (*codes.shape[:-2], 1, 1))
    return MinifloatTensor(codes, scale, whole, fmt, matrix, "bfloat16")


def _exponents(scale, fmt, matrix, where: str, lead: tuple[int, ...] = ()):
    """E8M0 scales `[*lead, groups, out]` in uint8."""
    if scale.dtype.name == "float8_e8m0fnu":
        scale = scale.view(np.uint8)
    scale = by_inputs(scale)
    expected = (*lead, *fmt.grouping(matrix).scale_shape)
    if scale.dtype != np.uint8 or scale.shape != expected:
        raise FormatError(
            f"{where}: has scales {scale.dtype} {_stored(scale)}, expected uint8 "
            f"{[*expected[:-2], *expected[:-3:-1]]}"
        )
    return scale


def _stored(scale: np.ndarray) -> list[int]:
    """The shape in the file."""
    return [*scale.shape[:-2], *scale.shape[:-3:-1]]
