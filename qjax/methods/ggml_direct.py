"""Ternary, one- and two-bit and FP4 types, which llama.cpp rounds without a search.

Encoders take blocks `x [elements, *blocks]`; the imatrix's values that follow are
ignored, as llama.cpp ignores them. They return bytes `[bytes, *blocks]`.

The exponent of MXFP4 comes from the bits of the largest magnitude. llama.cpp takes the
rounded logarithm, which is one more for the few numbers just below a power of two whose
logarithm rounds up.

Reference: ggml `src/ggml-quants.c` (MIT): `quantize_row_*_ref`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from qjax.formats.base import divided
from qjax.methods.ggml_bytes import groups, half, half_away, half_bytes, joined, stacked
from qjax.methods.ggml_exact import inverse, total

Blocks = Float[Array, " e *blocks"]
Bytes = UInt8[Array, " b *blocks"]
_FP4_BOUNDS = (0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0)  # between the doubled values


def q1_0(x: Blocks, importance: Any = None) -> Bytes:
    """Signs, and the mean magnitude of 128."""
    del importance
    step = total(jnp.abs, x) / x.shape[0]
    return stacked(half_bytes(half(step)), joined(x >= 0, 1))


def q2_0(x: Blocks, importance: Any = None) -> Bytes:
    """-1, 0 and 1 times the largest magnitude of 64."""
    del importance
    step, codes = _ternary(x)
    return stacked(step, joined(codes, 2))


def tq1_0(x: Blocks, importance: Any = None) -> Bytes:
    """-1, 0 and 1 times the largest magnitude of 256, five to a byte."""
    del importance
    step, codes = _ternary(x)
    most = _trits(codes[:160], 32), _trits(codes[160:240], 16)
    rest = jnp.concatenate([codes[240:], jnp.zeros_like(codes[:4])])
    return stacked(*most, _trits(rest, 4), step)


def tq2_0(x: Blocks, importance: Any = None) -> Bytes:
    """-1, 0 and 1 times the largest magnitude of 256, four to a byte."""
    del importance
    step, codes = _ternary(x)
    return stacked(joined(codes, 2, 32), step)


def mxfp4(x: Blocks, importance: Any = None) -> Bytes:
    """E2M1 times a power of two for 32."""
    del importance
    top = jnp.max(jnp.abs(x), axis=0)
    exponent = _bits(top) >> 23
    stored = jnp.where(top > 0, jnp.maximum(exponent - 2, 0), 0)
    lift = jnp.where(exponent < 64, 64, 0)  # the smallest steps are subnormal
    lifted = x * jnp.where(lift > 0, 2.0**64, 1.0)
    step = (stored - 1 + lift) << 23  # half of the power: values are doubled
    step = jax.lax.bitcast_convert_type(step, jnp.float32)
    return stacked(stored[None], joined(_fp4(lifted, step), 4, 16))


def nvfp4(x: Blocks, importance: Any = None) -> Bytes:
    """E2M1 times an unsigned E4M3 number for 16."""
    del importance
    grouped = groups(x, 16)
    top = jnp.max(jnp.abs(grouped), axis=0)
    stored = _e4m3(divided(top, jnp.full_like(top, 6.0)))
    exponent, mantissa = stored >> 3, (stored & 7).astype(jnp.float32)
    normal = jnp.exp2((exponent - 8).astype(jnp.float32)) * (1 + mantissa / 8)
    step = jnp.where(exponent == 0, mantissa * 2.0**-10, normal)
    codes = jnp.moveaxis(_fp4(grouped, step), 0, 1)
    return stacked(stored, joined(codes.reshape(x.shape), 4, 8))


def _ternary(x):
    """Bytes of the largest magnitude, and codes 0 to 2 of the signs."""
    top = jnp.max(jnp.abs(x), axis=0)
    return half_bytes(half(top)), half_away(x * inverse(top)) + 1


def _trits(codes, run: int):
    """Five base-3 digits to a byte, `run` apart, the first one the highest.

    A byte holds the fraction `number / 243` in units of 1/256, rounded up.
    """
    digits = codes.reshape(5, run, *codes.shape[1:]).astype(jnp.int32)
    number = digits[0]
    for digit in digits[1:]:
        number = number * 3 + digit
    return (number * 256 + 242) // 243


def _fp4(x, step):
    """Nearest codes of E2M1 for doubled values times `step`; of equals the smaller."""
    size = jnp.abs(x)
    codes = sum((size > bound * step).astype(jnp.int32) for bound in _FP4_BOUNDS)
    codes = jnp.where(step > 0, codes, 0)
    return codes + jnp.where((x < 0) & (codes > 0), 8, 0)


def _e4m3(x: Float[Array, "..."]) -> Int[Array, "..."]:
    """Codes of unsigned E4M3, ties up, at most 448."""
    bits = _bits(jnp.minimum(x, 448.0))
    exponent = (bits >> 23) - 120
    rounded_up = (bits >> 20) + ((bits >> 19) & 1)  # a full mantissa carries over
    normal = jnp.minimum(rounded_up - (120 << 3), 0x7E)
    small = jnp.clip(jnp.trunc(x * 512.0 + 0.5), 0, 7).astype(jnp.int32)
    return jnp.where(exponent > 0, normal, small)


def _bits(x):
    return jax.lax.bitcast_convert_type(x, jnp.int32)
