"""Files and directories appear whole or not at all, whatever happens meanwhile."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qjax.errors import QjaxError, SpecError
from qjax.io import atomic
from qjax.io.atomic import atomic_directory, atomic_file, write_bytes
from qjax.io.safetensors import write_safetensors


def _tree(path: Path) -> dict[str, bytes]:
    """Every file below a directory, hidden ones too."""
    return {
        str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()
    }


def _run(code: str, *args: object, **kw: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **kw)


def test_file_appears_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with atomic_file(path) as file:
        file.write(b"abc")
        assert not path.exists()
    assert _tree(tmp_path) == {"x": b"abc"}
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_error_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with (
        pytest.raises(RuntimeError, match="stop"),
        atomic_file(path, overwrite=True) as f,
    ):
        f.write(b"new")
        raise RuntimeError("stop")
    assert _tree(tmp_path) == {"x": b"old"}
    write_bytes(path, b"new", overwrite=True)
    assert _tree(tmp_path) == {"x": b"new"}


def test_existing_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(SpecError, match=r"x: exists; .* overwrite it \(--force\)"):
        write_bytes(path, b"new")
    with pytest.raises(SpecError, match="exists"):
        with atomic_file(tmp_path / "y"):
            (tmp_path / "y").write_bytes(b"someone else")
    assert _tree(tmp_path) == {"x": b"old", "y": b"someone else"}
    (tmp_path / "d").mkdir()
    with pytest.raises(SpecError, match="exists"):
        write_bytes(tmp_path / "d", b"", overwrite=True)


def test_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="x: cannot be written: No such file"):
        write_bytes(tmp_path / "nowhere" / "x", b"")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("stage", ["write", "fsync", "replace"])
def test_full_disk_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, stage: str
) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    def write() -> None:
        with atomic_file(path, overwrite=True) as file:
            file.write(b"new")
            if stage == "write":
                fail()

    if stage != "write":
        monkeypatch.setattr(atomic.os, stage, fail)
    message = f"x: cannot be written: {os.strerror(code)}; the previous state is intact"
    with pytest.raises(QjaxError, match=message):
        write()
    assert _tree(tmp_path) == {"x": b"old"}


_LIMITED = """
import resource, sys
import numpy as np
from qjax.errors import QjaxError
from qjax.converters.huggingface import write_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
tensors = {str(i): np.zeros(1 << 17, np.float32) for i in range(8)}
try:
    write_checkpoint(sys.argv[1], {}, tensors, overwrite=True)
except QjaxError as error:
    print(error)
"""


def test_a_real_size_limit_leaves_the_old_directory(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_bytes(b"old")
    done = _run(_LIMITED, out)
    assert done.stdout == (
        f"{out}: cannot be written: File too large; the previous state is intact; free "
        "some space and run again\n"
    )
    assert _tree(tmp_path) == {"out/config.json": b"old"}


_KILLED = """
import sys, time
from qjax.io.atomic import atomic_directory
with atomic_directory(sys.argv[1], overwrite=True) as work:
    (work / "config.json").write_bytes(b"new")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_kill_leaves_the_old_directory(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_bytes(b"old")
    with subprocess.Popen(
        [sys.executable, "-c", _KILLED, out], stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        child.send_signal(signal.SIGKILL)
    assert (out / "config.json").read_bytes() == b"old"
    with atomic_directory(out, overwrite=True) as work:
        (work / "config.json").write_bytes(b"newer")
    assert _tree(out) == {"config.json": b"newer"}


def test_directory_is_replaced_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with atomic_directory(out) as work:
        (work / "config.json").write_bytes(b"1")
        (work / "gone").write_bytes(b"")
        assert not out.exists()
    with atomic_directory(out, overwrite=True) as work:
        (work / "config.json").write_bytes(b"2")
        assert (out / "config.json").read_bytes() == b"1"
    assert _tree(tmp_path) == {"deep/out/config.json": b"2"}
    assert out.stat().st_mode & 0o777 == 0o777 & ~_umask()


def test_directory_is_replaced_where_the_system_cannot_swap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic.ctypes, "CDLL", lambda _: object())
    test_directory_is_replaced_whole(tmp_path)


def test_error_removes_the_work(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="stop"),
        atomic_directory(tmp_path / "o") as w,
    ):
        (w / "x").write_bytes(b"")
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_what_may_be_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with atomic_directory(out) as work:
        (work / "x").write_bytes(b"")
    with pytest.raises(SpecError, match=r"out: exists and is not empty; .*--force"):
        with atomic_directory(out):
            pass
    with pytest.raises(SpecError, match=r"holds none of qjax\.json, config\.json"):
        with atomic_directory(out, overwrite=True):
            pass
    (tmp_path / "link").symlink_to(out)
    for name in ("link", "out/x"):
        with pytest.raises(SpecError, match="exists and is not a plain directory"):
            with atomic_directory(tmp_path / name, overwrite=True):
                pass
    assert _tree(out) == {"x": b""}


def test_safetensors_are_atomic(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": np.zeros(1)})
    before = path.read_bytes()
    with pytest.raises(SpecError, match="exists"):
        write_safetensors(path, {"b": np.ones(1)})

    class Broken:
        shape, dtype = (1,), np.dtype(np.float32)

        def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
            raise RuntimeError("cannot convert")

    with pytest.raises(RuntimeError, match="cannot convert"):
        write_safetensors(path, {"b": Broken()}, overwrite=True)
    assert _tree(tmp_path) == {"x.safetensors": before}
