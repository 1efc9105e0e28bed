"""Quantized layers whose parts do not fit each other, or the settings."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
from hostile_case import Case, Target, entry, model, safetensors_bytes
from hostile_layers import (
    BASES,
    NESTED,
    NF4,
    SCHEME,
    STATE,
    TABLE,
    case,
    refused,
    scheme,
)
from hostile_tensors import (
    COLS,
    GROUP,
    GROUPS,
    LAYER,
    ROWS,
    Raw,
    ones,
    text,
    with_one,
    words,
)

_SCALES = {
    "gptq": "scales",
    "awq": "scales",
    "gemv": "scales",
    "fast": "scales",
    "bnb": "weight.absmax",
    "nested": "weight.nested_absmax",
    "int8": "SCB",
    "ct": "weight_scale",
    "fp8": "weight_scale",
}
_VALID = {"zero": 0.0, "negative": -0.5, "subnormal": 6e-8, "largest": 65504.0}
_INVALID = {"nan": np.nan, "inf": np.inf, "minus-inf": -np.inf}
_NOT_FINITE = "are infinite or NaN, the first at index ["


def _scale(base: str, value: float) -> dict[str, Any]:
    part = _SCALES[base]
    return {part: with_one(BASES[base][1][part], value, 0)}


SCALES = [
    *(
        case(base, f"ok-scale-{name}", None, _scale(base, value))
        for base in _SCALES
        for name, value in _VALID.items()
    ),
    *(
        case(base, f"scale-{name}", _NOT_FINITE, _scale(base, value))
        for base in _SCALES
        for name, value in _INVALID.items()
    ),
]
_NEEDED = {
    "gptq": ("qzeros", "scales"),
    "awq": ("qzeros", "scales"),
    "bnb": ("weight", "weight.absmax", "weight.quant_map"),
    "nested": ("weight.nested_absmax", "weight.nested_quant_map"),
    "int8": ("weight",),
    "ct": ("weight_shape",),
}
PARTS = [
    *(
        case(base, f"without-{part}", part.rpartition(".")[2], {part: None})
        for base, parts in _NEEDED.items()
        for part in parts
    ),
    *(
        case(base, f"empty-{part}", "not empty", {part: np.zeros((0, 64), "int32")})
        for base, part in (("gptq", "qweight"), ("awq", "qzeros"))
    ),
]

_TRIVIAL = np.arange(ROWS) // GROUP
_BITS = (9, 0, -4, 1, "4", True, 4.0, 4.5, [4], {"a": 4}, 10**18, 1e300)
_NO_GROUPS = (0, -1, None, "32", 32.0, [32], {})


def _index(values: Any, dtype: str = "int32") -> dict[str, Any]:
    return {"g_idx": np.asarray(values).astype(dtype)}


_g = functools.partial(case, "gptq")
GPTQ = [
    _g("ok"),
    *(_g(f"bits-{i}", "bits is", bits=bits) for i, bits in enumerate(_BITS)),
    _g("bits-none", "bits is None", bits=None),
    *(_g(f"ok-group-{i}", group_size=size) for i, size in enumerate(_NO_GROUPS)),
    _g("ok-group-uneven", None, {"g_idx": None}, group_size=40),
    _g("group-large", "3 scales per column", group_size=97),
    _g("group-2^63", "3 scales per column", group_size=2**63),
    _g("group-one", "3 scales per column", group_size=1),
    _g("scale-groups", "zero-points", {"scales": ones(4, COLS)}),
    _g("groups", "expected 3", {"scales": ones(4, COLS), "qzeros": words(4, 8)}),
    _g("scale-columns", "scales have", {"scales": ones(3, 63)}),
    _g("scale-rank", "rank 2", {"scales": ones(GROUPS * COLS)}),
    _g("scale-integers", "floating", {"scales": words(3, 64)}),
    _g("zeros-narrow", "zero-points", {"qzeros": words(3, 7)}),
    _g("zeros-wide", "zero-points", {"qzeros": words(3, 9)}),
    _g("zeros-rows", "zero-points", {"qzeros": words(2, 8)}),
    _g("zeros-5000", "zero-points", {"qzeros": words(1, 5000)}),
    _g("words-int64", "int64", {"qweight": words(12, 64, dtype="int64")}),
    _g("words-rank", "rank 2", {"qweight": words(12, 64, 1)}),
    _g("words-short", "g_idx", {"qweight": words(11, COLS)}),
    _g("index-beyond", "groups of", _index(_TRIVIAL + 1)),
    _g("index-2^31", "groups of", _index(_TRIVIAL + 2**31 - 9)),
    _g("index-2^62", "groups of", _index(_TRIVIAL + 2**62, "int64")),
    _g("index-uneven", "groups of", _index(np.arange(ROWS) // 40)),
    _g("index-below", "groups of", _index(_TRIVIAL - 40)),
    _g("index-float", "integer", _index(_TRIVIAL, "float32")),
    _g("index-short", "g_idx", _index(_TRIVIAL[:-1])),
    _g("index-long", "g_idx", _index([*_TRIVIAL, 2])),
    _g("index-mixed", "g_idx", _index([2, *_TRIVIAL])),
    _g("index-one", "g_idx", _index([0])),
    _g("index-rank", "rank 1", _index(_TRIVIAL[None])),
    _g("ok-index-order", None, _index(_TRIVIAL[::-1])),
    _g("ok-index-negative", None, _index(_TRIVIAL - GROUPS)),
    _g("planar", "zero-points", checkpoint_format="gptq_p", bits=3),
    _g("method-list", "quant_method is", quant_method=["gptq"]),
    _g("dynamic-list", "dynamic is", dynamic=[1]),
    _g("dynamic-value", "is not an object", dynamic={".*": 4}),
    _g("dynamic-bits", "bits is", dynamic={".*": {"bits": "x"}}),
    _g("dynamic-many", "dynamic is", dynamic={f"a{i}": {} for i in range(10_001)}),
    refused("gptq", "layout", "is not read", checkpoint_format=["gptq"]),
    refused("gptq", "pack-dtype", "are not read", pack_dtype={"a": 1}),
    refused("gptq", "method", "is not read", quant_method="x" * 3000),
]

_a = functools.partial(case, "awq")
_VERSIONS = (["gemm"], {"a": 1}, 3, "x" * 3000, True)
AWQ = [
    *(case(base, "ok") for base in ("awq", "gemv", "fast")),
    *(
        refused("awq", f"bits-{i}", "bits is not read", bits=bits)
        for i, bits in enumerate(_BITS)
        if bits != 4
    ),
    *(
        refused("awq", f"version-{i}", "is not read", version=version)
        for i, version in enumerate(_VERSIONS)
    ),
    *(_a(f"ok-group-{i}", group_size=size) for i, size in enumerate(_NO_GROUPS)),
    _a("group-large", "3 scales per column", group_size=97),
    _a("scale-groups", "zero-points", {"scales": ones(4, COLS)}),
    _a("scale-columns", "scales have", {"scales": ones(3, 72)}),
    _a("zeros-narrow", "zero-points", {"qzeros": words(3, 7)}),
    _a("zeros-floats", "qzeros", {"qzeros": ones(3, 8)}),
    *(
        _a(f"zeros-{kind}", "qzeros", {"qzeros": words(3, 8, dtype=kind)})
        for kind in ("int64", "int16", "uint8")
    ),
    *(
        _a(f"words-{kind}", "qweight", {"qweight": words(ROWS, 8, dtype=kind)})
        for kind in ("int64", "int16", "int8", "uint8")
    ),
    _a("words-float", "integer", {"qweight": ones(ROWS, 8)}),
    case("gemv", "int16", "qweight", {"qweight": words(COLS, 12, dtype="int16")}),
    case("gemv", "zeros-floats", "qzeros", {"qzeros": ones(COLS, 1)}),
    case("gemv", "scale-columns", "", {"scales": ones(COLS - 1, 8)}),
    case("gemv", "scale-groups", "", {"scales": ones(COLS, 2)}),
    case("fast", "rows", "of 64", {"qweight": words(16, 96, dtype="int16")}),
    case("fast", "int32", "expected int16", {"qweight": words(16, 128)}),
    case("fast", "zeros-integers", "expected floats", {"qzeros": words(2, COLS)}),
    case("fast", "zeros-shape", "expected floats", {"qzeros": -ones(3, COLS)}),
    *(
        case("fast", f"zeros-{name}", "", {"qzeros": with_one(-ones(2, COLS), value)})
        for name, value in _INVALID.items()
    ),
]


def _state(**changes: Any) -> dict[str, Any]:
    return {NF4: text(STATE | changes)}


def _nested(**changes: Any) -> dict[str, Any]:
    return {NF4: text(NESTED | changes)}


_SHAPES = {
    "one": [COLS],
    "three": [COLS, ROWS, 1],
    "float": [64.0, 96],
    "negative": [-64, -96],
    "zero": [0, ROWS],
    "text": "64x96",
    "long": ["x" * 3000, 1],
    "off": [COLS, ROWS + 1],
    "bool": [True, ROWS],
    "2^31": [2**31, 2**31],
    "2^62": [2**62, 2**62],
    "product": [1, ROWS * COLS + 1],
}
_JSON = {
    "text": (b"nope", "not valid JSON"),
    "binary": (b"\xff" * 40, "not UTF-8"),
    "list": (b"[1]", "the root is"),
    "deep": (b'{"a":' + b"[" * 900 + b"]" * 900 + b"}", "nested deeper"),
    "very-deep": (b'{"a":' + b"[" * 100_000, "nested deeper"),
    "twice": (b'{"shape":[64,96],"shape":[64,96]}', "is given twice"),
    "number": (b'{"shape":[64,' + b"9" * 100_000 + b"]}", "100,000 characters"),
    "nan": (b'{"shape":NaN}', "NaN is not JSON"),
    "infinity": (b'{"nested_offset":1e999}', "out of range"),
    "large": (b" " * (1 << 21), "allowed"),
    "zeros": (b"\0" * 40, "not valid JSON"),
}
_f32 = functools.partial(ones, dtype="float32")
_u8 = functools.partial(words, dtype="uint8")
_b = functools.partial(case, "bnb")
_n = functools.partial(case, "nested")
_i = functools.partial(case, "int8")
_LAST = {"weight": with_one(_u8(17, 1), 0xFF, 16)}  # 33 codes leave half a byte
_ODD = _LAST | {"weight.absmax": _f32(2)} | _state(shape=[3, 11])
BITSANDBYTES = [
    *(case(base, "ok") for base in ("bnb", "nested", "int8")),
    *(_b(f"shape-{n}", "expected", _state(shape=x)) for n, x in _SHAPES.items()),
    *(_b(f"json-{n}", message, {NF4: text(x)}) for n, (x, message) in _JSON.items()),
    *(
        _b(f"block-{i}", "", _state(blocksize=block))
        for i, block in enumerate((0, -32, 64, 32.0, "32", "x" * 3000, True, None))
    ),
    *(
        refused("bnb", f"block-{i}", "blocksize is", _state(blocksize=block))
        for i, block in enumerate((1, 16, 33, 48, 8192, 2**40, 10**18), 10)
    ),
    *(
        refused("bnb", f"dtype-{i}", "is not a float", _state(dtype=dtype))
        for i, dtype in enumerate((["float16"], "int8", "x" * 5000))
    ),
    _b("ok-padding", None, _ODD),
    _b("absmax-short", "191 scales", {"weight.absmax": _f32(191)}),
    _b("absmax-rank", "rank 1", {"weight.absmax": _f32(192, 1)}),
    _b("absmax-int32", "absmax", {"weight.absmax": words(192)}),
    _b("absmax-int8", "absmax", {"weight.absmax": words(192, dtype="int8")}),
    _b("absmax-bytes", "nested_absmax", {"weight.absmax": _u8(192)}),
    _b("words-short", "3071 bytes", {"weight": _u8(3071, 1)}),
    _b("words-long", "3073 bytes", {"weight": _u8(3073, 1)}),
    _b("ok-words-float", None, {"weight": Raw("F16", [1536, 1], b"\x7f" * 3072)}),
    _b("table-15", "table of 15", {"weight.quant_map": TABLE[:15]}),
    _b("table-32", "table of 32", {"weight.quant_map": np.tile(TABLE, 2)}),
    _b("table-nan", "table of 16", {"weight.quant_map": with_one(TABLE, np.nan)}),
    _b("table-integers", "floating", {"weight.quant_map": words(16)}),
    _b("ok-table-unsorted", None, {"weight.quant_map": TABLE[::-1]}),
    *(
        _n(f"block-{i}", "", _nested(nested_blocksize=block))
        for i, block in enumerate((0, -1, 64, 256.0, "256", True, None))
    ),
    refused("nested", "block-2^40", "blocksize is", _nested(nested_blocksize=2**40)),
    *(
        _n(f"offset-{i}", "nested_offset", _nested(nested_offset=mean))
        for i, mean in enumerate(("x", None, [0.1], True, 1e300, -1e39))
    ),
    _n("ok-offset-large", None, _nested(nested_offset=10**19)),
    _n("table", "table of 16 values", {"weight.nested_quant_map": TABLE}),
    _n("table-inf", "table of 256", {"weight.nested_quant_map": _f32(256) * np.inf}),
    _n("scales", "2 scales", {"weight.nested_absmax": _f32(2)}),
    _i("scales", "expected int8", {"SCB": _f32(63)}),
    _i("scales-rank", "rank 1", {"SCB": _f32(64, 1)}),
    _i("words-float", "expected int8", {"weight": ones(COLS, ROWS)}),
    _i("words-uint8", "expected int8", {"weight": _u8(COLS, ROWS)}),
    _i("words-rank", "expected int8", {"weight": words(COLS, ROWS, 1, dtype="int8")}),
    _i("words-flat", "expected int8", {"weight": words(COLS, dtype="int8")}),
    refused("int8", "tiled", "is tiled", {"weight_format": np.array(3, np.uint8)}),
    refused("int8", "tiled-2^62", "is tiled", {"weight_format": np.array([2**62])}),
]

_PATTERNS = {
    "nested": "(a+)+$",
    "alternatives": "(.|.)*X",
    "lazy": "(.+?)*?X",
    "inner-group": "((.+))*X",
    "ladder": ".*" * 25 + "X",
    "options": ".?" * 60 + "." * 60 + "X",
    "branches": "(.|.)" * 60 + "X",
    "counted": "(.{1,60}){1,60}X",
    "repeated": "(.*)" * 20 + "X",
    "ahead": "(?=(.+)+X)",
    "broken": "(",
    "large": "a{99999999999}",
    "deep": "(" * 400,
    "long": "a" * 5000,
}
_W = SCHEME["weights"]
_c = functools.partial(case, "ct")
_groups: Any = lambda **more: {"config_groups": scheme(**more)}  # noqa: E731
_bits: Any = lambda bits: _groups(weights=_W | {"num_bits": bits})  # noqa: E731
_of: Any = lambda size: _groups(weights=_W | {"group_size": size})  # noqa: E731
_WIDTHS = (9, 0, -4, "4", [4], None, 10**18, 1e300)
_SIZES = {
    "one": [COLS],
    "three": [COLS, ROWS, 1],
    "negative": [COLS, -96],
    "zero": [COLS, 0],
    "rows": [COLS + 1, ROWS],
    "off": [COLS, ROWS + 1],
    "half": [COLS, ROWS // 2],
    "2^31": [COLS, 2**31],
    "2^62": [2**62, 2**62],
}
PATTERNS = [
    *(
        _c(f"pattern-{name}", "pattern", **_groups(targets=[f"re:{regular}"]))
        for name, regular in _PATTERNS.items()
    ),
    *(
        _g(f"pattern-{name}", "pattern", dynamic={regular: {"bits": 4}})
        for name, regular in _PATTERNS.items()
    ),
]
_ZERO = "weight_zero_point"
_BAD_CODE = Raw("F8_E4M3", [COLS, ROWS], b"\x7f" + bytes(ROWS * COLS - 1))
COMPRESSED = [
    *(case(base, "ok") for base in ("ct", "fp8")),
    *(_c(f"bits-{i}", "num_bits", **_bits(bits)) for i, bits in enumerate(_WIDTHS)),
    *(_c(f"shape-{n}", "", {"weight_shape": np.array(x)}) for n, x in _SIZES.items()),
    _c("shape-floats", "integer", {"weight_shape": ones(2)}),
    _c("targets-number", "target", **_groups(targets=5)),
    _c("targets-numbers", "target", **_groups(targets=[5])),
    _c("targets-none", "names it", **_groups(targets=[])),
    _c("groups-list", "config_groups", config_groups=[SCHEME]),
    _c("groups-empty", "config_groups", config_groups={}),
    _c("groups-text", "weights", config_groups={"a": "b"}),
    _c("weights-list", "weights", **_groups(weights=[4])),
    _c("format-list", "format", format=["pack-quantized"]),
    _c("format-own", "format", **_groups(format=["pack-quantized"])),
    _c("activations", "input_activations", **_groups(input_activations=[1])),
    _c("group-large", "scales per column", **_of(97)),
    _c("group-2^63", "scales per column", **_of(2**63)),
    _c("scale-rows", "scales", {"weight_scale": ones(63, 3)}),
    _c("scale-groups", "scales", {"weight_scale": ones(64, 4)}),
    _c("scale-rank", "", {"weight_scale": ones(64, 3, 1)}),
    _c("zeros-packed", "words for", {_ZERO: words(7, 3)}),
    _c("zeros-plain", "zero-points", {_ZERO: words(64, 4, dtype="int8")}),
    _c("zeros-below", "below the smallest", {_ZERO: np.full((64, 3), -128, "int8")}),
    _c("ok-zeros-above", None, {_ZERO: np.full((64, 3), 100, "int8")}),
    _c("zeros-rank", "", {_ZERO: words(64, dtype="int8")}),
    _c("index-beyond", "groups of", {"weight_g_idx": _TRIVIAL + 5}),
    _c("index-short", "g_idx", {"weight_g_idx": _TRIVIAL[1:]}),
    _c("index-long", "g_idx", {"weight_g_idx": np.append(2, _TRIVIAL)}),
    _c("words-rank", "rank 2", {"weight_packed": words(64, 12, 1)}),
    _c("words-narrow", "", {"weight_packed": words(64, 11)}),
    _c("words-wide", "", {"weight_packed": words(64, 20)}),
    case("fp8", "nan-weight", _NOT_FINITE, {"weight": _BAD_CODE}),
    refused("fp8", "scale-shape", "is not read", {"weight_scale": _f32(2, 3)}),
    refused("fp8", "scale-rank", "is not read", {"weight_scale": ones(8, 8, 1)}),
]


def _deep(depth: int) -> bytes:
    return b'{"quant_method":"gptq","a":' + b"[" * depth + b"]" * depth + b"}"


SETTINGS = [
    _g("settings-deep", "nested deeper", raw=_deep(100)),
    _g("settings-very-deep", "nested deeper", raw=_deep(100_000)),
    _g("settings-twice", "is given twice", raw=b'{"bits":4,"bits":8}'),
    _g("settings-list", "quantization_config", raw=b"[4]"),
    _g("settings-text", "quantization_config", raw=b'"gptq"'),
]
_CONFIG = {"model_type": "llama", "quantization_config": BASES["gptq"][0]}


def _huge(folder: Path) -> Target:
    """Shapes of 2^31 without data."""
    header = {
        f"{LAYER}.qweight": entry([1 << 31, 1 << 31], 0, 0, "I32"),
        f"{LAYER}.scales": entry([3, 1 << 31], 0, 0, "F16"),
    }
    return model(folder, _CONFIG, model__safetensors=safetensors_bytes(header))


def _terabyte(folder: Path) -> Target:
    """A valid file of holes: a layer of 2^21 x 2^20."""
    parts = {
        "qweight": ("I32", [1 << 18, 1 << 20], 1 << 40),
        "qzeros": ("I32", [1 << 16, 1 << 17], 1 << 35),
        "scales": ("F16", [1 << 16, 1 << 20], 1 << 37),
    }
    header, end = {}, 0
    for part, (dtype, shape, size) in parts.items():
        header[f"{LAYER}.{part}"] = entry(shape, end, end + size, dtype)
        end += size
    head = safetensors_bytes(header)
    model(folder, _CONFIG, model__safetensors=head)
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(len(head) + end)
    return folder


_LOADED = ("gptq", "awq", "gemv", "bnb", "nested", "int8", "ct", "fp8")
_SHORT = {"weight": _u8(COLS * 32, 1), "weight.absmax": _f32(COLS * 2)}
MODELS = [
    *(case(base, "ok", whole=True) for base in _LOADED),
    *(
        case(base, "scale", _NOT_FINITE, _scale(base, np.nan), whole=True)
        for base in _LOADED
    ),
    _g("index", "groups of", _index(_TRIVIAL + 1), whole=True),
    _g("ordered", None, _index(_TRIVIAL[::-1]), whole=True),
    _g("outputs", "of the wrong shape", {"qweight": words(12, 63)}, whole=True),
    _a("inputs", "of the wrong shape", {"qweight": words(95, 8)}, whole=True),
    _b("shape", "wrong shape", _SHORT | _state(shape=[COLS, COLS]), whole=True),
    _i("rank", "wrong shape", {"weight": words(COLS, dtype="int8")}, whole=True),
    _c("zeros", "below the", {_ZERO: np.full((64, 3), -128, "int8")}, whole=True),
    _c(
        "huge",
        "of the wrong shape",
        {"weight_shape": np.array([64, 2**40])},
        whole=True,
    ),
    _g("missing", "1 missing", dict.fromkeys(BASES["gptq"][1]), whole=True),
]


CASES = [
    *SCALES,
    *PARTS,
    *GPTQ,
    *AWQ,
    *BITSANDBYTES,
    *COMPRESSED,
    *PATTERNS,
    *SETTINGS,
    *MODELS,
    Case("packed-huge-shapes", "packed", _huge, message="needs"),
    Case("packed-terabyte", "packed", _terabyte, message="cannot map"),
]
