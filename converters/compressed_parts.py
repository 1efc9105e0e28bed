"""The layouts of compressed-tensors; see `qjax.converters.compressed_tensors`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.converters.affine import affine, group_of
from qjax.converters.floats import by_inputs, fp4, fp8, mxfp8
from qjax.converters.marlin_24 import marlin_24
from qjax.converters.words import codes_of, stream
from qjax.errors import FormatError, UnsupportedError
from qjax.formats import Cast
from qjax.tensor import MinifloatTensor, QuantizedTensor


def weight_of(
    parts: Mapping[str, np.ndarray], weights: Mapping[str, Any], where: str
) -> QuantizedTensor:
    """One weight `[in, out]`.

    Args:
      parts: its tensors, `weight` of a sparse one decompressed.
      weights: how the settings say it is quantized.
      where: what errors call the layer.

    Raises:
      FormatError: parts do not fit each other or the settings.
      UnsupportedError: they are not read.
    """
    if "scale_packed" in parts:
        return marlin_24(parts, weights, where)
    if "weight_packed" in parts:
        packed, scale = parts["weight_packed"], parts["weight_scale"]
        if packed.dtype.itemsize == 1:
            return fp4(packed, scale, parts.get("weight_global_scale"), where)
        return _packed(parts, weights, where)
    weight = parts["weight"]
    if "bitmask" in parts and "weight_scale" not in parts:
        if weight.dtype.name not in ("bfloat16", "float16"):
            raise UnsupportedError(
                f"{where}: is sparse and {weight.dtype}; expected bfloat16 or float16"
            )
        fmt, codes = Cast(weight.dtype.name), weight.T
        return MinifloatTensor(codes, None, None, fmt, codes.shape, fmt.dtype)
    if weight.dtype == np.int8:
        return _integers(parts, weights, where)
    scale = parts["weight_scale"]
    if scale.dtype == np.uint8:
        return mxfp8(weight, scale, where)
    tiles = weights.get("strategy") == "block"  # one tile is also one tensor
    return fp8(weight, scale, where, "block" if tiles else None)


def dense(parts: Mapping[str, np.ndarray], where: str) -> np.ndarray:
    """The weight `[out, in]` of the values that are kept, zero elsewhere.

    Raises:
      FormatError: the bits do not fit the shape or the values.
    """
    sizes = [int(size) for size in parts["shape"].reshape(-1)]
    values, bits = parts["compressed"].reshape(-1), parts["bitmask"]
    if len(sizes) != 2 or bits.shape != (sizes[0], -(-sizes[1] // 8)):
        raise FormatError(
            f"{where}: bitmask has shape {list(bits.shape)}, expected [out, in / 8] "
            f"for the shape {sizes}"
        )
    mask = np.unpackbits(
        bits.astype(np.uint8), axis=1, count=sizes[1], bitorder="little"
    )
    mask = mask.view(bool)
    if np.count_nonzero(mask) != values.size:
        raise FormatError(
            f"{where}: bitmask keeps {np.count_nonzero(mask)} weights, but compressed "
            f"has {values.size}"
        )
    raw = np.dtype(f"u{values.dtype.itemsize}")
    made = np.zeros(mask.shape, raw)
    made[mask] = values.view(raw)
    return made.view(values.dtype)


def _width(weights: Mapping[str, Any], where: str) -> int:
    bits = weights.get("num_bits", 8)
    if type(bits) is not int or not 1 <= bits <= 8:
        raise FormatError(f"{where}: num_bits is {bits!r}, expected 1 to 8")
    return bits


def _packed(parts, weights, where: str) -> QuantizedTensor:
    words, bits = parts["weight_packed"], _width(weights, where)
    sizes = [int(size) for size in parts["weight_shape"]]
    if len(sizes) != 2 or sizes[0] != words.shape[0] or sizes[1] < 1:
        raise FormatError(
            f"{where}: weight_packed has shape {list(words.shape)}, expected "
            f"[out, words] for the weight_shape {sizes}"
        )
    cols, rows = sizes
    zero = parts.get("weight_zero_point")
    if zero is not None and zero.dtype == np.int32:
        data = _bit_string(zero, bits, cols, where)
        zero = codes_of(data, bits, cols).astype(np.int32).T
        zero = np.ascontiguousarray(zero)
    elif zero is not None:
        zero = by_inputs(zero).astype(np.int32) + 2 ** (bits - 1)
    codes = _bit_string(by_inputs(words), bits, rows, where)
    return _affine(parts, weights, codes, zero, (rows, cols), where)


def _integers(parts, weights, where: str) -> QuantizedTensor:
    """int8 codes of any width, one per byte."""
    half = 2 ** (_width(weights, where) - 1)
    codes = by_inputs(parts["weight"]).view(np.uint8) + np.uint8(half)
    zero = parts.get("weight_zero_point")
    if zero is not None:
        zero = by_inputs(zero).astype(np.int32) + half
    return _affine(parts, weights, codes, zero, codes.shape, where, unpacked=True)


def _affine(
    parts, weights, codes, zero, matrix, where: str, unpacked: bool = False
) -> QuantizedTensor:
    scale = by_inputs(parts["weight_scale"])
    if not np.issubdtype(scale.dtype, np.floating) and scale.dtype.name != "bfloat16":
        raise FormatError(
            f"{where}.weight_scale: is {scale.dtype}, expected floating numbers"
        )
    if zero is not None and zero.size == 1:
        zero = np.broadcast_to(zero, scale.shape)
    index = parts.get("weight_g_idx")
    return affine(
        codes,
        scale,
        zero,
        bits=_width(weights, where),
        matrix=matrix,
        where=where,
        group=group_of(weights),
        index=None if index is None or (index < 0).all() else index,
        dtype=scale.dtype.name,
        unpacked=unpacked,
    )


def _bit_string(words: np.ndarray, bits: int, count: int, where: str) -> np.ndarray:
    """The bytes of codes along the first axis, without gaps."""
    if 8 % bits and words.shape[0] == -(-count // (32 // bits)):
        per = 32 // bits  # whole codes in each word
        if words.shape[0] != -(-count * bits // 32):
            shifts = (np.arange(per, dtype=np.uint32) * bits)[:, None]
            fields = (words.view(np.uint32)[:, None] >> shifts) & np.uint32(2**bits - 1)
            codes = fields.reshape(-1, words.shape[1])[:count].astype(np.uint8)
            flat = np.unpackbits(codes[..., None], axis=-1, bitorder="little")
            planes = flat[..., :bits].transpose(0, 2, 1).reshape(-1, words.shape[1])
            return np.packbits(planes, axis=0, bitorder="little")
    if words.shape[0] != -(-count * bits // 32):
        raise FormatError(
            f"{where}: {words.shape[0]} words for {count} codes of {bits} bits, "
            f"expected {-(-count * bits // 32)}"
        )
    return stream(words)
