"""Additive vector codes: a group of weights is a sum of rows of codebooks.

For output `o` and group `j` of `group` consecutive inputs, with codebooks `B_c`:

    w[j * group : (j + 1) * group, o] = scale[o] * sum_c B_c[code[j, c, o]].

Numbers are those of AQLM with `out_group_size` 1: `codebooks [C, 2**bits, group]`,
one scale per output. Codes occupy 8 bits, or 16 for 9 to 16 `bits`.

Bits per weight: `codebooks * (8 or 16) / group + 16 / in`, and the codebooks,
`16 * codebooks * 2**bits / out / in * group`, which only large matrices make
negligible: 0.33 for two of 8 bits in a 768 x 256 matrix, 0.004 for 4096 x 4096.

Reference: Egiazarian et al., AQLM, arXiv 2401.06118, section 3.
"""

import dataclasses
from typing import NoReturn

from jaxtyping import Array, Float, Shaped

from qjax.errors import SpecError
from qjax.formats.base import FLOAT_SCALES, Format, check_choice
from qjax.formats.grouping import Grouping

MAX_CODEBOOKS = 8
TABLES = (*FLOAT_SCALES, "float8_e4m3fn")


@dataclasses.dataclass(frozen=True)
class Additive(Format):
    """Sums of `codebooks` vectors of `group` weights along `in`.

    Attributes:
      codebooks: vectors per sum, 1 to 8.
      bits: width of the index of a vector, 8 to 16.
      group: weights per vector; divides `in`.
      scale_dtype: of the scales, one per output.
      table_dtype: of the vectors; also `float8_e4m3fn`, which holds small lattices.

    Raises:
      SpecError: a field is out of range.

    Example:
      >>> Additive(2, 8, 8).name
      'additive2x8-g8'
    """

    codebooks: int = 2
    bits: int = 8
    group: int = 8
    scale_dtype: str = "float16"
    table_dtype: str = "float16"

    def __post_init__(self) -> None:
        where = f"Additive({self.codebooks}, {self.bits}, {self.group})"
        counts = tuple(range(1, MAX_CODEBOOKS + 1))
        check_choice(where, "codebooks", self.codebooks, counts)
        check_choice(where, "bits", self.bits, tuple(range(8, 17)))
        check_choice(where, "scale_dtype", self.scale_dtype, FLOAT_SCALES)
        check_choice(where, "table_dtype", self.table_dtype, TABLES)
        if type(self.group) is not int or self.group < 1:
            raise SpecError(
                f"{where}: group is {self.group!r}, expected a positive integer"
            )

    @property
    def name(self) -> str:
        """Short name, for example `additive1x16-g8`."""
        return f"additive{self.codebooks}x{self.bits}-g{self.group}"

    @property
    def code_bits(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Stored width of an index."""
        return 8 if self.bits == 8 else 16

    @property
    def levels(self) -> int:
        """Vectors of a codebook."""
        return 2**self.bits

    @property
    def peak(self) -> float:
        """Codebooks have no range of their own."""
        return 1.0

    def grouping(self, matrix: tuple[int, int]) -> Grouping:
        """One scale per output column.

        Raises:
          SpecError: `group` does not divide `in`.
        """
        if matrix[0] % self.group:
            raise SpecError(
                f"{self.name}: vectors of {self.group} do not divide in={matrix[0]}; "
                f"choose a group that does"
            )
        return Grouping("channel", matrix)

    def encode(self, u: Float[Array, "..."]) -> NoReturn:
        """Refuses: see `_refuse`."""
        self._refuse()

    def decode(self, codes: Shaped[Array, "..."]) -> NoReturn:
        """Refuses: see `_refuse`."""
        self._refuse()

    def neighbour(
        self, codes: Shaped[Array, "..."], up: Shaped[Array, "..."]
    ) -> NoReturn:
        """Refuses: see `_refuse`."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise SpecError(
            f"{self.name}: codes are indices of learned vectors, which no single "
            "weight has; quantize with method=AQLM()"
        )
