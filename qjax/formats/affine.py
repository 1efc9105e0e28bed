"""Uniform integer formats: 1 to 8 bits, symmetric or with a zero-point.

`w = (code - zero) * scale` with unsigned codes `0 .. 2**bits - 1`. Symmetric formats
have the implicit zero `2**(bits - 1)` (0.5 for one bit, whose two levels are then
symmetric), so their signed range is the whole two's complement range; 8-bit symmetric
codes are stored signed. Rounding is to nearest, ties to even, of `w / scale`
(symmetric) or of `w / scale + zero` (asymmetric), as in compressed-tensors.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from qjax.errors import SpecError
from qjax.formats.base import FLOAT_SCALES, Format, check_choice, check_matrix
from qjax.formats.grouping import Grouping

ZERO_DTYPES = (*FLOAT_SCALES, "uint8")


@dataclasses.dataclass(frozen=True)
class Int(Format):
    """Integers of 1 to 8 bits: `w = (code - zero) * scale`.

    Attributes:
      bits: code width, 1 to 8.
      group: weights per scale along `axis`, or `"channel"` (one scale per output
        column) or `"tensor"`. A size that does not divide leaves a short last group.
      symmetric: no stored zero-point.
      axis: `"in"` (default, the contraction axis) or `"out"`: what groups run along.
      scale_dtype: `float32`, `bfloat16`, `float16`, or `uint8` (double quantization:
        scales become 8-bit codes of bitsandbytes' unsigned dynamic map in blocks of
        256).
      zero_dtype: `float32`, `bfloat16`, `float16` (a real zero-point, as HQQ needs), or
        `uint8` (an integer code, as GPTQ and AWQ store). Unused when symmetric.

    Raises:
      SpecError: a field is out of range.

    Example:
      >>> Int(4, 128).name
      'int4-g128'
    """

    bits: int = 4
    group: int | str = 128
    symmetric: bool = True
    axis: str = "in"
    scale_dtype: str = "float32"
    zero_dtype: str = "float32"

    def __post_init__(self) -> None:
        where = f"Int({self.bits}, {self.group!r})"
        check_choice(where, "bits", self.bits, tuple(range(1, 9)))
        check_choice(where, "axis", self.axis, ("in", "out"))
        check_choice(where, "scale_dtype", self.scale_dtype, (*FLOAT_SCALES, "uint8"))
        check_choice(where, "zero_dtype", self.zero_dtype, ZERO_DTYPES)
        if isinstance(self.group, str):
            check_choice(where, "group", self.group, ("channel", "tensor"))
        elif type(self.group) is not int or self.group < 1:
            raise SpecError(
                f"{where}: group is {self.group!r}, expected a positive integer, "
                "'channel' or 'tensor'"
            )

    @property
    def name(self) -> str:
        """Short name, for example `int3-g64-asym`."""
        group = f"g{self.group}" if isinstance(self.group, int) else self.group
        parts = [f"int{self.bits}", group]
        parts += [] if self.symmetric else ["asym"]
        parts += ["out"] if self.axis == "out" else []
        return "-".join(parts)

    @property
    def code_bits(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Stored width of a code."""
        return self.bits

    @property
    def signed(self) -> bool:
        """Whether codes are stored as int8 instead of packed unsigned fields."""
        return self.symmetric and self.bits == 8

    @property
    def levels(self) -> int:
        """Highest unsigned code, `2**bits - 1`."""
        return 2**self.bits - 1

    @property
    def offset(self) -> float:
        """Zero-point that the stored codes of a symmetric format imply."""
        if self.signed:
            return 0.0
        return 0.5 if self.bits == 1 else float(2 ** (self.bits - 1))

    @property
    def peak(self) -> float:
        """Half the number of steps: no weight lies beyond half a step."""
        return self.levels / 2

    def grouping(self, matrix: tuple[int, int]) -> Grouping:
        """Groups along `axis`; see `Format.grouping`."""
        if isinstance(self.group, str):
            kind: Any = self.group
            return Grouping(kind, matrix)
        check_matrix(self.name, matrix, self.group, 0 if self.axis == "in" else 1)
        return Grouping("in" if self.axis == "in" else "out", matrix, self.group)

    def encode(self, u: Float[Array, "..."]) -> Shaped[Array, "..."]:
        """Nearest codes of `w / scale` (symmetric) or `w / scale + zero`."""
        if not self.symmetric:
            return jnp.clip(jnp.round(u), 0, self.levels).astype(jnp.uint8)
        if self.bits == 1:
            return (u > 0).astype(jnp.uint8)
        half = 2 ** (self.bits - 1)
        q = jnp.clip(jnp.round(u), -half, half - 1)
        return (
            q.astype(jnp.int8) if self.signed else (q + float(half)).astype(jnp.uint8)
        )

    def decode(self, codes: Shaped[Array, "..."]) -> Float[Array, "..."]:
        """Codes as float32, the implicit zero-point removed."""
        values = codes.astype(jnp.float32)
        return values - self.offset if self.symmetric else values

    def neighbour(
        self, codes: Shaped[Array, "..."], up: Bool[Array, "..."]
    ) -> Shaped[Array, "..."]:
        """The adjacent integer, clipped to the range."""
        low = -128 if self.signed else 0
        step = jnp.where(up, 1, -1).astype(jnp.int32)
        moved = codes.astype(jnp.int32) + step
        return jnp.clip(moved, low, low + self.levels).astype(codes.dtype)
