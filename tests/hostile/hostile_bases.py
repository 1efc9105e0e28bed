"""Valid layers of the other packings; `[in=96, out=64]` unless a format forbids it."""

from typing import Any

import numpy as np
from hostile_tensors import COLS, GROUP, GROUPS, LAYER, ROWS, Raw, ones, text, words

WIDE = 128
"""Inputs and outputs of EXL3's layer, whose Hadamard blocks have this size."""
FLOAT8 = Raw("F8_E4M3", [COLS, ROWS], bytes(range(96)) * COLS)
NV = Raw("F8_E4M3", [COLS, ROWS // 16], b"\x38" * (COLS * ROWS // 16))
MX = Raw("F8_E8M0", [COLS, GROUPS], b"\x7e" * (COLS * GROUPS))
NIBBLES = words(COLS, ROWS // 2, dtype="uint8")
EXPONENTS = np.full((COLS, GROUPS), 126, np.uint8)
MATRICES = ROWS * COLS // GROUP
ORDER = np.arange(ROWS)[::-1]


def number(value: Any, dtype: str = "float32") -> np.ndarray:
    """A tensor of rank 0."""
    return np.array(value, dtype)


def sylvester(size: int) -> np.ndarray:
    """Hadamard's matrix over the root of its size, float16."""
    made = np.ones((1, 1))
    while len(made) < size:
        made = np.block([[made, made], [made, -made]])
    return (made / np.sqrt(size)).astype("float16")


def _spqr_words() -> np.ndarray:
    """Tiles with statistics of 0.5 and arbitrary codes."""
    tiles = words(COLS // 16, ROWS // 16, 16, dtype="int64") << 6 & (1 << 54) - 1
    tiles[..., [2, 6]] |= 0x38 << 54
    return tiles.reshape(-1)


def _halves(index: Any) -> np.ndarray:
    """Pairs of 16-bit numbers in 32-bit words."""
    return np.asarray(index).astype("uint16").view("int32")


def _hqq(**more: Any) -> dict[str, Any]:
    return {
        "nbits": number(4, "int32"),
        "axis": number(1, "int32"),
        "group_size": number(GROUP, "int32"),
        "shape": np.array([COLS, ROWS]),
        "packing": text(b"4bit_u8"),
        "compute_dtype": text(b"torch.float16"),
        "view_as_float": number(0, "uint8"),
        **more,
    }


def _meta(name: str) -> dict[str, Any]:
    """Statistics as codes with one scale."""
    own = _hqq(nbits=number(8, "int32"), packing=text(b"8bit_u8"))
    own |= {"shape": np.array([MATRICES, 1]), "group_size": number(MATRICES, "int32")}
    own |= {"scale": ones(1, 1), "zero": ones(1, 1)}
    return {f"meta_{name}.{part}": leaf for part, leaf in own.items()}


VPTQ: dict[str, Any] = {
    "vector_lens": [-1, 8],
    "num_centroids": [-1, 256],
    "num_res_centroids": [-1, 16],
    "group_num": 1,
    "group_size": ROWS,
    "outlier_size": 0,
    "in_features": ROWS,
    "out_features": COLS,
    "vector_quant_dim": "out",
}
OUTLIERS: dict[str, Any] = {
    **VPTQ,
    "vector_lens": [4, 8],
    "num_centroids": [16, 256],
    "num_res_centroids": [-1, -1],
    "group_size": 64,
    "outlier_size": 32,
}
_CONFIG = {"_type": "Int8DynamicActivationInt8WeightConfig", "_data": {}, "_version": 1}
_TORCHAO = {"quant_method": "torchao", "quant_type": {"default": _CONFIG}}
_FLOATS = {"quant_method": "torchao", "quant_type": {"default": "float8wo"}}
_QUARK = {
    "weight": {"dtype": "fp8_e4m3", "qscheme": "per_tensor"},
    "input_tensors": {"dtype": "fp8_e4m3", "is_dynamic": False},
}

MORE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "round": (
        {
            "quant_method": "auto-round",
            "bits": 4,
            "group_size": GROUP,
            "packing_format": "auto_round:auto_gptq",
        },
        {
            "qweight": words(ROWS // 8, COLS),
            "qzeros": words(GROUPS, COLS // 8),
            "scales": ones(GROUPS, COLS),
        },
    ),
    "hqq": (
        {"quant_method": "hqq"},
        _hqq(
            W_q=words(MATRICES // 2, GROUP, dtype="uint8"),
            scale=ones(MATRICES, 1),
            zero=ones(MATRICES, 1),
        ),
    ),
    "hqq-meta": (
        {"quant_method": "hqq"},
        _hqq(
            W_q=words(MATRICES // 2, GROUP, dtype="uint8"),
            scale_q=words(MATRICES, 1, dtype="uint8"),
            zero_q=words(MATRICES, 1, dtype="uint8"),
            **_meta("scale"),
            **_meta("zero"),
        ),
    ),
    "quanto": (
        {"quant_method": "quanto", "weights": "int8"},
        {
            "weight._data": words(COLS, ROWS, dtype="int8"),
            "weight._scale": ones(COLS, 1),
            "input_scale": number(1, "float16"),
            "output_scale": number(1, "float16"),
        },
    ),
    "quanto4": (
        {"quant_method": "quanto", "weights": "int4"},
        {
            "weight._data._data": words(COLS // 2, ROWS, dtype="uint8"),
            "weight._scale": ones(COLS, 1),
            "weight._shift": ones(COLS, 1),
        },
    ),
    "ao8": (
        _TORCHAO,
        {
            "_weight_qdata": words(COLS, ROWS, dtype="int8"),
            "_weight_scale": ones(COLS, GROUPS, dtype="float32"),
            "_weight_zero_point": words(COLS, GROUPS, dtype="int8"),
        },
    ),
    "ao4": (
        {"quant_method": "torchao", "quant_type": {"default": "int4wo"}},
        {
            "_weight_qdata": NIBBLES.view("int8"),
            "_weight_scale": ones(GROUPS, COLS),
            "_weight_zero_point": ones(GROUPS, COLS),
        },
    ),
    "aotile": (
        {"quant_method": "torchao", "quant_type": {"default": "int4wo"}},
        {
            "_weight_qdata": words(COLS // 8, GROUPS, 32, 1),
            "_weight_scale_and_zero": ones(GROUPS, COLS, 2),
        },
    ),
    "aof8": (
        _FLOATS,
        {"_weight_qdata": FLOAT8, "_weight_scale": ones(COLS, 1, dtype="float32")},
    ),
    "aomx": (_FLOATS, {"_weight_qdata": NIBBLES, "_weight_scale": MX}),
    "aonv": (
        _FLOATS,
        {
            "_weight_qdata": NIBBLES,
            "_weight_scale": NV,
            "_weight_per_tensor_scale": number(0.5),
        },
    ),
    "mlx": (
        {"group_size": GROUP, "bits": 4},
        {
            "weight": words(COLS, ROWS // 8, dtype="uint32"),
            "scales": ones(COLS, GROUPS),
            "biases": ones(COLS, GROUPS),
        },
    ),
    "mlx-mx": (
        {"group_size": GROUP, "bits": 4, "mode": "mxfp4"},
        {"weight": words(COLS, ROWS // 8, dtype="uint32"), "scales": EXPONENTS},
    ),
    "block": (
        {
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
            "activation_scheme": "dynamic",
        },
        {"weight": FLOAT8, "weight_scale_inv": ones(1, 1, dtype="float32")},
    ),
    "static": (
        {"quant_method": "fp8", "activation_scheme": "static"},
        {"weight": FLOAT8, "weight_scale": number(0.5), "input_scale": number(0.5)},
    ),
    "fbgemm": (
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
        {"weight": FLOAT8, "weight_scale": ones(COLS, 1, dtype="float32")},
    ),
    "opt8": (
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        {"weight": FLOAT8, "weight_scale": number(0.5), "input_scale": number(0.5)},
    ),
    "opt4": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        {
            "weight": NIBBLES,
            "weight_scale": NV,
            "weight_scale_2": number(0.5),
            "input_scale": number(0.5),
            "pre_quant_scale": ones(ROWS),
        },
    ),
    "quark": (
        {"quant_method": "quark", "global_quant_config": _QUARK},
        {"weight": FLOAT8, "weight_scale": number(0.5), "input_scale": number(0.5)},
    ),
    "quark4": (
        {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp4"}}},
        {"weight": NIBBLES, "weight_scale": EXPONENTS},
    ),
    "quark-int": (
        {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "int8"}}},
        {
            "weight": words(COLS, ROWS, dtype="int8"),
            "weight_scale": ones(COLS, dtype="float32"),
            "weight_zero_point": np.zeros(COLS, np.int8),
        },
    ),
    "fpq": (
        {"quant_method": "fp_quant", "forward_dtype": "nvfp4"},
        {
            "qweight": NIBBLES,
            "scales": np.full((COLS, ROWS // 16), 0x38, np.uint8),
            "weight_global_scale": ones(1, dtype="float32"),
            "act_global_scale": ones(1, dtype="float32"),
            "forward_hadamard_matrix": sylvester(32),
        },
    ),
    "fpq-mx": (
        {"quant_method": "fp_quant", "forward_dtype": "mxfp4"},
        {
            "qweight": NIBBLES,
            "scales": EXPONENTS,
            "weight_global_scale": ones(1, dtype="float32"),
            "forward_hadamard_matrix": sylvester(32),
        },
    ),
    "oss": (
        {"quant_method": "mxfp4"},
        {"blocks": words(COLS, GROUPS, 16, dtype="uint8"), "scales": EXPONENTS},
    ),
    "bitnet": (
        {"quant_method": "bitnet", "linear_class": "autobitlinear"},
        {
            "weight": words(COLS // 4, ROWS, dtype="uint8") & 0x55,
            "weight_scale": ones(1, dtype="float32"),
        },
    ),
    "spqr": (
        {"quant_method": "spqr", "bits": 3, "beta1": 16, "beta2": 16},
        {
            "dense_weights": _spqr_words(),
            "row_offsets": np.minimum(np.arange(COLS + 1), 8).astype("int32"),
            "col_vals": _halves([[i, 0x3800] for i in range(8)]).reshape(-1),
            "in_perm": _halves(ORDER),
        },
    ),
    "aqlm": (
        {"quant_method": "aqlm", "nbits_per_codebook": 8, "num_codebooks": 2},
        {
            "codes": words(COLS, ROWS // 8, 2, dtype="int8"),
            "codebooks": ones(2, 256, 1, 8),
            "scales": ones(COLS, 1, 1, 1),
        },
    ),
    "vptq": (
        {"quant_method": "vptq", "config_for_layers": {LAYER: VPTQ}},
        {
            "indices": words(1, COLS // 8, ROWS * 12 // 32),
            "centroids.weight": ones(1, 256 * 8),
            "res_centroids.weight": ones(1, 16 * 8),
            "perm": ORDER.astype("uint16"),
            "weight_scale": ones(ROWS),
            "weight_bias": ones(ROWS),
        },
    ),
    "vptq16": (
        {"quant_method": "vptq", "config_for_layers": {LAYER: OUTLIERS}},
        {
            "indices": words(1, COLS // 8, 64, dtype="uint16") & 255,
            "centroids.weight": ones(1, 256 * 8),
            "outlier_indices": words(1, COLS // 4, 32, dtype="uint16") & 15,
            "outlier_centroids.weight": ones(1, 16 * 4),
        },
    ),
    "squeeze": (
        {"quant_method": "squeezellm", "wbits": 4},
        {
            "qweight": words(ROWS // 8, COLS),
            "lookup_table": ones(COLS, 16),
            "rows": np.minimum(np.arange(COLS + 1), 8).astype("int32"),
            "cols": np.arange(8, dtype="int32"),
            "vals": ones(8, dtype="float32"),
            "full_rows": ones(ROWS, 2, dtype="float32"),
            "full_row_indices": np.array([3, 5], "int32"),
        },
    ),
    "exl2": (
        {"quant_method": "exl2", "bits": 4.33},
        {
            "q_weight": words(13, COLS),
            "q_groups": np.array([5, 0, 4, 5, 4, 9], "int16"),
            "q_scale": words(GROUPS, COLS // 8),
            "q_scale_max": ones(GROUPS),
            "q_invperm": ORDER.astype("int16"),
        },
    ),
    "exl3": (
        {"quant_method": "exl3", "bits": 4},
        {
            "trellis": words(WIDE // 16, WIDE // 16, 64, dtype="int16"),
            "suh": ones(WIDE),
            "svh": ones(WIDE),
            "mcg": np.array(0xCBAC1FED, "uint32").view("int32"),
        },
    ),
}
"""`quantization_config` and parts of a layer, by a short name."""
