"""Small floats: FP8, the OCP microscaling formats, NVFP4, and plain 16-bit downcasts.

FP8 leaves hold the 8-bit float itself; 4-bit floats (E2M1) are packed two to a byte. MX
scales are E8M0 exponents in uint8 (`2**(e - 127)`); NVFP4 scales are E4M3 values under
one float32 divisor per matrix. Rounding is to nearest, ties to the even code; values
beyond the range saturate.

Reference: OCP Microscaling Formats (MX) v1.0, sections 5 and 6; compressed-tensors
`compressors/nvfp4`, `compressors/mxfp4`.
"""

import abc
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped, UInt8

from qjax.formats.base import FLOAT_SCALES, Format, check_choice
from qjax.formats.grouping import Grouping

E4M3_MAX = 448.0
E2M1_MAX = 6.0
_DTYPES = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}
_MAX = {"e4m3": E4M3_MAX, "e5m2": 57344.0}


@dataclasses.dataclass(frozen=True)
class Minifloat(Format):
    """Base of formats whose codes are small floats."""

    @property
    @abc.abstractmethod
    def kind(self) -> str:
        """Element type: `e2m1`, `e4m3` or `e5m2`."""

    @property
    def code_bits(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """4 for E2M1, 8 for FP8."""
        return 4 if self.kind == "e2m1" else 8

    @property
    def peak(self) -> float:
        """Largest finite element: 6, 448 or 57344."""
        return E2M1_MAX if self.kind == "e2m1" else _MAX[self.kind]

    def encode(self, u: Float[Array, "..."]) -> Shaped[Array, "..."]:
        """Nearest element, ties to even; saturates."""
        if self.kind == "e2m1":
            return encode_e2m1(u)
        return jnp.clip(u, -self.peak, self.peak).astype(_DTYPES[self.kind])

    def decode(self, codes: Shaped[Array, "..."]) -> Float[Array, "..."]:
        """Element values, float32."""
        if self.kind == "e2m1":
            return decode_e2m1(codes)
        return codes.astype(jnp.float32)

    def neighbour(
        self, codes: Shaped[Array, "..."], up: Bool[Array, "..."]
    ) -> Shaped[Array, "..."]:
        """The adjacent representable element."""
        sign_bit = 8 if self.kind == "e2m1" else 128
        bits = codes
        if self.kind != "e2m1":
            bits = jax.lax.bitcast_convert_type(codes, jnp.uint8)
        bits = bits.astype(jnp.int32)
        signed = jnp.where(bits >= sign_bit, sign_bit - bits, bits)
        top = int(self._code_of_peak())
        moved = jnp.clip(signed + jnp.where(up, 1, -1), -top, top)
        bits = jnp.where(moved < 0, sign_bit - moved, moved).astype(jnp.uint8)
        if self.kind == "e2m1":
            return bits
        return jax.lax.bitcast_convert_type(bits, _DTYPES[self.kind])

    def _code_of_peak(self) -> int:
        if self.kind == "e2m1":
            return 7
        return int(np.array(self.peak, _DTYPES[self.kind]).view(np.uint8))


@dataclasses.dataclass(frozen=True)
class FP8(Minifloat):
    """8-bit floats with a real scale: `w = float8 * scale`.

    Attributes:
      element: `e4m3` (4 exponent bits, max 448) or `e5m2` (max 57344).
      granularity: `"tensor"`, `"channel"`, or `"block"` for tiles of 128 x 128
        (DeepSeek-V3's layout).
      scale_dtype: `float32`, `bfloat16` or `float16`.

    Reference: Micikevicius et al., FP8 Formats for Deep Learning, arXiv 2209.05433.
    """

    element: str = "e4m3"
    granularity: str = "channel"
    scale_dtype: str = "float32"

    def __post_init__(self) -> None:
        check_choice("FP8", "element", self.element, ("e4m3", "e5m2"))
        kinds = ("tensor", "channel", "block")
        check_choice("FP8", "granularity", self.granularity, kinds)
        check_choice("FP8", "scale_dtype", self.scale_dtype, FLOAT_SCALES)

    @property
    def kind(self) -> str:
        """The element type."""
        return self.element

    @property
    def name(self) -> str:
        """Short name, for example `fp8-e4m3-channel`."""
        return f"fp8-{self.element}-{self.granularity}"

    def grouping(self, matrix: tuple[int, int]) -> Grouping:
        """One scale per tensor, per output column or per 128 x 128 tile."""
        kind = self.granularity
        return Grouping(kind, matrix, 128 if kind == "block" else 0)  # pyright: ignore[reportArgumentType]


@dataclasses.dataclass(frozen=True)
class _Microscaled(Minifloat):
    """Groups of `group_size` along `in`."""

    group_size: ClassVar[int] = 32

    def grouping(self, matrix: tuple[int, int]) -> Grouping:
        """Groups along `in`; a short last group is allowed."""
        return Grouping("in", matrix, self.group_size)


@dataclasses.dataclass(frozen=True)
class MXFP4(_Microscaled):
    """OCP MXFP4: E2M1 elements, one E8M0 scale per 32: 4.25 bits per weight."""

    scale_dtype: ClassVar[str] = "e8m0"

    @property
    def kind(self) -> str:
        """E2M1."""
        return "e2m1"

    @property
    def name(self) -> str:
        """`mxfp4`."""
        return "mxfp4"


@dataclasses.dataclass(frozen=True)
class MXFP8(_Microscaled):
    """OCP MXFP8: FP8 elements, one E8M0 scale per 32: 8.25 bits per weight.

    Attributes:
      element: `e4m3` or `e5m2`.
    """

    element: str = "e4m3"
    scale_dtype: ClassVar[str] = "e8m0"

    def __post_init__(self) -> None:
        check_choice("MXFP8", "element", self.element, ("e4m3", "e5m2"))

    @property
    def kind(self) -> str:
        """The element type."""
        return self.element

    @property
    def name(self) -> str:
        """`mxfp8-e4m3` or `mxfp8-e5m2`."""
        return f"mxfp8-{self.element}"


@dataclasses.dataclass(frozen=True)
class NVFP4(_Microscaled):
    """NVIDIA NVFP4: E2M1 elements, one E4M3 scale per 16, one divisor per matrix.

    `w = e2m1 * (scale / global_scale)` with `global_scale = 448 * 6 / absmax(w)`, the
    compressed-tensors convention (ModelOpt stores the reciprocal).
    """

    scale_dtype: ClassVar[str] = "e4m3"
    group_size: ClassVar[int] = 16

    @property
    def kind(self) -> str:
        """E2M1."""
        return "e2m1"

    @property
    def name(self) -> str:
        """`nvfp4`."""
        return "nvfp4"


@dataclasses.dataclass(frozen=True)
class Cast(Format):
    """A plain downcast: the weight itself in 16 bits, no scale.

    Attributes:
      dtype: `bfloat16` or `float16`.
    """

    dtype: str = "bfloat16"
    code_bits: ClassVar[int] = 16

    def __post_init__(self) -> None:
        check_choice("Cast", "dtype", self.dtype, ("bfloat16", "float16"))

    @property
    def name(self) -> str:
        """The dtype."""
        return self.dtype

    @property
    def peak(self) -> float:
        """Largest finite value."""
        return float(jnp.finfo(self.dtype).max)

    def grouping(self, matrix: tuple[int, int]) -> Grouping:
        """No scale; one group."""
        return Grouping("tensor", matrix)

    def encode(self, u: Float[Array, "..."]) -> Shaped[Array, "..."]:
        """Nearest value, ties to even; saturates instead of overflowing."""
        return jnp.clip(u, -self.peak, self.peak).astype(self.dtype)

    def decode(self, codes: Shaped[Array, "..."]) -> Float[Array, "..."]:
        """The values as float32."""
        return codes.astype(jnp.float32)

    def neighbour(
        self, codes: Shaped[Array, "..."], up: Bool[Array, "..."]
    ) -> Shaped[Array, "..."]:
        """The adjacent representable value."""
        towards = jnp.where(up, self.peak, -self.peak).astype(self.dtype)
        return jnp.nextafter(codes, towards)


def encode_e2m1(u: Float[Array, "..."]) -> UInt8[Array, "..."]:
    """Nearest E2M1 code, ties to the even code, saturating at +-6.

    Bit 3 is the sign; magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6 are codes 0 to 7.
    """
    size = jnp.abs(u)
    code = jnp.zeros(u.shape, jnp.uint8)
    for i, bound in enumerate((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)):
        above = size > bound if i % 2 == 0 else size >= bound
        code = code + above.astype(jnp.uint8)
    return code | (jnp.signbit(u).astype(jnp.uint8) << jnp.uint8(3))


def decode_e2m1(codes: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """E2M1 values, float32, by arithmetic on the bits (cheaper than a look-up).

    A magnitude code of 2 or more is exponent and mantissa of a normal number; 0 and 1
    are the subnormals 0 and 0.5.
    """
    bits = codes.astype(jnp.uint32)
    size = bits & jnp.uint32(7)
    normal = (size << jnp.uint32(22)) + jnp.uint32(126 << 23)
    half = jnp.where(size == 1, jnp.uint32(126 << 23), jnp.uint32(0))
    sign = (bits & jnp.uint32(8)) << jnp.uint32(28)
    value = jnp.where(size < 2, half, normal) | sign
    return jax.lax.bitcast_convert_type(value, jnp.float32)


def encode_e8m0(exponent: Float[Array, "..."]) -> UInt8[Array, "..."]:
    """Biased exponent `e + 127`, clipped to 0..254 (255 is NaN)."""
    return (jnp.clip(exponent, -127.0, 127.0) + 127.0).astype(jnp.uint8)


def decode_e8m0(codes: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """`2**(code - 127)` as float32, exact; code 0 is the subnormal `2**-127`."""
    bits = codes.astype(jnp.uint32) << jnp.uint32(23)
    bits = jnp.where(codes == 0, jnp.uint32(0x400000), bits)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
