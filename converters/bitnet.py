"""BitNet checkpoints of transformers: weights of -1, 0 and 1.

Per linear layer: `weight` uint8 `[out / 4, in]`, where bits `2 i` and `2 i + 1` of row
`r` hold one more than the weight of output `i out / 4 + r`; and `weight_scale` `[1]`.
The product is divided by it where `linear_class` is `bitlinear` (also when nothing is
said), and multiplied by it where it is `autobitlinear`.

Both round activations to int8, one scale per token: `RoundedInputs`. The weight becomes
`Int(2, "tensor")`, whose codes are two more than the weight.

Reference: transformers 5.24 `integrations/bitnet.py`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.converters.words import transposed
from qjax.errors import FormatError, UnsupportedError
from qjax.formats import Int
from qjax.tensor import AffineTensor, QuantizedTensor
from qjax.wrappers import RoundedInputs

PARTS = {"weight": ("uint8", 2), "weight_scale": ("floating", None)}


class BitNet:
    """Reads the layers of one checkpoint; see `qjax.converters.gptq.GPTQ`."""

    kind, marks, parts, stated = "bitnet", ("weight_scale",), PARTS, ()

    def __init__(self, settings: Mapping[str, Any], where: str):
        linear = settings.get("linear_class", "bitlinear")
        if linear not in ("bitlinear", "autobitlinear"):
            raise FormatError(
                f"{where}: linear_class is {linear!r:.200}, expected bitlinear or "
                "autobitlinear"
            )
        if settings.get("quantization_mode", "offline") != "offline":
            raise UnsupportedError(
                f"{where}: BitNet weights that are rounded whenever they are used are "
                "not read; expected quantization_mode offline"
            )
        if settings.get("use_rms_norm"):
            raise UnsupportedError(
                f"{where}: BitNet layers with a norm of their own (use_rms_norm) are "
                "not computed"
            )
        self._divides = linear == "bitlinear"

    def shape(self, parts: Mapping[str, Any]) -> tuple[int, ...]:
        """`(out, in)`; see `Reader.shape`."""
        rows, cols = parts["weight"].shape
        return 4 * rows, cols

    def read(self, parts: Mapping[str, np.ndarray], where: str) -> QuantizedTensor:
        """One weight `[in, out]`, symmetric integers in `RoundedInputs`."""
        weight, stored = parts["weight"], parts["weight_scale"]
        with np.errstate(over="ignore", divide="ignore"):
            scale = stored.astype(np.float32)
            scale = 1 / scale if self._divides else scale
        if scale.size != 1 or not np.isfinite(scale).all() or not (scale > 0).all():
            raise FormatError(
                f"{where}.weight_scale: {stored.size} numbers, the first "
                f"{stored.reshape(-1)[0]}; expected one finite positive scale"
            )
        if ((weight & (weight >> 1)) & np.uint8(0x55)).any():
            raise FormatError(f"{where}.weight: holds fields of 3, expected 0, 1 and 2")
        rows, cols = weight.shape[1], 4 * weight.shape[0]
        fmt = Int(2, "tensor", scale_dtype="float32")
        dtype = stored.dtype.name if stored.dtype.itemsize == 2 else "float32"
        codes = _along_inputs(weight + np.uint8(0x55))
        made = AffineTensor(codes, scale.reshape(1, 1), None, fmt, (rows, cols), dtype)
        return RoundedInputs(made, "int8")


def _along_inputs(packed: np.ndarray) -> np.ndarray:
    """2-bit fields of four distant outputs, packed four neighbouring inputs each."""
    rows, cols = packed.shape
    spare = -cols % 4
    if spare:
        packed = np.pad(packed, [(0, 0), (0, spare)])
    words = transposed(np.ascontiguousarray(packed).view("<u4"))  # four inputs
    made = np.empty((len(words), 4, rows), np.uint8)
    for i in range(4):
        field = (words >> np.uint32(2 * i)) & np.uint32(0x03030303)
        # The fields of bytes 1 to 3 come to bits 2, 4 and 6 of the lowest byte.
        field |= field >> np.uint32(6)
        field |= field >> np.uint32(12)
        made[:, i] = field.astype(np.uint8)
    return made.reshape(-1, 4 * rows)
