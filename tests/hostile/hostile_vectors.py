"""SpQR, AQLM, SqueezeLLM, EXL2 and EXL3: what their layers can get wrong."""

import functools
from typing import Any

import numpy as np
from hostile_bases import MORE, WIDE
from hostile_case import Case, Target, entry, model, safetensors_bytes
from hostile_layers import case, refused
from hostile_readers import FINITE
from hostile_tensors import COLS, GROUPS, LAYER, ROWS, ones, with_one, words

LONG = "x" * 3000


def _i32(*values: Any) -> np.ndarray:
    return np.array(values, "int64").astype("int32")


def _one(base: str, part: str, value: Any, at: int = 7) -> dict[str, Any]:
    return {part: with_one(MORE[base][1][part], value, at)}


_RISING = MORE["squeeze"][1]["rows"]
_OFFSETS: dict[str, Any] = {
    "falls": with_one(_RISING, 0),
    "beyond": np.append(_RISING[:-1], 9).astype("int32"),
    "short": _RISING - (_RISING == 8),
    "start": _RISING + (_RISING == 0),
    "negative": with_one(_RISING, -1, 0),
    "2^62": with_one(_RISING.astype("int64"), 2**62),
    "2^63": with_one(_RISING.astype("uint64"), 2**63),
    "2^64": with_one(_RISING.astype("uint64"), 2**64 - 1),
}
_s = functools.partial(case, "spqr")
SPQR = [
    *(
        refused("spqr", f"{name}-{i}", f"with {name}", **{name: value})
        for name in ("bits", "beta1", "beta2")
        for i, value in enumerate((4, "3", [3], None, True, LONG, 10**18, {}))
    ),
    *(
        _s(f"offsets-{name}", "that rise from 0 to 8", {"row_offsets": leaf})
        for name, leaf in _OFFSETS.items()
    ),
    _s("offsets-few", "are not the tiles", {"row_offsets": _RISING[-17:-1]}),
    _s("offsets-one", "with 1 row_offsets", {"row_offsets": _RISING[-1:]}),
    _s(
        "offsets-many",
        "with 100000 row_offsets",
        {"row_offsets": np.full(100_000, 8, "int32")},
    ),
    _s("words", "are not the tiles", {"dense_weights": words(383, dtype="int64")}),
    _s(
        "words-one",
        "1 words are not the tiles",
        {"dense_weights": words(1, dtype="int64")},
    ),
    _s("statistics", FINITE, _one("spqr", "dense_weights", 0x7C << 54, 2)),
    _s("outlier-nan", FINITE, _one("spqr", "col_vals", 0x7E00_0001)),
    _s("outlier-inf", FINITE, _one("spqr", "col_vals", 0x7C00_0001)),
    _s("outlier-beyond", "outliers at in", _one("spqr", "col_vals", 0x3800_0060)),
    _s("outlier-65535", "outliers at in", _one("spqr", "col_vals", 0x3800_FFFF)),
    _s("outliers-float", "expected int32", {"col_vals": ones(8, dtype="float32")}),
    _s("order-repeats", "is not a permutation", _one("spqr", "in_perm", 0)),
    _s("order-beyond", "is not a permutation", _one("spqr", "in_perm", -1)),
    _s(
        "order-short",
        "of the wrong shape",
        {"in_perm": MORE["spqr"][1]["in_perm"][1:]},
        whole=True,
    ),
]

_a = functools.partial(case, "aqlm")


def _codebooks(folder: Any) -> Target:
    """A codebook of 2^40 vectors without data."""
    header = {
        f"{LAYER}.codebooks": entry([2, 1 << 40, 1, 8], 0, 0, "F16"),
        f"{LAYER}.codes": entry([COLS, 12, 2], 0, 0, "I8"),
        f"{LAYER}.scales": entry([COLS, 1, 1, 1], 0, 0, "F16"),
    }
    config = {"model_type": "llama", "quantization_config": MORE["aqlm"][0]}
    return model(folder, config, model__safetensors=safetensors_bytes(header))


AQLM = [
    *(
        _a(f"ok-setting-{i}", nbits_per_codebook=value, num_codebooks=value)
        for i, value in enumerate((2**40, "8", [8], -1, None, 1e300, LONG))
    ),
    *(
        refused(
            "aqlm",
            f"levels-{n}",
            "vectors per codebook",
            {"codebooks": ones(2, n, 1, 8)},
        )
        for n in (1, 3, 255, 2**17)
    ),
    Case("packed-aqlm-levels-2^40", "packed", _codebooks, message="needs"),
    refused("aqlm", "outputs", "out_group_size 1", {"codebooks": ones(2, 256, 2, 8)}),
    _a("group", "not empty", {"codebooks": ones(2, 256, 1, 0)}),
    _a("books", "do not fit 3 codebooks", {"codebooks": ones(3, 256, 1, 8)}),
    refused(
        "aqlm",
        "many",
        "99 codebooks",
        {"codebooks": ones(99, 4, 1, 8), "codes": words(COLS, 12, 99, dtype="int8")},
    ),
    _a("rank", "rank 4", {"codebooks": ones(2, 256, 8)}),
    _a("codes-rank", "rank 3", {"codes": words(COLS, 24, dtype="int8")}),
    _a("codes", "wrong shape", {"codes": words(COLS, 11, 2, dtype="int8")}, whole=True),
    _a("scales", "[out, 1, 1, 1]", {"scales": ones(COLS - 1, 1, 1, 1)}),
    _a("scales-wide", "[out, 1, 1, 1]", {"scales": ones(COLS, 1, 1, 2)}),
    refused(
        "aqlm", "double", "float64", {"codebooks": ones(2, 256, 1, 8, dtype="float64")}
    ),
]

_q = functools.partial(case, "squeeze")
SQUEEZE = [
    *(
        _q(f"rows-{name}", "that rise from 0 to 8", {"rows": leaf})
        for name, leaf in _OFFSETS.items()
    ),
    _q("rows-few", "expected 65 offsets", {"rows": _RISING[-9:]}),
    _q("cols-short", "has 7 entries", {"cols": np.arange(7)}),
    *(
        _q(f"cols-{name}", "outliers at in", {"cols": leaf})
        for name, leaf in (
            ("beyond", np.arange(8) + ROWS),
            ("negative", np.arange(8) - 1),
            ("2^62", np.arange(8) + 2**62),
            ("2^63", np.arange(8).astype("uint64") + 2**63),
        )
    ),
    *(
        _q(f"table-{name}", "expected [64, 2**bits]", {"lookup_table": leaf})
        for name, leaf in (
            ("15", ones(COLS, 15)),
            ("17", ones(COLS, 17)),
            ("2", ones(COLS, 2)),
            ("512", ones(COLS, 512)),
            ("rows", ones(COLS - 1, 16)),
        )
    ),
    _q("table-1", "expected [64, 2**bits]", {"lookup_table": ones(COLS, 1)}),
    _q("table-double", "float64", {"lookup_table": ones(COLS, 16, dtype="float64")}),
    _q("table-width", "do not hold whole codes", {"lookup_table": ones(COLS, 32)}),
    _q("words", "wrong shape", {"qweight": words(13, COLS)}, whole=True),
    _q("whole", "expected [96, 2]", {"full_rows": ones(ROWS - 1, 2)}),
    _q("whole-count", "expected [96, 2]", {"full_rows": ones(ROWS, 3)}),
    *(
        _q(
            f"whole-{value}",
            "outputs below 64",
            {"full_row_indices": np.array([3, value])},
        )
        for value in (COLS, -1, 2**62, -(2**62))
    ),
    _q(
        "whole-2^63",
        "outputs below",
        {"full_row_indices": np.array([3, 2**63], "uint64")},
    ),
]

_e = functools.partial(case, "exl2")
_PAIRS = "expected pairs of bits and first words"
_GROUPS: dict[str, Any] = {
    "odd": (_PAIRS, 5, 0, 4, 5, 4),
    "start": (_PAIRS, 5, 1, 4, 5, 4, 9),
    "falls": ("group 0 has 9 words", 5, 0, 4, 9, 4, 5),
    "same": ("group 1 has 0 words", 5, 0, 4, 5, 4, 5),
    "beyond": ("group 1 has 9 words", 5, 0, 4, 5, 4, 14),
    "end": ("group 2 has 0 words", 5, 0, 4, 5, 4, 13),
    "65535": ("group 1 has 65530 words", 5, 0, 4, 5, 4, -1),
    "width": (
        "group 2 has 4 words for 32 inputs or some of them with 3 bits",
        5,
        0,
        4,
        5,
        3,
        9,
    ),
    "bits-0": ("with 0 bits", 0, 0, 4, 5, 4, 9),
    "bits-7": ("with 7 bits", 5, 0, 7, 5, 4, 9),
    "bits-65535": ("with 65535 bits", -1, 0, 4, 5, 4, 9),
    "rest": ("group 0 has 6 words", 5, 0, 4, 6, 4, 9),
    "few": ("do not fit 2 groups", 5, 0, 4, 5),
    "many": ("group 3 has 0 words", 5, 0, 4, 5, 4, 9, 4, 13),
}
_ALTERNATING = [(4, 3)[i % 2] for i in range(300)]
EXL2 = [
    *(
        _e(f"groups-{name}", what, {"q_groups": np.array(values, "int16")})
        for name, (what, *values) in _GROUPS.items()
    ),
    _e("groups-2^62", "q_groups", {"q_groups": np.array([5, 2**62, 4, 5, 4, 9])}),
    refused(
        "exl2",
        "runs",
        "300 runs of equal groups",
        {
            "q_weight": words(sum(_ALTERNATING), COLS),
            "q_groups": np.array(
                [
                    n
                    for i, b in enumerate(_ALTERNATING)
                    for n in (b, sum(_ALTERNATING[:i]))
                ],
                "int16",
            ),
            "q_scale": words(300, COLS // 8),
            "q_scale_max": ones(300),
            "q_invperm": np.arange(300 * 32, dtype="int16"),
        },
    ),
    _e("words", "q_groups", {"q_weight": words(12, COLS)}),
    _e("scales", "do not fit 3 groups", {"q_scale": words(GROUPS, 7)}),
    _e("scales-groups", "do not fit 3 groups", {"q_scale": words(4, COLS // 8)}),
    _e("most", "do not fit 3 groups", {"q_scale_max": ones(4)}),
    _e("most-double", "infinite", {"q_scale_max": ones(3, dtype="float64") * 1e300}),
    *(
        _e(f"order-{name}", "is not a permutation of 0..95", {"q_invperm": leaf})
        for name, leaf in (
            ("repeats", np.zeros(ROWS, "int16")),
            ("beyond", np.arange(1, ROWS + 1)),
            ("negative", _i32(*range(-1, ROWS - 1))),
            ("65535", with_one(np.arange(ROWS, dtype="int16"), -1)),
            ("2^63", np.arange(ROWS).astype("uint64") + 2**63),
        )
    ),
    _e("order-short", "wrong shape", {"q_invperm": np.arange(ROWS - 1)}, whole=True),
    _e("order-long", "q_groups", {"q_invperm": np.arange(ROWS + 1)}),
    _e(
        "order-other",
        "q_perm: is not a",
        {"q_perm": np.zeros(ROWS, "int16"), "q_invperm": None},
    ),
]

_t = functools.partial(case, "exl3")
EXL3 = [
    *(
        _t(f"words-{n}", "words per tile", {"trellis": words(8, 8, n, dtype="int16")})
        for n in (1, 15, 17, 63, 65, 144, 1024)
    ),
    refused("exl3", "half", "4.5 bits", {"trellis": words(8, 8, 72, dtype="int16")}),
    _t("tiles", "multiples of 128", {"trellis": words(7, 8, 64, dtype="int16")}),
    _t("tiles-out", "multiples of 128", {"trellis": words(8, 9, 64, dtype="int16")}),
    *(
        refused("exl3", f"hash-{i}", ".mcg: is", {"mcg": leaf})
        for i, leaf in enumerate(
            (
                _i32(0),
                _i32(-1),
                words(2),
                np.array(2**62),
                np.array(2**64 - 1, "uint64"),
            )
        )
    ),
    _t("hash-empty", "not empty", {"mcg": _i32()}),
    _t("hash-float", "integer", {"mcg": ones(1)}),
    refused("exl3", "hash-other", ".mul1: is", {"mcg": None, "mul1": _i32(7)}),
    _t("hash-both", "both mcg and mul1", {"mul1": _i32(7)}),
    *(
        _t(f"{side}-{size}", f"has {size} numbers", {side: ones(size)})
        for side in ("suh", "svh")
        for size in (1, WIDE - 1, WIDE + 1)
    ),
    _t("signs", "has 7 numbers", {"suh": None, "su": words(7, dtype="int16")}),
    _t("ok-signs", None, {"suh": None, "su": words(8, dtype="int16")}),
]
CASES = [*SPQR, *AQLM, *SQUEEZE, *EXL2, *EXL3]
