"""What every reader has to refuse: parts that are missing, of a wrong kind, not finite.

`hostile_integers`, `hostile_floats` and `hostile_vectors` have what is particular.
"""

from typing import Any

import numpy as np
from hostile_bases import MORE, WIDE
from hostile_layers import BASES, case
from hostile_tensors import Raw, ones, with_one, words

FINITE = "are infinite or NaN, the first at index ["
_ZERO, _POSITIVE, _INPUTS = "is not finite", "one positive number", "scale of activ"


def poked(base: str, part: str, value: Any) -> dict[str, Any]:
    """The first number of a part changed; the first byte of what NumPy has not."""
    leaf = BASES[base][1][part]
    if isinstance(leaf, Raw):
        return {part: Raw(leaf.dtype, leaf.shape, bytes([value]) + leaf.data[1:])}
    return {part: with_one(leaf, value, 0)}


_FLOATS = {
    "round": {"scales": FINITE},
    "hqq": {"scale": FINITE, "zero": _ZERO},
    "hqq-meta": {"meta_scale.scale": "infinite or NaN", "meta_zero.zero": _ZERO},
    "quanto": {"weight._scale": FINITE},
    "quanto4": {"weight._scale": "finite", "weight._shift": _ZERO},
    "ao8": {"_weight_scale": FINITE},
    "ao4": {"_weight_scale": "finite", "_weight_zero_point": _ZERO},
    "aof8": {"_weight_scale": FINITE},
    "aonv": {"_weight_per_tensor_scale": _POSITIVE},
    "mlx": {"scales": "finite", "biases": _ZERO},
    "block": {"weight_scale_inv": FINITE},
    "static": {"weight_scale": FINITE, "input_scale": _INPUTS},
    "fbgemm": {"weight_scale": FINITE},
    "opt8": {"weight_scale": FINITE, "input_scale": _INPUTS},
    "opt4": {"weight_scale_2": _POSITIVE, "pre_quant_scale": FINITE},
    "quark": {"weight_scale": FINITE, "input_scale": _INPUTS},
    "quark-int": {"weight_scale": FINITE},
    "fpq": {"weight_global_scale": _POSITIVE},
    "bitnet": {"weight_scale": "one finite positive"},
    "aqlm": {"codebooks": FINITE, "scales": FINITE},
    "vptq": {
        "centroids.weight": FINITE,
        "res_centroids.weight": FINITE,
        "weight_scale": FINITE,
        "weight_bias": FINITE,
    },
    "vptq16": {"outlier_centroids.weight": FINITE},
    "squeeze": {"lookup_table": FINITE, "vals": FINITE, "full_rows": FINITE},
    "exl2": {"q_scale_max": FINITE},
    "exl3": {"suh": FINITE, "svh": FINITE},
}
_INVALID = {"nan": np.nan, "inf": np.inf, "minus-inf": -np.inf}
_VALID = {"zero": 0.0, "negative": -0.5, "subnormal": 6e-8, "largest": 65504.0}
_BYTES = {
    "aof8": ("_weight_qdata", 0x7F),
    "aomx": ("_weight_scale", 0xFF),
    "aonv": ("_weight_scale", 0x7F),
    "mlx-mx": ("scales", 0xFF),
    "block": ("weight", 0xFF),
    "static": ("weight", 0x7F),
    "fbgemm": ("weight", 0xFF),
    "opt8": ("weight", 0x7F),
    "opt4": ("weight_scale", 0x7F),
    "quark": ("weight", 0x7F),
    "quark4": ("weight_scale", 0xFF),
    "fpq": ("scales", 0x7F),
    "fpq-mx": ("scales", 0xFF),
    "oss": ("scales", 0xFF),
}
SCALES = [
    *(
        case(base, f"{part}-{name}", message, poked(base, part, value))
        for base, parts in _FLOATS.items()
        for part, message in parts.items()
        for name, value in _INVALID.items()
    ),
    *(
        case(base, f"ok-{part}-{name}", None, poked(base, part, value))
        for base, parts in _FLOATS.items()
        for part, message in parts.items()
        for name, value in _VALID.items()
        if message == FINITE
    ),
    *(
        case(base, f"{part}-nan", FINITE, poked(base, part, value))
        for base, (part, value) in _BYTES.items()
    ),
]

_NEEDED = {
    "round": ("qzeros", "scales"),
    "hqq": ("nbits", "axis", "shape", "scale", "zero"),
    "hqq-meta": ("scale_q", "zero_q", "meta_scale.scale", "meta_zero.nbits"),
    "quanto": ("weight._scale",),
    "quanto4": ("weight._scale", "weight._shift"),
    "ao8": ("_weight_scale",),
    "mlx": ("weight", "biases"),
    "mlx-mx": ("weight",),
    "block": ("weight",),
    "static": ("weight", "input_scale"),
    "fbgemm": ("weight",),
    "opt8": ("weight",),
    "opt4": ("weight",),
    "quark": ("weight",),
    "fpq": ("scales", "weight_global_scale", "forward_hadamard_matrix"),
    "oss": ("scales",),
    "bitnet": ("weight",),
    "spqr": ("row_offsets", "col_vals", "in_perm"),
    "aqlm": ("codes", "scales"),
    "vptq": ("indices", "res_centroids.weight"),
    "vptq16": ("outlier_indices", "outlier_centroids.weight"),
    "squeeze": ("qweight", "rows", "cols", "vals", "full_rows", "full_row_indices"),
    "exl2": ("q_groups", "q_scale", "q_scale_max", "q_invperm"),
    "exl3": ("suh", "svh"),
}
_MARKS = {
    "round": "qweight",
    "hqq": "W_q",
    "quanto": "weight._data",
    "ao8": "_weight_qdata",
    "mlx": "scales",
    "block": "weight_scale_inv",
    "static": "weight_scale",
    "fbgemm": "weight_scale",
    "opt8": "weight_scale",
    "opt4": "weight_scale",
    "quark": "weight_scale",
    "fpq": "qweight",
    "oss": "blocks",
    "bitnet": "weight_scale",
    "spqr": "dense_weights",
    "aqlm": "codebooks",
    "vptq": "centroids.weight",
    "squeeze": "lookup_table",
    "exl2": "q_weight",
}
"""Without this part nothing belongs to a layer, which shows when a model is loaded."""
PARTS = [
    *(
        case(base, f"without-{part}", part.rpartition("_weight_")[2], {part: None})
        for base, parts in _NEEDED.items()
        for part in parts
    ),
    *(
        case(base, f"without-{part}", "up_proj.weight", {part: None}, whole=True)
        for base, part in _MARKS.items()
    ),
    *(
        case(base, f"empty-{part}", "not empty", {part: np.zeros((0, 64), "uint8")})
        for base, part in _MARKS.items()
    ),
    *(
        case(base, f"rank-{part}", "expected", {part: words(2, 3, 4, 2, dtype="uint8")})
        for base, part in _MARKS.items()
        if base not in ("oss", "aqlm", "ao8")
    ),
]
_TYPED = {
    "round": ("qweight", "qzeros"),
    "hqq": ("shape", "axis"),
    "quanto4": ("weight._data._data",),
    "mlx": ("weight",),
    "fbgemm": ("weight",),
    "fpq": ("qweight", "scales"),
    "oss": ("blocks",),
    "bitnet": ("weight",),
    "spqr": ("dense_weights", "row_offsets", "in_perm"),
    "aqlm": ("codes",),
    "vptq": ("perm",),
    "exl2": ("q_groups", "q_invperm", "q_scale"),
    "squeeze": ("rows", "cols", "full_row_indices"),
    "exl3": ("trellis",),
}
_DOUBLES = {
    "round": "scales",
    "hqq": "scale",
    "quanto": "weight._scale",
    "quark-int": "weight_scale",
    "squeeze": "lookup_table",
}
KINDS = [
    *(
        case(base, f"{part}-{kind}", f"{part}: is {kind}", {part: leaf})
        for base, parts in _TYPED.items()
        for part in parts
        for kind in ("float64", "bool")
        for leaf in [ones(*BASES[base][1][part].shape, dtype=kind)]
    ),
    *(
        case(base, f"{part}-double", "_dtype is 'float64'", {part: leaf})
        for base, part in _DOUBLES.items()
        for leaf in [ones(*BASES[base][1][part].shape, dtype="float64")]
    ),
]
MODELS = [
    *(case(base, "ok", whole=True) for base in MORE if base != "exl3"),
    case(
        "exl3",
        "other-shape",
        f"({WIDE}, {WIDE}), expected (64, 96)",
        whole=True,
    ),
]
CASES = [*(case(base, "ok") for base in MORE), *SCALES, *PARTS, *KINDS, *MODELS]
