"""Valid quantized layers, one per packing, and directories with one thing changed.

Every layer is `[in=96, out=64]` (GEMV-FAST: `[128, 64]`); weights are arbitrary words,
which any packing can hold.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from hostile_case import Case, Target, entry, model, safetensors_bytes

ROWS, COLS, GROUP = 96, 64, 32
GROUPS = ROWS // GROUP
LAYER = "model.layers.0.mlp.up_proj"
_CODES = {
    "int32": "I32",
    "int64": "I64",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "float16": "F16",
    "float32": "F32",
    "bool": "BOOL",
}


class Raw:
    """A tensor of a type that NumPy has not."""

    def __init__(self, dtype: str, shape: list[int], data: bytes):
        self.dtype, self.shape, self.data = dtype, shape, data


def file_of(tensors: Mapping[str, Any]) -> bytes:
    """A safetensors file; None for a tensor that is missing."""
    header, data = {}, b""
    for name, leaf in tensors.items():
        if leaf is None:
            continue
        other = isinstance(leaf, Raw)
        raw = leaf.data if other else np.ascontiguousarray(leaf).tobytes()
        dtype = leaf.dtype if other else _CODES[leaf.dtype.name]
        end = len(data) + len(raw)
        header[name] = entry(list(leaf.shape), len(data), end, dtype)
        data += raw
    return safetensors_bytes(header, data)


def words(*shape: int, dtype: str = "int32") -> np.ndarray:
    """Arbitrary words."""
    numbers = np.arange(1, int(np.prod(shape)) + 1) * 0x01030507 % 0x7FFFFFFF
    return numbers.astype(dtype).reshape(shape)


def ones(*shape: int, dtype: str = "float16") -> np.ndarray:
    """Scales."""
    return np.full(shape, 0.5, dtype)


def with_one(array: Any, value: Any, at: int = 7) -> Any:
    """A copy with one number changed."""
    made = array.copy()
    made.reshape(-1)[at] = value
    return made


def text(value: Any) -> np.ndarray:
    """JSON as bitsandbytes stores it."""
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return np.frombuffer(raw, np.uint8)


STATE = {
    "quant_type": "nf4",
    "blocksize": 32,
    "dtype": "float16",
    "shape": [COLS, ROWS],
}
NESTED = STATE | {"nested_blocksize": 256, "nested_offset": 0.1}
NF4 = "weight.quant_state.bitsandbytes__nf4"
TABLE = np.linspace(-1, 1, 16, dtype=np.float32)
SCHEME: dict[str, Any] = {
    "targets": ["Linear"],
    "weights": {"num_bits": 4, "type": "int", "group_size": GROUP, "symmetric": True},
}
_FLOAT8 = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}
_AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}

BASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gptq": (
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP},
        {
            "qweight": words(ROWS // 8, COLS),
            "qzeros": words(GROUPS, COLS // 8),
            "scales": ones(GROUPS, COLS),
            "g_idx": (np.arange(ROWS) // GROUP).astype("int32"),
        },
    ),
    "awq": (
        _AWQ,
        {
            "qweight": words(ROWS, COLS // 8),
            "qzeros": words(GROUPS, COLS // 8),
            "scales": ones(GROUPS, COLS),
        },
    ),
    "gemv": (
        _AWQ | {"version": "gemv"},
        {
            "qweight": words(COLS, ROWS // 8),
            "qzeros": words(COLS, 1),
            "scales": ones(COLS, 8),
        },
    ),
    "fast": (
        _AWQ | {"version": "gemv_fast", "group_size": 64},
        {
            "qweight": words(COLS // 4, 128, dtype="int16"),
            "qzeros": -ones(2, COLS),
            "scales": ones(2, COLS),
        },
    ),
    "bnb": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {
            "weight": words(ROWS * COLS // 2, 1, dtype="uint8"),
            "weight.absmax": ones(ROWS * COLS // 32, dtype="float32"),
            "weight.quant_map": TABLE,
            NF4: text(STATE),
        },
    ),
    "nested": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {
            "weight": words(ROWS * COLS // 2, 1, dtype="uint8"),
            "weight.absmax": words(ROWS * COLS // 32, dtype="uint8"),
            "weight.quant_map": TABLE,
            "weight.nested_absmax": ones(1, dtype="float32"),
            "weight.nested_quant_map": np.linspace(-1, 1, 256, dtype=np.float32),
            NF4: text(NESTED),
        },
    ),
    "int8": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {
            "weight": words(COLS, ROWS, dtype="int8"),
            "SCB": ones(COLS, dtype="float32"),
            "weight_format": np.zeros((), np.uint8),
        },
    ),
    "ct": (
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": SCHEME},
        },
        {
            "weight_packed": words(COLS, ROWS // 8),
            "weight_scale": ones(COLS, GROUPS),
            "weight_shape": np.array([COLS, ROWS]),
        },
    ),
    "fp8": (
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"group_0": _FLOAT8},
        },
        {
            "weight": Raw("F8_E4M3", [COLS, ROWS], bytes(range(96)) * COLS),
            "weight_scale": ones(COLS, 1, dtype="float32"),
        },
    ),
}
"""`quantization_config` and parts of a layer, by a short name."""


LLAMA = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": ROWS,
    "intermediate_size": COLS,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}
"""A model in which `LAYER` has the shape of the layers above."""
_DENSE = {
    "model.embed_tokens": (4096, ROWS),
    "model.norm": (ROWS,),
    "model.layers.0.input_layernorm": (ROWS,),
    "model.layers.0.post_attention_layernorm": (ROWS,),
    "model.layers.0.self_attn.q_proj": (ROWS, ROWS),
    "model.layers.0.self_attn.k_proj": (ROWS // 2, ROWS),
    "model.layers.0.self_attn.v_proj": (ROWS // 2, ROWS),
    "model.layers.0.self_attn.o_proj": (ROWS, ROWS),
    "model.layers.0.mlp.gate_proj": (COLS, ROWS),
    "model.layers.0.mlp.down_proj": (ROWS, COLS),
}
TOKENIZER = Path(__file__).resolve().parents[2] / "examples/model/tokenizer.json"


def case(
    base: str,
    name: str,
    message: str | None = None,
    parts: Mapping[str, Any] | None = None,
    error: str = "FormatError",
    raw: bytes | None = None,
    whole: bool = False,
    **settings: Any,
) -> Case:
    """One of `BASES` with other parts or settings.

    Args:
      base: which.
      name: of the case.
      message: what the error says; None for a valid layer.
      parts: what to replace; None for a part that is missing.
      error: class of the error.
      raw: JSON of all settings.
      whole: inside of a model, which is loaded.
      **settings: settings to replace.
    """

    def build(folder: Path) -> Target:
        usual, layer = BASES[base]
        config: Any = {**LLAMA, "quantization_config": usual | settings}
        if raw is not None:
            config = b'{"model_type":"llama","quantization_config":' + raw + b"}"
        layer = layer | dict(parts or {})
        tensors = {f"{LAYER}.{part}": leaf for part, leaf in layer.items()}
        if whole:
            tensors |= {f"{n}.weight": ones(*shape) for n, shape in _DENSE.items()}
            (folder / "tokenizer.json").write_bytes(TOKENIZER.read_bytes())
        return model(folder, config, model__safetensors=file_of(tensors))

    found = None if message is None else error
    opener = "load" if whole else "packed"
    return Case(f"{opener}-{base}-{name}", opener, build, found, message or "")


def refused(base: str, name: str, message: str, parts: Any = None, **more: Any) -> Case:
    """A case that is valid and not read."""
    return case(base, name, message, parts, "UnsupportedError", **more)


def scheme(**more: Any) -> dict[str, Any]:
    """Groups of compressed-tensors with something changed."""
    return {"group_0": {**SCHEME, **more}}
