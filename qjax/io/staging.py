"""A directory under construction that survives crashes: `TARGET.partial/`.

A long run writes file after file; each appears under its final name only when it is
complete (`atomic_file`), so after a kill at any instant the names present are exactly
the work that is done. The identity of the work (source, recipe, versions) lies beside
the directory in `.TARGET.partial.json`, which is also the lock against a second
writer. `commit` moves the directory into place in one step.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Self

from qjax.errors import FormatError, SpecError
from qjax.io.atomic import (
    atomic_file,
    check_target,
    move_into_place,
    no_space,
    sync_directory,
    sync_tree,
)
from qjax.io.files import shown
from qjax.io.json import encode_object, parse_object


class StagingDirectory:
    """`TARGET.partial/`, taken up again by a later run of the same work.

    Use as a context manager; leaving without `commit` keeps the directory:

        with StagingDirectory(out, identity={"source": digest, "recipe": "nf4"}) as s:
            for layer in layers:
                if layer.file not in s.files():
                    with s.write(layer.file) as file:
                        ...
            s.commit()

    Attributes:
      target: The final directory.
      path: The staging directory.
      resumed: Whether finished files of an earlier run were found.
    """

    def __init__(
        self,
        target: str | os.PathLike[str],
        *,
        identity: dict[str, Any],
        overwrite: bool = False,
    ):
        """Create the staging directory, or take up one left by the same work.

        Args:
          target: The final directory.
          identity: JSON object that names the work. Files of an earlier run are kept
            only when its identity is equal.
          overwrite: Whether an existing model directory may be replaced, and
            unfinished work of another identity thrown away.

        Raises:
          SpecError: The target exists, another process is writing it, or the staging
            directory belongs to other work.
          QjaxError: No space left.
        """
        self.target = Path(os.path.abspath(target))
        self._overwrite = overwrite
        check_target(self.target, overwrite)
        name = f"{self.target.name}.partial"
        self.path = self.target.with_name(name)
        self._marker = self.target.with_name(f".{name}.json")
        with no_space(self.target):
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self._marker, self.path)
            try:
                self._take_up(identity)
            except BaseException:
                self.close()
                raise
        self.resumed = bool(self.files())

    def _take_up(self, identity: dict[str, Any]) -> None:
        recorded = self._identity()
        there = sorted(self.path.iterdir()) if self.path.is_dir() else []
        if there and recorded is None:
            self._marker.unlink()
            raise SpecError(
                f"{shown(self.path)}: exists but is not unfinished work of qjax; "
                "move it away"
            )
        same = recorded == encode_object(identity)
        if there and not same and not self._overwrite:
            raise SpecError(
                f"{shown(self.path)}: holds unfinished work of another run (other "
                "source, recipe or version); delete it or overwrite (--force)"
            )
        for path in there:
            if not same or path.name.startswith("."):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not same:
            self._record(encode_object(identity))
        self.path.mkdir(exist_ok=True)
        sync_directory(self.path.parent)

    def _identity(self) -> bytes | None:
        """Return the recorded identity; None when there was none."""
        data = os.pread(self._lock, 1 << 20, 0)
        if not data:
            return None
        with suppress(FormatError):
            parse_object(data, shown(self._marker))
            return data
        return b"damaged"

    def _record(self, data: bytes) -> None:
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, data, 0)
        os.fsync(self._lock)

    def files(self) -> set[str]:
        """Return the names of the files finished so far."""
        return {p.name for p in self.path.iterdir() if not p.name.startswith(".")}

    @contextmanager
    def write(self, name: str) -> Iterator[BinaryIO]:
        """Give a binary file that counts as finished when the block ends.

        Args:
          name: Plain file name; an earlier file of that name is replaced.

        Yields:
          A seekable binary file.

        Raises:
          SpecError: The name is hidden or has a directory in it.
          QjaxError: No space left; finished files are intact.
        """
        if not name or name != Path(name).name or name.startswith("."):
            raise SpecError(f"{name!r} is not a plain file name")
        with atomic_file(self.path / name, overwrite=True) as file:
            yield file

    def commit(self) -> None:
        """Make the staging directory the target, in one step.

        Raises:
          SpecError: The target appeared meanwhile and may not be replaced.
        """
        with no_space(self.target):
            check_target(self.target, self._overwrite)
            sync_tree(self.path)
            if self.target.is_dir() and any(self.target.iterdir()):
                # The exchange leaves the old model under our name: disown it first,
                # so that a kill right after cannot pass it off as finished work.
                self._record(encode_object({"replacing": self.target.name}))
            move_into_place(self.path, self.target, self._overwrite)
            self._marker.unlink(missing_ok=True)
        self.close()

    def discard(self) -> None:
        """Delete the staging directory and all work in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._marker.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Release the lock and keep the work."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _lock(marker: Path, directory: Path) -> int:
    """Open and lock `marker`; refuse when another process holds it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
    try:
        fd = os.open(marker, flags, 0o666)
    except OSError as error:
        raise SpecError(
            f"{shown(directory)}: cannot be written: {error.strerror}"
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        current = os.stat(marker).st_ino == os.fstat(fd).st_ino
    except OSError:
        current = False
    if not current:
        os.close(fd)
        raise SpecError(
            f"{shown(directory)}: another process is writing it; wait for it to end"
        )
    return fd
