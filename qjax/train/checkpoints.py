"""Checkpoints of a training run: all of its state, or none of it.

`DIRECTORY/00000120/` is the run after 120 steps:

* `state/`: every array of the state, by name, written by Orbax from the devices that
  hold it;
* `run.json`: what is not an array (where the data stands, what the run is), and shape
  and dtype of every array;
* `manifest.json`: size and SHA-256 of all other files, written last.

It is written as `.00000120.partial` and renamed when it is complete and on the disk, so
a kill at any instant leaves the checkpoints before it. Only the copy off the devices
keeps the caller waiting. Reading checks every byte and takes the newest checkpoint that
is whole; dtypes are compared, since Orbax casts to what it is asked for.

Costs: a copy of the state in host memory while it is written, `keep` of them on disk,
and one pass over the files to write their digests.
"""

import dataclasses
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from qjax.errors import FormatError, IntegrityError, QjaxError, SpecError
from qjax.io.atomic import no_space, sync_directory, sync_tree, write_bytes
from qjax.io.files import sha256_file, shown
from qjax.io.json import encode_object, read_object

_STATE, _RUN, _MANIFEST = "state", "run.json", "manifest.json"
_VERSION = 1
_MAX_JSON = 64 << 20


@dataclasses.dataclass(frozen=True)
class Saved:
    """A checkpoint whose files are whole.

    Attributes:
      path: Its directory.
      step: Number of steps done.
      run: What `save` was given beside the state.
      leaves: Dtype and shape of every array, by name.
      skipped: Why newer checkpoints were passed over.
    """

    path: Path
    step: int
    run: dict[str, Any]
    leaves: dict[str, Any]
    skipped: tuple[str, ...]


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last one.

    Args:
      directory: Where they lie; made when the first one is saved.
      keep: How many of the newest stay.

    Raises:
      SpecError: `keep` is not positive.

    Example:
      >>> with Checkpoints(out / "checkpoints") as checkpoints:
      ...     checkpoints.save(120, state, {"data": batches.get_state()})
      >>> saved = checkpoints.newest()
      >>> state = checkpoints.load(saved, state)
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int = 3):
        if keep < 1:
            raise SpecError(f"keep is {keep}; expected at least 1 checkpoint")
        self.directory, self.keep = Path(directory), keep
        self._pool = ThreadPoolExecutor(1, "qjax-checkpoint")
        self._writing: Future[None] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, *rest: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._pool.shutdown()

    def steps(self) -> list[int]:
        """Returns the steps of complete checkpoints, oldest first."""
        if not self.directory.is_dir():
            return []
        names = (path.name for path in self.directory.iterdir() if path.is_dir())
        return sorted(int(name) for name in names if name.isdecimal())

    def save(self, step: int, state: Any, run: dict[str, Any]) -> None:
        """Starts to write a checkpoint; returns once the state may be donated.

        Args:
          step: Number of steps done.
          state: A pytree of arrays.
          run: JSON object stored with it.

        Raises:
          QjaxError: The checkpoint before this one could not be written.
        """
        from orbax.checkpoint import v1 as ocp

        self.wait()
        arrays = _named(state)
        kept = {k: _data(x) for k, x in arrays.items() if x.size}
        leaves = {name: _kind(x) for name, x in arrays.items()}
        info = {"version": _VERSION, "step": step, "leaves": leaves, "run": run}
        target = self.directory / f"{step:08d}"
        work = target.with_name(f".{target.name}.partial")
        with no_space(target):
            if jax.process_index() == 0:
                self._clear()
                work.mkdir(parents=True)
            _meet(f"qjax checkpoint {step}")
            text = encode_object(info)
            started = ocp.save_async(os.path.abspath(work / _STATE), kept)
        self._writing = self._pool.submit(self._finish, started, text, work, target)

    def wait(self) -> None:
        """Waits for the checkpoint being written, if there is one.

        Raises:
          QjaxError: It could not be written; those before it are intact.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()
            _meet("qjax checkpoint written")

    def _finish(self, started: Any, text: bytes, work: Path, target: Path) -> None:
        """What happens beside training: wait for the arrays, digest, sync, rename."""
        try:
            with no_space(target):
                started.result()
                if jax.process_index():
                    return
                write_bytes(work / _RUN, text)
                digests = {name: _digest(path) for name, path in _files(work)}
                write_bytes(work / _MANIFEST, encode_object({"files": digests}))
                sync_tree(work)
                if target.exists():  # a damaged one, which was passed over
                    self._remove(target)
                os.replace(work, target)
                sync_directory(self.directory)
                for step in self.steps()[: -self.keep]:
                    self._remove(self.directory / f"{step:08d}")
        except QjaxError:
            raise
        except Exception as error:
            raise QjaxError(
                f"{shown(target)}: the checkpoint could not be written: {error}; those "
                "before it are intact"
            ) from error

    def _clear(self) -> None:
        """Removes what a killed run left behind."""
        if self.directory.is_dir():
            for path in self.directory.glob(".*"):
                shutil.rmtree(path, ignore_errors=True)

    def _remove(self, path: Path) -> None:
        gone = path.with_name(f".{path.name}.old")
        os.replace(path, gone)
        shutil.rmtree(gone, ignore_errors=True)

    def newest(self) -> Saved | None:
        """Returns the newest checkpoint that is whole; None if there never was one.

        Raises:
          IntegrityError: There are checkpoints, and all are damaged.
        """
        skipped: list[str] = []
        for step in reversed(self.steps()):
            path = self.directory / f"{step:08d}"
            try:
                info = _checked(path)
            except QjaxError as error:
                skipped.append(str(error))
                continue
            return Saved(path, step, info["run"], info["leaves"], tuple(skipped))
        if skipped:
            raise IntegrityError(
                f"{shown(self.directory)}: every checkpoint is damaged: "
                f"{'; '.join(skipped)}"
            )
        return None

    def load(self, saved: Saved, like: Any) -> Any:
        """Returns the state of a checkpoint.

        Args:
          saved: From `newest`.
          like: A state of the same structure, shapes, dtypes and shardings.

        Raises:
          SpecError: The checkpoint holds other arrays; the message names one.
        """
        from orbax.checkpoint import v1 as ocp

        arrays = _named(like)
        expected = {name: _kind(x) for name, x in arrays.items()}
        for name in sorted(expected.keys() | saved.leaves.keys()):
            has, wants = saved.leaves.get(name), expected.get(name)
            if has != wants:
                raise SpecError(
                    f"{shown(saved.path)}: {name} is {_words(has)} in the checkpoint, "
                    f"{_words(wants)} in this run; resume with the settings it was "
                    "trained with"
                )
        wanted = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for name, leaf in arrays.items()
            if leaf.size
            for x in (_data(leaf),)
        }
        read = ocp.load(os.path.abspath(saved.path / _STATE), wanted)
        values = [_like(read.get(name, x), x) for name, x in arrays.items()]
        return jax.tree.unflatten(jax.tree.structure(like), values)


def _named(state: Any) -> dict[str, jax.Array]:
    """The arrays of a state by their path in it."""
    found, _ = jax.tree_util.tree_flatten_with_path(state)
    arrays = {
        jax.tree_util.keystr(path, simple=True, separator="."): jnp.asarray(x)
        for path, x in found
    }
    if len(arrays) != len(found):
        raise SpecError("checkpoint: two arrays of the state have the same name")
    return arrays


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _data(x: jax.Array) -> jax.Array:
    return jax.random.key_data(x) if _is_key(x) else x


def _like(read: jax.Array, like: jax.Array) -> jax.Array:
    if _is_key(like) and not _is_key(read):
        return jax.random.wrap_key_data(read, impl=jax.random.key_impl(like))
    return read


def _kind(x: jax.Array) -> list[Any]:
    return [str(x.dtype), list(x.shape)]


def _words(kind: Any) -> str:
    return "absent" if kind is None else f"{kind[0]}{kind[1]}"


def _meet(name: str) -> None:
    """Lets the processes of a run wait for each other."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _files(root: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.name != _MANIFEST:
            yield path.relative_to(root).as_posix(), path


def _digest(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _checked(path: Path) -> dict[str, Any]:
    """Returns `run.json` of a checkpoint after comparing every file with its digest."""
    listed = read_object(path / _MANIFEST, max_bytes=_MAX_JSON).get("files")
    if not isinstance(listed, dict):
        raise FormatError(f"{shown(path)}: the manifest lists no files")
    present = dict(_files(path))
    if odd := sorted(present.keys() ^ listed.keys()):
        kind = "is missing" if odd[0] in listed else "does not belong to it"
        raise IntegrityError(f"{shown(path)}: {odd[0]} {kind}")
    for name, file in present.items():
        if _digest(file) != listed[name]:
            raise IntegrityError(f"{shown(path)}: {name} differs from its digest")
    info = read_object(path / _RUN, max_bytes=_MAX_JSON)
    if info.get("version") != _VERSION:
        raise FormatError(
            f"{shown(path)}: version {info.get('version')!r:.50}, expected {_VERSION}"
        )
    return info
