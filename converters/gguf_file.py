"""Reading GGUF files, the format of llama.cpp: bounded and without copies.

`GGUFFile` opens one file, `open_gguf` also a model that was split into several: their
names end in `-00001-of-0000N.gguf`, the first holds the metadata and its keys
`split.count` and `split.tensors.count` say what there must be. See `gguf_header` for
what is refused, `gguf_layout` for the layout.
"""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any, Self

import numpy as np

from qjax.converters.gguf_header import read_header
from qjax.converters.gguf_layout import MAX_HEADER
from qjax.converters.shards import contained
from qjax.errors import FormatError, SpecError
from qjax.io.files import MappedFile, shown

_FIRST = re.compile(r"(.+)-00001-of-(\d{5})\.gguf", re.DOTALL)
_SPLIT = ("split.no", "split.count", "split.tensors.count")
_MOST_PARTS = 99_999


class GGUFFile:
    """One open GGUF file, validated, read by name.

    Attributes:
      file: The mapped file underneath; of a split model the first.
      version: 2 or 3.
      alignment: What the data of tensors is padded to.
      fields: Key to `Value`, in the order of the file: values with their types.
      metadata: Key to value: bool, int, float, str, list of str, vector of numbers.
      tensors: Name to `Tensor`, in the order of the data.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        resolved: str | os.PathLike[str] | None = None,
        *,
        max_header: int = MAX_HEADER,
    ):
        """Open and validate `path`.

        Args:
          path: Regular file.
          resolved: Its real path, found before; opened without following another link.
          max_header: Most bytes of header that are accepted.

        Raises:
          FormatError: The file breaks the format; see `gguf_header`.
          UnsupportedError: Another version, big-endian, or a removed type of tensor.
          SpecError: The file cannot be opened.
        """
        self.file = MappedFile(path, resolved)
        self._files = [self.file]
        try:
            header = read_header(self.file, max_header)
        except BaseException:
            self.close()
            raise
        self.version, self.alignment = header.version, header.alignment
        self.fields, self.tensors = header.fields, header.tensors
        self.metadata: dict[str, Any] = {k: v.value for k, v in self.fields.items()}

    @property
    def files(self) -> tuple[MappedFile, ...]:
        """The mapped files, in order."""
        return tuple(self._files)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def read(self, name: str) -> np.ndarray:
        """Return a tensor as a read-only view of the mapped file.

        Args:
          name: A key of `tensors`.

        Returns:
          Numbers in their type and shape; of quantized types the bytes of the blocks,
          uint8 `[*lead, out, in / elements * bytes]`.

        Raises:
          SpecError: No such tensor.
          FormatError: The file shrank since it was opened.
        """
        try:
            tensor = self.tensors[name]
        except KeyError:
            raise SpecError(f"{shown(self.file.path)}: no tensor {name!r}") from None
        return self._files[tensor.part].array(tensor.offset, *tensor.stored)

    def release(self) -> None:
        """Give the pages of tensors read so far back; views stay valid."""
        for file in self._files:
            file.release()

    def close(self) -> None:
        """Close the file; views handed out stay valid until dropped."""
        for file in self._files:
            file.close()

    def append(self, other: "GGUFFile") -> None:
        """Take over the next part of a split model; it is closed with this file.

        Raises:
          FormatError: It is another part, or has a tensor that was there before.
        """
        number, count = len(self._files), _part(self)[1]
        self._files.append(other.file)
        where = shown(other.file.path)
        if _part(other) != (number, count):
            no, of = _part(other)
            raise FormatError(
                f"{where}: is part {no + 1} of {of}, expected {number + 1} of {count}"
            )
        both = self.tensors.keys() & other.tensors.keys()
        if both:
            raise FormatError(
                f"{where}: tensor {min(both)!a} is in an earlier part, too"
            )
        for name, tensor in other.tensors.items():
            self.tensors[name] = dataclasses.replace(tensor, part=number)


def open_gguf(
    path: str | os.PathLike[str],
    resolved: str | os.PathLike[str] | None = None,
    *,
    max_header: int = MAX_HEADER,
) -> GGUFFile:
    """Open a GGUF file, or all parts of a split model as one.

    Args:
      path: The file, or the first part; the others lie beside it.
      resolved: Its real path, found before; opened without following another link.
      max_header: Most bytes of header that are accepted in each file.

    Returns:
      The open file; of a split model without the keys that speak of parts.

    Raises:
      FormatError: A file breaks the format, or the parts do not fit together.
      UnsupportedError: See `GGUFFile`.
      SpecError: A file cannot be opened, or `path` is not the first part.
    """
    first = GGUFFile(path, resolved, max_header=max_header)
    try:
        number, count = _part(first)
        if count > 1:
            _join(first, number, count, max_header)
    except BaseException:
        first.close()
        raise
    return first


def _part(file: GGUFFile) -> tuple[int, int]:
    """Return (number from 0, count) of the parts; the count is 0 or 1 if unsplit."""
    number, count = (file.metadata.get(key, 0) for key in _SPLIT[:2])
    for key, value in zip(_SPLIT, (number, count), strict=False):
        if type(value) is not int or not 0 <= value <= _MOST_PARTS:
            raise FormatError(
                f"{shown(file.file.path)}: {key} is {str(value)[:40]!a}, expected an "
                f"integer from 0 to {_MOST_PARTS:,}"
            )
    if number > max(count - 1, 0):
        raise FormatError(
            f"{shown(file.file.path)}: is part {number + 1} of {count}; {_SPLIT[0]} "
            f"must be less than {_SPLIT[1]}"
        )
    return number, count


def _join(first: GGUFFile, number: int, count: int, max_header: int) -> None:
    """Open the other parts and append them."""
    path = Path(first.file.path)
    where, end = shown(path), f"-00001-of-{count:05d}.gguf"
    if number:
        start = re.sub(r"-\d{5}-of-\d{5}\.gguf\Z", "", path.name)
        raise SpecError(
            f"{where}: is part {number + 1} of {count}; open the first, {start + end!a}"
        )
    name = _FIRST.fullmatch(path.name)
    if name is None or int(name[2]) != count:
        raise SpecError(
            f"{where}: is the first of {count} parts, but its name does not end in "
            f"{end}, so the others cannot be found; give them their names back"
        )
    for n in range(1, count):
        other = path.with_name(f"{name[1]}-{n + 1:05d}-of-{count:05d}.gguf")
        real = contained(path.parent, other.name)
        first.append(GGUFFile(other, real, max_header=max_header))
    total = first.metadata.get(_SPLIT[2])
    if total != len(first.tensors):
        raise FormatError(
            f"{where}: the {count} parts hold {len(first.tensors):,} tensors, "
            f"{_SPLIT[2]} is {str(total)[:40]!a}"
        )
    for key in _SPLIT:
        del first.fields[key], first.metadata[key]
