"""Imports point one way, cost little, and every public name is documented."""

import ast
import importlib
import inspect
import json
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import qjax

ROOT = Path(__file__).resolve().parent.parent

# Lowest first. A room imports rooms above it in this list, itself, and nothing below;
# rooms on one line are neighbours that do not import each other.
LAYERS = [
    ["errors", "compat", "pallas_kernels"],
    ["packing"],
    ["formats"],
    ["tensor"],
    ["scales"],
    ["wrappers", "additive", "ggml"],
    ["trellis"],
    ["specs"],
    ["artifact"],
    ["io"],
    ["methods"],
    ["recipes"],
    ["tree"],
    ["ops"],
    ["nn"],
    ["chat_worker"],
    ["chat"],
    ["text_files"],
    ["models", "text", "sampling"],
    ["converters"],
    ["specs"],
    ["artifact"],
    ["checkpoint"],
    ["calibration", "reports"],
    ["parameter", "imatrix"],
    ["parts"],
    ["quantize", "inspection"],
    ["convert_gguf"],
    ["convert"],
    ["convert", "inspection"],
    ["decoding"],
    ["generate"],
    ["evaluate"],
    ["sensitivity", "budget"],
    ["allocate"],
    ["devices"],
    ["abstract", "train", "serve"],
    ["plan_parts"],
    ["plan_work"],
    ["plan"],
    ["cli"],
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}

# Imported only inside the functions that need them.
HEAVY = {"torch", "transformers", "matplotlib", "lm_eval", "datasets", "pandas"}
HEAVY |= {"grain", "pyarrow"}


def _modules() -> Iterator[tuple[str, Path]]:
    """Installed name and file of every module of the library."""
    for prefix in ("qjax", "qjax.converters", "qjax.pallas_kernels"):
        folder = prefix.rpartition(".")[2]
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = [*file.relative_to(ROOT / folder).with_suffix("").parts]
            if parts[-1] == "__init__":
                parts.pop()
            yield ".".join([prefix, *parts]), file


MODULES = dict(_modules())


def _imports(name: str, file: Path) -> Iterator[tuple[str, int, bool]]:
    """Absolute targets of every import: (target, line, at module level)."""
    tree = ast.parse(file.read_text("utf-8"))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        top = id(node) not in inside
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, top
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, *filter(None, [node.module])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield (full if full in MODULES else base), node.lineno, top


def _room(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if parts[0] == "qjax" and len(parts) > 1 else None


def test_every_room_has_a_level():
    rooms = {_room(name) for name in MODULES} - {None}
    assert rooms <= set(LEVEL), "place the new room in LAYERS"


@pytest.mark.parametrize("name", [n for n in MODULES if _room(n)])
def test_imports_point_down(name):
    room = _room(name)
    wrong = []
    for target, line, _ in _imports(name, MODULES[name]):
        if target == "qjax":
            wrong.append(f"line {line}: imports the package root")
            continue
        other = _room(target)
        if other is None or other == room:
            continue
        if LEVEL[other] >= LEVEL[room]:
            wrong.append(f"line {line}: {room} imports {other}")
    assert not wrong, f"{MODULES[name].relative_to(ROOT)}: {wrong}"


@pytest.mark.parametrize("name", MODULES)
def test_heavy_libraries_only_inside_functions(name):
    for target, line, top in _imports(name, MODULES[name]):
        assert not (top and target.split(".")[0] in HEAVY), f"{name}:{line}: {target}"


@pytest.mark.parametrize("name", MODULES)
def test_folders_are_not_imported_by_their_checkout_names(name):
    for target, line, _ in _imports(name, MODULES[name]):
        first = target.split(".")[0]
        assert first not in {"converters", "pallas_kernels", "tests"}, f"{name}:{line}"


@pytest.mark.parametrize("name", [n for n in MODULES if _room(n) != "cli"])
def test_the_library_does_not_print(name):
    for node in ast.walk(ast.parse(MODULES[name].read_text("utf-8"))):
        called = isinstance(node, ast.Call) and getattr(node.func, "id", None)
        assert called != "print", f"{name}:{node.lineno}: print"


def _child(code: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_import_touches_no_device_and_no_heavy_library():
    heavy = sorted(HEAVY | {"tyro", "huggingface_hub"})
    seen = _child(
        "import json, sys, qjax\n"
        "from jax._src import xla_bridge\n"
        f"loaded = [m for m in {heavy!r} if m in sys.modules]\n"
        "print(json.dumps({'loaded': loaded, 'backends': list(xla_bridge._backends)}))"
    )
    assert seen == {"loaded": [], "backends": []}


def test_import_is_quick():
    # Processor time, as a share of what importing jax takes on the same machine; the
    # least of a few runs leaves out the cold file cache.
    code = (
        "import json, time\n"
        "start = time.process_time()\n"
        "import jax\n"
        "jax_took = time.process_time() - start\n"
        "import flax.nnx\n"
        "start = time.process_time()\n"
        "import qjax\n"
        "print(json.dumps({'share': (time.process_time() - start) / jax_took}))"
    )
    least = 1e9
    for _ in range(5):
        least = min(least, _child(code)["share"])
        if least < 0.7:
            break
    assert least < 0.7, f"import qjax takes {least:.2f} of the time of import jax"


def _public_modules() -> list[str]:
    found = pkgutil.walk_packages(qjax.__path__, "qjax.")
    names = (module.name for module in found)
    return ["qjax", *(n for n in names if not n.endswith("__main__"))]


def _public(module: ModuleType) -> dict[str, object]:
    """Public names: those of `__all__`, else everything but modules and imports."""
    names = getattr(module, "__all__", None)
    if names is None:
        names = [n for n, v in vars(module).items() if n[0] != "_"]
    values = {name: getattr(module, name) for name in names}
    return {n: v for n, v in values.items() if not isinstance(v, ModuleType)}


@pytest.mark.parametrize("name", _public_modules())
def test_public_names_are_documented(name):
    module = importlib.import_module(name)
    assert (module.__doc__ or "").strip(), f"{name} has no docstring"
    for public, value in _public(module).items():
        ours = getattr(value, "__module__", "").startswith("qjax")
        if ours and (inspect.isclass(value) or inspect.isfunction(value)):
            assert (inspect.getdoc(value) or "").strip(), f"{name}.{public}"


def _undocumented(body: list[ast.stmt], prefix: str) -> Iterator[str]:
    """Public classes, functions and methods without a docstring, by name."""
    kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in body:
        if not isinstance(node, kinds) or node.name.startswith("_"):
            continue
        overloads = [
            getattr(d, "attr", getattr(d, "id", "")) for d in node.decorator_list
        ]
        if {"overload", "override", "setter"} & set(overloads):
            continue
        if ast.get_docstring(node) is None:
            yield f"{prefix}{node.name} (line {node.lineno})"
        if isinstance(node, ast.ClassDef):
            yield from _undocumented(node.body, f"{node.name}.")


@pytest.mark.parametrize("name", MODULES)
def test_modules_and_public_definitions_have_docstrings(name):
    tree = ast.parse(MODULES[name].read_text("utf-8"))
    assert ast.get_docstring(tree), f"{name} has no docstring"
    assert not list(_undocumented(tree.body, "")), name
