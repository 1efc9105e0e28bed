"""Tensors of hostile layers, and safetensors files of them."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from hostile_case import entry, safetensors_bytes

ROWS, COLS, GROUP = 96, 64, 32
GROUPS = ROWS // GROUP
LAYER = "model.layers.0.mlp.up_proj"
_CODES = {
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bool": "BOOL",
}


class Raw:
    """A tensor of a type that NumPy has not."""

    def __init__(self, dtype: str, shape: list[int], data: bytes):
        self.dtype, self.shape, self.data = dtype, shape, data


def file_of(tensors: Mapping[str, Any], metadata: Any = None) -> bytes:
    """A safetensors file; None for a tensor that is missing."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
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
