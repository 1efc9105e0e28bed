"""What the loader says when there is an extension, and when there is none."""

import os
import shutil
import subprocess
import sys

import jax
import pytest

from qjax.pallas_kernels import native


def include(tmp_path, minor):
    header = tmp_path / "include" / "xla" / "ffi" / "api" / "c_api.h"
    header.parent.mkdir(parents=True)
    header.write_text(
        f"#define XLA_FFI_API_MAJOR 0\n#define XLA_FFI_API_MINOR {minor}\n"
    )
    return str(tmp_path / "include")


def test_status_is_one_sentence():
    state = native.status()
    assert state.loaded == (state.isa in native.ISAS)
    assert state.loaded or state.reason
    assert str(state).startswith("native CPU kernels: ")


def test_built_wherever_there_is_a_compiler():
    """The tests that need the library are then not skipped."""
    if shutil.which("c++") or shutil.which("g++"):
        assert native.status().loaded, native.status()
    else:
        assert "not built" in native.status().reason


def test_absent(tmp_path):
    library, reason = native.load(tmp_path, jax.ffi.include_dir(), "")
    assert library is None and reason.startswith("not built")
    (tmp_path / native.UNBUILT).write_text("not built: no g++\n")
    _, reason = native.load(tmp_path, jax.ffi.include_dir(), "")
    assert reason == "not built: no g++; install with a C++17 compiler in PATH"


def test_off(tmp_path):
    assert native.load(tmp_path, "", "off") == (None, "QJAX_NATIVE is off")


def test_broken_file(tmp_path):
    (tmp_path / "_kernels.so").write_bytes(b"nothing")
    library, reason = native.load(tmp_path, jax.ffi.include_dir(), "")
    assert library is None and "does not load" in reason


@pytest.mark.skipif(not native.status().loaded, reason=str(native.status()))
class TestLoaded:
    def test_older_runtime(self, tmp_path):
        _, reason = native.load(native.FOLDER, include(tmp_path, 1), "")
        assert "built for FFI 0.3, jaxlib has 0.1" in reason

    def test_newer_runtime(self, tmp_path):
        library, reason = native.load(native.FOLDER, include(tmp_path, 99), "")
        assert library is not None and not reason

    def test_unknown_runtime(self, tmp_path):
        _, reason = native.load(native.FOLDER, str(tmp_path), "")
        assert "no headers" in reason

    def test_unknown_isa(self):
        _, reason = native.load(native.FOLDER, jax.ffi.include_dir(), "mmx")
        assert reason == "QJAX_NATIVE='mmx': this machine does not have it"
        assert not native.choose_isa("mmx")

    def test_emulation_is_never_the_best(self):
        assert native.choose_isa("amx-emulated")
        assert native.choose_isa("") and native.status().isa != "amx-emulated"

    def test_any_python_finds_the_build(self, tmp_path):
        path = native.find_library()
        assert path is not None
        shutil.copy(path, tmp_path / "_kernels.cpython-300-other.so")
        assert native.load(tmp_path, jax.ffi.include_dir(), "")[0] is not None

    def test_variable(self):
        probe = "from qjax.pallas_kernels import native; print(native.status())"
        for value, wanted in [
            ("plain", "plain"),
            ("amx-emulated", "amx-emulated"),
            ("off", "absent, QJAX_NATIVE is off"),
        ]:
            done = subprocess.run(
                [sys.executable, "-c", probe],
                env={**os.environ, "QJAX_NATIVE": value, "JAX_PLATFORMS": "cpu"},
                capture_output=True,
                text=True,
            )
            assert done.stdout.strip() == f"native CPU kernels: {wanted}", done.stderr
