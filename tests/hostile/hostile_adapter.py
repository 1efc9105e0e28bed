"""Adapters of PEFT that must be refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from hostile_case import FOREIGN, Case, Target, entry, safetensors_bytes
from hostile_tensors import COLS, LAYER, ROWS, Raw, file_of, ones, with_one, words

PREFIX = "base_model.model."
_A, _B = f"{PREFIX}{LAYER}.lora_A.weight", f"{PREFIX}{LAYER}.lora_B.weight"
_M = f"{PREFIX}{LAYER}.lora_magnitude_vector"
_TENSORS = {_A: ones(4, ROWS), _B: ones(COLS, 4)}
_CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["up_proj"]}


def case(
    name: str,
    message: str | None = None,
    tensors: Mapping[str, Any] | None = None,
    error: str = "FormatError",
    raw: bytes | None = None,
    **config: Any,
) -> Case:
    """An adapter with other tensors or settings; valid without a message."""

    def build(folder: Path) -> Target:
        settings = json.dumps(_CONFIG | config).encode() if raw is None else raw
        (folder / "adapter_config.json").write_bytes(settings)
        data = file_of(_TENSORS | dict(tensors or {}))
        (folder / "adapter_model.safetensors").write_bytes(data)
        return folder

    found = None if message is None else error
    return Case(f"adapter-{name}", "adapter", build, found, message or "")


def _with(name: str, data: bytes, drop: str = "") -> Any:
    """A builder of a valid adapter with one file of other content."""

    def build(folder: Path) -> Target:
        case("").build(folder)
        (folder / name).write_bytes(data)
        if drop:
            (folder / drop).unlink()
        return folder

    return build


def _link(folder: Path) -> Target:
    (folder / "adapter_config.json").symlink_to("/etc/hostname")
    return folder


_WEIGHTS = "adapter_model.safetensors"
_HUGE = safetensors_bytes({_A: entry([1 << 31, 1 << 31], 0, 0)})
_SETTINGS = {
    "r-0": {"r": 0},
    "r-negative": {"r": -4},
    "r-huge": {"r": 10**18},
    "r-float": {"r": 4.0},
    "r-bool": {"r": True},
    "r-list": {"r": [4]},
    "alpha-0": {"lora_alpha": 0},
    "alpha-text": {"lora_alpha": "8"},
    "alpha-huge": {"lora_alpha": 1e300},
    "type-list": {"peft_type": ["LORA"]},
    "type-none": {"peft_type": None},
    "bias": {"bias": "x" * 3000},
    "bias-list": {"bias": ["none"]},
    "dora": {"use_dora": "yes"},
    "pool": {"use_qalora": "yes"},
    "pool-0": {"use_qalora": True, "qalora_group_size": 0},
    "pool-huge": {"use_qalora": True, "qalora_group_size": 10**18},
    "targets": {"target_modules": {"a": 1}},
    "targets-numbers": {"target_modules": [1]},
    "saved": {"modules_to_save": [["lm_head"]]},
    "ranks": {"rank_pattern": ["up_proj"]},
    "ranks-text": {"rank_pattern": {"up_proj": "4"}},
    "scales-text": {"alpha_pattern": {"up_proj": "4"}},
    "ranks-many": {"rank_pattern": {f"a{i}": 4 for i in range(10_001)}},
    "base": {"base_model_name_or_path": ["x"]},
}
_PATTERNS = ("(a+)+$", "(.|.)*X", "((.+))*X", ".*" * 25 + "X", "(.|.)" * 60, "(", ")|(")
_REFUSED = ("lora_bias", "layer_replication", "target_parameters", "use_bdlora")
CASES = [
    case("ok"),
    *(case(f"set-{n}", "key ", error="SpecError", **c) for n, c in _SETTINGS.items()),
    *(
        case(f"pattern-{kind}-{i}", "pattern", **{f"{kind}_pattern": {regular: 4}})
        for kind in ("rank", "alpha")
        for i, regular in enumerate(_PATTERNS)
    ),
    *(case(f"refused-{k}", k, None, "UnsupportedError", **{k: [1]}) for k in _REFUSED),
    case("json", "not valid JSON", raw=b"nope"),
    case("json-list", "the root is", raw=b"[1]"),
    case("json-deep", "nested deeper", raw=b'{"a":' + b"[" * 100_000),
    case("json-twice", "is given twice", raw=b'{"r":4,"r":8}'),
    case("json-large", "allowed", raw=b" " * (2 << 20)),
    Case("adapter-link", "adapter", _link, message="outside"),
    *(
        Case(f"adapter-foreign-{i}", "adapter", _with(_WEIGHTS, data))
        for i, data in enumerate(FOREIGN)
    ),
    Case("adapter-huge", "adapter", _with(_WEIGHTS, _HUGE), message="needs"),
    Case(
        "adapter-pickle",
        "adapter",
        _with("adapter_model.bin", b"\x80\x02}q\0.", drop=_WEIGHTS),
        error="UnsupportedError",
        message="before PyTorch 1.6",
    ),
    case("rank", "expected [4, in] and [out, 4]", {_A: ones(5, ROWS)}),
    case("rank-both", "expected [4, in]", {_A: ones(8, ROWS), _B: ones(COLS, 8)}),
    case("dimensions", "expected [4, in]", {_A: ones(4, ROWS, 1)}),
    case("empty", "expected [4, in]", {_A: ones(4, 0)}),
    case("alone", "expected ['a', 'b']", {_B: None}),
    case("inputs", "the model has [96, 64]", {_A: ones(4, ROWS + 1)}),
    case("outputs", "the model has [96, 64]", {_B: ones(COLS - 1, 4)}),
    case("pooled", "for a weight [1536, 64], the model has [96", use_qalora=True),
    case(
        "pooled-embedding",
        "is an embedding with use_qalora",
        {
            f"{PREFIX}model.embed_tokens.lora_embedding_A": ones(4, 4),
            f"{PREFIX}model.embed_tokens.lora_embedding_B": ones(ROWS, 4),
        },
        use_qalora=True,
    ),
    case("ok-pooled", None, {_A: ones(4, ROWS // 16)}, use_qalora=True),
    case("integers", "expected floats", {_A: words(4, ROWS)}),
    case("nan", "1 of 384 numbers", {_A: with_one(ones(4, ROWS), np.nan)}),
    case("inf", "the first at index [0, 7]", {_A: with_one(ones(4, ROWS), np.inf)}),
    case("magnitude", "expected ['a', 'b']", {_M: ones(COLS)}),
    case("magnitude-missing", "'magnitude'", use_dora=True),
    case("magnitude-short", "[63] magnitudes", {_M: ones(COLS - 1)}, use_dora=True),
    case("ok-magnitude", None, {_M: ones(COLS)}, use_dora=True),
    case("ok-brain", None, {_A: Raw("BF16", [4, ROWS], bytes(8 * ROWS))}),
    case("unknown", "does not explain", {f"{PREFIX}{LAYER}.lora_C.weight": ones(1)}),
    case("no-prefix", "does not explain", {"x.lora_A.weight": ones(4, ROWS)}),
    case(
        "other-layer",
        "does not have",
        {
            f"{PREFIX}model.layers.9.mlp.up_proj.lora_A.weight": ones(4, ROWS),
            f"{PREFIX}model.layers.9.mlp.up_proj.lora_B.weight": ones(COLS, 4),
        },
    ),
    case(
        "long",
        "does not have",
        {
            f"{PREFIX}{'x' * 400}.lora_A.weight": ones(4, ROWS),
            f"{PREFIX}{'x' * 400}.lora_B.weight": ones(COLS, 4),
        },
    ),
    case("vocabulary", "resized", {f"{PREFIX}lm_head.weight": ones(4097, ROWS)}),
]
