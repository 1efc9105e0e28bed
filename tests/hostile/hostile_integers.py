"""AutoRound, HQQ, quanto, torchao, MLX and BitNet: what their layers can get wrong."""

import functools
from typing import Any

import numpy as np
from hostile_bases import MATRICES, NIBBLES, number
from hostile_layers import case, refused
from hostile_readers import poked
from hostile_tensors import COLS, GROUP, GROUPS, LAYER, ROWS, Raw, ones, text, words

LONG = "x" * 3000
_at: Any = lambda value: {LAYER: value}  # noqa: E731
_NO_NAMES = (5, ["auto_round"], {"a": 1}, LONG, True)
_r = functools.partial(case, "round")
ROUND = [
    *(
        refused("round", f"packing-{i}", "packing_format", packing_format=value)
        for i, value in enumerate(_NO_NAMES)
    ),
    *(
        refused("round", f"type-{i}", "data_type", data_type=value)
        for i, value in enumerate(("mx_fp", 4, [1], LONG))
    ),
    *(
        _r(f"bits-{i}", "bits is", bits=bits)
        for i, bits in enumerate(("4", 4.5, 0, -4, 9, [4], {}, 10**18, 1e300, True))
    ),
    _r("group-large", "3 scales per column", group_size=2**62),
    _r("extra-list", "extra_config is", extra_config=[1]),
    _r("extra-value", "is not an object", extra_config={LAYER: 4}),
    _r("extra-bits", "bits is", extra_config={LAYER: {"bits": "4"}}),
    _r("extra-width", "zero-points", extra_config={LAYER: {"bits": 2}}),
    _r("extra-many", "at most", extra_config={f"a{i}": {} for i in range(10_001)}),
    _r("extra-pattern", "not a simple pattern", extra_config={"(a+)+$": {}}),
    _r("zeros", "zero-points", {"qzeros": words(GROUPS, 7)}),
    _r("scales", "scales have", {"scales": ones(GROUPS, COLS + 1)}),
]

_h, _m = functools.partial(case, "hqq"), functools.partial(case, "hqq-meta")
_SHAPES = {
    "one": ("not enough values", COLS),
    "three": ("too many values", COLS, ROWS, 1),
    "zero": ("of shape [0, 96]", 0, ROWS),
    "negative": ("of shape [-64, -96]", -COLS, -ROWS),
    "off": ("of shape [65, 96]", COLS + 1, ROWS),
    "2^31": ("of shape [2147483648,", 2**31, 2**31),
    "2^62": ("of shape [4611686018427387904, 4]", 2**62, 4),
}
_BITS = (0, -4, 7, 9, 2**31 - 1, -(2**31))
HQQ = [
    _h("ok-float", None, {"W_q": words(96, 16, dtype="int16").view("float16")}),
    _h(
        "ok-axis",
        None,
        {
            "axis": number(0, "int32"),
            "W_q": words(GROUP // 2, MATRICES, dtype="uint8"),
        },
    ),
    *(_h(f"bits-{b}", "nbits is", {"nbits": number(b, "int32")}) for b in _BITS),
    *(
        _h(f"bits-{b}", "expected one number", {"nbits": number(b)})
        for b in (np.nan, np.inf, -np.inf)
    ),
    _h("bits-1e30", "nbits is 1e+30", {"nbits": number(1e30)}),
    _h("bits-two", "expected one number", {"nbits": np.array([4, 4], "int32")}),
    *(_h(f"axis-{a}", "along axis", {"axis": number(a, "int64")}) for a in (2, -1)),
    _h("axis-2^62", "along axis", {"axis": number(2**62, "int64")}),
    _h("axis-two", "expected one number", {"axis": np.array([0, 1])}),
    *(
        _h(f"shape-{n}", what, {"shape": np.array(x)})
        for n, (what, *x) in _SHAPES.items()
    ),
    refused("hqq", "shape-thin", "do not divide", {"shape": np.array([6144, 1])}),
    _h("shape-float", "integer numbers", {"shape": ones(2)}),
    _h("packing", "nbits is 4 with packing", {"packing": text(b"os.system")}),
    _h("packing-long", "with packing", {"packing": text(LONG.encode())}),
    _h("packing-text", "is not text", {"packing": text(b"\xff\xfe")}),
    _h("packing-large", "with packing", {"packing": np.full(9, 2**40)}),
    _h("packing-width", "which is not 8bit_u8", {"packing": text(b"8bit_u8")}),
    _h("packing-three", "expected one of", {"packing": text(b"3bit_32")}),
    *(
        refused("hqq", f"dtype-{i}", "compute_dtype is", {"compute_dtype": text(raw)})
        for i, raw in enumerate((b"torch.float64", b"os.system", LONG.encode()))
    ),
    _h(
        "code",
        "has code 255, expected less than 32",
        {
            "nbits": number(5, "int32"),
            "packing": text(b"8bit_u8"),
            "W_q": np.full((MATRICES, GROUP), 255, np.uint8),
        },
    ),
    _h("words", "W_q is", {"W_q": words(96, 31, dtype="uint8")}),
    _h("words-int32", "W_q is int32", {"W_q": words(96, GROUP)}),
    _h("scales", "191 scales", {"scale": ones(MATRICES - 1, 1)}),
    _h("zeros", "191 zero-points", {"zero": ones(MATRICES - 1, 1)}),
    _h("scale-integers", "floating", {"scale": words(MATRICES, 1)}),
    _m("codes", "W_q is", {"scale_q": words(MATRICES - 1, 1, dtype="uint8")}),
    _m("shape", "W_q is", {"meta_scale.shape": np.array([2**62, 2**62])}),
    _m("shape-one", "W_q is", {"meta_zero.shape": np.array([MATRICES])}),
    _m("bits", "nbits is", {"meta_scale.nbits": number(2**31 - 1, "int32")}),
    _m("matrix", "statistics of shape", {"meta_scale.scale": ones(5, 5)}),
    _m("overflow", "infinite", {"meta_scale.scale": 60000 * ones(1, 1)}),
    _m("both", "two matrices", {"scale_q": None, "zero_scale": words(3, 4, 5)}),
]

_q, _q4 = functools.partial(case, "quanto"), functools.partial(case, "quanto4")
QUANTO = [
    *(
        refused("quanto", f"data-{kind}", f"of {kind}", {"weight._data": leaf})
        for kind in ("int32", "uint8", "float16", "bool")
        for leaf in [np.zeros((COLS, ROWS), kind)]
    ),
    _q("scales", "63 scales for 64", {"weight._scale": ones(COLS - 1, 1)}),
    *(
        _q(f"{side}-{name}", "one positive number", poked("quanto", side, value))
        for side in ("input_scale", "output_scale")
        for name, value in (("zero", 0), ("negative", -1), ("nan", np.nan))
    ),
    _q("input-inf", "one positive number", poked("quanto", "input_scale", np.inf)),
    _q("output-inf", "one positive number", poked("quanto", "output_scale", np.inf)),
    _q("input-two", "one positive number", {"input_scale": ones(2)}),
    *(
        refused(
            "quanto",
            f"activations-{i}",
            "activations of",
            poked("quanto", "input_scale", 2),
            **_at({"activations": value}),
        )
        for i, value in enumerate(("qint4", LONG, ["qint8"], {"a": 1}, 8, None))
    ),
    _q("ok-settings", None, **_at(["qint8"])),
    _q4("rows", "rows of bytes", {"weight._data._data": words(31, 96, dtype="uint8")}),
    _q4(
        "row",
        "no groups",
        {"weight._data._data": words(32, 95, dtype="uint8")},
        whole=True,
    ),
    _q4("scales", "no groups", {"weight._scale": ones(COLS - 1, 1)}, whole=True),
    _q4("shifts", "63 shifts", {"weight._shift": ones(COLS - 1, 1)}),
    _q4("shift-bool", "is bool", {"weight._shift": np.ones((COLS, 1), bool)}),
    _q4("ok-shift-below", None, {"weight._shift": -words(COLS, 1)}),
    _q4("ok-shift", None, {"weight._shift": words(COLS, 1, dtype="int64") << 32}),
    *(
        _q4(f"weights-{i}", "rows of bytes", **_at({"weights": value}))
        for i, value in enumerate(("qint2",))
    ),
    *(
        _q4(
            f"kind-{i}",
            "rows of bytes",
            {"weight._data._data": words(31, 96, dtype="uint8")},
            **_at({"weights": value}),
        )
        for i, value in enumerate((LONG, [LONG], 4, {"a": LONG}))
    ),
]

_o = functools.partial(case, "ao8")
_TYPES: dict[str, Any] = {
    "module": {"_type": "os.system", "_data": {"command": "touch pwned"}},
    "dunder": {"_type": "__import__", "_data": ["os"]},
    "text": "__import__('os').system('touch pwned')",
    "blocks": {"_type": "Int4WeightOnlyConfig", "_data": {"group_size": 2**62}},
    "negative": {"_type": "Int4WeightOnlyConfig", "_data": {"group_size": -1}},
    "nested": {"_type": {"_type": {"_type": ["a"]}}, "_data": [[[[[1]]]]]},
    "number": 5,
    "none": None,
    "long": "x" * 500_000,
}
_DATA, _TILES = "_weight_qdata", "_weight_scale_and_zero"
_AMD = {"default": {"_data": {"int4_tile_packed_ntile": 16}}}
TORCHAO = [
    *(_o(f"ok-type-{n}", quant_type={"default": kind}) for n, kind in _TYPES.items()),
    *(_o(f"ok-types-{i}", quant_type=kind) for i, kind in enumerate((4, [1], True))),
    *(
        _o(f"ok-metadata-{i}", metadata={f"{LAYER}.weight": raw})
        for i, raw in enumerate(('{"_type":"os.system"}', "[" * 50_000, "NaN", ""))
    ),
    _o("scales", "scales [64, 5]", {"_weight_scale": ones(COLS, 5)}),
    _o("scale-rows", "scales [63, 3]", {"_weight_scale": ones(COLS - 1, 3)}),
    _o("scale-rank", "scales [192]", {"_weight_scale": ones(COLS * 3)}),
    _o("scale-integers", "scales are int32", {"_weight_scale": words(COLS, 3)}),
    _o("zeros", "zero-points", {"_weight_zero_point": words(COLS, 2, dtype="int8")}),
    _o("zeros-nan", "not finite", {"_weight_zero_point": ones(COLS, 3) * np.nan}),
    refused("ao8", "rank", "one kernel", {"_weight_qdata": words(2, 3, 4)}),
    _o("tiles", "expected int32 [out / 8", {_TILES: ones(2)}),
    *(
        case("aotile", f"words-{i}", "expected int32 [out / 8", {_DATA: leaf})
        for i, leaf in enumerate((words(8, 3, 32, 3), words(8, 3, 31, 1), words(8, 96)))
    ),
    *(
        case("aotile", f"scales-{i}", "expected floats [groups, 64, 2]", {_TILES: leaf})
        for i, leaf in enumerate((ones(5, COLS, 2), ones(3, COLS), ones(3, 63, 2)))
    ),
    *(
        case("aotile", f"scale-{name}", "finite", poked("aotile", _TILES, value))
        for name, value in (("nan", np.nan), ("inf", np.inf), ("minus-inf", -np.inf))
    ),
    refused("aotile", "amd", "int4_tile_packed_ntile is 16", quant_type=_AMD),
    refused("ao8", "static", "one scale", {"_weight_act_quant_scale": ones(2)}),
    *(
        _o(
            f"static-{name}",
            "act_quant_scale is",
            {"_weight_act_quant_scale": number(value)},
        )
        for name, value in (("zero", 0), ("nan", np.nan), ("inf", np.inf), ("-1", -1))
    ),
    _o("before", "expected [96]", {"_weight_act_pre_scale": ones(ROWS - 1)}),
    _o("before-nan", "infinite", {"_weight_act_pre_scale": ones(ROWS) * np.nan}),
    case("ao4", "scales", "[5, 64]", {"_weight_scale": ones(5, COLS)}),
    case("ao4", "zeros", "zero-points", {"_weight_zero_point": ones(4, COLS)}),
    case(
        "ao4",
        "codes",
        "scales [3, 64] for codes",
        {"_weight_qdata": words(63, 48, dtype="int8")},
    ),
    refused("aof8", "scales", "is not read", {"_weight_scale": ones(3, 3)}),
    refused("aomx", "scales", "is not read", {"_weight_scale": ones(COLS, 4)}),
    refused(
        "aomx",
        "groups",
        "is not read",
        {"_weight_qdata": words(COLS, 47, dtype="uint8")},
    ),
    case(
        "aomx", "ok-tiles", None, {"_weight_scale": Raw("F8_E8M0", [512], b"~" * 512)}
    ),
    case("aonv", "zero", "positive", poked("aonv", "_weight_per_tensor_scale", 0)),
    case("aonv", "tiny", "positive", poked("aonv", "_weight_per_tensor_scale", 1e-45)),
    case("aonv", "two", "positive", {"_weight_per_tensor_scale": ones(2)}),
]

_x = functools.partial(case, "mlx")
_MANY: Any = {f"a{i}": {"bits": 4} for i in range(20_000)}
MLX = [
    *(
        refused("mlx", f"bits-{i}", "bits is not read", bits=bits)
        for i, bits in enumerate((0, 7, 9, -4, "4", [4], {"a": 4}, 10**18, 1e300))
    ),
    *(
        refused("mlx", f"mode-{i}", "mode", mode=mode)
        for i, mode in enumerate(("x", 3, ["affine"], LONG, None, True))
    ),
    *(
        _x(f"group-{i}", "fit no bits", group_size=size)
        for i, size in enumerate((0, -1, "32", 33, 32.0, [32], 2**62, None, 1))
    ),
    *(_x(f"width-{bits}", "fit no bits", bits=bits) for bits in (2, 4.0, True)),
    _x("own-bits", "[192, 64], expected [96, 64]", **_at({"bits": 2})),
    _x("own-group", "in groups of 64", **_at({"group_size": 64})),
    refused("mlx", "own-text", "bits is not read", **_at({"bits": "4"})),
    refused("mlx", "own-mode", "mode", **_at({"mode": ["mxfp4"]})),
    _x("ok-own-list", None, **_at([4])),
    _x("ok-own-false", None, **_at(False)),
    _x("ok-many", None, **_MANY),
    _x("words", "fit no bits", {"weight": words(COLS, 11, dtype="uint32")}),
    _x("scales", "fit no bits", {"scales": ones(COLS, 4)}),
    _x("outputs", "no affine layer", {"scales": ones(COLS - 1, GROUPS)}),
    _x("biases", "floats of one shape", {"biases": ones(COLS, 2)}),
    _x("scales-bytes", "floats of one shape", {"scales": words(COLS, 3, dtype="int8")}),
    _x(
        "overflow",
        "not finite",
        {
            "scales": ones(COLS, GROUPS, dtype="float32") * np.float32(1e-40),
            "biases": ones(COLS, GROUPS, dtype="float32") * np.float32(1e38),
        },
    ),
    *(
        case("mlx-mx", f"scales-{kind}", "expected uint8", {"scales": leaf})
        for kind in ("int8", "int32", "float16", "float32", "bool")
        for leaf in [np.ones((COLS, GROUPS), kind)]
    ),
    case("mlx-mx", "biases", "no biases", {"biases": ones(COLS, GROUPS)}),
    case("mlx-mx", "ok-mode", None, mode="nvfp4"),
    _x(
        "ok-other-key",
        None,
        top={
            "quantization_config": None,
            "quantization": {"group_size": 32, "bits": 4},
        },
    ),
    *(
        _x(
            f"key-{i}",
            "fit no bits",
            top={"quantization_config": None, "quantization": value},
        )
        for i, value in enumerate(([4], "4", {"bits": 4}, {"group_size": {}}))
    ),
]

_b = functools.partial(case, "bitnet")
BITNET = [
    *(
        _b(f"class-{i}", "linear_class is", linear_class=value)
        for i, value in enumerate(("x", 3, ["bitlinear"], LONG, None, {"a": 1}))
    ),
    *(
        refused("bitnet", f"mode-{i}", "quantization_mode", quantization_mode=value)
        for i, value in enumerate(("online", 3, [1], None))
    ),
    refused("bitnet", "norm", "use_rms_norm", use_rms_norm=True),
    _b("three", "fields of 3", poked("bitnet", "weight", 0b1100)),
    _b("zero", "finite positive", poked("bitnet", "weight_scale", 0)),
    _b("negative", "finite positive", poked("bitnet", "weight_scale", -1)),
    _b("two", "2 numbers", {"weight_scale": ones(2)}),
    _b("many", "64 numbers", {"weight_scale": ones(COLS)}),
    _b(
        "tiny",
        "finite positive",
        poked("bitnet", "weight_scale", 1e-45),
        linear_class="bitlinear",
    ),
    _b("int8", "uint8", {"weight": NIBBLES.view("int8")}),
    _b("shape", "wrong shape", {"weight": NIBBLES[:15] & 0x55}, whole=True),
]
CASES = [*ROUND, *HQQ, *QUANTO, *TORCHAO, *MLX, *BITNET]
