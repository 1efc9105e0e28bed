"""Regular files, opened once and mapped read-only.

Every reader of model files goes through `MappedFile`. It decides what may be opened
(regular files only: no FIFO, device or directory), checks every range against the
size the kernel reports before touching it, and hands out NumPy views without copying.

Cost: an open file descriptor and address space. Pages become resident as they are
touched; `release` gives them back, views stay valid and fault in again. A file that
another process truncates while it is mapped cannot be made safe: the size is checked
again before each view, which catches all but the last instant.
"""

import errno
import hashlib
import math
import mmap
import os
import stat
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np

from qjax.errors import FormatError, SpecError

_CHUNK = 4 << 20


def shown(path: str | os.PathLike[str]) -> str:
    """Return a path for a message: shortened, and quoted when it is not printable."""
    text = os.fspath(path)
    text = text if len(text) <= 300 else f"...{text[-297:]}"
    return text if text.isprintable() else ascii(text)


def open_regular(
    path: str | os.PathLike[str], resolved: str | os.PathLike[str] | None = None
) -> int:
    """Open a regular file for reading and return its descriptor.

    Opening never blocks (a FIFO is refused, not waited for).

    Args:
      path: File to open.
      resolved: Its real path, found before; opened without following another link.

    Returns:
      A file descriptor owned by the caller.

    Raises:
      SpecError: The file does not exist or the system refuses to open it.
      FormatError: It is a directory, FIFO, socket or device.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0)
    if resolved is not None:
        flags |= getattr(os, "O_NOFOLLOW", 0)
    try:
        fd = os.open(path if resolved is None else resolved, flags)
    except FileNotFoundError:
        raise SpecError(f"{shown(path)}: no such file") from None
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise FormatError(
                f"{shown(path)}: is a socket or FIFO, expected a regular file"
            ) from None
        raise SpecError(f"{shown(path)}: cannot be opened: {error.strerror}") from error
    except ValueError as error:
        raise SpecError(f"{shown(path)}: not a usable path: {error}") from None
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        kind = "a directory" if stat.S_ISDIR(mode) else "a FIFO, socket or device"
        raise FormatError(f"{shown(path)}: is {kind}, expected a regular file")
    return fd


def read_small(
    path: str | os.PathLike[str],
    limit: int,
    resolved: str | os.PathLike[str] | None = None,
) -> bytes:
    """Return the bytes of a regular file of at most `limit` bytes.

    Args:
      path: File to read.
      limit: Largest accepted size in bytes.
      resolved: Its real path, found before; opened without following another link.

    Returns:
      The content.

    Raises:
      SpecError: The file cannot be opened.
      FormatError: It is not a regular file, or larger than `limit`.
    """
    with os.fdopen(open_regular(path, resolved), "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise FormatError(
            f"{shown(path)}: larger than the {limit:,} bytes allowed for such a file"
        )
    return data


def content_of(source: str | os.PathLike[str] | bytes, limit: int) -> bytes:
    """Return what is given as content, or by the path of a file; see `read_small`."""
    return source if isinstance(source, bytes) else read_small(source, limit)


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a regular file as hex, reading it in small pieces."""
    with MappedFile(path) as file:
        return file.sha256()


class MappedFile:
    """A regular file, open for random reading.

    Attributes:
      path: Where it was opened.
      size: Its size in bytes at that moment; no range may pass it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        resolved: str | os.PathLike[str] | None = None,
    ):
        """Open `path`; see `open_regular`."""
        self.path = Path(path)
        self._fd = open_regular(path, resolved)
        self._close = weakref.finalize(self, os.close, self._fd)
        self._map: mmap.mmap | None = None
        self.size = os.fstat(self._fd).st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Views handed out stay valid until they are dropped."""
        self._map = None
        self._fd = -1
        self._close()

    def stamp(self) -> tuple[int, int]:
        """Return (size, modification time in ns), a cheap sign of change."""
        status = os.fstat(self._fd)
        return status.st_size, status.st_mtime_ns

    def read(self, start: int, stop: int) -> bytes:
        """Return a copy of the bytes `start:stop`."""
        return b"".join(self._parts(start, stop))

    def array(self, start: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        """Return a read-only array over the file's bytes from `start`.

        It is a view of the mapped file, or a copy where `start` is not a multiple of
        the item size.

        Args:
          start: First byte.
          dtype: Element type; little-endian as stored.
          shape: Shape; `start + prod(shape) * itemsize` must lie inside the file.

        Returns:
          The array.

        Raises:
          FormatError: The range passes the end of the file, or the file shrank.
        """
        count = math.prod(shape)
        self._check(start, start + count * dtype.itemsize)
        if count == 0:
            array = np.empty(shape, dtype)
            array.flags.writeable = False
            return array
        flat = np.frombuffer(self._mapping(), dtype, count, start)
        if start % dtype.alignment:
            flat = flat.copy()
            flat.flags.writeable = False
        return flat.reshape(shape)

    def release(self) -> None:
        """Give resident pages back to the system; views stay valid."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def sha256(self, start: int = 0, stop: int | None = None) -> str:
        """Return the SHA-256 of the bytes `start:stop` as hex; no page is mapped."""
        digest = hashlib.sha256()
        for part in self._parts(start, stop):
            digest.update(part)
        return digest.hexdigest()

    def crc32(self, start: int = 0, stop: int | None = None) -> int:
        """Return the CRC-32 of the bytes `start:stop`; no page is mapped."""
        crc = 0
        for part in self._parts(start, stop):
            crc = zlib.crc32(part, crc)
        return crc

    def _parts(self, start: int, stop: int | None) -> Iterator[bytes]:
        """Yield the bytes `start:stop` in small pieces, past the mapping."""
        stop = self.size if stop is None else stop
        self._check(start, stop)
        while start < stop:
            part = os.pread(self._fd, min(_CHUNK, stop - start), start)
            if not part:
                raise self._shrunk(start)
            yield part
            start += len(part)

    def _check(self, start: int, stop: int) -> None:
        if self._fd < 0:
            raise SpecError(f"{shown(self.path)}: already closed")
        if not 0 <= start <= stop <= self.size:
            raise FormatError(
                f"{shown(self.path)}: bytes {start}..{stop} lie outside the file of "
                f"{self.size} bytes; it is damaged or truncated"
            )
        if os.fstat(self._fd).st_size < self.size:
            raise self._shrunk(os.fstat(self._fd).st_size)

    def _shrunk(self, at: int) -> FormatError:
        return FormatError(
            f"{shown(self.path)}: shrank from {self.size} to {at} bytes while in use"
        )

    def _mapping(self) -> mmap.mmap:
        if self._map is None:
            try:
                self._map = mmap.mmap(self._fd, self.size, access=mmap.ACCESS_READ)
            except (OSError, ValueError, OverflowError) as error:
                raise FormatError(
                    f"{shown(self.path)}: cannot map {self.size} bytes: {error}"
                ) from error
        return self._map
