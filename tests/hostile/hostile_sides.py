"""Files beside config.json that say how a checkpoint is quantized."""

import os
from pathlib import Path
from typing import Any

from hostile_case import Case, Target
from hostile_layers import BASES, case
from hostile_tensors import GROUP, LAYER

LONG = "x" * 3000
_BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "quanto_qmap.json": ("quanto4", {LAYER: {"weights": "qint4"}}),
    "hf_quant_config.json": ("opt8", {"quantization": {"quant_algo": "FP8"}}),
    "quantization_config.json": ("exl3", {"quant_method": "exl3", "bits": 4.25}),
    "quantize_config.json": ("gptq", {"bits": 4, "group_size": GROUP}),
    "quant_config.json": ("awq", {"w_bit": 4, "q_group_size": GROUP}),
}
_CONTENT: dict[str, tuple[str, bytes]] = {
    "empty": ("not valid JSON", b""),
    "text": ("not valid JSON", b"nope"),
    "binary": ("not UTF-8", b"\xff" * 40),
    "list": ("the root is", b"[1]"),
    "number": ("the root is", b"4"),
    "deep": ("nested deeper", b'{"a":' + b"[" * 100_000),
    "twice": ("is given twice", b'{"bits":4,"bits":8}'),
    "nan": ("NaN is not JSON", b'{"bits":NaN}'),
    "infinity": ("out of range", b'{"bits":1e999}'),
    "large": ("allowed", b" " * (2 << 20)),
    "digits": ("100,000 characters", b'{"bits":' + b"9" * 100_000 + b"}"),
    "method": ("quant_method is", b'{"quant_method":["gptq"]}'),
    "inner": ("expected an object", b'{"quantization":[1]}'),
}


def _case(file: str, name: str, message: str | None, data: Any, **more: Any) -> Case:
    """A layer whose settings are in a side file alone."""
    base = more.pop("base", _BASES[file][0])
    top = {"quantization_config": None}
    name = f"{name}-{file.partition('.')[0]}"
    return case(base, name, message, top=top, side={file: data}, **more)


def _special(file: str, kind: str) -> Case:
    """A side file that is none."""

    def build(folder: Path) -> Target:
        _case(file, "", None, {}).build(folder)
        path = folder / file
        path.unlink()
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "directory":
            path.mkdir()
        else:
            path.symlink_to("/etc/hostname")
        return folder

    message = "outside the model" if kind == "link" else "expected a regular file"
    return Case(f"packed-{file}-{kind}", "packed", build, "FormatError", message)


_QMAP, _HF, _EXL3 = list(_BASES)[:3]
_refused: Any = {"error": "UnsupportedError"}
CASES = [
    *(_case(file, "ok", None, data) for file, (_, data) in _BASES.items()),
    *(
        _case(file, name, message, data)
        for file in _BASES
        for name, (message, data) in _CONTENT.items()
    ),
    *(
        _special(file, kind)
        for file in _BASES
        for kind in ("fifo", "directory", "link")
    ),
    *(
        _case(file, "unknown", "which is not read", {"quant_method": LONG}, **_refused)
        for file in _BASES
    ),
    *(
        _case(_QMAP, f"ok-{i}", None, {LAYER: value})
        for i, value in enumerate((None, [], "qint4", {"weights": ["qint2"]}, {}, 4))
    ),
    _case(_QMAP, "kind", "rows of bytes", {LAYER: {"weights": "qint2"}}),
    _case(
        _QMAP, "ok-many", None, {f"a{i}": {"weights": LONG[:9]} for i in range(9999)}
    ),
    _case(
        _HF, "algorithms", "quant_algo is", {"quantization": {"quant_algo": ["FP8"]}}
    ),
    _case(
        _HF,
        "layers",
        "quantized_layers is",
        {"quantization": {"quantized_layers": [LAYER]}},
    ),
    _case(
        _HF,
        "awq",
        "is not read",
        {"quantization": {"quant_algo": "W4A16_AWQ"}},
        **_refused,
    ),
    _case(_HF, "ok-flat", None, {"quant_algo": "FP8"}),
    *(
        _case(
            _EXL3, f"ok-storage-{i}", None, BASES["exl3"][0] | {"tensor_storage": value}
        )
        for i, value in enumerate(
            ([], LONG, {LAYER: {"stored_tensors": {"a": [2**62]}}})
        )
    ),
    _case(_EXL3, "round", "bits is", {"bits": 4.25}, base="round"),
    _case(_EXL3, "ok-round", None, {"bits": 4, "group_size": GROUP}, base="round"),
]
