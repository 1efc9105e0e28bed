"""llama.cpp's tensor types: blocks of bytes that hold codes and their scales.

A block stands for 32 to 256 consecutive inputs of one output. qjax keeps the bytes as
they are in a GGUF file, transposed: `[*lead, in / elements * bytes, out]`. Decoding is
per type (`BlockType`): `parts` are the integer codes and float32 scales of blocks,
`decode` their weights, bit for bit those of ggml.

Reference: ggml `ggml.h` (`enum ggml_type`), `ggml-common.h` (layouts).
"""

import dataclasses
from collections.abc import Callable
from typing import NoReturn

from jaxtyping import Array, Float, Shaped, UInt8

from qjax.errors import FormatError, SpecError, UnsupportedError
from qjax.formats import ggml_iq as iq
from qjax.formats import ggml_k as k
from qjax.formats import ggml_legacy as legacy
from qjax.formats.base import Format, check_choice
from qjax.formats.ggml_parts import AffineParts, TableParts, floats
from qjax.formats.grouping import Grouping

_FLOATS = ("float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class BlockType:
    """A tensor type.

    Attributes:
      name: lower-case name.
      id: its number in a file.
      elements: weights of a block.
      bytes: bytes of a block.
      parts: splits blocks `[..., bytes, out]` into codes and scales; None for plain
        numbers and for types that only activations have.
      dtype: NumPy's name of plain numbers, else None.
    """

    name: str
    id: int
    elements: int
    bytes: int
    parts: Callable[[UInt8[Array, "..."]], AffineParts | TableParts] | None = None
    dtype: str | None = None

    @property
    def bits_per_weight(self) -> float:
        """Bits of storage per weight, scales included."""
        return 8 * self.bytes / self.elements

    def decode(
        self, blocks: UInt8[Array, "*lead b out"]
    ) -> Float[Array, "*lead e out"]:
        """The weights of blocks, float32.

        Args:
          blocks: uint8 `[..., bytes, out]`.

        Returns:
          `[..., elements, out]`; no finite numbers where a block's scale is none.

        Raises:
          SpecError: the type has no weights to decode, or these are no blocks.
        """
        if blocks.ndim < 2 or blocks.shape[-2] != self.bytes or blocks.dtype != "uint8":
            raise SpecError(
                f"{self.name}: got {blocks.dtype} of shape {blocks.shape}, expected "
                f"uint8 blocks [..., {self.bytes}, out]"
            )
        if self.parts is not None:
            return self.parts(blocks).values()
        if self.dtype in _FLOATS:
            return floats(blocks, self.dtype)
        raise SpecError(f"{self.name}: {_no_weights(self)}")


def _no_weights(kind: BlockType) -> str:
    if kind.dtype is None:
        return "a type of activations inside products; no file holds weights in it"
    return f"plain {kind.dtype} numbers, which need no format; keep the array"


TYPES: dict[str, BlockType] = {
    kind.name: kind
    for kind in (
        BlockType("f32", 0, 1, 4, dtype="float32"),
        BlockType("f16", 1, 1, 2, dtype="float16"),
        BlockType("q4_0", 2, 32, 18, legacy.q4_0),
        BlockType("q4_1", 3, 32, 20, legacy.q4_1),
        BlockType("q5_0", 6, 32, 22, legacy.q5_0),
        BlockType("q5_1", 7, 32, 24, legacy.q5_1),
        BlockType("q8_0", 8, 32, 34, legacy.q8_0),
        BlockType("q8_1", 9, 32, 36),
        BlockType("q2_k", 10, 256, 84, k.q2_k),
        BlockType("q3_k", 11, 256, 110, k.q3_k),
        BlockType("q4_k", 12, 256, 144, k.q4_k),
        BlockType("q5_k", 13, 256, 176, k.q5_k),
        BlockType("q6_k", 14, 256, 210, k.q6_k),
        BlockType("q8_k", 15, 256, 292),
        BlockType("iq2_xxs", 16, 256, 66, iq.iq2_xxs),
        BlockType("iq2_xs", 17, 256, 74, iq.iq2_xs),
        BlockType("iq3_xxs", 18, 256, 98, iq.iq3_xxs),
        BlockType("iq1_s", 19, 256, 50, iq.iq1_s),
        BlockType("iq4_nl", 20, 32, 18, iq.iq4_nl),
        BlockType("iq3_s", 21, 256, 110, iq.iq3_s),
        BlockType("iq2_s", 22, 256, 82, iq.iq2_s),
        BlockType("iq4_xs", 23, 256, 136, iq.iq4_xs),
        BlockType("i8", 24, 1, 1, dtype="int8"),
        BlockType("i16", 25, 1, 2, dtype="int16"),
        BlockType("i32", 26, 1, 4, dtype="int32"),
        BlockType("i64", 27, 1, 8, dtype="int64"),
        BlockType("f64", 28, 1, 8, dtype="float64"),
        BlockType("iq1_m", 29, 256, 56, iq.iq1_m),
        BlockType("bf16", 30, 1, 2, dtype="bfloat16"),
        BlockType("tq1_0", 34, 256, 54, legacy.tq1_0),
        BlockType("tq2_0", 35, 256, 66, legacy.tq2_0),
        BlockType("mxfp4", 39, 32, 17, legacy.mxfp4),
        BlockType("nvfp4", 40, 64, 36, legacy.nvfp4),
        BlockType("q1_0", 41, 128, 18, legacy.q1_0),
        BlockType("q2_0", 42, 64, 18, legacy.q2_0),
    )
}
"""All types by name, in the order of their numbers."""

REMOVED = {
    4: "q4_2",
    5: "q4_3",
    31: "q4_0_4_4",
    32: "q4_0_4_8",
    33: "q4_0_8_8",
    36: "iq4_nl_4_4",
    37: "iq4_nl_4_8",
    38: "iq4_nl_8_8",
}
"""Numbers that llama.cpp no longer reads."""

_WEIGHTS = tuple(name for name, kind in TYPES.items() if kind.parts is not None)


def type_of_id(number: int, where: str) -> BlockType:
    """The type that a file's number stands for.

    Args:
      number: as the file has it.
      where: what errors call the place.

    Returns:
      The type.

    Raises:
      UnsupportedError: llama.cpp has removed the type.
      FormatError: there is no such type.
    """
    if number in REMOVED:
        raise UnsupportedError(
            f"{where}: type {number} ({REMOVED[number]}) was removed from llama.cpp, "
            "which does not read it either; convert the original model again"
        )
    for kind in TYPES.values():
        if kind.id == number:
            return kind
    known = ", ".join(f"{kind.id} {name}" for name, kind in TYPES.items())
    raise FormatError(f"{where}: unknown type {number}; known types: {known}")


@dataclasses.dataclass(frozen=True)
class Ggml(Format):
    """A type of llama.cpp: blocks along `in` that hold their own scales.

    Attributes:
      type: lower-case name, for example `q4_k`.

    Raises:
      SpecError: no such type, or none for weights.

    Example:
      >>> Ggml("q4_k").block.bits_per_weight
      4.5
    """

    type: str = "q4_k"

    def __post_init__(self) -> None:
        kind = TYPES.get(self.type) if isinstance(self.type, str) else None
        if kind is not None and kind.parts is None:
            raise SpecError(f"Ggml: type {self.type!r}: {_no_weights(kind)}")
        check_choice("Ggml", "type", self.type, _WEIGHTS)

    @property
    def block(self) -> BlockType:
        """The type's layout and decoder."""
        return TYPES[self.type]

    @property
    def name(self) -> str:
        """The type's name after `ggml-`, for MXFP4 and NVFP4 are other formats, too."""
        return f"ggml-{self.type}"

    @property
    def peak(self) -> float:
        """Blocks have no range of their own."""
        return 1.0

    def grouping(self, matrix: tuple[int, int]) -> Grouping:
        """Blocks along `in`.

        Raises:
          SpecError: `in` is not a multiple of the block.
        """
        size = self.block.elements
        if matrix[0] % size:
            raise SpecError(
                f"{self.name}: blocks of {size} weights do not divide in={matrix[0]}; "
                f"expected a multiple of {size}. Keep this weight in a type of smaller "
                "blocks, which are 32 weights or more, or unquantized"
            )
        return Grouping("in", matrix, size)

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
            f"{self.name}: bytes belong to blocks of {self.block.elements} weights and "
            "their scales, no single weight has a code; quantize with method=GGML()"
        )
