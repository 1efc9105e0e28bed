"""FP8, FBGEMM, ModelOpt, Quark, FP-Quant, gpt-oss: what layers can get wrong."""

import functools
from typing import Any

import numpy as np
from hostile_bases import EXPONENTS, FLOAT8, NIBBLES, NV, number, sylvester
from hostile_layers import case, refused
from hostile_tensors import COLS, GROUPS, LAYER, ROWS, Raw, ones, words

LONG = "x" * 3000
_E5M2 = Raw("F8_E5M2", FLOAT8.shape, FLOAT8.data)
_FLAT = Raw("F8_E4M3", [COLS * ROWS], FLOAT8.data)
_CUT = Raw("F8_E4M3", [COLS, 48], FLOAT8.data[: COLS * 48])
_NO_NUMBERS = {
    "zero": number(0),
    "negative": number(-1),
    "nan": number(np.nan),
    "inf": number(np.inf),
}


def _f32(*shape: int) -> np.ndarray:
    return ones(*shape, dtype="float32")


_k, _s = functools.partial(case, "block"), functools.partial(case, "static")
_BLOCKS = ([64, 64], [128], "x", {"a": 1}, 10**18, [2**62, 2**62], True, [[128]], LONG)
FP8 = [
    *(
        refused("block", f"size-{i}", "weight_block_size", weight_block_size=size)
        for i, size in enumerate(_BLOCKS)
    ),
    *(
        _k(f"scheme-{i}", "activation_scheme is", activation_scheme=value)
        for i, value in enumerate(("x", ["dynamic"], 3, LONG, True, {}))
    ),
    refused(
        "block", "scales", "with scales [2, 1] is not", {"weight_scale_inv": _f32(2, 1)}
    ),
    refused(
        "block", "scales-rank", "is not read", {"weight_scale_inv": _f32(64, 96, 1)}
    ),
    refused("block", "weights-float", "is not read", {"weight": ones(COLS, ROWS)}),
    _k(
        "scales-bytes", "expected uint8 [64, 3]", {"weight_scale_inv": EXPONENTS[:, :2]}
    ),
    _k("scales-integers", "scales of int32", {"weight_scale_inv": words(1, 1)}),
    _k(
        "scales-float64",
        "scales of float64",
        {"weight_scale_inv": ones(1, 1, dtype="float64")},
    ),
    _k("weights-bytes", "has scales float32", {"weight": NIBBLES}),
    _k("weights-words", "expected bytes", {"weight": words(COLS, ROWS)}),
    _k("weights-rank", "rank 2", {"weight": _FLAT}),
    _k("both", "has both", {"weight_scale": number(1)}),
    _k("shape", "wrong shape", {"weight": _CUT}, whole=True),
    *(
        _s(f"input-{name}", "scale of activations is", {"input_scale": leaf})
        for name, leaf in _NO_NUMBERS.items()
    ),
    _s("input-words", "floating", {"input_scale": words(1)}),
    refused("static", "scales", "is not read", {"weight_scale": _f32(2)}),
    refused("fbgemm", "scales", "is not read", {"weight_scale": _f32(COLS - 1, 1)}),
    refused("fbgemm", "scales-row", "is not read", {"weight_scale": _f32(1, COLS)}),
    case("fbgemm", "e5m2", "float8_e4m3fn", {"weight": _E5M2}),
    case("fbgemm", "bytes", "float8_e4m3fn", {"weight": NIBBLES}),
    case("fbgemm", "scales-rank", "rank 2", {"weight_scale": _f32(COLS)}),
]

_o8, _o4 = functools.partial(case, "opt8"), functools.partial(case, "opt4")
MODELOPT = [
    *(
        refused("opt8", f"refused-{i}", "is not read", quant_algo=name)
        for i, name in enumerate(
            ("INT4_AWQ", "W4A8_AWQ", "W8A8_SQ_PER_CHANNEL", "W4A16_AWQ" + LONG)
        )
    ),
    *(
        _o8(f"algorithm-{i}", "quant_algo is", quant_algo=value)
        for i, value in enumerate((8, ["FP8"], {"a": LONG}, True, 1e300))
    ),
    *(
        _o8(f"layers-{i}", "quantized_layers is", quantized_layers=value)
        for i, value in enumerate(([LAYER], LAYER, 5))
    ),
    _o8("layer", f"{LAYER} is", quantized_layers={LAYER: ["FP8"]}),
    _o8("inner", "quantization is", quantization=[{"quant_algo": "FP8"}]),
    *(
        _o8(f"input-{name}", "scale of activations is", {"input_scale": leaf})
        for name, leaf in _NO_NUMBERS.items()
    ),
    refused("opt8", "second", "are not those of", {"weight_scale_2": number(1)}),
    refused("opt8", "e5m2", "are not those of", {"weight": _E5M2}),
    refused("opt8", "scales", "is not read", {"weight_scale": _f32(COLS - 1)}),
    refused("opt8", "tiles", "is not read", {"weight_scale": _f32(2, 1, 1, 1)}),
    *(
        _o4(f"second-{name}", "one positive number", {"weight_scale_2": leaf})
        for name, leaf in _NO_NUMBERS.items()
    ),
    _o4("second-two", "one positive number", {"weight_scale_2": _f32(2)}),
    _o4("second-tiny", "one positive number", {"weight_scale_2": number(1e-45)}),
    _o4("scales-float", "expected float8_e4m3fn", {"weight_scale": _f32(COLS, 6)}),
    _o4("scales-bytes", "expected float8_e4m3fn", {"weight_scale": EXPONENTS}),
    _o4("without-second", "expected uint8 [64, 3]", {"weight_scale_2": None}),
    _o4("before", "expected 96", {"pre_quant_scale": ones(ROWS - 1)}),
    _o4("before-empty", "not empty", {"pre_quant_scale": ones(0)}),
]

_u, _ui = functools.partial(case, "quark"), functools.partial(case, "quark-int")
_key: Any = lambda key, value: {key: value}  # noqa: E731
_CHAIN = [{"dtype": "fp8_e4m3"}, {"dtype": "fp4"}]
QUARK = [
    *(
        _u(f"{key}-{i}", f"{key} is", **_key(key, value))
        for key in ("global_quant_config", "layer_quant_config")
        for i, value in enumerate(([1], LONG, 5, True))
    ),
    *(
        _u(f"ok-pattern-{i}", None, layer_quant_config={pattern: {}})
        for i, pattern in enumerate(
            ("*" * 5000, "[", "[!" * 2000, "*a" * 2000, "[z-a]", "?" * 5000, "(a+)+$")
        )
    ),
    *(
        refused(
            "quark", f"kind-{i}", "are not read", global_quant_config={"weight": kind}
        )
        for i, kind in enumerate(
            (_CHAIN, {"dtype": "int4"}, {"dtype": LONG[:500]}, {"dtype": "mxfp6"})
        )
    ),
    *(
        _u(f"ok-kind-{i}", None, global_quant_config={"weight": kind})
        for i, kind in enumerate(
            ([], None, {}, {"dtype": 8}, {"dtype": ["fp8"]}, "fp8")
        )
    ),
    _u("layer", f"{LAYER} is", layer_quant_config={LAYER: 5}),
    *(
        _u(f"input-{name}", "scale of activations is", {"input_scale": leaf})
        for name, leaf in _NO_NUMBERS.items()
    ),
    refused("quark", "scales", "is not read", {"weight_scale": _f32(2)}),
    refused("quark", "weights", "are not read", {"weight": ones(COLS, ROWS)}),
    case("quark4", "scales", "expected uint8 [64, 3]", {"weight_scale": EXPONENTS[:9]}),
    refused("quark4", "scales-float", "are not read", {"weight_scale": _f32(COLS, 3)}),
    _ui("scales", "scales have shape [1, 63]", {"weight_scale": _f32(COLS - 1)}),
    _ui(
        "zeros",
        "zero-points have shape [1, 63]",
        {"weight_zero_point": np.zeros(COLS - 1, "int8")},
    ),
    *(
        _ui(
            f"zeros-{name}",
            "weight_zero_point",
            {"weight_zero_point": _f32(COLS) * value},
        )
        for name, value in (("half", 1), ("nan", np.nan), ("1e30", 1e30))
    ),
]

_p, _pm = functools.partial(case, "fpq"), functools.partial(case, "fpq-mx")
_MATRIX = "forward_hadamard_matrix"
FP_QUANT = [
    *(
        refused("fpq", f"kind-{i}", "forward_dtype", forward_dtype=value)
        for i, value in enumerate(("x", ["nvfp4"], 4, LONG, True))
    ),
    refused("fpq", "pseudo", "pseudoquantization", pseudoquantization=True),
    *(
        _p(f"global-{name}", "one positive number", {"weight_global_scale": leaf})
        for name, leaf in _NO_NUMBERS.items()
    ),
    _p("global-two", "one positive number", {"weight_global_scale": _f32(2)}),
    _pm("global-tiny", "one positive number", {"weight_global_scale": number(1e-45)}),
    _p("scales", "has scales", {"scales": EXPONENTS}),
    _p("kind", "has scales", forward_dtype="mxfp4"),
    _pm("scales", "expected uint8 [64, 3]", {"scales": EXPONENTS[:, :2]}),
    _p("matrix-shape", "expected [h, h]", {_MATRIX: ones(32, 31)}),
    _p("matrix-size", "a divisor of 96", {_MATRIX: sylvester(64)}),
    _p("matrix-large", "at most 1024", {_MATRIX: np.zeros((2048, 2048), "float16")}),
    *(
        refused("fpq", f"matrix-{name}", "is neither", {_MATRIX: leaf})
        for name, leaf in (
            ("nan", ones(32, 32) * np.nan),
            ("inf", ones(32, 32) * np.inf),
            ("zeros", ones(32, 32) * 0),
            ("three", ones(3, 3)),
            ("negative", -sylvester(32)),
        )
    ),
    case("fpq", "ok-identity", None, {_MATRIX: np.eye(32, dtype="float16")}),
]

_g = functools.partial(case, "oss")
OSS = [
    _g("size", "blocks are", {"blocks": words(COLS, GROUPS, 15, dtype="uint8")}),
    _g("rank-2", "expected rank 3 or 4", {"blocks": words(COLS, 16, dtype="uint8")}),
    _g("rank-1", "expected rank 3 or 4", {"blocks": words(COLS, dtype="uint8")}),
    _g(
        "rank-5",
        "expected rank 3 or 4",
        {"blocks": words(1, 1, 4, 3, 16, dtype="uint8")},
    ),
    _g("int8", "expected uint8", {"blocks": words(COLS, 3, 16, dtype="int8")}),
    _g("scales", "as the blocks", {"scales": EXPONENTS[:, :2]}),
    _g("scales-rank", "as the blocks", {"scales": EXPONENTS[..., None]}),
    _g("scales-float", "expected uint8", {"scales": _f32(COLS, GROUPS)}),
    _g(
        "ok-experts",
        None,
        {
            "blocks": words(2, COLS, GROUPS, 16, dtype="uint8"),
            "scales": np.stack([EXPONENTS] * 2),
        },
    ),
    _g(
        "experts",
        "wrong shape",
        {"blocks": words(1, COLS, 3, 16, dtype="uint8"), "scales": EXPONENTS[None]},
        whole=True,
    ),
    _g("nv", "expected uint8", {"scales": NV}),
]
CASES = [*FP8, *MODELOPT, *QUARK, *FP_QUANT, *OSS]
