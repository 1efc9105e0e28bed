"""torchao checkpoints in safetensors, read: integers, FP8, MX and NVFP4.

The parts of `layer.weight` are called `layer._weight_PART`; which tensor class wrote
them follows from their dtypes and shapes.

* `Int8Tensor`, `IntxUnpackedToInt8Tensor`: `qdata` int8 `[out, in]`, one signed code
  per byte; `scale` and `zero_point` `[out, groups]` or `[1, 1]`:
  `(code - zero_point) * scale`.
* `Int4Tensor`: `qdata` int8 `[out, in / 2]`, the even input in the low nibble, signed;
  `scale` and `zero_point` `[groups, out]`: `code * scale + zero_point`.
* `Int4TilePackedTo4dTensor`: see `qjax.converters.torchao_tiles`.
* `Float8Tensor`: `qdata` float8 and a `scale` per tensor, output or block of 128.
* `MXTensor`: `qdata` float8, or uint8 with two E2M1 codes, the first in the low nibble;
  `scale` E8M0 `[out, in / 32]`.
* `NVFP4Tensor`: `qdata` as above, `scale` E4M3 `[out, in / 16]`, `per_tensor_scale`.

Scales of the last two may be in tiles of 128 outputs and 4 groups, padded, as tensor
cores read them: output `32 a + b` and group `c` of a tile at `[b, a, c]`.

`act_pre_scale` multiplies activations. The settings' `quant_type` says whether
activations are rounded.

Reference: torchao 0.18 `prototype/safetensors`, `quantization/quantize_/workflows`,
`prototype/mx_formats`.
"""

import json
import logging
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from qjax.converters.affine import affine
from qjax.converters.biases import affine_of_bias
from qjax.converters.torchao_tiles import SCALES, tile_shape, tiled
from qjax.converters.words import transposed
from qjax.errors import FormatError, UnsupportedError
from qjax.formats import FP8, MXFP4, MXFP8, NVFP4
from qjax.formats.base import FLOAT_SCALES
from qjax.tensor import MinifloatTensor, QuantizedTensor
from qjax.wrappers import InputScaled, RoundedInputs

_log = logging.getLogger(__name__)

START = "_weight_"
PARTS = {
    f"{START}{name}": rule
    for name, rule in {
        "qdata": ("any", None),
        "scale": ("any", None),
        "zero_point": ("any", None),
        SCALES: ("floating", None),
        "act_pre_scale": ("floating", None),
        "act_quant_scale": ("floating", None),
        "act_quant_zero_point": ("any", None),
        "per_tensor_scale": ("floating", None),
        "act_per_tensor_scale": ("floating", None),
    }.items()
} | {"expected_shape": ("integer", 1)}
E4M3, E5M2 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
ELEMENTS = {E4M3: "e4m3", E5M2: "e5m2"}
ROUNDED = {
    "Int8DynamicActivationInt8WeightConfig": "int8",
    "Int8StaticActivationInt8WeightConfig": "int8",
    "Float8DynamicActivationFloat8WeightConfig": "float8_e4m3fn",
    "Float8StaticActivationFloat8WeightConfig": "float8_e4m3fn",
}


class TorchAO:
    """Reads the layers of one checkpoint; see `qjax.converters.gptq.GPTQ`."""

    kind, marks, parts, stated = "torchao", (f"{START}qdata",), PARTS, ()

    def __init__(self, settings: Mapping[str, Any], where: str):
        said = json.dumps(settings.get("quant_type", ""), default=str)
        self._where, self._amd = where, '"int4_tile_packed_ntile": 16' in said
        kinds = [kind for kind in ROUNDED if kind in said]
        self._activation = ROUNDED[kinds[0]] if kinds else None
        self._bits = next((b for b in range(1, 9) if f'"int{b}"' in said), None)
        if self._activation is None and ("Activation" in said):
            _log.warning(
                "%s: was made for activations that are rounded in a way that is not "
                "computed; only its weights are rounded here",
                where,
            )

    def shape(self, parts: Mapping[str, Any]) -> tuple[int, ...]:
        """`(out, in)`; see `Reader.shape`."""
        parts = _named(parts)
        if SCALES in parts:
            return tile_shape(parts, self._where)
        if len(parts["qdata"].shape) != 2:
            return tuple(parts["qdata"].shape)  # which `read` refuses
        cols, rows = parts["qdata"].shape
        return cols, rows * (2 if _paired(parts) else 1)

    def read(self, parts: Mapping[str, np.ndarray], where: str) -> QuantizedTensor:
        """One weight `[in, out]`, in wrappers for what happens to activations."""
        parts = _named(parts)
        data = parts["qdata"]
        several = data.ndim != (4 if SCALES in parts else 2)
        if several or (data.dtype == np.int32 and SCALES not in parts):
            raise UnsupportedError(
                f"{where}: {data.dtype} {list(data.shape)} is in the order of one "
                "kernel, or of several matrices, and is not read; expected one matrix "
                "in torchao's plain layout, or 4-bit integers in tiles for CUDA"
            )
        if SCALES in parts:
            if self._amd:
                raise UnsupportedError(
                    f"{where}: int4_tile_packed_ntile is 16 in quant_type, as for "
                    "tiles of AMD's kernels, whose order is not read; expected 8"
                )
            return self._inputs(tiled(parts, where), parts, where)
        scale = parts["scale"]
        if data.dtype == np.int8:
            made = (_nibbles if _paired(parts) else self._integers)(parts, where)
        elif scale.dtype == E8M0 or data.dtype == np.uint8:
            made = _microscaled(parts, where)
        else:
            made = _float8(parts, where)
        return self._inputs(made, parts, where)

    def _integers(self, parts: Mapping[str, np.ndarray], where: str):
        data, scale = parts["qdata"], parts["scale"]
        cols, rows = data.shape
        zero = parts.get("zero_point", np.zeros(scale.shape, np.int8))
        _check_scale(scale, where)
        groups = scale.shape[1] if scale.ndim == 2 else 0
        if scale.size == 1:
            scale, zero, groups = scale.reshape(1, 1), zero.reshape(-1, 1), 1
        elif not groups or len(scale) != cols or rows % groups:
            raise FormatError(
                f"{where}: scales {list(scale.shape)} for codes {list(data.shape)}, "
                "expected [out, groups]"
            )
        bits = self._bits or 1
        low, high = int(data.min()), int(data.max())
        while not -(2 ** (bits - 1)) <= low <= high < 2 ** (bits - 1):
            bits += 1
        half = 2 ** (bits - 1)
        codes = transposed(data).view(np.uint8) + np.uint8(half)
        return affine(
            codes,
            np.ascontiguousarray(scale.T),
            np.ascontiguousarray(zero.T).astype(np.float32) + np.float32(half),
            bits=bits,
            matrix=(rows, cols),
            where=where,
            group=rows // groups,
            unpacked=True,
            dtype=scale.dtype.name,
        )

    def _inputs(self, made, parts: Mapping[str, np.ndarray], where: str):
        static, shift = parts.get("act_quant_scale"), parts.get("act_quant_zero_point")
        if shift is not None and np.any(shift.astype(np.float32) != 0):
            raise UnsupportedError(
                f"{where}: activations are rounded with a zero-point, which is not "
                "computed"
            )
        if static is not None and static.size != 1:
            raise UnsupportedError(
                f"{where}: act_quant_scale has shape {list(static.shape)}, expected "
                "one scale"
            )
        if self._activation is not None or static is not None:
            scale = static if static is None else static.astype("f4").reshape(())
            if scale is not None and not 0 < scale < np.inf:
                raise FormatError(
                    f"{where}: act_quant_scale is {scale}, expected a positive number"
                )
            made = RoundedInputs(made, self._activation or "int8", scale)
        before = parts.get("act_pre_scale")
        if before is None:
            return made
        if before.size not in (1, made.matrix[0]):
            raise FormatError(
                f"{where}: act_pre_scale has shape {list(before.shape)}, expected "
                f"[{made.matrix[0]}]"
            )
        return InputScaled(made, np.resize(before, made.matrix[0]))


def _named(parts: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(START): leaf for name, leaf in parts.items()}


def _paired(parts: Mapping[str, Any]) -> bool:
    """Whether a byte holds two codes."""
    data, scale = parts["qdata"], parts["scale"]
    if np.dtype(data.dtype) != np.int8:
        return np.dtype(data.dtype) == np.uint8
    zero, cols = parts.get("zero_point"), data.shape[0]
    if len(scale.shape) != 2 or zero is None or zero.dtype != scale.dtype:
        return False
    return scale.shape[1] == cols and scale.shape[0] != cols


def _check_scale(scale: np.ndarray, where: str) -> None:
    if scale.dtype.name not in FLOAT_SCALES:
        raise FormatError(f"{where}: scales are {scale.dtype}, expected floats")


def _nibbles(parts: Mapping[str, np.ndarray], where: str) -> QuantizedTensor:
    data, scale, zero = parts["qdata"], parts["scale"], parts["zero_point"]
    cols, rows = len(data), data.shape[1] * 2
    _check_scale(scale, where)
    if zero.shape != scale.shape or rows % len(scale):
        raise FormatError(
            f"{where}: scales {list(scale.shape)} and zero-points {list(zero.shape)} "
            f"for [{cols}, {rows}], expected [groups, {cols}]"
        )
    wide = scale.astype(np.float32)
    return affine_of_bias(
        transposed(data).view(np.uint8) ^ np.uint8(0x88),  # signed to unsigned
        scale,
        zero.astype(np.float32) - 8 * wide,
        bits=4,
        matrix=(rows, cols),
        where=where,
        group=rows // len(scale),
    )


def _float8(parts: Mapping[str, np.ndarray], where: str) -> QuantizedTensor:
    data, scale = parts["qdata"], parts["scale"]
    cols, rows = data.shape
    kinds = {(cols, 1): "channel", (-(-cols // 128), -(-rows // 128)): "block"}
    whole = "tensor" if scale.size == 1 else kinds.get(scale.shape)
    if whole is None or data.dtype not in ELEMENTS:
        raise UnsupportedError(
            f"{where}: {data.dtype} {list(data.shape)} with scales "
            f"{list(scale.shape)} is not read; expected float8 with a scale per "
            "tensor, output or block of 128 x 128"
        )
    _check_scale(scale, where)
    scale = scale.reshape(1, 1) if whole == "tensor" else scale
    fmt = FP8(ELEMENTS[data.dtype], whole, scale_dtype=scale.dtype.name)
    scale = np.ascontiguousarray(scale.T)
    return MinifloatTensor(
        transposed(data), scale, None, fmt, (rows, cols), scale.dtype.name
    )


def _microscaled(parts: Mapping[str, np.ndarray], where: str) -> QuantizedTensor:
    data, scale = parts["qdata"], parts["scale"]
    cols, rows = data.shape[0], data.shape[1] * (2 if data.dtype == np.uint8 else 1)
    nv = scale.dtype == E4M3
    fmt: Any = NVFP4() if nv else MXFP4()
    if data.dtype in ELEMENTS:
        fmt = MXFP8(ELEMENTS[data.dtype])
    groups = rows // fmt.group_size
    known = data.dtype in (E4M3, E5M2, np.uint8) and (nv or scale.dtype == E8M0)
    tiles = -(-cols // 128), -(-groups // 4)
    plain = scale.shape == (cols, groups)
    swizzled = scale.size == tiles[0] * tiles[1] * 512
    if not known or rows % fmt.group_size or not (plain or swizzled):
        raise UnsupportedError(
            f"{where}: {data.dtype} {list(data.shape)} with scales {scale.dtype} "
            f"{list(scale.shape)} is not read; expected MXFP4, MXFP8 or NVFP4"
        )
    scale = np.ascontiguousarray(scale).view(np.uint8)
    if not plain:
        tiled = scale.reshape(*tiles, 32, 4, 4).transpose(0, 3, 2, 1, 4)
        scale = tiled.reshape(tiles[0] * 128, -1)[:cols, :groups]
    scale, whole = np.ascontiguousarray(scale.T), None
    if nv:
        scale = scale.view(E4M3)
        factor = parts.get("per_tensor_scale", np.ones((), np.float32))
        with np.errstate(all="ignore"):
            whole = np.float32(1) / factor.astype(np.float32)
        if whole.size != 1 or not 0 < float(whole.reshape(())) < np.inf:
            raise FormatError(f"{where}: per_tensor_scale is not one positive number")
        whole = whole.reshape(1, 1)
    return MinifloatTensor(
        transposed(data), scale, whole, fmt, (rows, cols), "bfloat16"
    )
