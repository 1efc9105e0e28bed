"""bitsandbytes checkpoints, read and written: NF4 and FP4, nested or not, LLM.int8().

4 bits: `weight` holds the row-major codes of `[out, in]`, two per byte, the first in
the high nibble, in any dtype; `weight.absmax` the scale of each block of the flattened
weight, in float32 or as codes of the dynamic 8-bit map (`weight.nested_absmax`,
`weight.nested_quant_map` and an offset); `weight.quant_map` the table;
`weight.quant_state.bitsandbytes__nf4` or `__fp4` JSON: block sizes, dtype and shape.

8 bits: `weight` int8 `[out, in]` and `SCB`, the absolute maximum of each output.

Reference: bitsandbytes 0.50 `functional.QuantState`, `nn/modules.py` (`Linear8bitLt`).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax.converters.words import transposed
from qjax.errors import FormatError, UnsupportedError
from qjax.formats import FP4, NF4, Int
from qjax.formats.codebook import Dynamic8
from qjax.io.json import parse_object
from qjax.tensor import AffineTensor, CodebookTensor, QuantizedTensor
from qjax.wrappers import RoundedInputs

STATES = {f"weight.quant_state.bitsandbytes__{kind}": kind for kind in ("nf4", "fp4")}
FORMATS = {"nf4": NF4, "fp4": FP4}
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
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
            f"shape {shape!r:.100}, blocksize {block!r:.100}, nested_blocksize "
            f"{nested!r:.100}"
        )
    for field, size in (("blocksize", block), ("nested_blocksize", nested)):
        if size not in BLOCKS:
            raise UnsupportedError(
                f"{where}.{name}: {field} is {size}, expected one of {BLOCKS}"
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
    if not double and not jnp.issubdtype(absmax.dtype, jnp.floating):
        raise FormatError(
            f"{where}.weight.absmax: is {absmax.dtype}, expected floats, or uint8 with "
            "nested_absmax"
        )
    fmt = FORMATS[kind](block=block, double=double)
    flat = fmt.grouping((rows, cols)).kind == "flat"
    scale = (blocks, 1) if flat else (rows // block, cols)

    def placed(values: np.ndarray) -> np.ndarray:
        if flat:
            return values.reshape(-1, 1)
        return transposed(values.reshape(scale[::-1]))

    swapped = (data >> 4) | (data << 4)
    codes = swapped[:, None] if flat else transposed(swapped.reshape(cols, -1))
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
        if type(mean) not in (int, float) or not abs(mean) < 3.4e38:
            raise FormatError(
                f"{where}: nested_offset is {mean!r:.200}, expected a float32 number"
            )
        mean = np.full((1, 1), mean, np.float32)
        stored = CodebookTensor(
            absmax.reshape(-1, 1), sums, table, mean, inner, scale, "float32"
        )
    own = _table(parts["weight.quant_map"], fmt.table, where)
    dtype = str(state.get("dtype", "float32"))
    if dtype not in ("float16", "bfloat16", "float32"):
        raise UnsupportedError(
            f"{where}: dtype {dtype!r:.100} of the weight is not a float"
        )
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
    stored, absmax = parts["weight"], parts["SCB"].reshape(-1)
    if stored.dtype != np.int8 or stored.ndim != 2 or absmax.size != len(stored):
        raise FormatError(
            f"{where}: weight {stored.dtype} {list(stored.shape)} and SCB "
            f"{list(absmax.shape)}, expected int8 [out, in] and [out]"
        )
    layout = parts.get("weight_format")
    if layout is not None and int(np.asarray(layout).reshape(-1)[0]) != 0:
        raise UnsupportedError(
            f"{where}: weight_format {int(np.asarray(layout).reshape(-1)[0])} is tiled "
            "for one GPU; load and save it with bitsandbytes first"
        )
    codes = transposed(stored)
    scale = absmax.astype(np.float32)[None] / np.float32(127)
    return AffineTensor(codes, scale, None, Int(8, "channel"), codes.shape, "float16")


class BitsAndBytesWriter:
    """Writes the layers of one checkpoint; see `qjax.converters.gptq.GPTQWriter`.

    One checkpoint holds 4-bit layers of one kind, or 8-bit ones. Scales of 8-bit layers
    that did not come from bitsandbytes may change by one unit of float32's last place,
    because it stores 127 times the scale.
    """

    kind = "bnb"
    fallback = NF4(64, double=True)

    def __init__(self):
        self._kinds: set[tuple[str, bool]] = set()
        self._dtype = "float32"

    def write(self, q: QuantizedTensor, where: str) -> dict[str, np.ndarray]:
        """The tensors of a 4-bit weight, or `weight` and `SCB` of an 8-bit one.

        Raises:
          UnsupportedError: bitsandbytes does not hold it exactly.
        """
        base = q.base if isinstance(q, RoundedInputs) and q.scale is None else q
        if isinstance(q, CodebookTensor) and isinstance(q.format, NF4 | FP4):
            kind, made = (q.format.name[:3], q.format.double), _write_four(q, where)
        elif (
            isinstance(base, AffineTensor)
            and base.format.signed
            and base.grouping.kind in ("channel", "tensor")
        ):
            kind, made = ("int8", False), _write_eight(base)
        else:
            raise UnsupportedError(
                f"{where}: is {q!r}; bitsandbytes holds NF4, FP4 and int8 with a scale "
                "per output"
            )
        self._kinds.add(kind)
        self._dtype = getattr(q, "dtype", "float32")
        if len({name for name, _ in self._kinds}) > 1:
            raise UnsupportedError(
                f"{where}: is {kind[0]}, other layers are not; bitsandbytes has one "
                "kind for all"
            )
        return made

    def settings(self, kept: Sequence[str]) -> dict[str, Any]:
        """`quantization_config` of the layers written so far."""
        kind = next(iter(self._kinds))[0]
        common = {
            "quant_method": "bitsandbytes",
            "llm_int8_skip_modules": list(kept) or None,
        }
        if kind == "int8":
            return common | {"load_in_8bit": True, "load_in_4bit": False}
        return common | {
            "load_in_8bit": False,
            "load_in_4bit": True,
            "bnb_4bit_quant_type": kind,
            "bnb_4bit_use_double_quant": any(double for _, double in self._kinds),
            "bnb_4bit_compute_dtype": self._dtype,
            "bnb_4bit_quant_storage": "uint8",
        }


def _write_four(q: CodebookTensor, where: str) -> dict[str, np.ndarray]:
    fmt, (rows, cols) = q.format, q.matrix
    assert isinstance(fmt, NF4 | FP4)
    data = np.asarray(q.codes).T.reshape(-1)
    state = {"quant_type": fmt.name[:3], "blocksize": fmt.block}
    state |= {"dtype": q.dtype, "shape": [cols, rows]}
    made: dict[str, np.ndarray] = {"weight": ((data << 4) | (data >> 4))[:, None]}
    made["weight.quant_map"] = np.asarray(q.table(), np.float32)
    nested = q.scale
    if isinstance(nested, CodebookTensor):
        made["weight.absmax"] = np.asarray(nested.codes).reshape(-1)
        made["weight.nested_absmax"] = np.asarray(nested.scale, np.float32).reshape(-1)
        made["weight.nested_quant_map"] = np.asarray(nested.table(), np.float32)
        state |= {
            "nested_blocksize": nested.format.block,  # pyright: ignore[reportAttributeAccessIssue]
            "nested_dtype": "float32",
            "nested_offset": float(np.asarray(nested.offset).reshape(())),
        }
    elif isinstance(nested, QuantizedTensor) or q.offset is not None:
        raise UnsupportedError(f"{where}: has scales that bitsandbytes does not hold")
    else:
        absmax = np.asarray(nested).astype(np.float32)
        made["weight.absmax"] = np.ascontiguousarray(absmax.T).reshape(-1)
    name = f"weight.quant_state.bitsandbytes__{fmt.name[:3]}"
    made[name] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return made


def _write_eight(q: AffineTensor) -> dict[str, np.ndarray]:
    scale = np.broadcast_to(np.asarray(q.scale, np.float32), (1, q.matrix[1]))[0]
    absmax = _times_127(scale)
    return {
        "weight": np.ascontiguousarray(np.asarray(q.codes).T),
        "SCB": absmax,
        "weight_format": np.zeros((), np.uint8),
    }


def _times_127(scale: np.ndarray) -> np.ndarray:
    """Float32 `x` with `x / 127 == scale`: the shortest of several, or the nearest.

    The scale that is read back is then off by one unit in its last place.
    """
    near = (scale.astype(np.float64) * 127).astype(np.float32)
    bits = near.view(np.int32)[..., None] + np.array([0, -1, 1], np.int32)
    with np.errstate(over="ignore"):
        half = near.astype(np.float16).astype(np.float32)[..., None]
    tries = np.concatenate([half, bits.view(np.float32)], -1)
    good = tries / np.float32(127) == scale[..., None]
    good[..., 1] |= ~good.any(-1)
    return np.take_along_axis(tries, np.argmax(good, -1)[..., None], -1)[..., 0]
