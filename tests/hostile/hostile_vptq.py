"""VPTQ: what its layers and the settings of each can get wrong."""

import functools
from typing import Any

import numpy as np
from hostile_bases import MORE, OUTLIERS, VPTQ
from hostile_layers import case, refused
from hostile_tensors import COLS, LAYER, ROWS, ones, with_one, words

LONG = "x" * 3000


def _one(part: str, value: Any) -> dict[str, Any]:
    return {part: with_one(MORE["vptq16"][1][part], value)}


_v, _w = functools.partial(case, "vptq"), functools.partial(case, "vptq16")
_layers: Any = lambda own: {"config_for_layers": {LAYER: own}}  # noqa: E731
_NUMBERS = ("8", 8.0, True, -2, 2**31, 2**62, 1e300, [8], [[8], [8]], {"a": 8})
CASES = [
    *(
        _v(f"{key}-{i}", f"{key} is", **_layers(VPTQ | {key: value}))
        for key in ("in_features", "group_size", "num_centroids", "vector_lens")
        for i, value in enumerate(_NUMBERS)
    ),
    *(
        _v(
            f"pair-{i}",
            "num_centroids is",
            **_layers(VPTQ | {"num_centroids": [-1, value]}),
        )
        for i, value in enumerate(_NUMBERS)
    ),
    *(
        refused(
            "vptq",
            f"levels-{n}",
            "vectors per codebook",
            **_layers(VPTQ | {"num_centroids": [-1, n]}),
        )
        for n in (0, -1, 1, 3, 255, 2**17, 2**30)
    ),
    *(
        refused(
            "vptq",
            f"inputs-{n}",
            "that are all inputs",
            **_layers(VPTQ | {"in_features": n}),
        )
        for n in (0, 95, 2**30)
    ),
    *(
        refused(
            "vptq",
            f"dimension-{i}",
            "vectors along",
            **_layers(VPTQ | {"vector_quant_dim": value}),
        )
        for i, value in enumerate(("in", ["out"], 0, None, LONG))
    ),
    refused(
        "vptq",
        "groups",
        "with 1073741824 groups",
        **_layers(VPTQ | {"group_num": 2**30}),
    ),
    _v("outputs", "has shape", **_layers(VPTQ | {"out_features": 2**30})),
    _v("outputs-off", "has shape", **_layers(VPTQ | {"out_features": COLS + 8})),
    refused(
        "vptq",
        "outputs-rest",
        "do not divide",
        **_layers(VPTQ | {"out_features": COLS - 1}),
    ),
    _v("vector", "has shape", **_layers(VPTQ | {"vector_lens": [-1, 2**30]})),
    _v(
        "outliers",
        "in=96",
        None,
        "UnsupportedError",
        **_layers(OUTLIERS | {"outlier_size": 97}),
    ),
    *(
        _v(f"layers-{i}", "config_for_layers is", config_for_layers=value)
        for i, value in enumerate(([VPTQ], LONG, 5, True))
    ),
    *(
        _v(f"layer-{i}", "expected an object", **_layers(v))
        for i, v in enumerate(([1], LONG, 5))
    ),
    *(
        _v(f"none-{i}", "has no config_for_layers", config_for_layers=v)
        for i, v in enumerate(({}, None))
    ),
    _v("other", "does not name it", config_for_layers={"model.x": VPTQ}),
    _v("ok-shared", None, config_for_layers={}, shared_layer_config={"up_proj": VPTQ}),
    _v(
        "ok-many",
        None,
        config_for_layers={LAYER: VPTQ} | {f"a{i}": VPTQ for i in range(2000)},
    ),
    *(
        _v(f"order-{name}", "is not a permutation", {"perm": leaf})
        for name, leaf in (
            ("repeats", np.zeros(ROWS, "uint16")),
            ("beyond", np.arange(1, ROWS + 1)),
            ("negative", np.arange(ROWS) - 1),
            ("2^63", np.arange(ROWS).astype("uint64") + 2**63),
            ("int16", -np.arange(ROWS).astype("int16")),
        )
    ),
    _v("order-short", "perm has shape", {"perm": np.arange(ROWS - 1)}),
    _v("words", "indices has shape", {"indices": words(1, 8, 35)}),
    _v("words-int64", "not [1, 8, 96]", {"indices": words(1, 8, 36, dtype="int64")}),
    _v("words-int8", "not [1, 8, 96]", {"indices": words(1, 8, 36, dtype="int8")}),
    _v("centroids", "centroids.weight has", {"centroids.weight": ones(1, 2047)}),
    _v("residuals", "res_centroids.weight has", {"res_centroids.weight": ones(1, 127)}),
    _v("extra", "outlier_indices", {"outlier_indices": words(1, 1, 1, dtype="int16")}),
    _w("index", "index 256 outside 0..255", _one("indices", 256)),
    _w("index-65535", "index 65535 outside", _one("indices", 65535)),
    _w("outlier", "index 16 outside 0..15", _one("outlier_indices", 16)),
    _w("outlier-words", "16-bit", {"outlier_indices": words(1, 16, 32)}),
    refused(
        "vptq16",
        "outlier-vector",
        "do not divide",
        {
            "outlier_indices": words(1, 13, 32, dtype="uint16") & 15,
            "outlier_centroids.weight": ones(1, 80),
        },
        **_layers(OUTLIERS | {"vector_lens": [5, 8]}),
    ),
    _w("scales", "weight_scale has", {"weight_scale": ones(ROWS - 1)}),
]
