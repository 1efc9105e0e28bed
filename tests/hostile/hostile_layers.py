"""Valid quantized layers, one per packing, and directories with one thing changed.

Every layer is `[in=96, out=64]` (GEMV-FAST: `[128, 64]`); weights are arbitrary words,
which any packing can hold.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from hostile_bases import MORE
from hostile_case import Case, Target, model
from hostile_tensors import (
    COLS,
    GROUP,
    GROUPS,
    LAYER,
    ROWS,
    Raw,
    file_of,
    ones,
    text,
    words,
)

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
    **MORE,
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
    top: Mapping[str, Any] | None = None,
    side: Mapping[str, Any] | None = None,
    metadata: Any = None,
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
      top: other keys of config.json; `quantization_config` is None to leave it out.
      side: content of files beside config.json: JSON, or bytes.
      metadata: of the safetensors file.
      **settings: settings to replace.
    """

    def build(folder: Path) -> Target:
        usual, layer = BASES[base]
        config: Any = {**LLAMA, "quantization_config": usual | settings, **(top or {})}
        if raw is not None:
            config = b'{"model_type":"llama","quantization_config":' + raw + b"}"
        layer = layer | dict(parts or {})
        tensors = {f"{LAYER}.{part}": leaf for part, leaf in layer.items()}
        if whole:
            tensors |= {f"{n}.weight": ones(*shape) for n, shape in _DENSE.items()}
            (folder / "tokenizer.json").write_bytes(TOKENIZER.read_bytes())
        for file, data in (side or {}).items():
            data = data if isinstance(data, bytes) else json.dumps(data).encode()
            (folder / file).write_bytes(data)
        return model(folder, config, model__safetensors=file_of(tensors, metadata))

    found = None if message is None else error
    opener = "load" if whole else "packed"
    return Case(f"{opener}-{base}-{name}", opener, build, found, message or "")


def refused(base: str, name: str, message: str, parts: Any = None, **more: Any) -> Case:
    """A case that is valid and not read."""
    return case(base, name, message, parts, "UnsupportedError", **more)


def scheme(**more: Any) -> dict[str, Any]:
    """Groups of compressed-tensors with something changed."""
    return {"group_0": {**SCHEME, **more}}
