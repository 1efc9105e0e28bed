"""Reading and writing safetensors files, bounded and without copies.

Layout: 8 bytes little-endian header length N, N bytes of JSON
`{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}`,
then the data; tensors cover it from 0 to its end without holes or overlaps.

The reader is stricter than the `safetensors` package: the header must begin with `{`,
hold no key twice and no field it does not define, and respect caps (32 MB of header,
200,000 tensors, rank 8); names must be printable, at most 512 characters, never look
like a path that climbs, and differ after Unicode normalisation. F4, F6 and C64 tensors
are refused as unsupported. Everything is checked against the true file size before a
byte of data is read, so a damaged file costs its header and nothing more.

The writer takes all shapes first and then one tensor at a time, in any order, so it
holds one tensor; the bytes do not depend on the order of arrival. Data is laid out by
falling item size, which keeps every tensor aligned.

Reference: https://huggingface.co/docs/safetensors
"""

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO, Self

import numpy as np

from qjax.errors import FormatError, SpecError, UnsupportedError
from qjax.io.atomic import atomic_file
from qjax.io.files import MappedFile, shown
from qjax.io.safetensors_layout import (
    DTYPE_NAMES,
    MAX_HEADER,
    MAX_TENSORS,
    TensorInfo,
    check_names,
    read_layout,
)


class SafetensorsFile:
    """One open safetensors file, validated, read by name.

    Attributes:
      file: The mapped file underneath.
      metadata: The `__metadata__` strings, empty when absent.
      tensors: Name to `TensorInfo`, in the order of the data.
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
          max_header: Largest accepted header in bytes.

        Raises:
          FormatError: The file breaks the format; see the module's header.
          UnsupportedError: A tensor has a sub-byte or complex type.
          SpecError: The file cannot be opened.
        """
        self.file = MappedFile(path, resolved)
        try:
            self.metadata, self.tensors = read_layout(self.file, max_header)
        except BaseException:
            self.file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def names(self) -> list[str]:
        """Return the tensor names in the order of their data."""
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self.info(name).shape

    def dtype(self, name: str) -> np.dtype:
        """Return the dtype of a tensor."""
        return self.info(name).dtype

    def info(self, name: str) -> TensorInfo:
        """Return the place of a tensor, or raise `SpecError` when it is not here."""
        try:
            return self.tensors[name]
        except KeyError:
            raise SpecError(f"{shown(self.file.path)}: no tensor {name!r}") from None

    def read(self, name: str) -> np.ndarray:
        """Return a tensor as a read-only view of the mapped file.

        Raises:
          SpecError: No such tensor.
          FormatError: The file shrank since it was opened, or a BOOL is not 0 or 1.
        """
        info = self.info(name)
        if info.dtype == np.bool_:
            raw = self.file.array(info.start, np.dtype(np.uint8), info.shape)
            if raw.size and raw.max() > 1:
                raise FormatError(
                    f"{shown(self.file.path)}: tensor {name!r}: BOOL byte "
                    f"{raw.max()}, expected 0 or 1"
                )
            return raw.view(np.bool_)
        return self.file.array(info.start, info.dtype, info.shape)

    def sha256(self, name: str) -> str:
        """Return the SHA-256 of a tensor's stored bytes as hex."""
        info = self.info(name)
        return self.file.sha256(info.start, info.start + info.nbytes)

    def release(self) -> None:
        """Give the pages of tensors read so far back; views stay valid."""
        self.file.release()

    def close(self) -> None:
        """Close the file; views handed out stay valid until dropped."""
        self.file.close()


class SafetensorsWriter:
    """Writes one safetensors file, one tensor at a time.

    Use with `qjax.io.atomic.atomic_file`, which makes the file appear whole or not at
    all:

        with atomic_file(path) as file:
            writer = SafetensorsWriter(file, {"w": ((2, 3), np.dtype("f4"))})
            writer.write("w", array)
            digests = writer.finish()
    """

    def __init__(
        self,
        file: BinaryIO,
        specs: Mapping[str, tuple[tuple[int, ...], Any]],
        metadata: Mapping[str, str] | None = None,
    ):
        """Write the header for `specs` (name to (shape, dtype)).

        Args:
          file: Seekable binary file, at its start.
          specs: Every tensor that will be written.
          metadata: Strings to store in the header.

        Raises:
          FormatError: A tensor name is not allowed.
          UnsupportedError: A dtype has no safetensors code.
        """
        check_names(specs, "safetensors writer")
        if len(specs) > MAX_TENSORS:
            raise SpecError(f"{len(specs):,} tensors, at most {MAX_TENSORS:,} per file")
        self._file = file
        self._tensors: dict[str, TensorInfo] = {}
        self._digests: dict[str, str] = {}
        header: dict[str, Any] = {}
        if metadata:
            header["__metadata__"] = {k: metadata[k] for k in sorted(metadata)}
        typed = {n: (tuple(s), _storable(d, n)) for n, (s, d) in specs.items()}
        at = 0
        for name in sorted(typed, key=lambda n: (-typed[n][1].itemsize, n)):
            shape, dtype = typed[name]
            info = TensorInfo(dtype, shape, at)
            header[name] = {
                "dtype": DTYPE_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [at, at + info.nbytes],
            }
            self._tensors[name] = info
            at += info.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._data_start = 8 + len(text)
        self.nbytes = self._data_start + at
        file.write(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, array: Any) -> str:
        """Write one tensor and return the SHA-256 of its bytes.

        Args:
          name: A name of `specs`, not written yet.
          array: Anything `np.asarray` takes, of exactly the declared shape and dtype.

        Returns:
          Hex digest of the stored bytes.

        Raises:
          SpecError: Unknown or repeated name, other shape or dtype.
        """
        if name not in self._tensors or name in self._digests:
            why = "was written before" if name in self._digests else "was not declared"
            raise SpecError(f"tensor {name!r} {why}")
        info, array = self._tensors[name], np.asarray(array)
        if array.shape != info.shape or array.dtype.newbyteorder("<") != info.dtype:
            raise SpecError(
                f"tensor {name!r}: got {array.dtype}{list(array.shape)}, declared "
                f"{info.dtype}{list(info.shape)}"
            )
        flat = np.ascontiguousarray(array, info.dtype).reshape(-1).view(np.uint8)
        digest = hashlib.sha256()
        self._file.seek(self._data_start + info.start)
        for at in range(0, flat.size, 16 << 20):
            part = flat[at : at + (16 << 20)].data
            digest.update(part)
            self._file.write(part)
        self._digests[name] = digest.hexdigest()
        return self._digests[name]

    def finish(self) -> dict[str, str]:
        """Check that every tensor was written; return name to SHA-256.

        Raises:
          SpecError: Declared tensors are missing.
        """
        missing = [name for name in self._tensors if name not in self._digests]
        if missing:
            raise SpecError(
                f"{len(missing)} declared tensors were not written: {missing[:5]}"
            )
        return {name: self._digests[name] for name in sorted(self._digests)}


def _storable(dtype: Any, name: str) -> np.dtype:
    dtype = np.dtype(dtype).newbyteorder("<")
    if dtype not in DTYPE_NAMES:
        raise UnsupportedError(
            f"tensor {name!r}: dtype {dtype} cannot be stored in safetensors; expected "
            f"one of {', '.join(str(d) for d in DTYPE_NAMES)}"
        )
    return dtype


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    *,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> dict[str, str]:
    """Write arrays to a safetensors file, atomically.

    Args:
      path: Target file.
      tensors: Name to array; values need `shape`, `dtype` and conversion by
        `np.asarray`, which happens one at a time.
      metadata: Strings to store in the header.
      overwrite: Whether an existing file may be replaced.

    Returns:
      Name to SHA-256 of the stored bytes.

    Raises:
      SpecError: The file exists and `overwrite` is false.
      QjaxError: The disk is full; nothing changed.
    """
    specs = {name: (tuple(a.shape), a.dtype) for name, a in tensors.items()}
    with atomic_file(path, overwrite=overwrite) as file:
        writer = SafetensorsWriter(file, specs, metadata)
        for name in tensors:
            writer.write(name, tensors[name])
        return writer.finish()
