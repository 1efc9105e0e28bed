"""Writing compressed-tensors; see `qjax.converters.compressed_tensors` for the layouts.

Integers become `pack-quantized`, without gaps between codes, or `int-quantized` where
activations are rounded to int8; FP8 `float-quantized`, or `naive-quantized` without
rounded activations; FP4 and MX their own formats. Layers that are quantized alike are
one config group; of several, each names its layers.

`weight_g_idx` (groups out of order) is read by vLLM and by compressed-tensors before
0.20, which refuses such a checkpoint.
"""

import json
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax.converters.affine import integers
from qjax.converters.floats import FLOATS
from qjax.converters.overrides import layer_name
from qjax.converters.words import words_of
from qjax.errors import UnsupportedError
from qjax.formats import FP8, MXFP4, MXFP8, NVFP4, Int
from qjax.tensor import AffineTensor, MinifloatTensor, QuantizedTensor
from qjax.wrappers import Permuted, RoundedInputs

Parts = dict[str, np.ndarray]
_SCALES = {"mxfp4": "torch.uint8", "mxfp8-e4m3": "torch.uint8"}
_SCALES["nvfp4"] = "torch.float8_e4m3fn"


class CompressedTensorsWriter:
    """Writes the layers of one checkpoint; see `qjax.converters.gptq.GPTQWriter`."""

    kind = "compressed-tensors"
    fallback = Int(4, 128, scale_dtype="float16")

    def __init__(self):
        self._schemes: dict[str, list[str]] = {}

    def write(self, q: QuantizedTensor, where: str) -> Parts:
        """The tensors of a weight, by their names after the layer's.

        Raises:
          UnsupportedError: compressed-tensors does not hold it exactly.
        """
        base, activation = q, None
        if isinstance(q, RoundedInputs):
            base, activation = q.base, q.activation
        inner = base.base if isinstance(base, Permuted) else base
        if isinstance(inner, AffineTensor) and q.ndim == 2:
            layout, weights, parts = _integers(base, inner, activation, where)
        elif isinstance(base, MinifloatTensor) and q.ndim == 2:
            layout, weights, parts = _floats(base, activation, where)
        else:
            raise _refused(where, f"is {q!r}", "integers and small floats [in, out]")
        scheme: dict[str, Any] = {"format": layout, "weights": weights}
        scheme["input_activations"] = None
        if isinstance(q, RoundedInputs):
            scheme["input_activations"] = _activations(q)
            if q.scale is not None:
                parts["input_scale"] = _static(q.scale, parts["weight_scale"].dtype)
        key = json.dumps(scheme)
        self._schemes.setdefault(key, []).append(layer_name(where))
        return parts

    def settings(self, kept: Sequence[str]) -> dict[str, Any]:
        """`quantization_config` of the layers written so far."""
        single = len(self._schemes) == 1
        groups = {
            f"group_{i}": {"targets": ["Linear"] if single else names}
            | json.loads(scheme)
            for i, (scheme, names) in enumerate(self._schemes.items())
        }
        formats = {group["format"] for group in groups.values()}
        return {
            "quant_method": "compressed-tensors",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": list(kept),
            "kv_cache_scheme": None,
        }


def _refused(where: str, got: str, holds: str) -> UnsupportedError:
    return UnsupportedError(f"{where}: {got}; compressed-tensors holds {holds}")


def _arguments(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    made = {"num_bits": bits, "type": kind, "strategy": strategy}
    return made | {"symmetric": True, "dynamic": False} | more


def _activations(q: RoundedInputs) -> dict[str, Any]:
    kind = "int" if q.activation == "int8" else "float"
    if q.scale is None:
        return _arguments(8, kind, "token", dynamic=True)
    return _arguments(8, kind, "tensor")


def _static(scale: Any, dtype: np.dtype) -> np.ndarray:
    """The scale of activations, in the dtype of the weight's where that holds it."""
    wide = np.asarray(scale, np.float32).reshape(1)
    if dtype.name in FLOATS:
        with np.errstate(over="ignore"):
            small = wide.astype(dtype)
        wide = small if small.astype(np.float32) == wide else wide
    return wide


def _integers(base, inner: AffineTensor, activation: str | None, where: str):
    x = integers(base, where)
    rows, cols = x.codes.shape
    layout = "int-quantized" if activation == "int8" else "pack-quantized"
    if x.scale.dtype.name not in FLOATS:
        raise _refused(where, f"has scales of {x.scale.dtype}", "floats")
    if not x.symmetric and (
        x.zero.dtype != np.int32 or x.zero.min() < 0 or x.zero.max() >= 2**x.bits
    ):
        raise _refused(
            where,
            f"has zero-points from {x.zero.min():g} to {x.zero.max():g}",
            f"whole numbers from 0 to {2**x.bits - 1}",
        )
    grouped = x.group < rows
    if grouped and rows % x.group:
        raise _refused(
            where, f"{rows} inputs in groups of {x.group}", "groups that divide inputs"
        )
    scale, zero = x.scale, x.zero
    single = inner.grouping.kind == "tensor" and layout == "int-quantized"
    if single:
        scale, zero = scale[0, :1], zero[0, :1]
    strategy = "group" if grouped else "tensor" if single else "channel"
    weights = _arguments(x.bits, "int", strategy, symmetric=x.symmetric)
    weights |= {"group_size": x.group} if grouped else {}
    index = x.index if grouped else None
    weights |= {} if index is None else {"actorder": "group"}
    parts = {"weight_scale": np.ascontiguousarray(scale.T)}
    if layout == "int-quantized":
        parts["weight"] = _signed(x.codes.T, x.bits)
        if not x.symmetric:
            parts["weight_zero_point"] = _signed(zero.T, x.bits)
    else:
        parts["weight_packed"] = np.ascontiguousarray(words_of(x.codes, x.bits).T)
        parts["weight_shape"] = np.array([cols, rows], np.int64)
        if not x.symmetric:
            codes = np.ascontiguousarray(zero.T).astype(np.uint8)
            parts["weight_zero_point"] = words_of(codes, x.bits)
    if index is not None:
        parts["weight_g_idx"] = index
    return layout, weights, parts


def _signed(codes: np.ndarray, bits: int) -> np.ndarray:
    """int8 numbers, counted from the middle."""
    return np.ascontiguousarray(codes.astype(np.int16) - 2 ** (bits - 1)).astype(
        np.int8
    )


def _floats(q: MinifloatTensor, activation: str | None, where: str):
    fmt, scale = q.format, q.scale
    if not isinstance(fmt, FP8 | MXFP4 | MXFP8 | NVFP4) or fmt.kind == "e5m2":
        raise _refused(where, f"is {q!r}", "FP8 E4M3, MXFP4, MXFP8 and NVFP4")
    if activation == "int8" or isinstance(scale, QuantizedTensor):
        raise _refused(where, f"is {q!r} with activations in {activation}", "FP8 ones")
    codes = np.asarray(jnp.swapaxes(q.codes, 0, 1))  # faster than NumPy for bytes
    scale = np.asarray(scale)
    if isinstance(fmt, FP8):
        kind = fmt.granularity
        if scale.dtype.name not in FLOATS:
            raise _refused(where, f"has scales of {scale.dtype}", "floats")
        scale = scale.reshape(1) if kind == "tensor" else scale.T
        tiles = {"block_structure": [128, 128]} if kind == "block" else {}
        layout = "naive-quantized" if activation is None else "float-quantized"
        parts = {"weight": codes, "weight_scale": np.ascontiguousarray(scale)}
        return layout, _arguments(8, "float", kind, **tiles), parts
    return _groups(q, fmt, codes, scale, where)


def _groups(q: MinifloatTensor, fmt, codes: np.ndarray, scale: np.ndarray, where: str):
    """Formats with groups of a fixed size."""
    nv, size = isinstance(fmt, NVFP4), fmt.group_size
    expected = "float8_e4m3fn" if nv else "uint8"
    if q.matrix[0] % size or scale.dtype.name != expected:
        raise _refused(
            where,
            f"has {q.matrix[0]} inputs and scales of {scale.dtype}",
            f"multiples of {size} and {expected} in {fmt.name}",
        )
    name = "weight" if fmt.kind == "e4m3" else "weight_packed"
    parts = {name: codes, "weight_scale": np.ascontiguousarray(scale.T)}
    if nv:
        parts["weight_global_scale"] = np.asarray(q.global_scale).reshape(1)
    layout = "mxfp8-quantized" if name == "weight" else f"{fmt.name}-pack-quantized"
    weights = _arguments(
        fmt.code_bits,
        "float",
        "tensor_group" if nv else "group",
        group_size=size,
        scale_dtype=_SCALES[fmt.name],
    )
    return layout, weights, parts
