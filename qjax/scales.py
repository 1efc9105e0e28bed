"""Rounding scales to what a format stores: floats, E8M0, E4M3, or codes of their own.

Positive scales stay positive and finite, because codes are computed for the scale as
stored. Double quantization is bitsandbytes': 8-bit dynamic codes in blocks of 256.
"""

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.formats.base import Format, divided
from qjax.formats.codebook import Dynamic8, TableFormat, pytorch_mean
from qjax.formats.minifloat import E2M1_MAX, E4M3_MAX, decode_e8m0, encode_e8m0
from qjax.tensor import CodebookTensor, assemble

_TINY = float(jnp.finfo(jnp.float32).tiny)


def store_scale(
    fmt: Format, scale: Float[Array, "*lead s t"], divisor: Any = None
) -> tuple[Any, Float[Array, "*lead s t"]]:
    """Rounds scales to what a format stores.

    Positive scales stay positive and finite after rounding, so that codes computed for
    the stored scale are defined.

    Args:
      fmt: the format of the weight the scales belong to.
      scale: positive float32 scales in stored shape.
      divisor: NVFP4's `global_scale`.

    Returns:
      `(stored, effective)`: the leaf (or nested tensor) and its float32 value.
    """
    kind = "uint8" if getattr(fmt, "double", False) else fmt.scale_dtype  # pyright: ignore[reportAttributeAccessIssue]
    if kind == "uint8":
        nested = quantize_scale(scale, signed=isinstance(fmt, TableFormat))
        return nested, nested.dequantize(jnp.float32)
    if kind == "e8m0":
        # A scale of 2**e is stored exactly; others round up, so nothing saturates.
        exponent = jnp.ceil(jnp.log2(jnp.maximum(scale, _TINY)) - 1e-5)
        stored = encode_e8m0(exponent)
        return stored, decode_e8m0(stored)
    if kind == "e4m3":
        scaled = jnp.clip(scale * divisor, 2.0**-9, E4M3_MAX)
        stored = scaled.astype(jnp.float8_e4m3fn)
        return stored, divided(stored.astype(jnp.float32), divisor)
    if kind == "float32" and isinstance(fmt, TableFormat):
        return scale, scale
    info = jnp.finfo(kind)
    # Tables keep the absolute maximum itself, 0 included, as bitsandbytes does.
    low = 0.0 if isinstance(fmt, TableFormat) else max(float(info.tiny), _TINY)
    stored = jnp.clip(scale, low, float(info.max)).astype(kind)
    return stored, stored.astype(jnp.float32)


def nvfp4_divisor(absmax: Float[Array, "*lead 1 1"]) -> Float[Array, "*lead 1 1"]:
    """NVFP4's `global_scale = 448 * 6 / absmax` (1 for an all-zero matrix)."""
    safe = jnp.where(absmax > 0, absmax, E4M3_MAX * E2M1_MAX)
    return jnp.float32(E4M3_MAX * E2M1_MAX) / safe


def quantize_scale(scale: Float[Array, "*lead s t"], *, signed: bool) -> CodebookTensor:
    """Double quantization: scales as 8-bit dynamic codes in blocks of 256.

    Args:
      scale: float32 scales.
      signed: subtract the mean and use the signed map (bitsandbytes' rule) instead of
        the unsigned map on the scales themselves, which keeps them positive.

    Returns:
      The nested tensor.

    Reference: bitsandbytes `functional.quantize_4bit(compress_statistics=True)`.
    """
    fmt = Dynamic8(block=256, signed=signed)
    matrix = (scale.shape[-2], scale.shape[-1])
    offset = None
    if signed:
        order = jnp.swapaxes(scale, -1, -2)
        order = order.reshape(*scale.shape[:-2], math.prod(matrix))
        offset = pytorch_mean(order)[..., None, None]
        scale = scale - offset
    group = fmt.grouping(matrix)
    blocks = group.split(scale)
    absmax = jnp.max(jnp.abs(blocks), axis=-2, keepdims=True)
    codes = fmt.encode(blocks * (1.0 / jnp.where(absmax > 0, absmax, 1.0)))
    codes = jnp.where(absmax > 0, codes, jnp.uint8(0))
    if not signed:  # code 0 is the value 0: no scale may vanish
        codes = jnp.maximum(codes, jnp.uint8(1))
    stored = group.store(absmax)
    return assemble(fmt, group.join(codes), stored, matrix, offset=offset)  # pyright: ignore[reportReturnType]
