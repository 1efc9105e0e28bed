"""Where a run is kept, and that nobody else writes there meanwhile.

    OUT/finetune.json     what the run is; marks the directory as a run's
    OUT/checkpoints/      see `qjax.train.checkpoints`
    OUT/metrics.jsonl     see `qjax.train.metrics`
    OUT/adapter/          what was trained, for PEFT; or
    OUT/model/            the converted model, after quantization-aware training
    OUT/report.json       the result, and what was trained, module by module

Refuses: a directory that holds something else, or another run unless it is to be
continued or replaced; one that another process writes to.
"""

import fcntl
import os
import shutil
from pathlib import Path
from typing import Any

import jax

from qjax.errors import SpecError
from qjax.io.atomic import write_bytes
from qjax.io.files import shown
from qjax.io.json import encode_object

_MARKER, _LOCK = "finetune.json", ".lock"


class RunFiles:
    """The directory of a run; a context manager that holds its lock.

    Args:
      output: The directory.
      resume: Continue the run that lies there, if there is one.
      overwrite: Replace the run that lies there, if there is one.

    Attributes:
      root, checkpoints, metrics, adapter, model, report: Paths; see the module.

    Raises:
      SpecError: See the module's refusals; or it cannot be written.
    """

    def __init__(
        self,
        output: str | os.PathLike[str],
        *,
        resume: bool = False,
        overwrite: bool = False,
    ):
        if resume and overwrite:
            raise SpecError("finetune: give resume or overwrite (--force), not both")
        self.root = root = Path(os.path.abspath(output))
        self.checkpoints, self.metrics = root / "checkpoints", root / "metrics.jsonl"
        self.adapter, self.model = root / "adapter", root / "model"
        self.report = root / "report.json"
        self._resume, self._overwrite = resume, overwrite
        self._lock = -1

    def __enter__(self) -> "RunFiles":
        if jax.process_index() == 0:
            self.check()
            try:
                self.root.mkdir(parents=True, exist_ok=True)
                self._lock = os.open(self.root / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError as error:
                raise SpecError(
                    f"{shown(self.root)}: cannot be written: {error.strerror}"
                ) from error
            try:
                self._hold()
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *exc: object) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def start(self, config: dict[str, Any]) -> None:
        """Notes what the run is, in place of the run before where it is replaced.

        Args:
          config: As JSON.
        """
        if self._overwrite and jax.process_index() == 0:
            self._clear()
        self.write(self.root / _MARKER, config)

    def write(self, path: Path, value: dict[str, Any]) -> None:
        """Writes JSON atomically, in the first process of a run."""
        if jax.process_index() == 0:
            write_bytes(path, encode_object(value), overwrite=True)

    def check(self) -> None:
        """Refuses a directory that holds something else, before any work is done."""
        if not os.path.lexists(self.root):
            return
        if not self.root.is_dir():
            raise SpecError(f"{shown(self.root)}: exists and is no directory")
        names = {path.name for path in self.root.iterdir()} - {_LOCK}
        if not names:
            return
        if _MARKER not in names:
            raise SpecError(
                f"{shown(self.root)}: exists, is not empty and holds no run; choose "
                "another directory"
            )
        if not self._resume and not self._overwrite:
            raise SpecError(
                f"{shown(self.root)}: holds a run; continue it (--resume), replace it "
                "(--force) or choose another directory"
            )

    def _hold(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SpecError(
                f"{shown(self.root)}: another process is training there; wait for it "
                "to end"
            ) from error

    def _clear(self) -> None:
        """Removes the run that lies here; its mark last, so a kill leaves a run."""
        for path in sorted(self.root.iterdir(), key=lambda path: path.name == _MARKER):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != _LOCK:
                path.unlink()
