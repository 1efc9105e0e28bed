"""Files and directories that appear whole or not at all.

Everything is written to a temporary sibling, flushed to the disk, and renamed into
place, so a reader (or a crash at any instant) sees the old state or the new one. An
existing target is refused unless the caller says `overwrite`; a directory is then only
replaced when it looks like a model directory, so a mistyped path cannot erase a home.

`atomic_directory` removes its work on failure; `qjax.io.staging` keeps it for a later
run to continue.

A full disk (or quota, or file-size limit) becomes a `QjaxError` that says nothing
changed. Cost: the space of both the old and the new state, and an fsync per file.
"""

import ctypes
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from qjax.errors import QjaxError, SpecError
from qjax.io.files import shown

MARKERS = ("qjax.json", "config.json", "adapter_config.json")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic_file(
    path: str | os.PathLike[str], *, overwrite: bool = False
) -> Iterator[BinaryIO]:
    """Give a binary file that becomes `path` when the block ends without error.

    Args:
      path: Target; its directory must exist.
      overwrite: Whether an existing file may be replaced.

    Yields:
      A seekable binary file.

    Raises:
      SpecError: The target exists, or its directory does not.
      QjaxError: No space left; the old state is intact.
    """
    target = Path(path)
    _refuse_existing(target, overwrite)
    with no_space(target):
        fd, name = _temporary(target)
        try:
            with os.fdopen(fd, "wb") as file:
                yield file
                file.flush()
                os.fchmod(file.fileno(), 0o666 & ~_umask())
                os.fsync(file.fileno())
            _refuse_existing(target, overwrite)
            os.replace(name, target)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(name)
            raise
        sync_directory(target.parent)


def write_bytes(
    path: str | os.PathLike[str], data: bytes, *, overwrite: bool = False
) -> None:
    """Write `data` to a file atomically; see `atomic_file`."""
    with atomic_file(path, overwrite=overwrite) as file:
        file.write(data)


@contextmanager
def atomic_directory(
    path: str | os.PathLike[str], *, overwrite: bool = False
) -> Iterator[Path]:
    """Give an empty directory that becomes `path` when the block ends without error.

    On any error the directory is removed and the target is as it was.

    Args:
      path: Target; missing, an empty directory, or with `overwrite` a model directory.
      overwrite: Whether an existing model directory may be replaced.

    Yields:
      The temporary directory to write into.

    Raises:
      SpecError: The target exists and may not be replaced.
      QjaxError: No space left; the old state is intact.
    """
    target = Path(os.path.abspath(path))
    check_target(target, overwrite)
    with no_space(target):
        work = Path(_temporary(target, directory=True)[1])
        try:
            yield work
            work.chmod(0o777 & ~_umask())
            sync_tree(work)
            move_into_place(work, target, overwrite)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse a target directory that exists, unless it is empty or replaceable.

    Raises:
      SpecError: Saying why, and what to do.
    """
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_dir():
        raise SpecError(f"{shown(target)}: exists and is not a plain directory")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise SpecError(
            f"{shown(target)}: exists and is not empty; choose another directory or "
            "overwrite it (--force)"
        )
    if not any((target / name).is_file() for name in MARKERS):
        raise SpecError(
            f"{shown(target)}: will not be overwritten: it holds none of "
            f"{', '.join(MARKERS)}, so it is not a model directory"
        )


def sync_directory(path: Path) -> None:
    """Flush a directory's entries to the disk, where the system can."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def sync_tree(root: Path) -> None:
    """Flush every regular file and directory below `root` to the disk."""
    for directory, _, names in os.walk(root):
        for name in names:
            path = os.path.join(directory, name)
            if stat.S_ISREG(os.lstat(path).st_mode):
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
        sync_directory(Path(directory))


def move_into_place(work: Path, target: Path, overwrite: bool) -> None:
    """Make the finished directory `work` the directory `target`, in one step."""
    check_target(target, overwrite)
    if target.is_dir() and any(target.iterdir()):
        _exchange(work, target)
        sync_directory(target.parent)
        shutil.rmtree(work, ignore_errors=True)
    else:
        os.replace(work, target)
        sync_directory(target.parent)


def _exchange(new: Path, old: Path) -> None:
    """Swap two directories in one step, or in two where the system cannot."""
    exchange = 2  # RENAME_EXCHANGE of renameat2(2)
    here = -100  # AT_FDCWD
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is not None:
        names = os.fsencode(new), os.fsencode(old)
        if renameat2(here, names[0], here, names[1], exchange) == 0:
            return
    aside = Path(_temporary(old, directory=True)[1])
    os.replace(old, aside)
    try:
        os.replace(new, old)
    except BaseException:
        os.replace(aside, old)
        raise
    os.replace(aside, new)


def _temporary(target: Path, *, directory: bool = False) -> tuple[int, str]:
    """Create a temporary sibling of `target`: (descriptor or -1, path)."""
    where = {"prefix": f".{target.name[:100]}.", "suffix": ".tmp", "dir": target.parent}
    try:
        if directory:
            target.parent.mkdir(parents=True, exist_ok=True)
            return -1, tempfile.mkdtemp(**where)
        return tempfile.mkstemp(**where)
    except OSError as error:
        if error.errno in _FULL:
            raise
        raise SpecError(
            f"{shown(target)}: cannot be written: {error.strerror}"
        ) from error


def _refuse_existing(target: Path, overwrite: bool) -> None:
    if target.is_dir() or (os.path.lexists(target) and not overwrite):
        raise SpecError(
            f"{shown(target)}: exists; choose another name or overwrite it (--force)"
        )


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@contextmanager
def no_space(target: Path) -> Iterator[None]:
    """Turn "no space left" into one clear error."""
    try:
        yield
    except (OSError, QjaxError) as error:
        cause = error.__cause__ if isinstance(error, QjaxError) else error
        if not isinstance(cause, OSError) or cause.errno not in _FULL:
            raise
        raise QjaxError(
            f"{shown(target)}: cannot be written: {cause.strerror}; the previous state "
            "is intact; free some space and run again"
        ) from cause
