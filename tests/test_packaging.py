"""The wheel holds the library's tree, all of it and nothing else."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

NATIVE = "qjax/pallas_kernels/native"

PROBE = """
import importlib, pkgutil, sys
import qjax
names = [m.name for m in pkgutil.walk_packages(qjax.__path__, "qjax.")]
for name in names:
    if not name.endswith(("__main__", "._kernels")):  # the latter is plain C
        importlib.import_module(name)
print(qjax.__file__)
print(*names)
"""


@pytest.fixture(scope="module")
def settings(root) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text("utf-8"))


def _source_of(root: Path, settings: dict) -> dict[str, Path]:
    """Each package's installed name and its folder in the checkout."""
    mapping = settings["tool"]["setuptools"]["package-dir"]
    folders = {"qjax": root / "qjax"}
    folders |= {name: root / folder for name, folder in mapping.items()}
    return folders


def _tree(root: Path, settings: dict) -> set[str]:
    """Paths that the wheel should hold, derived from the folders."""
    paths = set()
    for name, folder in _source_of(root, settings).items():
        for file in folder.rglob("*"):
            if file.is_file() and _is_installed(file):
                inside = file.relative_to(folder)
                paths.add(f"{name.replace('.', '/')}/{inside.as_posix()}")
    excluded = settings["tool"]["setuptools"]["exclude-package-data"]["qjax"]
    return paths - {f"qjax/{name}" for name in excluded}


def _is_installed(file: Path) -> bool:
    """Builds of the extension in the checkout stay behind; its sources are few."""
    built = file.name == "unbuilt.txt" or file.suffix == ".so"
    return not built and "__pycache__" not in file.parts


def _copy(root: Path, settings: dict, work: Path) -> None:
    """What a build needs, without what earlier builds left."""
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so", "unbuilt.txt")
    for folder in [root / "qjax", *_source_of(root, settings).values()]:
        target = work / folder.relative_to(root)
        if not target.exists():
            shutil.copytree(folder, target, ignore=skip)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(root / name, work / name)


def _build(work: Path, **env) -> Path:
    build = "import sys, setuptools.build_meta as b; print(b.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(work / "dist")],
        cwd=work,
        capture_output=True,
        text=True,
        env=os.environ | env,
    )
    assert done.returncode == 0, done.stderr
    return next((work / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(root, settings, tmp_path_factory) -> Path:
    """A wheel built from a copy of the checkout, so that no stale build leaks in."""
    work = tmp_path_factory.mktemp("wheel")
    _copy(root, settings, work)
    return _build(work, CXXFLAGS="-O1 -DQJAX_PLAIN")  # what it holds matters, not speed


def test_every_package_is_listed(root, settings):
    found = set()
    for name, folder in _source_of(root, settings).items():
        for init in folder.rglob("__init__.py"):
            inner = init.parent.relative_to(folder).parts
            found.add(".".join([name, *inner]))
    assert sorted(found) == sorted(settings["tool"]["setuptools"]["packages"])


def test_every_module_folder_is_a_package(root, settings):
    for folder in _source_of(root, settings).values():
        for module in folder.rglob("*.py"):
            assert (module.parent / "__init__.py").exists(), module


def test_wheel_equals_tree(wheel, root, settings):
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
    extension = {n for n in names if n.startswith(f"{NATIVE}/_kernels")}
    assert names - extension == _tree(root, settings)
    assert len(extension) == 1 or not shutil.which("c++")


def test_wheel_without_a_compiler(root, settings, tmp_path):
    """The install goes on and says why the native kernels are absent."""
    _copy(root, settings, tmp_path)
    wheel = _build(tmp_path, CC="no-such-compiler", CXX="no-such-compiler")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        reason = archive.read(f"{NATIVE}/unbuilt.txt").decode()
    assert not [n for n in names if n.startswith(f"{NATIVE}/_kernels")]
    assert reason.startswith("not built: ") and "no-such-compiler" in reason


def test_wheel_carries_licence_and_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        info = {Path(n).name: n for n in archive.namelist() if ".dist-info/" in n}
        assert b"Apache License" in archive.read(info["LICENSE"])
        assert b"qjax = qjax.cli:main" in archive.read(info["entry_points.txt"])
        assert b"License-Expression: Apache-2.0" in archive.read(info["METADATA"])


def test_every_module_imports_from_the_wheel(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    # -P and an empty folder keep the checkout out; the wheel comes first on the path.
    probe = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + PROBE
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", probe],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    where, names = done.stdout.splitlines()
    assert Path(where).is_relative_to(tmp_path)
    assert "qjax.converters" in names.split()
