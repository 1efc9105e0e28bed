"""A staging directory keeps finished files across errors and kills."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qjax.errors import QjaxError, SpecError
from qjax.io.staging import StagingDirectory

ID = {"source": "abc", "recipe": "nf4"}


def _names(path: Path) -> set[str]:
    return {str(p.relative_to(path)) for p in path.rglob("*")}


def _put(stage: StagingDirectory, name: str, data: bytes = b"x") -> None:
    with stage.write(name) as file:
        file.write(data)


def test_commit_moves_everything_into_place(tmp_path: Path) -> None:
    with StagingDirectory(tmp_path / "a" / "out", identity=ID) as stage:
        assert not stage.resumed
        _put(stage, "config.json", b"{}")
        assert stage.files() == {"config.json"}
        stage.commit()
    assert _names(tmp_path) == {"a", "a/out", "a/out/config.json"}


def test_an_error_keeps_finished_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="stop"):
        with StagingDirectory(out, identity=ID) as stage:
            _put(stage, "one")
            with stage.write("two") as file:
                file.write(b"half")
                raise RuntimeError("stop")
    assert not out.exists()
    with StagingDirectory(out, identity=ID) as stage:
        assert stage.resumed and stage.files() == {"one"}
        _put(stage, "two")
        stage.commit()
    assert _names(tmp_path) == {"out", "out/one", "out/two"}


_KILLED = """
import sys, time
from qjax.io.staging import StagingDirectory
stage = StagingDirectory(sys.argv[1], identity={"source": "abc", "recipe": "nf4"})
with stage.write("one") as file:
    file.write(b"x")
with stage.write("two") as file:
    file.write(b"half")
    file.flush()
    print("ready", flush=True)
    time.sleep(60)
"""


def test_kill_and_a_second_writer(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", _KILLED, out], stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        with pytest.raises(SpecError, match="another process is writing it"):
            StagingDirectory(out, identity=ID)
        child.send_signal(signal.SIGKILL)
    assert len(_names(tmp_path / "out.partial")) == 2
    with StagingDirectory(out, identity=ID) as stage:
        assert _names(stage.path) == {"one"}
        _put(stage, "two")
        stage.commit()
    assert _names(tmp_path) == {"out", "out/one", "out/two"}


def test_other_work_is_refused_or_thrown_away(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with StagingDirectory(out, identity=ID) as stage:
        _put(stage, "one")
    other = ID | {"recipe": "int8"}
    with pytest.raises(SpecError, match="holds unfinished work of another run"):
        StagingDirectory(out, identity=other)
    with StagingDirectory(out, identity=ID) as stage:
        assert stage.resumed
    with StagingDirectory(out, identity=other, overwrite=True) as stage:
        assert not stage.resumed and stage.files() == set()


def test_a_strangers_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "photo").write_bytes(b"")
    for overwrite in (False, True):
        with pytest.raises(SpecError, match="is not unfinished work of qjax"):
            StagingDirectory(tmp_path / "out", identity=ID, overwrite=overwrite)
    assert _names(tmp_path) == {"out.partial", "out.partial/photo"}


def test_overwriting_a_finished_model(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for data in (b"1", b"2"):
        with StagingDirectory(out, identity=ID, overwrite=True) as stage:
            assert not stage.resumed
            _put(stage, "config.json", data)
            stage.commit()
    assert (out / "config.json").read_bytes() == b"2"
    assert _names(tmp_path) == {"out", "out/config.json"}
    with pytest.raises(SpecError, match="exists and is not empty"):
        StagingDirectory(out, identity=ID)


def test_killed_right_after_replacing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old model is left under the staging name, and must not pass as work."""
    out = tmp_path / "out"
    with StagingDirectory(out, identity=ID) as stage:
        _put(stage, "config.json", b"old")
        stage.commit()

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qjax.io.atomic.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        with StagingDirectory(out, identity=ID, overwrite=True) as stage:
            _put(stage, "config.json", b"new")
            stage.commit()
    monkeypatch.undo()
    assert (out / "config.json").read_bytes() == b"new"
    assert (tmp_path / "out.partial" / "config.json").read_bytes() == b"old"
    with StagingDirectory(out, identity=ID, overwrite=True) as stage:
        assert not stage.resumed and stage.files() == set()


def test_full_disk_keeps_finished_files(tmp_path: Path) -> None:
    with StagingDirectory(tmp_path / "out", identity=ID) as stage:
        _put(stage, "one")
        with pytest.raises(QjaxError, match="No space left on device"):
            with stage.write("two"):
                raise OSError(28, "No space left on device")
        assert stage.files() == {"one"}


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", ".."])
def test_names_are_plain(tmp_path: Path, name: str) -> None:
    with StagingDirectory(tmp_path / "out", identity=ID) as stage:
        with pytest.raises(SpecError, match="not a plain file name"):
            _put(stage, name)


def test_discard_leaves_nothing(tmp_path: Path) -> None:
    with StagingDirectory(tmp_path / "out", identity=ID) as stage:
        _put(stage, "one")
        stage.discard()
    assert _names(tmp_path) == set()
