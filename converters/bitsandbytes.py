"""bitsandbytes checkpoints: NF4 and FP4, nested or not, and LLM.int8().

4 bits: `weight` holds the row-major codes of `[out, in]`, two per byte, the first in
the high nibble, in any dtype; `weight.absmax` the scale of each block of the flattened
weight, in float32 or as codes of the dynamic 8-bit map (`weight.nested_absmax`,
`weight.nested_quant_map` and an offset); `weight.quant_map` the table;
`weight.quant_state.bitsandbytes__nf4` or `__fp4` JSON: block sizes, dtype and shape.

8 bits: `weight` int8 `[out, in]` and `SCB`, the absolute maximum of each output.

Reference: bitsandbytes 0.50 `functional.QuantState`, `nn/modules.py` (`Linear8bitLt`).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.errors import FormatError, UnsupportedError
from qjax.formats import FP4, NF4, Int
from qjax.formats.codebook import Dynamic8
from qjax.io.json import parse_object
from qjax.tensor import AffineTensor, CodebookTensor, QuantizedTensor

STATES = {f"weight.quant_state.bitsandbytes__{kind}": kind for kind in ("nf4", "fp4")}
FORMATS = {"nf4": NF4, "fp4": FP4}
PARTS = {
    "weight": ("any", None),
    "weight.absmax": ("any", 1),
    "weight.quant_map": ("floating", 1),
    "weight.nested_absmax": ("floating", 1),
    "weight.nested_quant_map": ("floating", 1),
    "weight_format": ("integer", None),
    "SCB": ("floating", 1),
    **dict.fromkeys(STATES, ("integer", 1)),
}


class BitsAndBytes:
    """Reads the layers of one checkpoint; see `qjax.converters.gptq.GPTQ`."""

    kind, marks, parts = "bitsandbytes", (*STATES, "SCB"), PARTS
    stated = tuple(STATES)

    def __init__(self, settings: Mapping[str, Any], where: str):
        del settings, where  # every tensor says what it is

    def shape(self, parts: Mapping[str, Any]) -> tuple[int, ...]:
        """`(out, in)`; see `Reader.shape`."""
        if "SCB" in parts:
            return tuple(parts["weight"].shape)
        return _state(parts, "quant_state")[1]

    def read(self, parts: Mapping[str, np.ndarray], where: str) -> QuantizedTensor:
        """One weight `[in, out]`, packed."""
        return _eight(parts, where) if "SCB" in parts else _four(parts, where)


def _state(parts: Mapping[str, Any], where: str) -> tuple[dict[str, Any], Any, str]:
    """The settings of a 4-bit weight, its shape `(out, in)` and its kind."""
    name = next(name for name in STATES if name in parts)
    state = parse_object(np.asarray(parts[name]).tobytes(), f"{where}.{name}")
    shape = state.get("shape")
    block, nested = state.get("blocksize"), state.get("nested_blocksize", 256)
    sizes = [*shape, block, nested] if isinstance(shape, list) else []
    if len(sizes) != 4 or not all(type(n) is int and n > 0 for n in sizes):
        raise FormatError(
            f"{where}.{name}: expected a shape [out, in] and integer block sizes, got "
            f"shape {shape!r}, blocksize {block!r}, nested_blocksize {nested!r}"
        )
    return state, tuple(sizes[:2]), STATES[name]


def _four(parts: Mapping[str, np.ndarray], where: str) -> QuantizedTensor:
    state, (cols, rows), kind = _state(parts, where)
    block, count = state["blocksize"], rows * cols
    data = np.ascontiguousarray(parts["weight"]).reshape(-1).view(np.uint8)
    blocks = -(-count // block)
    absmax = parts["weight.absmax"].reshape(-1)
    if data.size != -(-count // 2) or absmax.size != blocks:
        raise FormatError(
            f"{where}: {data.size} bytes and {absmax.size} scales, expected "
            f"{-(-count // 2)} and {blocks} for [{cols}, {rows}] in blocks of {block}"
        )
    double = absmax.dtype == np.uint8
    fmt = FORMATS[kind](block=block, double=double)
    flat = fmt.grouping((rows, cols)).kind == "flat"
    scale = (blocks, 1) if flat else (rows // block, cols)

    def placed(values: np.ndarray) -> np.ndarray:
        if flat:
            return values.reshape(-1, 1)
        return np.ascontiguousarray(values.reshape(scale[::-1]).T)

    swapped = (data >> 4) | (data << 4)
    codes = swapped.reshape(-1, 1) if flat else swapped.reshape(cols, -1).T
    if not double:
        stored: Any = placed(absmax.astype(np.float32, copy=False))
    else:
        inner = Dynamic8(state.get("nested_blocksize", 256))
        sums = parts["weight.nested_absmax"].astype(np.float32).reshape(-1, 1)
        if sums.size != -(-blocks // inner.block):
            raise FormatError(
                f"{where}.weight.nested_absmax: {sums.size} scales, expected "
                f"{-(-blocks // inner.block)}"
            )
        table = _table(parts["weight.nested_quant_map"], inner.table, where)
        mean = state.get("nested_offset", 0.0)
        if type(mean) not in (int, float):
            raise FormatError(f"{where}: nested_offset is {mean!r}, expected a number")
        mean = np.full((1, 1), mean, np.float32)
        stored = CodebookTensor(
            absmax.reshape(-1, 1), sums, table, mean, inner, scale, "float32"
        )
    own = _table(parts["weight.quant_map"], fmt.table, where)
    dtype = str(state.get("dtype", "float32"))
    if dtype not in ("float16", "bfloat16", "float32"):
        raise UnsupportedError(f"{where}: dtype {dtype!r} of the weight is not a float")
    return CodebookTensor(codes, stored, own, None, fmt, (rows, cols), dtype)


def _table(stored: np.ndarray, usual: np.ndarray, where: str) -> np.ndarray | None:
    """The file's table, or None where it is the format's own."""
    table = stored.astype(np.float32).reshape(-1)
    if table.size != usual.size or not np.isfinite(table).all():
        raise FormatError(
            f"{where}: table of {table.size} values, expected {usual.size} finite"
        )
    return None if np.array_equal(table, usual) else table


def _eight(parts: Mapping[str, np.ndarray], where: str) -> QuantizedTensor:
    codes, absmax = parts["weight"].T, parts["SCB"].reshape(-1)
    layout = parts.get("weight_format")
    if layout is not None and int(np.asarray(layout).reshape(-1)[0]) != 0:
        raise UnsupportedError(
            f"{where}: weight_format {int(np.asarray(layout).reshape(-1)[0])} is tiled "
            "for one GPU; load and save it with bitsandbytes first"
        )
    if codes.dtype != np.int8 or codes.ndim != 2 or absmax.size != codes.shape[1]:
        raise FormatError(
            f"{where}: weight {codes.dtype} {list(codes.shape[::-1])} and SCB "
            f"{list(absmax.shape)}, expected int8 [out, in] and [out]"
        )
    scale = absmax.astype(np.float32)[None] / np.float32(127)
    return AffineTensor(codes, scale, None, Int(8, "channel"), codes.shape, "float16")
