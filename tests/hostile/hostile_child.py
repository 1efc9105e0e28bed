"""Opens every hostile input under confinement; run as a script by the fixture.

Confinement: an address-space limit 1 GB above the start, an alarm, and an audit hook
that refuses, while a case is open, every file outside the case's directory, every
write, process, socket, import and execution of new code.
"""

import gc
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile_case import Case, Target
from hostile_cases import CASES

LIMIT_SECONDS = 10
_FORBIDDEN = (
    "subprocess.",
    "socket.",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.chmod",
    "shutil.",
    "ctypes.",
    "pickle.",
    "marshal.",
    "code.__new__",
    "exec",
    "compile",
    "import",
)


class Escape(BaseException):
    """A case did what no reader of data may do."""


class Guard:
    """The audit hook: inert until `root` is set."""

    def __init__(self) -> None:
        self.root: str | None = None
        self.allowed: tuple[str, ...] = ()
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self.root is None:
            return
        if event == "open":
            path, mode, flags = args
            writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
            inside = isinstance(path, int) or self._inside(os.fsdecode(path))
            if not inside or (flags and flags & writes) or (mode and "w" in mode):
                self.fail(event, args)
        elif event.startswith(_FORBIDDEN):
            self.fail(event, args)

    def _inside(self, path: str) -> bool:
        assert self.root is not None
        return os.path.abspath(path).startswith(self.root) or path in self.allowed

    def fail(self, event: str, args: object) -> None:
        self.root = None
        raise Escape(f"{event} {args!r}"[:300])


def _open_safetensors(path: Target) -> None:
    from qjax.io.safetensors import SafetensorsFile

    with SafetensorsFile(path) as file:  # type: ignore[arg-type]
        for name in file.names():
            array = file.read(name)
            assert array.shape == file.shape(name)
            assert array.dtype == file.dtype(name)


def _open_shrinking(path: Target) -> None:
    from qjax.io.safetensors import SafetensorsFile

    with SafetensorsFile(path) as file:  # type: ignore[arg-type]
        GUARD.root, root = None, GUARD.root
        os.truncate(path, 40)
        GUARD.root = root
        file.read("a")


def _open_torch(path: Target) -> None:
    from qjax.converters.torch_pickle import load_torch

    for array in load_torch(path).values():  # type: ignore[arg-type]
        array.sum(dtype=None) if array.dtype.kind in "fiu" else None


def _open_checkpoint(path: Target) -> None:
    from qjax.converters.huggingface import Checkpoint

    with Checkpoint(path) as checkpoint:  # type: ignore[arg-type]
        for name in checkpoint.names():
            checkpoint.read(name)
        checkpoint.source_digest()


def _open_json(path: Target) -> None:
    from qjax.io.json import read_object

    read_object(path)  # type: ignore[arg-type]


def _open_packed(path: Target) -> None:
    from qjax.converters.huggingface import Checkpoint
    from qjax.converters.packed import PackedCheckpoint
    from qjax.tensor import QuantizedTensor

    with Checkpoint(path) as checkpoint:  # type: ignore[arg-type]
        packed = PackedCheckpoint(checkpoint)
        for name in packed.names():
            leaf = packed.read(name)
            quantized = isinstance(leaf, QuantizedTensor)
            shape = leaf.dequantize("float32").shape if quantized else leaf.shape
            stored = packed.shape(name)
            assert shape == ((*stored[:-2], *stored[:-3:-1]) if quantized else stored)


def _load(path: Target) -> None:
    import qjax

    qjax.load(path, dtype="float32")


def _open_adapter(path: Target) -> None:
    from hostile_layers import LLAMA

    from qjax.converters.adapters import attached
    from qjax.converters.peft import read_adapter
    from qjax.models import ModelConfig

    list(attached(ModelConfig.from_hf(LLAMA), [], read_adapter(path)))


def _open_artifact(path: Target) -> None:
    from qjax.artifact import Artifact

    for _, part in Artifact(path).parts():
        for leaf in part.values():
            assert leaf.dequantize("float32").shape == leaf.shape


def _open_gguf(path: Target) -> None:
    from qjax.converters.gguf_file import open_gguf

    with open_gguf(path) as file:
        for name, tensor in file.tensors.items():
            array = file.read(name)
            assert (array.dtype, array.shape) == tensor.stored
            assert array.nbytes == tensor.nbytes


def _open_gguf_shrinking(path: Target) -> None:
    from qjax.converters.gguf_file import open_gguf

    with open_gguf(path) as file:
        GUARD.root, root = None, GUARD.root
        os.truncate(path, 40)
        GUARD.root = root
        file.read("a")


OPENERS: dict[str, Callable[[Target], None]] = {
    "safetensors": _open_safetensors,
    "shrinks": _open_shrinking,
    "torch": _open_torch,
    "checkpoint": _open_checkpoint,
    "json": _open_json,
    "packed": _open_packed,
    "load": _load,
    "adapter": _open_adapter,
    "artifact": _open_artifact,
    "gguf": _open_gguf,
    "gguf-shrinks": _open_gguf_shrinking,
}
GUARD = Guard()


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _alarm(*_: object) -> None:
    GUARD.root = None
    raise Escape(f"still running after {LIMIT_SECONDS} seconds")


def _attempt(case: Case, target: Target, root: Path) -> dict[str, Any]:
    """Open one target; report the error, the time and the memory it took."""
    from qjax.errors import QjaxError

    gc.collect()
    _reset_peak()
    before = _resident("VmRSS")
    error: BaseException | None = None
    trace = ""
    signal.alarm(LIMIT_SECONDS)
    started = time.process_time()
    GUARD.root = str(root)
    try:
        OPENERS[case.opener](target)
    except BaseException as caught:
        GUARD.root = None
        error, trace = caught, traceback.format_exc(limit=-4)
    GUARD.root = None
    seconds = time.process_time() - started
    signal.alarm(0)
    return {
        "target": ascii(target)[-80:],
        "error": None if error is None else type(error).__name__,
        "ours": isinstance(error, QjaxError),
        "message": str(error) if error is not None else "",
        "trace": "" if isinstance(error, QjaxError) else trace,
        "seconds": seconds,
        "memory": max(0, _resident("VmHWM") - before),
        "escaped": (root / "pwned").exists(),
    }


def main(folder: Path, report: Path) -> None:
    """Run the catalogue and write {case: [attempt, ...]} as JSON."""
    sys.path.append(str(Path(__file__).parents[2]))
    from tests import fast_compiler

    fast_compiler.install()
    warm = folder / "warm"
    warm.mkdir()
    for case in CASES:
        if case.error is None:
            (warm / case.name).mkdir()
            target = case.build(warm / case.name)
            for one in target if isinstance(target, list) else [target]:
                OPENERS[case.opener](one)
    gc.collect()
    gc.freeze()  # what the imports left need not be looked at before every case
    ceiling = _resident("VmSize") + (1 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (ceiling, ceiling))
    resource.setrlimit(resource.RLIMIT_CPU, (240, 240))
    signal.signal(signal.SIGALRM, _alarm)
    results = {}
    for case in CASES:
        root = folder / case.name
        root.mkdir()
        os.chdir(root)
        target = case.build(root)
        targets = target if isinstance(target, list) else [target]
        results[case.name] = [_attempt(case, one, root) for one in targets]
    report.write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
