"""What a GGUF file is made of: types of values and tensors, sizes, caps.

Layout, little-endian: `GGUF`, u32 version, u64 number of tensors, u64 number of keys;
the keys (string, u32 type, value; an array is u32 type of its elements, u64 count,
elements); the tensors (string name, u32 number of dimensions, u64 dimensions with the
fastest first, u32 type, u64 offset); then, from the next multiple of the alignment,
their data in the same order, each padded to the alignment. A string is u64 bytes and
UTF-8. Versions 2 and 3 are alike.

Reference: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and for what may
be refused `ggml/src/gguf.cpp` there.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from qjax.errors import FormatError, QjaxError
from qjax.formats.ggml import TYPES

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT_KEY = "general.alignment"
ALIGNMENT = 32
MAX_HEADER = 32 << 20
MAX_KEYS = MAX_TENSORS = 65_536
MAX_KEY = 65_535
MAX_NAME = 63
MAX_DIMS = 4
MAX_STRINGS = 1_500_000

# Name to dtype, in the order of the ids; strings and arrays have no dtype.
_VALUES: dict[str, str | None] = {
    "u8": "<u1",
    "i8": "<i1",
    "u16": "<u2",
    "i16": "<i2",
    "u32": "<u4",
    "i32": "<i4",
    "f32": "<f4",
    "bool": "?",
    "string": None,
    "array": None,
    "u64": "<u8",
    "i64": "<i8",
    "f64": "<f8",
}
VALUE_NAMES = tuple(_VALUES)
VALUE_IDS = {name: i for i, name in enumerate(_VALUES)}
NUMBERS = {name: np.dtype(code) for name, code in _VALUES.items() if code}


class Value(NamedTuple):
    """A value of the metadata with the type it has in the file.

    Attributes:
      type: "u8" ... "f64", "bool" or "string"; for an array the type of its elements.
      value: A Python scalar; for an array a list of strings or a vector of numbers.
    """

    type: str
    value: Any


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file.

    Attributes:
      name: Its name.
      type: Name of its type, a key of `qjax.formats.ggml.TYPES`.
      shape: Logical shape in NumPy's order, `[..., out, in]`; rows run along the last.
      offset: First byte, counted from the start of the file.
      nbytes: Size of its data.
      part: Which file of a split model holds it.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    part: int = 0

    @property
    def stored(self) -> tuple[np.dtype, tuple[int, ...]]:
        """Dtype and shape of its data as an array; blocks are rows of bytes."""
        return stored(self.type, self.shape)


def stored(kind: str, shape: tuple[int, ...]) -> tuple[np.dtype, tuple[int, ...]]:
    """Return (dtype, shape) of the array that holds a tensor's data.

    Numbers keep their type and shape. Blocks are uint8 with the bytes of a row as the
    last dimension.
    """
    block = TYPES[kind]
    if block.dtype is not None:
        brain = block.dtype == "bfloat16"  # which NumPy does not know by name
        dtype = np.dtype(ml_dtypes.bfloat16 if brain else block.dtype)
        return dtype.newbyteorder("<"), shape
    row = shape[-1] // block.elements * block.bytes
    return np.dtype(np.uint8), (*shape[:-1], row)


def tensor_bytes(
    kind: str,
    shape: tuple[int, ...],
    where: str,
    error: type[QjaxError] = FormatError,
) -> int:
    """Return the size of a tensor's data.

    Args:
      kind: Name of a type.
      shape: Logical shape, rows along the last dimension.
      where: What to name in messages.
      error: What to raise.

    Raises:
      QjaxError: `error`, when a file cannot hold such a tensor.
    """
    if not 1 <= len(shape) <= MAX_DIMS:
        raise error(f"{where}: {len(shape)} dimensions, expected 1 to {MAX_DIMS}")
    block, biggest = TYPES[kind], (1 << 63) - 1
    if not all(1 <= n <= biggest for n in shape):
        raise error(f"{where}: shape {shape}: dimensions must be 1 to 2^63 - 1")
    if shape[-1] % block.elements:
        raise error(
            f"{where}: rows of {shape[-1]} numbers, expected a multiple of the "
            f"{block.elements} in a block of {kind}"
        )
    nbytes = math.prod(shape) // block.elements * block.bytes
    if max(nbytes, math.prod(shape)) > biggest:
        raise error(f"{where}: shape {shape} is too large; it needs 2^63 bytes or more")
    return nbytes


def check_alignment(
    fields: dict[str, Value], where: str, error: type[QjaxError] = FormatError
) -> int:
    """Return the alignment that metadata asks for.

    Raises:
      QjaxError: `error`, when it is not a u32 that is a power of two.
    """
    value = fields.get(ALIGNMENT_KEY, Value("u32", ALIGNMENT))
    size = value.value
    if value.type != "u32" or not isinstance(size, int) or size.bit_count() != 1:
        raise error(
            f"{where}: {ALIGNMENT_KEY} is {str(size)[:40]!a} of type {value.type}, "
            "expected a u32 that is a power of two"
        )
    return size
