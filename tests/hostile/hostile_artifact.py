"""Artifacts whose manifest says of arrays what they are not.

Arrays keep their digests: only what is said of them is changed.
"""

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from hostile_case import Case, Target
from hostile_layers import LLAMA
from hostile_tensors import COLS, GROUP, GROUPS, ROWS, ones, words

PATH = "layers.0.mlp.up.kernel"
_FORMAT = {"kind": "Int", "bits": 4, "group": GROUP, "symmetric": False, "axis": "in"}
_FORMAT |= {"scale_dtype": "float16", "zero_dtype": "uint8"}
_ARRAYS = {
    "codes": words(ROWS // 2, COLS, dtype="uint8"),
    "scale": ones(GROUPS, COLS),
    "zero": words(GROUPS, COLS, dtype="uint8"),
}
_SPEC = {
    "type": "AffineTensor",
    "format": _FORMAT,
    "matrix": [ROWS, COLS],
    "dtype": "float32",
    "fields": {name: {"type": "array"} for name in _ARRAYS},
}


def _write(folder: Path, spec: Any, arrays: Mapping[str, np.ndarray]) -> Target:
    from qjax.artifact import ArtifactWriter

    inner, base = spec if isinstance(spec, dict) else {}, PATH
    while "base" in inner.get("fields", ()) and len(base) < 400:
        inner, base = inner["fields"]["base"], f"{base}.base"
    stored = {f"{base}.{name}": array for name, array in _ARRAYS.items()}
    stored |= {f"{PATH}.{name}": array for name, array in arrays.items()}
    (folder / "config.json").write_text(json.dumps(LLAMA), "utf-8")
    part = "layer-0000.safetensors"
    with ArtifactWriter(folder / "out", {}) as out:
        out.write(part, stored, {})
        out.finish({}, {"config.json": folder / "config.json"})
    file = folder / "out" / "qjax.json"
    manifest = json.loads(file.read_text("utf-8"))
    manifest["tensors"] = {PATH: {"file": part, "spec": spec}}
    file.write_text(json.dumps(manifest), "utf-8")
    return folder / "out"


def case(
    name: str,
    message: str | None = None,
    change: Callable[[Any], Any] = lambda spec: spec,
    **arrays: np.ndarray,
) -> Case:
    """A layer of which something else is said; valid without a message."""
    build = functools.partial(
        _write, spec=change(json.loads(json.dumps(_SPEC))), arrays=arrays
    )
    error = None if message is None else "FormatError"
    return Case(f"artifact-{name}", "artifact", build, error, message or "")


def _set(**changes: Any) -> Callable[[Any], Any]:
    return lambda spec: spec | changes


def _format(**changes: Any) -> Callable[[Any], Any]:
    return lambda spec: spec | {"format": spec["format"] | changes}


def _inside(kind: str, **fields: Any) -> Callable[[Any], Any]:
    """The layer inside of a wrapper with other arrays."""
    own = {name: {"type": "array"} for name in fields.get("arrays", ())}
    return lambda spec: {"type": kind, "fields": {"base": spec, **own}, **fields}


def _nested(depth: int) -> Callable[[Any], Any]:
    def change(spec: Any) -> Any:
        for _ in range(depth):
            spec = {"type": "Transposed", "fields": {"base": spec}}
        return spec

    return change


_MATRICES = ([ROWS, COLS + 1], [ROWS + 1, COLS], [ROWS * 2, COLS], [COLS, ROWS])
_NO_MATRICES = ([ROWS], [-96, 64], [2**40, 2**40], "96x64", [96.0, 64], [True, 64])
_BITS = (0, 9, -4, 10**18, 4.0, "4", [4], None)
_SIZES = (0, -1, 10**18, 31, "32", [32], 1e300)
CASES = [
    case("ok"),
    *(case(f"matrix-{i}", PATH, _set(matrix=m)) for i, m in enumerate(_MATRICES)),
    *(case(f"no-{i}", "matrix", _set(matrix=m)) for i, m in enumerate(_NO_MATRICES)),
    *(case(f"bits-{i}", PATH, _format(bits=b)) for i, b in enumerate(_BITS)),
    *(case(f"group-{i}", PATH, _format(group=g)) for i, g in enumerate(_SIZES)),
    case("axis", PATH, _format(axis="x" * 3000)),
    case("kind", PATH, _format(kind="os.system")),
    case("kind-list", PATH, _format(kind=["Int"])),
    case("kind-other", "cannot be", _set(format={"kind": "NF4", "block": 32})),
    case("format-list", PATH, _set(format=[1])),
    case("format-none", PATH, _set(format=None)),
    case("dtype", "dtype", _set(dtype="int8")),
    case("dtype-list", "dtype", _set(dtype=["float32"])),
    case("type", "unknown tensor type", _set(type="x" * 3000)),
    case("type-list", "unknown tensor type", _set(type=["AffineTensor"])),
    case("fields", "unknown tensor type", _set(fields=[1])),
    case("empty", "", _set(fields={})),
    case("spec", "expected a tensor description", lambda spec: [spec]),
    case("deep", "expected a tensor description", _nested(12)),
    case("very-deep", "nested deeper", _nested(200)),
    case("ok-transposed", None, _nested(4)),
    case(
        "permutation",
        "is not a permutation",
        _inside("Permuted", arrays=("perm",)),
        perm=np.full(ROWS, 5, np.int32),
    ),
    case(
        "permutation-2^31",
        "is not a permutation",
        _inside("Permuted", arrays=("perm",)),
        perm=np.arange(ROWS, dtype=np.int32) + (2**31 - 97),
    ),
    case("permutation-missing", "", _inside("Permuted")),
    case(
        "factors",
        "shape",
        _inside("LowRank", arrays=("a", "b")),
        a=ones(ROWS, 2),
        b=ones(3, COLS),
    ),
    case("factors-missing", "", _inside("LowRank")),
    case(
        "factors-scalar", "", _inside("LowRank", arrays=("a", "b")), a=ones(), b=ones()
    ),
    case("scaled-missing", "", _inside("InputScaled")),
    case("split-missing", "", _inside("SplitInputs")),
    case("outliers-missing", "", _inside("WithOutliers")),
    case(
        "outliers",
        "index outside",
        _inside("WithOutliers", arrays=("values", "rows", "cols")),
        values=ones(1),
        rows=np.full(1, ROWS, np.int32),
        cols=np.zeros(1, np.int32),
    ),
]
